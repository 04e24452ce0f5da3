"""Convolutions in loops: the same numbers, in the order that is fast there."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import rbpjax
from rbpjax import Adaptive, BiCGSTAB, CGNormal, FixedPointIteration, Neumann
from rbpjax.fixed_point.hoisting import hoist_linear
from tests.fixed_point.test_memory import loop_bodies

FAST = "b01f_01io->b01f"


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


# Image shape, kernel shape, and what lax.conv_general_dilated is told: every part
# different from every other, so that no exchange of two goes unseen.
CONVOLUTIONS = {
    "channels last": ((2, 7, 6, 4), (3, 2, 4, 5), ("NHWC", "HWIO", "NHWC"), {}),
    "channels first": ((2, 4, 7, 6), (5, 4, 3, 2), ("NCHW", "OIHW", "NCHW"), {}),
    "mixed": ((4, 2, 7, 6), (3, 5, 2, 4), ("CNHW", "HOWI", "NHWC"), {}),
    "strides": (
        (2, 9, 6, 4),
        (3, 2, 4, 5),
        ("NHWC", "HWIO", "NHWC"),
        {"window_strides": (2, 1)},
    ),
    "dilated": (
        (2, 9, 6, 4),
        (3, 2, 4, 5),
        ("NHWC", "HWIO", "NHWC"),
        {
            "rhs_dilation": (2, 1),
            "lhs_dilation": (1, 2),
            "padding": ((1, 0), (2, 1)),
        },
    ),
    "groups": (
        (2, 4, 7, 6),
        (6, 2, 3, 2),
        ("NCHW", "OIHW", "NCHW"),
        {"feature_group_count": 2},
    ),
    "one dimension": ((2, 4, 7), (5, 4, 3), ("NCH", "OIH", "NCH"), {}),
    "three dimensions": (
        (1, 4, 5, 4, 3),
        (2, 4, 3, 2, 1),
        ("NCDHW", "OIDHW", "NCDHW"),
        {},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_map_and_its_transpose_are_the_same(name):
    """Each kind of convolution: the map and the product with its transpose."""
    image, kernel, numbers, options = CONVOLUTIONS[name]
    x, k = normal(0, *image), normal(1, *kernel)
    options = {"window_strides": (1,) * (len(image) - 2), "padding": "SAME"} | options
    conv = lambda x: lax.conv_general_dilated(
        x, k, dimension_numbers=numbers, **options
    )
    want, vjp = jax.vjp(conv, x)
    g = normal(2, *want.shape)
    # Sums of at most 4·3·2 products of O(1): 1e-13 is a hundred roundings.
    chex.assert_trees_all_close(hoist_linear(conv, x)(x), want, atol=1e-13)
    back = lambda g: vjp(g)[0]
    chex.assert_trees_all_close(hoist_linear(back, g)(g), back(g), atol=1e-13)
    again = jax.linear_transpose(hoist_linear(back, g), g)
    chex.assert_trees_all_close(again(x)[0], conv(x), atol=1e-13)


def network(order):
    """tanh(x + K₂ tanh(K₁ h)), two different kernels, ρ(J) below 1."""
    kernels = [0.15 * normal(i, 3, 3, 4, 4) for i in (3, 4)]
    x, numbers = normal(5, 2, 6, 5, 4), ("NHWC", "HWIO", "NHWC")
    if order == "channels first":
        kernels = [k.transpose(3, 2, 0, 1) for k in kernels]
        x, numbers = x.transpose(0, 3, 1, 2), ("NCHW", "OIHW", "NCHW")
    conv = lambda h, k: lax.conv_general_dilated(
        h, k, (1, 1), "SAME", dimension_numbers=numbers
    )
    f = lambda p, x, h: jnp.tanh(x + conv(jnp.tanh(conv(h, p[0])), p[1]))
    return f, kernels, x


@pytest.mark.parametrize("order", ["channels last", "channels first"])
@pytest.mark.parametrize(
    "rule", [Neumann(), CGNormal(), BiCGSTAB(), Adaptive()], ids=repr
)
def test_loops_convolve_in_the_fast_order(order, rule):
    """No loop of the compiled gradient has a convolution in another order."""
    f, kernels, x = network(order)
    solve = rbpjax.rbp_solve(f, backward=rule)
    loss = lambda p, x: jnp.sum(jnp.sin(solve(p, x, jnp.zeros_like(x)).value))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(kernels, x).compile()
    labels = [
        re.findall(r"dim_labels=(\S+?)[,\s]", body) for body in loop_bodies(compiled)
    ]
    assert sum(map(len, labels)) >= 4
    assert {label for body in labels for label in body} == {FAST}


@pytest.mark.parametrize("order", ["channels last", "channels first"])
def test_gradients_are_those_of_the_unrolled_network(order):
    """Both orders, exact rules, against back-propagation through 200 steps."""
    f, kernels, x = network(order)

    def gradient(solve):
        return jax.grad(
            lambda p, x: jnp.sum(jnp.sin(solve(p, x, 0 * x).value)), (0, 1)
        )(kernels, x)

    forward = FixedPointIteration(tol=1e-14)
    want = gradient(rbpjax.bptt(f, 200))
    for rule in (CGNormal(tol=1e-12), Adaptive(tol=1e-12)):
        got = gradient(rbpjax.rbp_solve(f, forward=forward, backward=rule))
        chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)
