"""What the benchmarks import: no circles, and of the library what is public."""

import ast
import graphlib
from pathlib import Path

import benchmarks

ROOT = Path(benchmarks.__file__).parent


def imported(path):
    """Names of all modules that a file imports, inside its functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = {
    ".".join(("benchmarks", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in sorted(ROOT.rglob("*.py"))
}


def test_there_is_no_circle():
    graph = {
        name: {other for other in imported(path) if other in FILES}
        for name, path in FILES.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(FILES) > 50


def test_nothing_private_of_the_library():
    for name, path in FILES.items():
        for module in imported(path):
            parts = module.split(".")
            private = [p for p in parts if p.startswith("_") and p != "__future__"]
            assert parts[0] != "rbpjax" or not private, (name, module)
