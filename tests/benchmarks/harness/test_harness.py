"""What all experiments share: results, options, checkpoints, progress."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import checkpoints, results, training
from benchmarks.harness.figures import look
from benchmarks.harness.options import Count, OneOf, Positive, Seeds, UsageError, check
from benchmarks.harness.progress import progress


def test_no_progress_bar_where_the_output_is_no_terminal(capsys):
    """Nothing is drawn into a pipe or a file."""
    assert list(progress(range(3), 3, "x")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_results_are_whole_or_not_at_all(monkeypatch):
    """A write that fails leaves the former file; what is not finite becomes null."""
    results.prepare()
    results.write_json("x", {"a": np.float32(0.1), "b": [float("nan"), 1]})
    before = results.read_json("x")
    assert before == {"a": 0.1, "b": [None, 1]}
    with pytest.raises(TypeError):
        results.write_json("x", {"a": object()})
    assert results.read_json("x") == before
    (results.RESULTS / "x.json").write_text("{")
    with pytest.raises(UsageError, match=r"damaged result file x\.json"):
        results.read_json("x")


@dataclasses.dataclass(frozen=True)
class Options:
    """Of no experiment."""

    name: Annotated[str, OneOf(("a", "b"))] = "a"
    seeds: Seeds | None = None
    num_steps: Count = 1
    rate: Positive = 1.0


def test_right_options_are_right():
    check(Options())
    check(Options("b", (0, 3), 5, 1e-9))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "c"}, "--name: any of a, b; got 'c'"),
        ({"seeds": (-1,)}, "--seeds: at least 0; got -1"),
        ({"seeds": (1, 1)}, r"--seeds: one or more, no two alike; got \[1, 1\]"),
        ({"seeds": ()}, "--seeds: one or more"),
        ({"num_steps": 0}, "--num-steps: at least 1; got 0"),
        ({"rate": 0.0}, "--rate: above 0; got 0.0"),
        ({"rate": float("nan")}, "--rate: above 0; got nan"),
    ],
)
def test_wrong_options_are_named(wrong, says):
    with pytest.raises(UsageError, match=says):
        check(Options(**wrong))


def test_an_unwritable_folder_of_results_is_one_line(tmp_path, monkeypatch):
    """A file where the folder should be (root may write into any folder)."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "file" / "results")
    with pytest.raises(UsageError, match="cannot write into"):
        results.prepare()


def test_a_result_says_what_made_it(monkeypatch, tmp_path):
    """The command line without folders, the commit, and a hash of the sources."""
    monkeypatch.setattr(sys, "argv", ["x", "rules", "--fresh", str(tmp_path / "here")])
    where = results.record("rules", "rules", {})["environment"]
    assert where["argv"] == ["rules", "--fresh", "here"]
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    before = results.code(package)
    assert before["commit"] is None
    (package / "__init__.py").write_text("a = 2\n")
    assert results.code(package)["sources"] != before["sources"]
    git = lambda *c: subprocess.run(["git", *c], cwd=tmp_path, check=True)
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "m")
    commit = results.code(package)["commit"]
    assert len(commit) == 40
    (package / "__init__.py").write_text("a = 3\n")
    assert results.code(package)["commit"] == commit + "+changes"


def step(state, i):
    """Depends on the number of the block, and is not linear."""
    x, log = state
    x = jnp.sin(x + i)
    return x, log.at[i].set(x[0])


@pytest.mark.filterwarnings("ignore")  # orbax's own
@pytest.mark.parametrize("every", [1, 3])
def test_a_training_resumes_bit_for_bit_wherever_it_stops(monkeypatch, every):
    """Stopped before each block in turn; what was saved is not done again."""
    start = jnp.array([0.1, 0.2]), jnp.zeros(4)
    fresh = lambda: checkpoints.Checkpoints("test", {"a": 1}, fresh=True)
    whole = training.train(fresh(), "run", start, step, 4)
    for stop in range(4):
        run, done = fresh(), []

        def until(state, i, stop=stop, done=done):
            if i == stop and len(done) == stop:
                done.append(None)
                raise KeyboardInterrupt
            done.append(i)
            return step(state, i)

        with pytest.raises(KeyboardInterrupt):
            training.train(run, "run", start, until, 4, every=every)
        again = checkpoints.Checkpoints("test", {"a": 1}, fresh=False)
        got = training.train(again, "run", start, until, 4, every=every)
        for a, b in zip(got, whole, strict=True):
            np.testing.assert_array_equal(a, b)
        assert done[stop + 1 :] == list(range(stop // every * every, 4))


@pytest.mark.filterwarnings("ignore")
def test_other_options_never_resume():
    """Nor does a run whose states were forgotten; one name does not know another."""
    run = checkpoints.Checkpoints("test", {"a": 1}, fresh=False)
    run.save("one", 2, jnp.ones(3))
    restore = lambda a, name, fresh=False: checkpoints.Checkpoints(
        "test", {"a": a}, fresh
    ).restore(name, jnp.zeros(3))
    assert restore(1, "one")[0] == 2 and (restore(1, "one")[1] == 1).all()
    assert restore(2, "one")[0] == 0 and restore(1, "two")[0] == 0
    assert restore(1, "one", fresh=True)[0] == 0


@pytest.mark.filterwarnings("ignore")
def test_damage_is_one_line_that_says_what_to_delete():
    """Of a state, and of what is made once."""
    run = checkpoints.Checkpoints("test", {}, fresh=False)
    run.save("state", 1, jnp.ones(3))
    assert run.once("fact", lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert run.once("fact", lambda: 1 / 0) == {"a": [1, None]}
    for path in Path(run.folder).rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    for ask in (
        lambda: run.restore("state", jnp.ones(3)),
        lambda: run.once("fact", lambda: 1),
    ):
        with pytest.raises(UsageError, match=r"damaged checkpoint .*: delete it") as e:
            ask()
        assert "\n" not in str(e.value)


def test_a_method_has_one_color_wherever_it_is_drawn():
    """The longest name that begins a title counts; what is not known is gray."""
    assert look("Neumann-RBP")["color"] == look("Neumann(50)")["color"]
    assert look("BPTT")["color"] == look("BPTT, remat")["color"]
    assert look("TBPTT(16)") != look("TBPTT(1)") and look("?")["color"] == "0.6"
