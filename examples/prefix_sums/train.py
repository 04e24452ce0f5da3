"""Trains networks on the parity of all prefixes of 32 bits, and tests them on 4,096.

    python -m examples.prefix_sums.train [--tiny]

A convolution of three taps carries what it knows by one position a step, so that 512
bits take hundreds of steps, and the network has to go on right where its training
stopped. One whose state solves h* = tanh(K ∗ h* + x) is iterated until it is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import rbpjax
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, OneOf, Positive, Seeds
from examples.common import results
from examples.common.command import main
from examples.common.training import fit
from examples.prefix_sums import report
from examples.prefix_sums.testing import STRINGS, batch, tests
from rbpjax.nn import ConvCell, FixedPoint, report_metrics, value_and_grad_with_report

UNITS = 32
# Bounds of K's singular values. What is unrolled has the cell that settles.
BOUNDS = {"bounded": 1.4, "contraction": 0.55, "unbounded": 1e6}
UNROLLED = {"bptt-20": 20, "bptt-40": 40}
KINDS = (*BOUNDS, *UNROLLED, "feed-forward")


class Recurrent(nnx.Module):
    """The state that a bounded convolution settles in, read out at every position."""

    def __init__(self, kind: str, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, kernel_size=(3,), rngs=rngs)
        strong = nnx.initializers.normal(1.5 / 3**0.5)
        self.encode = conv(1, UNITS, kernel_init=strong)
        size = 0.7 if kind == "unbounded" else 1.0  # a lower start
        init = nnx.initializers.normal(size / (3 * UNITS) ** 0.5)
        bound = BOUNDS.get(kind, BOUNDS["bounded"])
        self.state = FixedPoint(
            ConvCell(UNITS, (3,), bound=bound, kernel_init=init, rngs=rngs),
            forward=rbpjax.FixedPointIteration(steps=64),
            backward=rbpjax.Neumann(steps=8),
        )
        self.hidden = conv(UNITS, UNITS)
        self.read = nnx.Linear(UNITS, 2, rngs=rngs)
        self.unrolled = UNROLLED.get(kind, 0)

    def start(self, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The injection, and zeros."""
        x = self.encode(bits[..., None])
        return x, jnp.zeros_like(x)

    def scores(self, h: jax.Array) -> jax.Array:
        return self.read(jax.nn.relu(self.hidden(h)))

    def __call__(
        self, bits: jax.Array, probe: rbpjax.AdjointReport | None = None
    ) -> jax.Array:
        x, h = self.start(bits)
        if not self.unrolled:
            return self.scores(self.state(x, h, probe).value)
        for _ in range(self.unrolled):  # a loop of the compiler's is slower on CPUs
            h = self.state.cell(x, h)
        return self.scores(h)


class FeedForward(nnx.Module):
    """Sixteen residual layers of five taps, which see the whole of 32 bits."""

    def __init__(self, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, kernel_size=(5,), rngs=rngs)
        self.encode = conv(1, UNITS)
        layer = lambda: (nnx.LayerNorm(UNITS, rngs=rngs), conv(UNITS, UNITS))
        self.layers = nnx.data([layer() for _ in range(16)])
        self.read = nnx.Linear(UNITS, 2, rngs=rngs)

    def __call__(self, bits: jax.Array, probe: None = None) -> jax.Array:
        h = self.encode(bits[..., None])
        for norm, conv in self.layers:
            h = h + jax.nn.relu(conv(norm(h)))
        return self.read(h)


Network = Recurrent | FeedForward


def make(kind: str, seed: int) -> Network:
    """The network of that name."""
    rngs = nnx.Rngs(seed)
    return FeedForward(rngs) if kind == "feed-forward" else Recurrent(kind, rngs)


def update(
    model: Network, optimizer: nnx.Optimizer, _: jax.Array, *data: jax.Array
) -> dict[str, jax.Array]:
    """One step of training, and what to watch."""
    bits, parities = data

    def loss(model: Network, probe: rbpjax.AdjointReport) -> tuple[jax.Array, Any]:
        scores = model(bits, probe)
        terms = optax.softmax_cross_entropy_with_integer_labels(scores, parities)
        return terms.mean(), jnp.mean(scores.argmax(-1) == parities)

    gradient = value_and_grad_with_report(loss, has_aux=True)
    (value, right), grads, found = gradient(model)
    optimizer.update(model, grads)
    return {"loss": value, "accuracy": right, **report_metrics(found)}


def radius(bits: jax.Array, model: Network) -> dict[str, jax.Array]:
    """ρ(J) at the state after 64 steps, the largest over some strings."""
    if isinstance(model, FeedForward):
        return {}
    x, h = model.start(bits)
    h = model.state(x, h).value
    return {"radius": model.state.spectral_radius(jax.random.key(0), x, h)}


@dataclasses.dataclass(frozen=True)
class PrefixSums:
    """Train on short strings, and test on long ones, with more iterations."""

    kinds: Annotated[tuple[str, ...], OneOf(KINDS)] = KINDS
    """Which networks."""
    bits: Count = 32
    """Length of the strings of training."""
    lengths: Annotated[tuple[int, ...], OneOf(STRINGS)] = (32, 128, 512, 4096)
    """Lengths of the strings of the tests."""
    blocks: Count = 12
    """Training, in blocks of 50 steps of 128 strings."""
    learning_rate: Positive = 2e-3
    """Of Adam."""
    seeds: Seeds = (0, 1, 2)
    """Of weights and strings."""
    tiny: bool = False
    """Eight bits, tested on 32; one seed of the bounded network."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Trains every network with every seed: JSON, figure, table."""
        if self.tiny:
            less: dict[str, Any] = {"kinds": ("bounded",), "bits": 8, "seeds": (0,)}
            less |= {"lengths": (16, 32), "blocks": 6}
            return dataclasses.replace(self, tiny=False, **less).run()
        checkpoints = results.opened("prefix_sums", self)
        networks: dict[str, Any] = {kind: [] for kind in self.kinds}
        for kind, seed in itertools.product(self.kinds, self.seeds):
            made = partial(self.train, checkpoints, kind, seed)
            networks[kind] += [checkpoints.once(f"{kind}-{seed}-done", made)]
        path = results.write("prefix_sums", self, networks=networks)
        checkpoints.clear()
        return results.show(report, path.stem)

    def train(self, checkpoints: Checkpoints, kind: str, seed: int) -> dict[str, Any]:
        """One network, from one seed."""
        model, steps = make(kind, seed), 50 * self.blocks
        rate = optax.schedules.join_schedules(
            [
                optax.linear_schedule(0.0, self.learning_rate, steps // 20),
                optax.constant_schedule(self.learning_rate),
                optax.linear_schedule(self.learning_rate, 4e-5, steps * 2 // 5),
            ],
            [steps // 20, steps * 3 // 5],
        )
        adam = optax.chain(optax.clip_by_global_norm(1), optax.adam(rate))
        history = fit(
            checkpoints,
            f"{kind}-{seed}",
            model,
            nnx.Optimizer(model, adam, wrt=nnx.Param),
            update,
            lambda k: batch(128, self.bits, (seed, k)),
            seed=seed,
            num_blocks=self.blocks,
            watch=partial(radius, batch(64, self.bits, (seed, 0))[0]),
        )
        found: dict[str, Any] = {}
        for n in sorted(self.lengths):
            if n <= 512 or found.get("512", {"bits": [100]})["bits"][-1] > 99:
                found[str(n)] = tests(model, n, seed)
        report.say_run(kind, seed, history, found)
        return {"history": history, "tests": found}


if __name__ == "__main__":
    sys.exit(main(PrefixSums))
