"""Prints the lowest versions that pyproject.toml admits, as requirements for pip.

usage: lowest.py [EXTRA ...] [NAME==VERSION ...]

Extras that include others are followed. A NAME==VERSION takes the place of a bound, for
what an extra's own requirements raise.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(
    (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
)["project"]


def bounds(extra: str | None) -> dict[str, str]:
    """Names and lowest versions of the library itself, or of an extra."""
    listed = (
        project["optional-dependencies"][extra] if extra else project["dependencies"]
    )
    found: dict[str, str] = {}
    for requirement in listed:
        if inner := re.fullmatch(r"rbpjax\[([\w,]+)\]", requirement):
            for name in inner[1].split(","):
                found |= bounds(name)
        else:
            name, version = re.fullmatch(r"([\w-]+)[>=]=([\w.]+)", requirement).groups()
            found[name] = version
    return found


pins = bounds(None)
for argument in sys.argv[1:]:
    name, _, version = argument.partition("==")
    pins |= {name: version} if version else bounds(name)
print("\n".join(f"{name}=={version}" for name, version in sorted(pins.items())))
