"""Norms of the activity by hand."""

import chex
import jax.numpy as jnp

from rbpjax import perturb


def test_activity_norms_by_hand():
    """Blocks of a layer, a step, a sequence; a batch with one loss is one block."""
    a = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
    b = jnp.ones((2, 3, 1))
    square = lambda x, axis: jnp.sum(x**2, axis=axis, keepdims=True)
    (s, n), (r, m) = perturb.norm.per_layer_step([a, b])
    chex.assert_trees_all_close((s, r), (square(a, 2), square(b, 2)))
    assert (n, m) == (4, 1)
    (s, n), (r, _) = perturb.norm.per_step([a, b])
    chex.assert_trees_all_close((s, r), (square(a, 2) + 1, square(a, 2) + 1))
    assert n == 5
    (s, n), _ = perturb.norm.per_sequence([a, b])
    chex.assert_trees_all_close(s, square(a, (0, 2)) + 2)
    assert n == 10
