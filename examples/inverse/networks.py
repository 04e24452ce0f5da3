"""An iteration that proposes an image and projects it onto what was measured."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import rbpjax
from examples.inverse.sensing import Sensing
from rbpjax.nn import FixedPoint
from rbpjax.regularizers import spectral_normalize

UNROLLED = {"BPTT, 4 steps": 4, "explicit, one step": 1}
KINDS = ("fixed point", *UNROLLED)
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Proposal(nnx.Module):
    """One iteration: a convolutional network with bounded kernels, and P."""

    def __init__(self, sensing: Sensing, units: int, bound: float, rngs: nnx.Rngs):
        def kernel(size: int, *ends: int, scale: float = 2.0) -> nnx.Param:
            init = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
            return nnx.Param(init(rngs.params(), (size, size, *ends)))

        self.first, self.down = kernel(4, 1, units), kernel(4, 1, units)
        self.middle = kernel(3, units, units, scale=0.5)
        self.up = kernel(4, units, 1, scale=0.1)
        self.bias = nnx.Param(jnp.zeros(units))
        self.sensing, self.bound = sensing, bound

    def injection(self, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What stays the same in all iterations: y, x₀, and what is seen of x₀."""
        x0 = self.sensing.linear(y)
        return y, x0, conv(self.images(x0), self.first[...], 2) + self.bias[...]

    def images(self, x: jax.Array) -> jax.Array:
        side = self.sensing.side
        return x.reshape(-1, side, side, 1)

    def __call__(self, inputs: tuple[jax.Array, ...], h: jax.Array) -> jax.Array:
        y, x0, drive = inputs
        rows = jnp.asarray(self.sensing.rows)
        kernels = self.down, self.middle, self.up
        down, middle, up = (spectral_normalize(k[...], self.bound) for k in kernels)
        u = jax.nn.relu(conv(self.images(h), down, 2) + drive)
        u = jax.nn.relu(u + conv(u, middle, 1))
        change = jax.lax.conv_transpose(u, up, (2, 2), "SAME", dimension_numbers=LAYOUT)
        x = x0 + change.reshape(x0.shape)
        return x + (y - x @ rows.T) @ rows


def conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution of images with the channels last."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=LAYOUT
    )


class Reconstruction(nnx.Module):
    """The fixed point of the iteration, or some steps of it."""

    def __init__(
        self, kind: str, sensing: Sensing, units: int, bound: float, seed: int
    ):
        self.state = FixedPoint(
            Proposal(sensing, units, bound, nnx.Rngs(seed)),
            forward=rbpjax.FixedPointIteration(tol=1e-3, max_steps=40),
            backward=rbpjax.Neumann(steps=6),
        )
        self.unrolled = UNROLLED.get(kind, 0)

    def __call__(self, y: jax.Array, probe: Any = None) -> jax.Array:
        inputs = self.state.cell.injection(y)
        h = inputs[1]
        if not self.unrolled:
            return self.state(inputs, h, probe).value
        for _ in range(self.unrolled):
            h = self.state.cell(inputs, h)
        return h
