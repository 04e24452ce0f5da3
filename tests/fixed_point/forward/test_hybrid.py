"""The default solver against closed forms, dense solves and other precisions."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Anderson, FixedPointIteration, Hybrid, Newton, Status
from tests.support.problems import PROBLEMS

jit_solve = lambda solver, step: jax.jit(partial(solver, step))


def matrix(seed, n, gain):
    w = np.random.default_rng(seed).normal(size=(n, n)) / n**0.5
    return jnp.asarray(gain * w)


def descent(condition, n=24):
    """A quadratic's gradient descent, with the solution of its linear system."""
    random = np.random.default_rng(3)
    q = np.linalg.qr(random.normal(size=(n, n)))[0]
    a = (q * np.geomspace(1 / condition, 1, n)) @ q.T
    b = random.normal(size=n)
    return (lambda h: h - (a @ h - b)), np.zeros(n), np.linalg.solve(a, b)


def two_units():
    """A pressure near 1e6 beside a velocity near 1, which is solved for densely."""
    w, x = 0.9 * np.array([[0.0, -1.0], [1.0, 0.0]]), np.array([0.5, 0.3])
    v = np.zeros(2)
    for _ in range(50):
        t = np.tanh(w @ v + x)
        v = v - np.linalg.solve(np.diag(1 - t**2) @ w - np.eye(2), t - v)
    step = lambda h: (0.5 * h[0] + 0.5e6, jnp.tanh(w @ h[1] + x))
    return step, (np.full(1, 1e6), np.zeros(2)), (np.full(1, 1e6), v)


