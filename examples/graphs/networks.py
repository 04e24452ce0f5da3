"""A graph network whose state is at a fixed point, unrolled, or in a few layers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import rbpjax
from rbpjax.nn import FixedPoint, GraphCell

UNROLLED = {"BPTT, 8 steps": 8, "BPTT, 100 steps": 100}
LAYERS = {"explicit, 2 layers": 2, "explicit, 8 layers": 8}
KINDS = {
    "cora": (
        "fixed point",
        "BPTT, 8 steps",
        "explicit, 2 layers",
        "explicit, 8 layers",
    ),
    "chains": ("fixed point", "BPTT, 100 steps", "BPTT, 8 steps", "explicit, 8 layers"),
}
KINDS["planted"] = KINDS["cora"]
NAMES = ("fixed point", *UNROLLED, *LAYERS)
# Of chains J is nilpotent: iteration and series end after as many steps as edges.
FORWARD, BACKWARD = rbpjax.FixedPointIteration(), rbpjax.Neumann()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a task asks for."""

    gain: float
    units: int
    dropout: float
    decay: float
    learning_rate: float


RECIPES = {
    "cora": Recipe(0.9, 32, 0.7, 2e-2, 1e-2),
    "chains": Recipe(0.99, 16, 0.0, 0.0, 5e-3),
}
RECIPES["planted"] = Recipe(0.9, 16, 0.2, 1e-3, 1e-2)


class Network(nnx.Module):
    """A drive from the features, the state, and a linear read-out."""

    def __init__(self, kind: str, recipe: Recipe, sizes: tuple[int, int], seed: int):
        rngs, units = nnx.Rngs(seed), recipe.units
        init = nnx.initializers.glorot_uniform()
        self.words = nnx.Param(init(rngs.params(), (sizes[0], 2 * units)))
        self.drive = nnx.Linear(2 * units, units, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(units, rngs=rngs)  # of what came far, and is faint
        self.read = nnx.Linear(units, sizes[1], rngs=rngs)
        self.drop = nnx.Dropout(recipe.dropout, rngs=rngs)
        cell = lambda: GraphCell(units, gain=recipe.gain, activation=jnp.tanh)
        # The explicit network has a cell for each layer.
        self.cells = nnx.data([cell() for _ in range(LAYERS.get(kind, 1))])
        self.kind, self.decay = kind, recipe.decay

    def __call__(
        self, graph: Any, features: jax.Array, probe: Any = None, *, test: bool = False
    ) -> tuple[jax.Array, rbpjax.Solution]:
        """Scores of classes ``[node, class]``, and how the states were found."""
        drop = partial(self.drop, deterministic=test)
        # Dropout of weights: that of all words would take most of the time.
        x = self.drive(drop(jnp.tanh(features @ drop(self.words[...]))))
        h, (cell, *_) = jnp.zeros_like(x), self.cells
        solution = rbpjax.Solution(h)
        if self.kind in LAYERS:
            h = x
            for layer in self.cells:
                h = layer((graph, x), h)
        elif self.kind in UNROLLED and not test:
            for _ in range(UNROLLED[self.kind]):
                h = cell((graph, x), h)
        else:  # what was unrolled in training is at its fixed point in tests
            solution = FixedPoint(cell, forward=FORWARD, backward=BACKWARD)(
                (graph, x), h, probe
            )
            h = solution.value
        return self.read(drop(self.norm(h))), solution

    def penalty(self) -> jax.Array:
        """Weight decay of the first layer, as is usual on citation graphs."""
        return self.decay / 2 * jnp.sum(self.words[...] ** 2)
