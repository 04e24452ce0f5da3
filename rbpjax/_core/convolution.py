"""Convolutions with the channels last, the order in which loops run them fast.

XLA for CPU brings a convolution to the order of its fast routine (images as batch,
space, channels; kernels as space, inputs, outputs), but not inside loops: there any
other order falls back to scalar code, many times slower. The product with Jᵀ of
a convolution is one with inputs and outputs of its kernel exchanged, and so always in
another order. Here the exchange is written out: of the kernel, once, outside the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend import core


class ChannelsLast(NamedTuple):
    """A convolution in two parts: what becomes of the kernel, and the rest."""

    kernel: Callable[[jax.Array], jax.Array]
    rest: Callable[[jax.Array, jax.Array], jax.Array]


def channels_last(equation: core.JaxprEqn) -> ChannelsLast | None:
    """The equation with the channels last; None where there is nothing to gain."""
    if equation.primitive.name != "conv_general_dilated":
        return None
    params = dict(equation.params)
    lhs, rhs, out = params["dimension_numbers"]  # (batch, channel, *space) and so on
    space = tuple(range(1, len(lhs) - 1))
    images = (0, len(lhs) - 1, *space)
    kernels = (len(lhs) - 1, len(lhs) - 2, *range(len(space)))
    if (lhs, rhs, out) == (images, kernels, images) or params["batch_group_count"] != 1:
        return None
    params["dimension_numbers"] = lax.ConvDimensionNumbers(images, kernels, images)
    last = lambda batch, channel, *space: (batch, *space, channel)
    back = tuple(np.argsort(last(*out)).tolist())

    def rest(image: jax.Array, kernel: jax.Array) -> jax.Array:
        image = lax.transpose(image, last(*lhs))
        made = lax.conv_general_dilated(image, kernel, **params)
        return lax.transpose(made, back)

    outputs, inputs, *places = rhs
    return ChannelsLast(
        lambda kernel: lax.transpose(kernel, (*places, inputs, outputs)), rest
    )
