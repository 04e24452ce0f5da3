"""What examples share: a training that goes on to the bit, batches, short errors."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, OneOf, UsageError
from examples.common import results
from examples.common.batches import shuffled
from examples.common.command import main
from examples.common.training import fit


class Noisy(nnx.Module):
    """With keys of dropout among its variables."""

    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.dropout(self.linear(x))


def step(model, optimizer, key, x):
    noise = jax.random.normal(key, x.shape)
    loss = lambda model: jnp.mean((model(x) - noise) ** 2)
    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return {"loss": value}


def trained(name, batch):
    """A run of three blocks: the model and the curves but for the time."""
    checkpoints = Checkpoints(name, {}, False)
    model = Noisy()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    watch = lambda model: {"size": jnp.sum(model.linear.kernel[...] ** 2)}
    options = {"seed": 5, "num_blocks": 3, "steps": 4, "watch": watch}
    history = fit(checkpoints, name, model, optimizer, step, batch, **options)
    times = history.pop("core_seconds")
    assert np.all(np.diff(times) > 0) and times[0] > 0
    return jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param))), history


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_a_training_that_was_cut_off_is_the_same_to_the_bit(apart):
    """Cut off in the middle of a block: weights, masks, noise and curves are those."""
    rows = (np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32),)
    batch = shuffled(rows, 8, seed=0)

    def cut(k):
        if k == 6:
            raise KeyboardInterrupt
        return batch(k)

    want = trained("whole", batch)
    with pytest.raises(KeyboardInterrupt):
        trained("cut", cut)
    got = trained("cut", batch)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    loss = want[1]["mean"]["loss"]
    assert len(set(loss.tolist())) == 3 and np.isfinite(loss).all()
    assert (want[1]["max"]["loss"] > loss).all()


def test_batches_are_a_function_of_their_number():
    """Each row once an epoch, in a new order, the same for all arrays, every time."""
    rows = np.arange(10)
    batch = shuffled((rows, rows + 100), 3, seed=1)
    epochs = [[batch(3 * e + i) for i in range(3)] for e in range(2)]
    for epoch in epochs:
        seen = np.concatenate([x for x, _ in epoch])
        assert len(set(seen.tolist())) == 9
    assert not np.array_equal(epochs[0][0][0], epochs[1][0][0])
    again = shuffled((rows, rows + 100), 3, seed=1)(4)
    np.testing.assert_array_equal(again[0], epochs[1][1][0])
    np.testing.assert_array_equal(again[1], again[0] + 100)
    assert not np.array_equal(shuffled((rows,), 3, seed=2)(0)[0], epochs[0][0][0])


@dataclasses.dataclass(frozen=True)
class Example:
    """What it does."""

    kinds: Annotated[tuple[str, ...], OneOf(("a", "b"))] = ("a",)
    """Which."""
    seeds: tuple[int, ...] = (0, 1)
    """Which, too."""
    size: Annotated[Count, OneOf((2, 4))] = 2
    """How large."""
    fresh: bool = False
    """Anew."""

    def run(self):
        if self.size == 4:
            raise UsageError("it cannot be done")


def test_errors_are_one_line_and_two(apart, capsys):
    assert main(Example, []) == 0
    assert main(Example, ["--size", "4"]) == 2
    assert main(Example, ["--size", "3"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: it cannot be done", "error: --size: any of 2, 4; got 3"]


def test_results_are_named_by_their_options(apart, monkeypatch):
    """The command that makes it; other options do not overwrite what is committed."""
    assert results.write("thing", Example(fresh=True)).name == "example-thing.json"
    monkeypatch.setattr(sys, "argv", ["train.py", "--size", "4"])
    path = results.write("thing", Example(size=4))
    assert path.name == "example-thing-custom.json"
    assert '"command": "python -m examples.thing.train --size 4"' in path.read_text()


def test_parts_are_shared_by_runs_with_other_seeds(apart):
    """And not by runs with other options."""
    made = lambda example: results.opened("thing", example).folder
    assert made(Example()) == made(Example(seeds=(3,), kinds=("b",)))
    assert made(Example()) != made(Example(size=4))


RUN = """
import sys, pathlib
from benchmarks.harness import checkpoints, results
folder = pathlib.Path(sys.argv[1])
results.RESULTS, checkpoints.CHECKPOINTS = folder / "results", folder / "checkpoints"
from examples.prefix_sums.train import PrefixSums, main
options = "--kinds bounded --seeds 0 --bits 4 --lengths 16 --blocks 4"
sys.exit(main(PrefixSums, options.split()))
"""


def start(folder):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", RUN, str(folder)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)


@pytest.mark.full
def test_kill_nine_loses_nothing(tmp_path):
    """Killed after its first checkpoint and started again: the same result."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = start(killed)
    try:
        deadline = time.monotonic() + 300
        while not list(killed.glob("checkpoints/*/bounded-0/*/manifest.json")):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()
    assert not (killed / "results").exists() or not list(killed.glob("results/*.json"))
    assert start(killed).wait() == start(whole).wait() == 0
    found = []
    for folder in (killed, whole):
        (path,) = folder.glob("results/*.json")
        networks = json.loads(path.read_text())["networks"]
        del networks["bounded"][0]["history"]["core_seconds"]
        found.append(networks)
    assert found[0] == found[1]
