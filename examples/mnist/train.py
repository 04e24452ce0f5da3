"""Trains a convolutional equilibrium network on MNIST, and an explicit one beside it.

    python -m examples.mnist.train                # RBPJAX_DATA, else a download
    python -m examples.mnist.train --data digits  # those of scikit-learn: no download
    python -m examples.mnist.train --tiny

The state h* = relu(K ∗ h* + x) solves for itself: K is a bounded kernel, x a stem of
two convolutions. The explicit network has the same parameters, and takes one step.
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
from benchmarks.harness.options import Count, Dataset, OneOf, Positive, Seeds
from benchmarks.harness.progress import say
from examples.common import results
from examples.common.batches import shuffled
from examples.common.command import main
from examples.common.training import fit
from examples.mnist import report
from examples.mnist.images import batches, deformed, load
from examples.mnist.memory import memory
from rbpjax.nn import ConvCell, FixedPoint, report_metrics, value_and_grad_with_report

KINDS = ("equilibrium", "explicit")


class Network(nnx.Module):
    """A stem, the state, and a linear read-out."""

    def __init__(self, kind: str, side: int, units: int, bound: float, seed: int):
        rngs, large = nnx.Rngs(seed), side > 8
        he = nnx.initializers.he_normal()
        conv = partial(nnx.Conv, kernel_init=he, rngs=rngs)
        norm = partial(nnx.GroupNorm, units, num_groups=None, group_size=8, rngs=rngs)
        self.explicit = kind == "explicit"
        self.first = conv(1, 16, (5, 5), strides=2 if large else 1)
        self.second, self.before = conv(16, units, (3, 3), strides=2), norm()
        relu = jax.nn.relu
        self.state = FixedPoint(
            ConvCell(units, (3, 3), bound=bound, activation=relu, rngs=rngs),
            forward=rbpjax.FixedPointIteration(tol=1e-2, max_steps=60),
            backward=rbpjax.Neumann(steps=5),
        )
        pooled = side // (4 if large else 2) // 2
        self.after, self.read = norm(), nnx.Linear(units * pooled**2, 10, rngs=rngs)

    def drive(self, images: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.first(images[..., None]))
        return self.before(self.second(x))

    def __call__(
        self, images: jax.Array, probe: rbpjax.AdjointReport | None = None
    ) -> tuple[jax.Array, rbpjax.Solution]:
        """Scores of ten classes, and how the state was found."""
        x = self.drive(images)
        if self.explicit:
            solution = rbpjax.Solution(self.state.cell(x, jax.nn.relu(x)))
        else:
            solution = self.state(x, jnp.zeros_like(x), probe)
        h = nnx.avg_pool(self.after(solution.value), (2, 2), (2, 2))
        return self.read(h.reshape(len(h), -1)), solution


def update(
    model: Network,
    optimizer: nnx.Optimizer,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
) -> dict[str, jax.Array]:
    """One step of training, and what to watch."""
    images = deformed(key, images)

    def loss(model: Network, probe: rbpjax.AdjointReport) -> tuple[jax.Array, Any]:
        scores, _ = model(images, probe)
        terms = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return terms.mean(), jnp.mean(scores.argmax(-1) != labels)

    gradient = value_and_grad_with_report(loss, has_aux=True)
    (value, error), grads, found = gradient(model)
    optimizer.update(model, grads)
    return {"loss": value, "error": error, **report_metrics(found)}


def radius(images: jax.Array, model: Network) -> dict[str, jax.Array]:
    """ρ(J), the largest over some images."""
    if model.explicit:
        return {}
    x, h = model.drive(images), model(images)[1].value
    key = jax.random.key(0)
    return {"radius": model.state.spectral_radius(key, x, h, num_steps=60)}


@nnx.jit
def judge(model: Network, images: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """Errors on a batch of test images, and how its states were found."""
    scores, solution = model(images)
    found = {"errors": jnp.sum(scores.argmax(-1) != labels)}
    if model.explicit:
        return found
    solves = {k: getattr(solution, k) for k in ("num_steps", "residual", "converged")}
    return found | solves | radius(images[:50], model)


@dataclasses.dataclass(frozen=True)
class Mnist:
    """Train a convolutional network at equilibrium on images of digits."""

    data: Dataset = "mnist"
    """mnist, or digits: small, without a download."""
    kinds: Annotated[tuple[str, ...], OneOf(KINDS)] = KINDS
    """equilibrium, and explicit: one step of the same cell."""
    epochs: Count = 4
    """Passes over the training images; digits are few, and take 60."""
    batch: Count = 64
    """Images of a step."""
    units: Annotated[int, OneOf((16, 32, 48, 64))] = 48
    """Channels of the state."""
    bound: Positive = 0.33
    """Of the kernel's singular values, as a matrix: below 1/3 it is a contraction."""
    learning_rate: Positive = 3e-3
    """Of AdamW, after a warm-up; it ends at zero."""
    seeds: Seeds = (0, 1, 2)
    """Of weights, order and deformations."""
    tiny: bool = False
    """Digits, 16 channels, one seed: half a minute."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Trains every network with every seed: JSON, figure, table."""
        if self.tiny:
            less = {"data": "digits", "epochs": 20, "units": 16, "seeds": (0,)}
            return dataclasses.replace(self, tiny=False, **less).run()
        train, test = load(self.data)
        checkpoints = results.opened("mnist", self)
        networks: dict[str, Any] = {kind: [] for kind in self.kinds}
        for seed, kind in itertools.product(self.seeds, self.kinds):
            made = partial(self.train, checkpoints, kind, train, test, seed)
            networks[kind] += [checkpoints.once(f"{kind}-{seed}-done", made)]
        make = partial(Network, side=train[0].shape[1], units=self.units, seed=0)
        bytes_ = memory(partial(make, bound=self.bound), *train)
        path = results.write("mnist", self, networks=networks, memory=bytes_)
        checkpoints.clear()
        return results.show(report, path.stem)

    def train(
        self, checkpoints: Checkpoints, kind: str, train: Any, test: Any, seed: int
    ) -> dict[str, Any]:
        """One network, from one seed."""
        images, _ = train
        model = Network(kind, images.shape[1], self.units, self.bound, seed)
        per_epoch = len(images) // self.batch
        blocks = 2 * self.epochs
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, per_epoch, blocks * (per_epoch // 2)
        )
        adam = optax.adamw(rate, weight_decay=1e-4)
        optimizer = nnx.Optimizer(
            model, optax.chain(optax.clip_by_global_norm(1.0), adam), wrt=nnx.Param
        )
        history = fit(
            checkpoints,
            f"{kind}-{seed}",
            model,
            optimizer,
            update,
            shuffled(train, self.batch, seed=seed),
            seed=seed,
            num_blocks=blocks,
            steps=per_epoch // 2,
            watch=partial(radius, jnp.asarray(images[:64])),
        )
        found = [judge(model, *part) for part in batches(test, 500)]
        errors = 100 * sum(int(row["errors"]) for row in found) / len(test[0])
        solves = [jax.tree.map(float, row) for row in found]
        say(f"{kind}, seed {seed}: test error {errors:.2f} %")
        return {"test_error": errors, "test_solves": solves, "history": history}


if __name__ == "__main__":
    sys.exit(main(Mnist))
