"""Imports go one way, as the diagram of CONTRIBUTING.md has them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "rbpjax"
ROOMS = ("online", "perturb", "unitary")
FILES = {
    ".".join(path.relative_to(LIBRARY).with_suffix("").parts): path
    for path in sorted(LIBRARY.rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, as full names.

    Of ``from a import b`` both ``a`` and ``a.b``, which may be a module. What only type
    checkers read is left out.
    """
    found, tree = set(), ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{n.name}" for n in node.names)}
    return found


def part(module: str, parts: list[str]) -> str:
    """The part of the diagram that a module is in: the longest that begins its name."""
    inside = [p for p in parts if module == p or module.startswith(f"{p}.")]
    return max(inside, key=len, default="")


def uses(parts: list[str]) -> dict[str, set[str]]:
    """What each part of the library imports of the others."""
    found: dict[str, set[str]] = {p: set() for p in parts}
    for name, path in FILES.items():
        own = part(name, parts)
        if name == "__init__":  # exports them all
            continue
        assert own, f"rbpjax/{name} is in no part of the diagram"
        inner = {m.removeprefix("rbpjax.") for m in imports(path) if "rbpjax." in m}
        # Of a name imported from a package, the package; names are no modules.
        modules = {m for m in inner if m in FILES or f"{m}.__init__" in FILES}
        found[own] |= {part(m, parts) for m in modules} - {own, ""}
    return found


def test_the_code_imports_what_the_diagram_says():
    """Each part what stands behind its arrow: no more, and nothing in vain."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"^```imports\n(.*?)^```", text, re.M | re.S)
    assert block, "CONTRIBUTING.md has no block of imports"
    rows = [line.split("->") for line in block[1].splitlines() if line.strip()]
    diagram = {
        a.strip(): {b.strip() for b in b.split(",") if b.strip()} for a, b in rows
    }
    found = uses(list(diagram))
    assert found == diagram


def test_rooms_do_not_know_each_other():
    """They import _core, types and themselves; _core only itself and types."""
    allowed = {room: {"_core", "types", room} for room in ROOMS}
    allowed["_core"] = {"_core", "types"}
    for name, path in FILES.items():
        room = name.split(".")[0]
        inner = [m.split(".")[1] for m in imports(path) if m.startswith("rbpjax.")]
        if room in allowed:
            assert set(inner) <= allowed[room], path


def test_fixed_point_is_built_upwards():
    """iterate, search, forward, backward, the transform, and nothing back."""
    below = {
        "contract": set(),
        "iterate": set(),
        "search": {"iterate"},
        "forward": {"iterate", "search"},
        "backward": {"contract", "iterate", "forward"},
    }
    for name, path in FILES.items():
        own, at, *_ = [*name.split("."), ""]
        inner = {
            m.split(".")[2]
            for m in imports(path)
            if m.startswith("rbpjax.fixed_point.") and m.count(".") >= 2
        }
        if own == "fixed_point" and at in below:
            assert inner <= below[at] | {at}, path


@pytest.mark.parametrize("package", ["tests", "benchmarks", "chex", "flax", "pytest"])
def test_what_the_library_does_not_need(package):
    """Only nn imports flax; tests, benchmarks and what belongs to them nobody."""
    for name, path in FILES.items():
        used = {module.split(".")[0] for module in imports(path)}
        assert package not in used or (package, name[:2]) == ("flax", "nn"), path