CASES = {
    "stiff Euler": (lambda h: 1 - 5 * h, np.ones(2), np.full(2, 1 / 6)),
    "zero": (lambda h: 0.5 * h, np.ones(3), np.zeros(3)),
    "zero, oscillating": (lambda h: -0.999 * h, np.ones(3), np.zeros(3)),
    "arctan": (lambda h: h - jnp.arctan(h - 5), np.array([15.0]), np.array([5.0])),
    "arctan, far": (lambda h: h + jnp.arctan(1 - h), np.array([30.0]), np.ones(1)),
    "logistic map": (lambda h: 3.2 * h * (1 - h), np.array([0.3]), np.array([0.6875])),
    "rotation": (
        lambda h: jnp.stack([-h[1], h[0]]) + jnp.array([1.0, 0.5]),
        np.zeros(2),
        np.array([0.25, 0.75]),
    ),
    "descent, condition 100": descent(1e2),
    "units": two_units(),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_what_plain_iteration_solves_slowly_or_not_at_all(name, dtype):
    """Right leaf by leaf, to the error that ``Solution`` promises."""
    step, h0, right = CASES[name]
    cast = lambda tree: jax.tree.map(lambda u: jnp.asarray(u, dtype), tree)
    with jax.numpy_dtype_promotion("standard"):  # what steps close over is float64
        found = jit_solve(Hybrid(), lambda h: cast(step(h)))(cast(h0))
    assert bool(found.converged), Status(int(found.status)).words
    allowed = 2 * float(jnp.finfo(dtype).eps) ** 0.5  # twice what an estimate says
    for u, v in zip(jax.tree.leaves(found.value), jax.tree.leaves(right), strict=True):
        error = np.linalg.norm(np.asarray(u, float) - v)
        assert error <= allowed * (np.linalg.norm(v) or np.linalg.norm(h0[:1]))


NOWHERE = {
    "h + exp(-h)": lambda h: h + jnp.exp(-h),
    "softplus": jax.nn.softplus,
    "sqrt(1 + h²)": lambda h: jnp.sqrt(1 + h * h),
    "h + 1": lambda h: h + 1,
    "h² + 1": lambda h: h * h + 1,
    "relay": lambda h: jnp.where(h < 0.5, 1.0, 0.0).astype(h.dtype),
}


@pytest.mark.full
@pytest.mark.parametrize("solver", [Hybrid(), Anderson(), Newton()], ids=repr)
@pytest.mark.parametrize("name", NOWHERE)
def test_maps_without_a_fixed_point_never_converge(name, solver):
    """However small the residual is beside a state that grows."""
    for dtype in (jnp.float32, jnp.float64):
        for start in (0.3, 7.0):
            found = jit_solve(solver, NOWHERE[name])(jnp.full(2, start, dtype))
            assert not bool(found.converged), (dtype, start)
            assert int(found.status) != Status.CONVERGED


@pytest.mark.parametrize("name", ["tanh_rnn", "hopfield"])
def test_no_evaluation_more_than_plain_iteration_where_that_is_quick(name):
    """The same value, bit for bit."""
    problem = PROBLEMS[name]
    step = partial(problem.f, problem.params, problem.inputs)
    plain = jit_solve(FixedPointIteration(tol=1e-6), step)(problem.h0)
    found = jit_solve(Hybrid(tol=1e-6), step)(problem.h0)
    assert bool(plain.converged) and int(plain.num_products) <= 25
    chex.assert_trees_all_equal(found, plain)


@pytest.mark.parametrize("solver", [Hybrid(), FixedPointIteration()], ids=repr)
@pytest.mark.parametrize("gain", [0.5, 1.8])
def test_units_of_leaves_do_not_matter(solver, gain):
    """Leaves in other units, by powers of two: the same steps, bit for bit."""
    w, x = matrix(0, 8, gain), matrix(1, 8, 1.0)[0]

    def solve(a, b):
        def step(h):
            u, v = h[0] / a, h[1] / b
            return a * jnp.tanh(w @ v + x), b * (0.5 * u - 0.4 * v)

        found = jit_solve(solver, step)((jnp.zeros(8), jnp.zeros(8)))
        u, v = found.value
        return found._replace(value=(u / a, v / b))

    chex.assert_trees_all_equal(solve(1.0, 1.0), solve(2.0**30, 2.0**-40))


def test_mapped_solves_are_those_of_one_by_one():
    """Each has its own way and status: quick, slow, and without a fixed point."""
    w = matrix(2, 6, 1.0)
    step = lambda gain, h: jnp.where(gain > 9, h + 1, jnp.tanh(gain * (w @ h)) + 0.1)
    gains = jnp.array([0.3, 1.5, -3.0, 10.0])
    solve = lambda gain: Hybrid()(partial(step, gain), jnp.zeros(6))
    together = jax.jit(jax.vmap(solve))(gains)
    for i, gain in enumerate(gains):
        alone = jax.jit(solve)(gain)
        assert int(together.status[i]) == int(alone.status)
        if alone.converged:
            # Two runs of one program stop within the error that both promise.
            chex.assert_trees_all_close(
                together.value[i], alone.value, rtol=0, atol=1e-7
            )
    assert not bool(together.converged[3])


def test_products_of_low_precision_end_soon_and_are_called_rounding():
    """What f computes in bfloat16 has no fixed point to float32's tolerance."""
    low = lambda a: jax.lax.reduce_precision(a, 8, 7)
    w = 0.6 * matrix(4, 32, 1.0).astype(jnp.float32)
    w /= jnp.linalg.norm(w, 2)
    step = lambda h: jnp.tanh(low(h) @ low(w) + 0.3)
    found = jit_solve(Hybrid(), step)(jnp.zeros((4, 32), jnp.float32))
    assert int(found.num_products) <= 100
    assert Status(int(found.status)) is Status.ROUNDING
    smooth = jit_solve(Hybrid(), lambda h: jnp.tanh(h @ w + 0.3))(found.value).value
    assert jnp.max(jnp.abs(found.value - smooth)) < 2.0**-6  # a few of its roundings


def test_a_step_with_a_backward_pass_of_its_own():
    """There are no products with J, and none are needed."""
    clip = jax.custom_vjp(lambda h: h)
    clip.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -1e3, 1e3),))
    w = matrix(5, 4, 1.5)
    found = jit_solve(Hybrid(), lambda h: jnp.tanh(w @ clip(h) + 0.5))(jnp.zeros(4))
    again = jit_solve(Hybrid(), lambda h: jnp.tanh(w @ h + 0.5))(jnp.zeros(4))
    assert bool(found.converged) and bool(again.converged)
    chex.assert_trees_all_close(found.value, again.value, rtol=0, atol=1e-7)


def test_complex_states_that_are_not_holomorphic():
    """As pairs of real numbers: conj(h) has no complex derivative."""
    w = jax.lax.complex(matrix(6, 5, 1.4), matrix(7, 5, 1.4))
    step = lambda h: 0.9 * jnp.tanh(w @ jnp.conj(h)) + 0.3
    found = jit_solve(Hybrid(), step)(jnp.zeros(5, jnp.complex128))
    assert bool(found.converged)
    assert jnp.linalg.norm(step(found.value) - found.value) < 1e-11


def test_the_start_is_not_returned_for_want_of_a_better_one():
    """An oscillating map from zeros, whose residuals are above that of the start."""
    f = lambda w, x, h: jnp.tanh(w * h + x)
    for forward in (FixedPointIteration(tol=1e-4, max_steps=40), Hybrid()):
        solve = jax.jit(rbpjax.rbp_solve(f, forward=forward))
        found = solve(-4.0, 0.5 * jnp.ones(8), jnp.zeros(8))
        assert bool(found.converged) or float(jnp.linalg.norm(found.value)) > 0
