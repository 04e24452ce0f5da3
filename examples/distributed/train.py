"""Trains a deep equilibrium network on MNIST, on one process or on many.

    python -m examples.distributed.train --tiny

The same file, unchanged, on one device, on N processes started by hand, under SLURM
and as a Kubernetes job (README.md beside it). The batch is divided over all devices,
and so are weights and Adam's moments (FSDP); every process writes its part of a
checkpoint. Row r of batch k is the same whatever the number of processes, so that a
run may go on with another number of them.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.data.images import digits, mnist
from benchmarks.harness.options import require
from examples.distributed.checkpoints import Checkpoints
from examples.distributed.peers import deadline, run
from rbpjax.nn import FixedPoint


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options, by command line, or by environment where a scheduler sets it."""
    env = os.environ.get
    parser = argparse.ArgumentParser("train", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="small digits, 128 units, no download")
    add("--steps", type=int, default=None, help="2000, or 60 if tiny")
    add("--batch", type=int, default=None, help="global: 512, or 64 if tiny")
    add("--units", type=int, default=None, help="1024, or 128 if tiny")
    add("--learning-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--every", type=int, default=None, help="checkpoint after 100, or 10, steps")
    add("--folder", type=Path, default=Path("build/distributed"), help="of this run")
    add("--fresh", action="store_true", help="start over")
    add("--patience", type=float, default=60, help="seconds to wait for a peer")
    add("--coordinator", default=env("COORDINATOR_ADDRESS"), help="host:port")
    add("--processes", type=int, default=int(env("NUM_PROCESSES", "1")))
    index = env("PROCESS_ID", env("JOB_COMPLETION_INDEX", "0"))
    add("--process", type=int, default=int(index), help="from 0 on")
    options = parser.parse_args(given)
    tiny = {"steps": 60, "batch": 64, "units": 128, "every": 10}
    large = {"steps": 2000, "batch": 512, "units": 1024, "every": 100}
    for name, value in (tiny if options.tiny else large).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class Cell(nnx.Module):
    """h = tanh(W h + x)."""

    def __init__(self, units: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.5 / units**0.5)
        self.linear = nnx.Linear(units, units, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(h) + x)


class Network(nnx.Module):
    """Pixels, a layer at equilibrium, ten classes."""

    def __init__(self, pixels: int, units: int, seed: int):
        rngs = nnx.Rngs(seed)
        self.encode = nnx.Linear(pixels, units, rngs=rngs)
        self.equilibrium = FixedPoint(Cell(units, rngs))
        self.read = nnx.Linear(units, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.encode(images)
        return self.read(self.equilibrium(x, jnp.zeros_like(x)).value)


class Examples:
    """What grain draws from: an image in [0, 1] and its label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels, self.top = images, labels, images.max()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        image = self.images[i].reshape(-1).astype(np.float32) / self.top
        return image, self.labels[i].astype(np.int32)


def batches(examples: Examples, options: argparse.Namespace, step: int) -> Any:
    """This process's rows of the global batches from ``step`` on."""
    index, count = jax.process_index(), jax.process_count()
    stream = grain.MapDataset.source(examples).seed(options.seed).shuffle().repeat()
    # Batch k of all is the parts k·count … k·count + count - 1 of the stream.
    parts = stream.batch(options.batch // count)[index::count]
    iterator = iter(parts.to_iter_dataset())
    iterator.set_state({"next_index": step})  # all of its state: each step takes one
    return iterator


def divided(mesh: jax.sharding.Mesh, x: jax.ShapeDtypeStruct) -> NamedSharding:
    """Over all devices along the longest axis that they divide, else whole on each."""
    fits = [n if n % mesh.size == 0 else 0 for n in x.shape]
    spec = [None] * len(fits)
    if max(fits, default=0):
        spec[int(np.argmax(fits))] = "data"
    return NamedSharding(mesh, P(*spec))


def train(options: argparse.Namespace) -> None:
    """The run, from its last complete checkpoint on."""
    count, devices = jax.process_count(), jax.device_count()
    require(
        options.batch % devices == 0 and options.steps >= 1 and options.every >= 1,
        f"--batch: {options.batch} is not divided by {devices} devices, or --steps "
        f"{options.steps} or --every {options.every} is below 1",
    )
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    examples = Examples(*(digits() if options.tiny else mnist()))
    pixels = examples.images[0].size
    adam = optax.adam(options.learning_rate)
    make = lambda: nnx.split(Network(pixels, options.units, options.seed))
    graph, _ = nnx.eval_shape(make)

    def begin() -> dict[str, Any]:
        params = make()[1]
        curve = jnp.zeros(options.steps)  # the losses, saved with what they led to
        return {"params": params, "adam": adam.init(params), "curve": curve}

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        scores = nnx.merge(graph, params)(images)
        terms = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return terms.mean()

    placed = jax.tree.map(partial(divided, mesh), jax.eval_shape(begin))
    placed["curve"] = NamedSharding(mesh, P())

    @partial(jax.jit, out_shardings=placed, donate_argnums=0)
    def update(state: Any, step: jax.Array, images: jax.Array, labels: jax.Array):
        value, grads = jax.value_and_grad(loss)(state["params"], images, labels)
        updates, moments = adam.update(grads, state["adam"])
        params = optax.apply_updates(state["params"], updates)
        curve = state["curve"].at[step].set(value)
        return {"params": params, "adam": moments, "curve": curve}

    config = {k: v for k, v in vars(options).items() if k in Checkpoints.CONFIG}
    checkpoints = Checkpoints(options.folder, config, options.fresh)
    with deadline(options.patience, "restoring"):
        first, state = checkpoints.restore(jax.jit(begin, out_shardings=placed)())
    say = partial(print, flush=True) if jax.process_index() == 0 else lambda _: None
    say(f"{devices} devices, {count} processes: from step {first}")
    rows = batches(examples, options, first)
    spread = NamedSharding(mesh, P("data"))
    for step in range(first, options.steps):
        # The first one waits for the compiler of the slowest peer, too.
        patience = options.patience * (10 if step == first else 1)
        with deadline(patience, f"step {step}"):
            batch = next(rows)
            parts = [jax.make_array_from_process_local_data(spread, x) for x in batch]
            state = update(state, jnp.int32(step), *parts)
            jax.block_until_ready(state["curve"])
        done = step + 1
        if done % options.every == 0 or done == options.steps:
            with deadline(options.patience, f"checkpoint {done}"):
                checkpoints.save(done, state)
            value = float(state["curve"].addressable_data(0)[step])
            say(f"step {done} of {options.steps}: loss {value:.4f}")
    curve = np.asarray(state["curve"].addressable_data(0))
    checkpoints.finish({"config": config, "losses": [x.hex() for x in curve.tolist()]})


def main(given: list[str] | None = None) -> None:
    """One line on standard error where it cannot go on; then restart it."""
    run(arguments(given), train)


if __name__ == "__main__":
    main()
