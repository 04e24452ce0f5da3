"""Products with J or Jᵀ, counted as they are executed."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

import rbpjax
from rbpjax.types import PyTree


class Counter:
    """Counts the products that a rule executes; compiled once for each structure."""

    def __init__(self, rule: rbpjax.BackwardRule) -> None:
        self._calls: list[int] = []

        def note(v: np.ndarray) -> np.ndarray:
            self._calls.append(1)
            return np.zeros_like(v)

        def noted(product: Any, v: PyTree) -> PyTree:
            # A pure callback, which goes when nobody reads the product.
            entry = jax.tree.leaves(v)[0].ravel()[0]
            kind = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
            zero = jax.pure_callback(note, kind, entry)
            return jax.tree.map(lambda u: u + zero.astype(u.dtype), product(v))

        def solve(vjp: Any, g: PyTree) -> tuple[PyTree, jax.Array]:
            transposed = lambda v: vjp(v)[0]
            product = lambda v: jax.linear_transpose(transposed, g)(v)[0]
            linear = partial(
                jax.custom_derivatives.linear_call,
                lambda _, v: noted(transposed, v),
                lambda _, v: noted(product, v),
                (),
            )
            # Value and steps alone: the product for the residual is for its readers.
            solution = rule(linear, g)
            return solution.value, solution.num_steps

        self._solve = jax.jit(solve)

    def __call__(self, vjp: Any, g: PyTree) -> tuple[int, int]:
        """The products and the steps of one solve.

        ``vjp`` is what ``jax.vjp`` returns. It is an argument of what is compiled: as a
        constant it would keep the compiler busy.
        """
        self._calls.clear()
        _, steps = jax.block_until_ready(self._solve(vjp, g))
        return len(self._calls), int(steps)


def count_products(
    rule: rbpjax.BackwardRule, step: Any, h: PyTree, g: PyTree
) -> tuple[int, int]:
    """Products with J or Jᵀ that the rule executes for a step at h; its steps."""
    return Counter(rule)(jax.vjp(step, h)[1], g)
