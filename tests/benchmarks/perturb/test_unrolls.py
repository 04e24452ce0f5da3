"""Long unrolls in windows, small: what is scored, what is counted, what resumes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import checkpoints, results, training
from benchmarks.perturb import unrolls


@pytest.mark.parametrize("name", unrolls.TASKS)
def test_the_score_is_the_expected_loss(name):
    """Of sequences run step by step, over their noise; and none is below the best."""
    task = unrolls.TASKS[name]()

    def total(key):
        def step(h, x):
            h = task.f(task.params, x, h)
            return h, task.loss(task.params, h, None)

        xs = task.inputs(key, task.steps)
        return jnp.mean(jax.lax.scan(step, task.h0, xs)[1])

    losses = jax.jit(jax.vmap(total))(jax.random.split(jax.random.key(0), 400))
    error = 5 * float(losses.std()) / 20 + 1e-6 * float(losses.mean())
    assert abs(float(losses.mean() - task.score(task.params))) < error
    for shift in (-0.5, 0.0, 0.5):
        assert task.score(task.params + shift) >= task.best


def test_costs_are_counted():
    """A pair for persistent methods, a run without noise for the others."""
    task = unrolls.TASKS["balance"]()
    costs = {m: unrolls.cost(m, task) for m in unrolls.METHODS}
    assert costs == {"truncated": 300, "pes": 200, "nres": 200, "wp": 15_000}


def few(patch, tasks, methods):
    """Only these, and two rates."""
    for name, kept in (("TASKS", tasks), ("METHODS", methods)):
        table = getattr(unrolls, name)
        patch.setattr(unrolls, name, {k: table[k] for k in kept})
    patch.setattr(unrolls, "GRID", (1e-2, 3e-2))


def run(*arguments):
    """The tasks of a custom result."""
    assert main(["perturb-unrolls", "--seeds", "0", "1", *arguments]) == 0
    path = results.RESULTS / "perturb-unrolls-custom"
    assert path.with_suffix(".png").stat().st_size < 200_000
    return json.loads(path.with_suffix(".json").read_text())["tasks"]


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_a_small_run_learns_where_truncation_fails(monkeypatch, capsys):
    """From the same start in the same budget: the order of the committed result."""
    few(monkeypatch, ["balance"], ["truncated", "nres", "wp"])
    found = run("--budget", "100000")["balance"]
    assert "| NRES" in capsys.readouterr().out
    curves = {m: np.array(v["curves"], float) for m, v in found["methods"].items()}
    assert all(c.shape == (2, unrolls.BLOCKS + 1) for c in curves.values())
    assert (curves["truncated"][:, -1] > found["start"]).all()
    assert (curves["nres"][:, -1] < 0.1 * found["start"]).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.full
def test_an_interrupted_run_resumes_bit_for_bit(monkeypatch):
    """Stopped after seven blocks and started again, the numbers are the same."""
    few(monkeypatch, ["schedule"], ["pes"])
    whole = run("--budget", "20000")

    def stop_after_seven(steps, total, label, done=0):
        for count, step in enumerate(steps):
            if count == 7 and not done:
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress", stop_after_seven)
        arguments = ["--seeds", "0", "1", "--budget", "20000"]
        assert main(["perturb-unrolls", *arguments]) == 130
    assert run("--budget", "20000") == whole
    assert not any(path.is_dir() for path in checkpoints.CHECKPOINTS.glob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "1000"), "it is for validation"),
        (("--budget", "0"), "--budget: at least 1"),
    ],
)
def test_bad_arguments_end_in_one_line(capsys, arguments, message):
    """Exit code 2 and the name of the option."""
    assert main(["perturb-unrolls", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
