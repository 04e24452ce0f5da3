"""One version, wherever it is said; what is released."""

import re
import tomllib
from pathlib import Path

import rbpjax

ROOT = Path(__file__).parents[1]


def test_one_version():
    """The package's own is the source; the citation and the changelog agree with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "rbpjax/__init__.py"
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited and cited[1] == rbpjax.__version__
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[:2] == ["Unreleased", rbpjax.__version__]
