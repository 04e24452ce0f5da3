"""Convolutions in loops: the same numbers, in the order that is fast there."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import rbpjax
from rbpjax import Adaptive, BiCGSTAB, CGNormal, FixedPointIteration, Neumann
from rbpjax._core.convolution import channels_last
from tests.support.hlo import loop_bodies
from tests.support.problems import rows

FAST = "b01f_01io->b01f"
# Whose tests are not marked full.
DEFAULT = [("strided", "last"), ("jitted", "first")]


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


@pytest.mark.parametrize(
    "name", rows(CONVOLUTIONS.keys(), ("channels first", "mixed", "dilated", "groups"))
)
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
    chex.assert_trees_all_close(channels_last(conv, x)(x), want, atol=1e-13)
    back = lambda g: vjp(g)[0]
    chex.assert_trees_all_close(channels_last(back, g)(g), back(g), atol=1e-13)
    again = jax.linear_transpose(channels_last(back, g), g)
    chex.assert_trees_all_close(again(x)[0], conv(x), atol=1e-13)


@pytest.mark.parametrize(
    "name", rows(CONVOLUTIONS.keys(), ("mixed", "dilated", "groups"))
)
def test_derivatives_of_a_differentiated_convolution(name):
    """Gradient, its gradient, the tangent and that of the gradient: plain autodiff's.

    With respect to image and kernel, both inside the function.
    """
    image, kernel, numbers, options = CONVOLUTIONS[name]
    at = normal(0, *image), normal(1, *kernel)
    along = normal(2, *image), normal(3, *kernel)
    options = {"window_strides": (1,) * (len(image) - 2), "padding": "SAME"} | options
    # Bent, so that the second derivatives have all their parts.
    f = lambda pair: jnp.sin(
        lax.conv_general_dilated(*pair, dimension_numbers=numbers, **options)
    )

    @partial(jax.jit, static_argnums=0)
    def derivatives(f):
        grad = jax.grad(lambda pair: jnp.sum(f(pair) ** 2))
        half = lambda pair: sum(jnp.sum(u**2) for u in grad(pair)) / 2
        tangents = [jax.jvp(g, (at,), (along,)) for g in (f, grad)]
        return grad(at), jax.grad(half)(at), tangents

    fast = channels_last(f, at, differentiated=True)
    # Sums of at most 2·7·6·5 products, those of second order of the square: up to 1e4,
    # with a few hundred roundings of 1e-16 each.
    chex.assert_trees_all_close(
        derivatives(fast), derivatives(f), rtol=1e-11, atol=1e-9
    )


@pytest.mark.parametrize("at", [0, 1], ids=["image", "kernel"])
def test_derivatives_with_respect_to_one_of_the_two(at):
    """What has no tangent is left out, and does not spoil the other."""
    image, kernel, numbers, _ = CONVOLUTIONS["mixed"]
    pair = [normal(0, *image), normal(1, *kernel)]

    def f(x):
        both = [*pair[:at], x, *pair[at + 1 :]]
        return lax.conv_general_dilated(
            *both, (1, 1), "SAME", dimension_numbers=numbers
        )

    fast = channels_last(f, pair[at], differentiated=True)
    grad = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(pair[at])
    got, want = grad(fast), grad(f)
    chex.assert_trees_all_close(got, want, atol=1e-12)  # 1e4 roundings of O(1)


def test_what_has_nothing_to_reorder_is_left_as_it_is():
    """No convolution, or one in order already: the very same function."""
    dense = lambda h: jnp.tanh(h @ h.T)
    assert channels_last(dense, jnp.ones((2, 2))) is dense
    assert channels_last(dense, jnp.ones((2, 2)), differentiated=True) is dense
    conv = lambda h: lax.conv_general_dilated(
        h, jnp.ones((3, 3, 2, 2)), (1, 1), "SAME", dimension_numbers=ORDERS["last"]
    )
    assert channels_last(conv, jnp.ones((1, 4, 4, 2))) is conv


def test_a_kernel_that_the_state_makes_is_left_as_it_is():
    """The value is the same where the kernel is new in every step."""
    f = lambda h: lax.conv_general_dilated(
        h["image"], h["kernel"], (1, 1), "SAME", dimension_numbers=ORDERS["first"]
    )
    h = {"image": normal(0, 1, 2, 5, 4), "kernel": normal(1, 3, 2, 3, 3)}
    chex.assert_trees_all_equal(channels_last(f, h)(h), f(h))


ORDERS = {"last": ("NHWC", "HWIO", "NHWC"), "first": ("NCHW", "OIHW", "NCHW")}


def conv(order, h, k, strides=(1, 1), padding="SAME", **options):
    """A convolution whose kernel comes as (height, width, input, output)."""
    k = k if order == "last" else k.transpose(3, 2, 0, 1)
    return lax.conv_general_dilated(
        h, k, strides, padding, dimension_numbers=ORDERS[order], **options
    )


def bounded(kernel, norm=0.5):
    """A kernel computed from a parameter, as normalization does: ‖h ↦ K h‖ ≤ norm.

    By Young's inequality, over the taps: Σ ‖K_tap‖_F.
    """
    return norm * kernel / jnp.sum(jnp.sqrt(jnp.sum(kernel**2, (2, 3))))


def plain(order, p, h):
    return conv(order, jnp.tanh(conv(order, h, bounded(p[0], 0.8))), bounded(p[1], 0.8))


def strided(order, p, h):
    """Down by two and up again, as in a network with an hourglass."""
    low = jnp.tanh(conv(order, h, bounded(p[0], 0.8), (2, 2)))
    return conv(
        order, low, bounded(p[1], 0.8), padding=[(1, 2)] * 2, lhs_dilation=[2, 2]
    )


def dilated(order, p, h):
    return conv(
        order, jnp.tanh(conv(order, h, bounded(p[0]), rhs_dilation=(2, 1))), p[1]
    )


def grouped(order, p, h):
    apart = conv(order, h, bounded(p[0][:, :, :2], 0.8), feature_group_count=2)
    return conv(order, jnp.tanh(apart), bounded(p[1], 0.8))


def jitted(order, p, h):
    """Kernels and convolutions inside functions of their own, one in another."""
    inner = jax.jit(partial(conv, order))
    outer = jax.jit(lambda h, k: jnp.tanh(inner(h, jax.jit(bounded)(k))))
    return inner(outer(h, p[0]), bounded(p[1]))


KINDS = {f.__name__: f for f in (plain, strided, dilated, grouped, jitted)}
CASES = [(kind, order) for kind in KINDS for order in ORDERS]
cases = pytest.mark.parametrize(
    ("kind", "order"),
    [
        pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.full)
        for case in CASES
    ],
)


def network(kind, order):
    """tanh(x + map(h)), its parameters and inputs: ρ(J) below 0.7."""
    kernels = [normal(i, 3, 3, 4, 4) for i in (3, 4)]
    if kind == "dilated":
        kernels[1] = bounded(kernels[1])
    x = normal(5, 2, 6, 8, 4)
    x = x if order == "last" else x.transpose(0, 3, 1, 2)
    return lambda p, x, h: jnp.tanh(x + KINDS[kind](order, p, h)), kernels, x


@pytest.mark.parametrize(
    "rule",
    [
        Neumann(),
        pytest.param(CGNormal(), marks=pytest.mark.full),
        pytest.param(BiCGSTAB(), marks=pytest.mark.full),
        Adaptive(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("order", rows(ORDERS.keys(), ("first",)))
def test_loops_convolve_in_the_fast_order(order, rule):
    """No loop of the compiled gradient has a convolution in another order."""
    assert_fast("plain", order, rule)


@cases
def test_loops_convolve_every_kind_in_the_fast_order(kind, order):
    """Strided, dilated, grouped, inside jits, of kernels that parameters make."""
    assert_fast(kind, order, Neumann())


DIFFERENTIATED = {
    "bptt": lambda f: rbpjax.bptt(f, 7),
    "remat": lambda f: rbpjax.bptt(f, 7, remat=3),
    "truncated": lambda f: rbpjax.bptt(f, 7, truncation=3),
    "phantom": lambda f: rbpjax.unrolled_phantom(f, 4),
    "reversible": lambda f: rbpjax.reversible(f, 7, anchors=2),
}


@pytest.mark.parametrize("name", rows(DIFFERENTIATED.keys(), ("remat", "reversible")))
@pytest.mark.parametrize("order", rows(ORDERS.keys(), ("last",)))
def test_loops_that_are_differentiated_convolve_in_the_fast_order(order, name):
    """The gradients of kernels, and with the kernel, too."""
    assert_loops_fast(DIFFERENTIATED[name], "plain", order)


@pytest.mark.parametrize("name", rows(DIFFERENTIATED.keys(), ("bptt",)))
def test_gradients_of_differentiated_loops(name):
    """The same as with convolutions that no library function knows: by shifts."""
    f, kernels, x = network("plain", "last")

    def shifted(p, x, h):
        """``network``'s map as sums of matrix products over the taps."""
        for k, bend in zip(p, (jnp.tanh, lambda h: jnp.tanh(x + h)), strict=True):
            k, wide = bounded(k, 0.8), jnp.pad(h, [(0, 0), (1, 1), (1, 1), (0, 0)])
            n, m = h.shape[1:3]
            h = sum(
                wide[:, i : i + n, j : j + m] @ k[i, j]
                for i in range(3)
                for j in range(3)
            )
            h = bend(h)
        return h

    def gradients(step):
        solve = DIFFERENTIATED[name](step)
        loss = lambda p, x: jnp.sum(jnp.sin(solve(p, x, 0.3 * x).value))
        return jax.jit(jax.grad(loss, (0, 1)))(kernels, x)

    # 7 steps, sums of 36 products of O(1), 100 positions: 1e-11 is 1e5 roundings.
    chex.assert_trees_all_close(gradients(f), gradients(shifted), atol=1e-11)


