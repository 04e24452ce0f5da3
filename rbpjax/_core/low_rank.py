"""The identity and a few rank-one terms: a linear map of states that is kept small."""

from __future__ import annotations

from typing import NamedTuple

import jax

from rbpjax._core import tree
from rbpjax.types import PyTree


class LowRank(NamedTuple):
    """v ↦ v + Σᵢ uᵢ ⟨wᵢ, v⟩.

    Attributes:
      left: the uᵢ, stacked states; rows of zeros are no terms.
      right: the wᵢ.
    """

    left: PyTree
    right: PyTree

    @classmethod
    def identity(cls, rank: int, like: PyTree) -> LowRank:
        """With room for so many terms."""
        rows = tree.empty_rows(rank, like)
        return cls(rows, rows)

    def apply(self, v: PyTree) -> PyTree:
        """The map."""
        return _apply(self.left, self.right, v)

    def transposed(self, v: PyTree) -> PyTree:
        """Its transpose under the real inner product."""
        return _apply(self.right, self.left, v)

    def put(self, i: jax.Array, u: PyTree, w: PyTree) -> LowRank:
        """With the term u ⟨w, ·⟩ in row ``i``."""
        return LowRank(tree.put(self.left, i, u), tree.put(self.right, i, w))


def _apply(left: PyTree, right: PyTree, v: PyTree) -> PyTree:
    """``v`` plus the left rows, weighted by the products of the right rows with it."""
    # Sums, as in Anderson's: a product of matrix and vector makes XLA copy the rows.
    weights = jax.vmap(lambda row: tree.vdot(row, v))(right)
    for i in range(len(weights)):
        v = tree.axpy(weights[i], tree.take(left, i), v)
    return v
