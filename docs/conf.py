"""The documentation site: ``python -m sphinx -W docs build/site``.

API pages are made here from docstrings, one for each public name, and notebooks are
copied from ``notebooks/`` with the outputs that they were saved with.
"""

import base64
import importlib
import inspect
import json
import re
import shutil
from pathlib import Path

from pygments.lexers.special import TextLexer

import rbpjax

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "rbpjax"
author = "The rbpjax authors"
copyright = "The rbpjax authors"
version = release = rbpjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["test_site.py", "gallery/list.md"]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are executed by nbmake, pages by test_site.py

autodoc_typehints = "signature"
autodoc_type_aliases = {
    name: name
    for name in (
        "ArrayLike",
        "BackwardRule",
        "ForwardSolver",
        "LinearMap",
        "OnFailure",
        "PyTree",
        "Solution",
        "Solve",
        "StepFn",
    )
}
python_maximum_signature_line_length = 72
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = f"rbpjax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "logo": {"text": "rbpjax"},
    "navbar_persistent": [],
    "repository_url": "https://github.com/rbpjax/rbpjax",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_toc_level": 2,
    "home_page_in_toc": True,
}


# --- pages for every public name ------------------------------------------------------

TITLES = {
    "rbpjax": "Fixed points",
    "rbpjax.diagnostics": "Diagnostics",
    "rbpjax.regularizers": "Regularizers",
    "rbpjax.nn": "Flax nnx modules",
    "rbpjax.online": "Streaming gradients",
    "rbpjax.online.cells": "Cells ready to use",
    "rbpjax.online.combine": "Combining estimators",
    "rbpjax.online.rank_one": "The rank-one trick",
    "rbpjax.perturb": "Forward-only gradients",
    "rbpjax.perturb.credit": "Credit",
    "rbpjax.perturb.difference": "Differences",
    "rbpjax.perturb.noise": "Noise",
    "rbpjax.perturb.norm": "Norms",
    "rbpjax.unitary": "Norm-preserving recurrence",
    "rbpjax.unitary.activation": "Activations",
    "rbpjax.unitary.history": "Histories",
}
TUPLE = {name for name in dir(tuple) if not name.startswith("__")}


def public(module) -> dict[str, object]:
    """The public names of a module that are not modules."""
    values = {name: getattr(module, name) for name in module.__all__}
    return {n: v for n, v in values.items() if not inspect.ismodule(v)}


def members(cls: type) -> list[str]:
    """What a class defines beside its fields: documented methods and properties."""
    fields = {*getattr(cls, "_fields", ()), *getattr(cls, "__annotations__", {})}
    return [
        name
        for name, value in vars(cls).items()
        if (not name.startswith("_") or name == "__call__")
        and name not in fields | TUPLE
        and (callable(value) or isinstance(value, property | classmethod))
        and getattr(value, "__doc__", None)
    ]


def page(path: str, value: object) -> str:
    """The page of one public name."""
    title = path.rsplit(".", 1)[1]
    lines = [title, "=" * len(title), ""]
    if inspect.isclass(value):
        lines += [f".. autoclass:: {path}"]
        if found := members(value):
            plain = [name for name in found if name != "__call__"]
            if plain:
                lines += [f"   :members: {', '.join(plain)}"]
            if "__call__" in found:
                lines += ["   :special-members: __call__"]
    elif inspect.isroutine(value):
        lines += [f".. autofunction:: {path}"]
    else:
        lines += [f".. autodata:: {path}"]
    return "\n".join([*lines, ""])


def listing(name: str, module) -> str:
    """The page of a module: what it says of itself, and its names."""
    title = f"{TITLES[name]}: {name}"
    lines = [title, "=" * len(title), "", f".. automodule:: {name}", ""]
    lines += [".. toctree::", "   :maxdepth: 1", "   :hidden:", ""]
    lines += [f"   {name}.{n}" for n in public(module)]
    lines += ["", ".. list-table::", "   :widths: 30 70", ""]
    for n, value in public(module).items():
        doc = (inspect.getdoc(value) or "").partition("\n\n")[0]
        first = plain([" ".join(doc.split())])[0]
        made = inspect.isclass(value) or inspect.isroutine(value)
        lines += [
            f"   * - :doc:`{n} <{name}.{n}>`",
            f"     - {first if made else 'A type of callables or values.'}",
        ]
    return "\n".join([*lines, ""])


