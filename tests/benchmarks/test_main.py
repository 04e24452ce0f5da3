"""The command line, and the README's tables."""

import shutil

import pytest

from benchmarks import readme
from benchmarks.__main__ import COMMANDS, main, parse
from benchmarks.harness import results
from benchmarks.harness.options import UsageError


def test_alone_it_lists_the_experiments(capsys):
    """A line each, and how to get help; no error."""
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "--help" in out
    lines = [line.split()[0] for line in out.splitlines()[2:]]
    assert lines == list(COMMANDS) and len(lines) > 10


def test_an_unknown_name_is_one_line(capsys):
    assert main(["hopfeld"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hopfield" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("hopfield --bogus 3", "--bogus"),
        ("hopfield --truncation many", "many"),
        ("hyperopt --steps many", "--steps"),
        ("fuzz --x", "--x"),
    ],
)
def test_what_cannot_be_read_is_said_by_tyro(arguments, says, capsys):
    """In as many lines as it takes, with exit code 2."""
    assert main(arguments.split()) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.stem)
def test_pages_show_the_committed_results(page, monkeypatch):
    """Generated blocks of README and docs are what the result files say."""
    monkeypatch.undo()
    text = page.read_text()
    assert readme.render(text) == text


def test_every_result_is_shown_once():
    """Each block is on one page, README has its own, and an unknown one is refused."""
    shown = [name for page in readme.PAGES for name in readme.names(page.read_text())]
    assert sorted(shown) == sorted(readme.BLOCKS)
    assert readme.names(readme.PAGES[0].read_text()) == ["headlines"]
    with pytest.raises(UsageError, match="nothing"):
        readme.render("<!-- nothing:begin -->\n<!-- nothing:end -->")
    with pytest.raises(UsageError, match="no end"):
        readme.render("<!-- warm:begin -->\n")


@pytest.mark.full
def test_every_figure_is_drawn_from_its_result(tmp_path, monkeypatch):
    """All that are committed, and no other."""
    committed = readme.ROOT / "benchmarks" / "results"
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for path in committed.glob("*.json"):
        shutil.copy(path, tmp_path)
    readme.draw_all()
    figures = lambda folder: {path.name for path in folder.glob("*.png")}
    assert figures(tmp_path) == figures(committed)


def test_help_exits_with_zero(capsys):
    """--help is no error."""
    with pytest.raises(SystemExit) as exit_:
        parse(["hopfield", "--help"])
    assert exit_.value.code == 0
    assert "--truncation" in capsys.readouterr().out
