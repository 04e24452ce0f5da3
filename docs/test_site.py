"""The site and the pages: run by .ci/run after the site is built, not by default."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.pages import agree, blocks
from tests.test_api import MODULES, OBJECTS

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
MADE = ("api", "gallery")  # by conf.py
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if page.relative_to(ROOT / "docs").parts[0] not in MADE
    ),
]
name = lambda page: page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(b[0] == "python" for b in blocks(p.read_text()))],
    ids=name,
)
def test_blocks_run_as_pasted(page, tmp_path):
    """One float32 process a page; what a page needs is in the extra ``docs``."""
    needs = re.search(r"<!-- needs: (.*?) -->", page.read_text())
    for package in needs[1].split() if needs else ():
        assert importlib.util.find_spec(package), f"{package} is in the extra docs"
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "pages.py", page],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "0", "MPLBACKEND": "Agg"},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_outputs_are_compared():
    """Words exactly, numbers nearly, errors to their size."""
    assert agree("loss 0.500 1e-06", "loss 0.505 3e-06")
    assert not agree("loss 0.500", "loss 0.600")
    assert not agree("loss 0.500", "error 0.500")
    assert not agree("1e-06", "1e-03")


COMMANDS = (
    "-m benchmarks hopfield",
    "-m pytest -q -n 2",
)


def test_readme_is_short():
    """A stranger reads it in five minutes, and finds two commands: no more, no less."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    shell = [code for language, code, _ in blocks(text) if language == "bash"]
    assert all(code.count("\n") == 1 for code in shell)
    ends = [code.strip().split(" && .venv/bin/python ")[-1] for code in shell]
    assert tuple(ends) == COMMANDS


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "SECURITY.md",
        ROOT / "benchmarks" / "README.md",
    ],
    ids=name,
)
def test_links_of_sources_resolve(page):
    """As they are followed on GitHub: files, and headings in them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if urlsplit(link).scheme:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() or target.parts[-2] in MADE, link
        if heading and target.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slug = lambda h: re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
            assert heading in map(slug, heads), link


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attrs):
        """Keeps what a tag refers to, and what may be referred to."""
        for key, value in attrs:
            if key in ("href", "src") and value:
                self.links.add(value)
            if key in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site() -> dict[Path, Links]:
    """The pages of the built site."""
    pages = {}
    for path in SITE.rglob("*.html"):
        if "_static" not in path.parts:
            pages[path.resolve()] = Links()
            pages[path.resolve()].feed(path.read_text())
    assert pages, "build the site first: python -m sphinx -W docs build/site"
    return pages


def test_links_of_the_site_resolve(site):
    """Files, and anchors in them."""
    for page, found in site.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = unquote(parts.path)
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if parts.fragment and target in site:
                anchor = unquote(parts.fragment)
                assert anchor in site[target].anchors | {"", "top"}, link


def test_every_public_name_has_a_page(site):
    """Each module, and each name that a module lists."""
    pages = {path.name.removesuffix(".html"): found for path, found in site.items()}
    for module in MODULES:
        assert module in pages
    for path in OBJECTS:
        assert path in pages[path].anchors, path
    for module, value in MODULES.items():
        for public in value.__all__:
            assert f"{module}.{public}" in pages, f"{module}.{public}"
