"""Reconstructs images of digits from a quarter as many measurements as pixels.

    python -m examples.inverse.train                # RBPJAX_DATA, else a download
    python -m examples.inverse.train --tiny         # scikit-learn's digits, no download

An iteration proposes an image by a small convolutional network, and projects it onto
what was measured: h ← P(x₀ + g(h, x₀)), P(x) = x + Aᵀ(y - Ax), with the linear
reconstruction x₀. Trained at its fixed point, or unrolled to a few steps, it is then
iterated for longer than training did.
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
from benchmarks.harness.options import Count, Dataset, OneOf, Positive, Seeds
from examples.common import results
from examples.common.batches import shuffled
from examples.common.command import main
from examples.common.training import fit
from examples.inverse import report
from examples.inverse.networks import KINDS, Reconstruction
from examples.inverse.sensing import Sensing, load, psnr
from rbpjax.nn import FixedPoint, report_metrics, value_and_grad_with_report

AT = (1, 2, 4, 8, 16, 32, 64)  # iterations in tests


def update(
    model: Reconstruction, optimizer: nnx.Optimizer, _: jax.Array, *data: jax.Array
) -> dict[str, jax.Array]:
    """One step of training, and what to watch."""
    images, seen = data

    def loss(model: Reconstruction, probe: rbpjax.AdjointReport) -> jax.Array:
        return jnp.mean(jnp.sum((model(seen, probe) - images) ** 2, axis=1))

    value, grads, found = value_and_grad_with_report(loss)(model)
    optimizer.update(model, grads)
    return {"loss": value, **report_metrics(found)}


@nnx.jit
def tests(model: Reconstruction, x: jax.Array, y: jax.Array) -> dict[str, Any]:
    """PSNR and residuals against iterations, and ρ(J) at the end."""
    inputs = model.state.cell.injection(y)
    h, done = inputs[1], 0
    found: dict[str, Any] = {"iterations": AT, "psnr": [], "residual": []}
    for n in AT:
        solver = rbpjax.FixedPointIteration(steps=n - done)
        solution = FixedPoint(model.state.cell, forward=solver)(inputs, h)
        h, done = solution.value, n
        found["psnr"].append(psnr(h, x))
        found["residual"].append(solution.residual)
    few = tuple(part[:50] for part in inputs)
    radius = model.state.spectral_radius(jax.random.key(0), few, h[:50])
    return found | {"radius": radius}


@dataclasses.dataclass(frozen=True)
class Inverse:
    """Compressed sensing of digits by an iteration that is run until it rests."""

    data: Dataset = "mnist"
    """mnist, or digits: small, without a download."""
    kinds: Annotated[tuple[str, ...], OneOf(KINDS)] = KINDS
    """Which networks."""
    measurements: Positive = 0.25
    """As a fraction of the pixels."""
    blocks: Count = 6
    """Training, in blocks of 40 steps of 64 images."""
    units: Count = 24
    """Channels of the network."""
    bound: Positive = 0.8
    """Of the kernels' singular values, as matrices."""
    seeds: Seeds = (0, 1, 2)
    """Of weights, order and noise."""
    tiny: bool = False
    """Digits, one seed of the fixed point, fewer channels."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Trains every network with every seed: JSON, figure, table."""
        if self.tiny:
            less: dict[str, Any] = {"data": "digits", "kinds": KINDS[:1], "seeds": (0,)}
            less |= {"units": 16, "measurements": 0.4, "blocks": 5}
            return dataclasses.replace(self, tiny=False, **less).run()
        sensing = load(self.data, self.measurements)
        checkpoints = results.opened("inverse", self)
        networks: dict[str, Any] = {kind: [] for kind in self.kinds}
        for seed, kind in itertools.product(self.seeds, self.kinds):
            made = partial(self.train, checkpoints, sensing, kind, seed)
            name = f"{kind}-{seed}-done".replace(", ", "-").replace(" ", "-")
            networks[kind] += [checkpoints.once(name, made)]
        x, y = sensing.test, sensing.measure(sensing.test, (0,))
        linear = {"ridge": psnr(sensing.ridge(y), x)}
        linear |= {"least squares, covariance": psnr(sensing.linear(y), x)}
        path = results.write("inverse", self, networks=networks, linear=linear)
        checkpoints.clear()
        return results.show(report, path.stem)

    def train(self, checkpoints: Any, sensing: Sensing, kind: str, seed: int) -> Any:
        """One network, from one seed."""
        model = Reconstruction(kind, sensing, self.units, self.bound, seed)
        rate = optax.cosine_decay_schedule(4e-3, 40 * self.blocks)
        adam = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
        rows = shuffled((sensing.train,), 64, seed=seed)
        batch = lambda k: (x := rows(k)[0], sensing.measure(x, (1, seed, k)))
        history = fit(
            checkpoints,
            f"{kind}-{seed}".replace(", ", "-").replace(" ", "-"),
            model,
            nnx.Optimizer(model, adam, wrt=nnx.Param),
            update,
            batch,
            seed=seed,
            num_blocks=self.blocks,
            steps=40,
        )
        found = tests(model, sensing.test, sensing.measure(sensing.test, (0,)))
        report.say_run(kind, seed, history, found)
        return {"history": history, "tests": found}


if __name__ == "__main__":
    sys.exit(main(Inverse))