def write_api() -> None:
    """Writes ``api/``: a page for each module and for each public name."""
    folder = DOCS / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in TITLES:
        module = importlib.import_module(name)
        (folder / f"{name}.rst").write_text(listing(name, module))
        for n, value in public(module).items():
            (folder / f"{name}.{n}.rst").write_text(page(f"{name}.{n}", value))
    index = ["API reference", "=============", ""]
    index += ["Every public name, by package, from its docstring.", ""]
    index += [".. toctree::", "   :maxdepth: 1", ""]
    index += [f"   {name}" for name in TITLES]
    (folder / "index.rst").write_text("\n".join([*index, ""]))


def write_gallery() -> None:
    """Copies the notebooks with their outputs, and lists them with a figure of each."""
    folder = DOCS / "gallery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(path, folder / path.name)
        cells = json.loads(path.read_text())["cells"]
        head = "".join(cells[0]["source"])
        title = head.partition("\n")[0].removeprefix("# ")
        question = re.search(r"\*\*Question: (.*?)\*\*", head)
        outputs = [o for cell in cells for o in cell.get("outputs", [])]
        figures = [o["data"]["image/png"] for o in outputs if _has_figure(o)]
        image = folder / f"{path.stem}.png"
        image.write_bytes(base64.b64decode("".join(figures[-1])))
        entries.append(
            f"## [{title}](gallery/{path.name})\n\n"
            f"{question[1][0].upper()}{question[1][1:]}\n\n"
            f"[![{title}](gallery/{image.name})](gallery/{path.name})\n"
        )
    (folder / "list.md").write_text("\n".join(entries))


def _has_figure(output: dict) -> bool:
    return "image/png" in output.get("data", {})


# --- docstrings are plain text; here they become reStructuredText ---------------------


def plain(lines: list[str]) -> list[str]:
    """Marks code, and escapes what would be markup."""
    made = []
    for line in lines:
        if line.lstrip().startswith((">>> ", "... ")):
            made.append(line)
            continue
        bullet = re.match(r" *[*-] ", line)
        lead = bullet[0] if bullet else ""
        parts = re.split(r"(``.+?``)", line.removeprefix(lead))
        for i in range(0, len(parts), 2):
            text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", parts[i])
            inner = re.split(r"(``.+?``)", text)
            inner[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", t) for t in inner[::2]]
            parts[i] = "".join(inner)
        made.append(lead + "".join(parts))
    return made


def equations(lines: list[str]) -> list[str]:
    """Indented paragraphs before the first section become literal blocks."""
    made, section = [], False
    for i, line in enumerate(lines):
        section = section or bool(re.match(r"[A-Z][a-z]+:$", line))
        before = lines[i - 1] if i else ""
        if not section and re.match(r" {4}\S", line) and not before.strip():
            earlier = next((t for t in reversed(lines[:i]) if t.strip()), "")
            if not earlier.startswith(" "):
                made += ["::", ""]
        made.append(line)
    return made


def to_rst(app, what, name, obj, options, lines) -> None:
    """Runs before napoleon, which takes the sections apart."""
    section, made, literal = "", [], False
    for line in equations(list(lines)):
        if match := re.match(r"([A-Z][a-z]+):$", line):
            section = match[1]
        if line == "::":
            literal = True
        elif literal and line.strip() and not line.startswith(" "):
            literal = False
        if section == "Example" or literal:
            made.append(line)
        elif section == "Args":
            made += plain([line.replace("**", "")])
        else:
            made += plain([line])
    lines[:] = made


def short(text: str | None) -> str | None:
    """Types by their last names."""
    if text is None:
        return None
    text = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
    text = re.sub(r"<function (\w+)(?: at 0x\w+)?>", r"\1", text)
    text = re.sub(r"<PjitFunction of <function (\w+) at 0x\w+>>", r"\1", text)
    text = re.sub(r"<jax\.\S+ object at 0x\w+>", "...", text)
    return re.sub(r"~?\b(?:[A-Za-z_]\w*\.)+([A-Za-z_]\w*)", r"\1", text)


def shorten(app, what, name, obj, options, signature, returns):
    """Signatures that a person can read."""
    return short(signature), short(returns)


def setup(app) -> None:
    """Makes the generated pages before anything is read."""
    write_api()
    write_gallery()
    app.add_lexer("imports", TextLexer)  # the diagram of CONTRIBUTING.md
    app.connect("autodoc-process-docstring", to_rst, priority=400)
    app.connect("autodoc-process-signature", shorten)
