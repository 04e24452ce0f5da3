"""A layer with one fixed point whatever its weights: the monotone operator network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class MonotoneCell(nnx.Module):
    """One forward-backward step towards z = relu(Wz + drive), W ≼ (1 - m) I.

    W = (1 - m) I - AᵀA + B - Bᵀ for any A and B, so that I - W is strongly monotone:
    its symmetric part is at least m. Then there is exactly one z, whatever training
    does to the weights, also where W has a large norm and z ← relu(Wz + drive) itself
    oscillates. The cell is the step

        h ← relu((1 - α) h + α (W h + drive)),    α = m / ‖I - W‖₂²,

    which has the same fixed point and is a contraction by √(1 - m²/‖I - W‖₂²), so that
    `rbpjax.nn.FixedPoint` of it settles by plain iteration. No gradient goes through
    α, on which the fixed point does not depend.

    Cost of a step: one product with W; a singular value decomposition of W once a
    solve. AD modes: all.

    Args:
      units: size of the state, the last axis.
      margin: m, positive; larger is faster, and carries less.
      rngs: random streams; ``rngs.params`` is used.

    Raises:
      ValueError: if ``margin`` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from rbpjax.nn import FixedPoint, MonotoneCell
      >>> cell = MonotoneCell(8, rngs=nnx.Rngs(0))
      >>> drive = jnp.ones((2, 8), jnp.float32)
      >>> z = FixedPoint(cell)(drive, jnp.zeros_like(drive)).value
      >>> bool(jnp.allclose(z, jax.nn.relu(z @ cell.weight().T + drive), atol=1e-4))
      True

    References:
      Winston and Kolter, "Monotone operator equilibrium networks", NeurIPS 2020,
      https://arxiv.org/abs/2006.08591: W is that of proposition 1, the step that of
      their forward-backward splitting, with its rate.
    """

    def __init__(self, units: int, *, margin: float = 1.0, rngs: nnx.Rngs) -> None:
        if not margin > 0:
            raise ValueError(f"MonotoneCell: `margin` must be positive; got {margin}.")
        self.margin = margin
        init = nnx.initializers.normal(0.5 / units**0.5)
        self.a = nnx.Param(init(rngs.params(), (units, units), jnp.float32))
        self.b = nnx.Param(init(rngs.params(), (units, units), jnp.float32))

    def weight(self) -> jax.Array:
        """W, ``[unit, unit]``."""
        a, b = self.a[...], self.b[...]
        identity = jnp.eye(len(a), dtype=a.dtype)
        margin = jnp.asarray(self.margin, a.dtype)
        return (1 - margin) * identity - a.T @ a + b - b.T

    def __call__(self, drive: jax.Array, h: jax.Array) -> jax.Array:
        """One step: the next state.

        Args:
          drive: like the state.
          h: the state, ``[..., unit]``.
        """
        weight = self.weight()
        gap = jnp.eye(len(weight), dtype=weight.dtype) - lax.stop_gradient(weight)
        alpha = jnp.asarray(self.margin, weight.dtype) / jnp.linalg.norm(gap, 2) ** 2
        alpha = alpha.astype(weight.dtype)
        return jax.nn.relu(h + alpha * (h @ weight.T - h + drive))