def assert_fast(kind, order, rule):
    assert_loops_fast(lambda f: rbpjax.rbp_solve(f, backward=rule), kind, order)


def assert_loops_fast(make, kind, order):
    f, kernels, x = network(kind, order)
    solve = make(f)
    loss = lambda p, x: jnp.sum(jnp.sin(solve(p, x, jnp.zeros_like(x)).value))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(kernels, x).compile()
    labels = [
        re.findall(r"dim_labels=(\S+?)[,\s]", body) for body in loop_bodies(compiled)
    ]
    # A convolution forward and one backward, in at least one loop each.
    assert sum(map(len, labels)) >= 2
    # XLA itself gives groups an axis of their own, between the last of the kernel.
    fast = {FAST, "b012f_01i2o->b012f"} if kind == "grouped" else {FAST}
    assert {label for body in labels for label in body} <= fast


@cases
def test_gradients_are_those_of_the_unrolled_network(kind, order):
    """Value, first and second order, against a scan over the plain step."""
    f, kernels, x = network(kind, order)

    def unrolled(p, x):
        # ρ(J) < 0.7: 1e-14 after 100 steps, for second order too.
        return lax.scan(lambda h, _: (f(p, x, h), None), 0 * x, length=100)[0]

    def derivatives(run):
        loss = lambda p, x: jnp.sum(jnp.sin(run(p, x)))
        square = lambda p, x: sum(
            jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss, (0, 1))(p, x))
        )
        return jax.jit(
            lambda p, x: (
                run(p, x),
                jax.grad(loss, (0, 1))(p, x),
                jax.grad(square, (0, 1))(p, x),
            )
        )(kernels, x)

    solve = rbpjax.rbp_solve(
        f, forward=FixedPointIteration(tol=1e-14), backward=Adaptive(tol=1e-13)
    )
    got = derivatives(lambda p, x: solve(p, x, 0 * x).value)
    want = derivatives(unrolled)
    assert min(float(jnp.abs(u).max()) for u in jax.tree.leaves(want)) > 1e-3
    chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_by_the_normal_equations(order):
    """The rule that takes J beside Jᵀ: its transposed products are in order too."""
    f, kernels, x = network("plain", order)

    def gradient(solve):
        return jax.grad(
            lambda p, x: jnp.sum(jnp.sin(solve(p, x, 0 * x).value)), (0, 1)
        )(kernels, x)

    forward = FixedPointIteration(tol=1e-14)
    want = gradient(rbpjax.bptt(f, 200))
    for rule in (CGNormal(tol=1e-12), Adaptive(tol=1e-12)):
        got = gradient(rbpjax.rbp_solve(f, forward=forward, backward=rule))
        chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)
