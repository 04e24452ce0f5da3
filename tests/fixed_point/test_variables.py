"""``scale`` and ``batch_axis``: other variables, and a batch as its examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Adaptive, AdjointReport, FixedPointIteration, Hybrid, rbp_solve

KEY = jax.random.key(0)
UNITS = jnp.array([1e6, 1.0, 1e-7])  # pressure, velocity, concentration
# The smallest entry drives none of the others: their residuals do not tell of it.
W = (0.5 * jax.random.normal(KEY, (3, 3)) / np.sqrt(3)).at[:, 2].set([0, 0, 0.9])
X = jnp.array([0.3, -1.0, 0.6])


def mixed(w, x, h):
    """A contraction whose entries have those units."""
    return UNITS * jnp.tanh(w @ (h / UNITS) + x)


def dense(w, x, g, steps=400):
    """The gradient for the cotangent g of h, by an unrolled iteration."""

    def run(w):
        u = jax.lax.fori_loop(0, steps, lambda _, u: jnp.tanh(w @ u + x), X)
        for _ in range(60):
            u = jnp.tanh(w @ u + x)
        return UNITS * u

    return run(w), jax.vjp(run, w)[1](g)[0]


LOSS_WEIGHTS = jnp.array([1e-6, 1.0, 1e7]) * jnp.array([0.5, -1.0, 2.0])


def test_a_scale_makes_all_units_count():
    """Without it the smallest entries stop at their start; with it they are right."""
    tight = dict(forward=FixedPointIteration(tol=1e-6), backward=Adaptive(tol=1e-6))
    value, grad = dense(W, X, LOSS_WEIGHTS)
    start = value * jnp.array([1.0, 1.0, 0.0])  # only the smallest is wrong
    found = {
        name: rbp_solve(mixed, scale=scale, **tight)
        for name, scale in (("without", None), ("with", UNITS))
    }
    state = {k: solve(W, X, start).value for k, solve in found.items()}
    error = {k: jnp.abs(v[2] / value[2] - 1) for k, v in state.items()}
    assert error["without"] > 0.1
    assert error["with"] < 1e-5
    loss = lambda w: LOSS_WEIGHTS @ found["with"](w, X, start).value
    np.testing.assert_allclose(jax.grad(loss)(W), grad, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 7])
def test_a_scale_rounds_nothing(steps):
    """A given number of steps is the same to the last bit: powers of two."""
    few = FixedPointIteration(steps=steps)
    plain = rbp_solve(mixed, forward=few)(W, X, UNITS)
    scaled = rbp_solve(mixed, forward=few, scale=UNITS * 1.7)(W, X, UNITS)
    np.testing.assert_array_equal(scaled.value, plain.value)


@pytest.mark.full
def test_a_scale_may_be_a_prefix_and_traced():
    """One number for all, one for each leaf; its gradient is zero."""
    f = lambda a, x, h: {"p": a * h["p"] + x, "q": [jnp.tanh(h["p"]) * a]}
    h0 = {"p": jnp.zeros(2), "q": [jnp.ones(2)]}
    want = rbp_solve(f)(0.4, 1.0, h0).value

    def run(scale):
        solve = rbp_solve(f, scale=scale)
        return jax.tree.map(lambda u: u.sum(), solve(0.4, 1.0, h0).value)

    for scale in (3.0, {"p": 1e3, "q": 1e-3}, {"p": jnp.array([1.0, 9.0]), "q": [2.0]}):
        got = jax.jit(run)(scale)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.sum()), got, want)
    grad = jax.grad(lambda s: run(s)["p"])(3.0)
    assert grad == 0


@pytest.mark.full
def test_the_report_and_a_warm_start_with_a_scale():
    """An adjoint comes out in h's own units, and starts the next solve there."""
    solve = rbp_solve(mixed, scale=UNITS, backward=Adaptive(tol=1e-9))
    loss = lambda w, probe: LOSS_WEIGHTS @ solve(w, X, UNITS, probe).value
    step = rbpjax.value_and_grad_with_report(loss)
    _, _, report = step(W, probe=AdjointReport.zeros(adjoint=jnp.zeros(3)))
    h = solve(W, X, UNITS).value
    jac = jax.jacobian(lambda h: mixed(W, X, h))(h)
    z = np.linalg.solve(np.eye(3) - jac.T, LOSS_WEIGHTS)
    np.testing.assert_allclose(report.adjoint, z, rtol=1e-7)
    assert report.converged == 1 and report.num_steps > 0
    _, _, again = step(W, probe=report)
    assert again.num_steps == 0
    np.testing.assert_allclose(again.adjoint, z, rtol=1e-7)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.0, "`scale` must be positive"),
        (jnp.array([1.0, -1.0, 2.0]), "`scale` must be positive"),
        (float("inf"), "`scale` must be positive"),
        (
            jnp.ones(2),
            r"`scale` must be a pytree like `h0`.*\[2\].*\[3\]",
        ),
        ({"a": 1.0}, "`scale` must be a pytree like `h0`"),
    ],
)
def test_what_is_no_scale(scale, message):
    with pytest.raises(ValueError, match=message):
        rbp_solve(mixed, scale=scale)(W, X, UNITS)


# A batch of examples with rates from 0 to 0.97, one without a fixed point.


def layer(w, x, h):
    """Written for batches: rows of x and h."""
    return x["rate"][:, None] * jnp.tanh(h @ w.T) + x["shift"]


RATES = jnp.array([0.0, 0.3, 0.9, 0.97])
INPUTS = {"rate": RATES, "shift": 0.1 * jax.random.normal(KEY, (4, 3))}
V = jnp.array([[0.6, -0.7, 0.1], [0.8, 0.5, -0.2], [0.1, 0.3, 0.9]])
OPTIONS = dict(forward=FixedPointIteration(tol=1e-10), backward=Adaptive(tol=1e-10))


def alone(i, w=V):
    one = jax.tree.map(lambda u: u[i : i + 1], INPUTS)
    return rbp_solve(layer, **OPTIONS)(w, one, jnp.zeros((1, 3)))


@pytest.mark.parametrize("axis", [0, -2])
def test_each_example_is_solved_by_itself(axis):
    """Value, steps and verdict are those of the example alone."""
    f, inputs = layer, INPUTS
    if axis == -2:  # rates need that axis, too
        inputs = {**INPUTS, "rate": RATES[:, None]}
        f = lambda w, x, h: layer(w, {**x, "rate": x["rate"][:, 0]}, h)
    solution = rbp_solve(f, batch_axis=axis, **OPTIONS)(V, inputs, jnp.zeros((4, 3)))
    assert solution.num_steps.shape == solution.converged.shape == (4,)
    assert solution.value.shape == (4, 3)
    for i in range(4):
        one = alone(i)
        np.testing.assert_allclose(solution.value[i], one.value[0], rtol=1e-12)
        assert solution.num_steps[i] == one.num_steps
    assert solution.num_steps[0] < solution.num_steps[1] < solution.num_steps[3]


@pytest.mark.full
def test_a_bad_example_spoils_no_other():
    """NaN in one, no rest in another: the others are as without them.

    So is the gradient of a loss that leaves them out, where they are finite.
    """
    inputs = {
        "rate": RATES.at[1].set(jnp.nan).at[2].set(3.0),
        "shift": INPUTS["shift"],
    }
    f = lambda w, x, h: x["rate"][:, None] * (h @ w.T) + x["shift"]  # unbounded
    solve = rbp_solve(f, batch_axis=0, **OPTIONS)
    whole = rbp_solve(f, **OPTIONS)(V, inputs, jnp.zeros((4, 3)))
    assert not whole.converged
    solution = solve(V, inputs, jnp.zeros((4, 3)))
    assert solution.converged.tolist() == [True, False, False, True]
    inputs["rate"] = inputs["rate"].at[1].set(5.0)  # in JAX, NaN times zero is NaN
    good = jnp.array([0, 3])
    loss = lambda w: jnp.sum(solve(w, inputs, jnp.zeros((4, 3))).value[good])
    one = lambda i, w: rbp_solve(f, **OPTIONS)(
        w, jax.tree.map(lambda u: u[i : i + 1], inputs), jnp.zeros((1, 3))
    )
    want = jax.grad(lambda w: sum(jnp.sum(one(i, w).value) for i in (0, 3)))(V)
    got = jax.grad(loss)(V)
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.full
def test_gradients_aux_and_what_is_no_array():
    """Of parameters the sum over examples; aux is of the whole batch at h*."""
    f = lambda w, x, h: (x["act"](layer(w, x, h)), {"mean": jnp.mean(h), "h": h})
    inputs = {**INPUTS, "act": jnp.tanh}
    plain = rbp_solve(f, has_aux=True, **OPTIONS)
    solve = rbp_solve(f, has_aux=True, batch_axis=0, **OPTIONS)
    h0 = jnp.zeros((4, 3))

    def loss(solve, w):
        solution = solve(w, inputs, h0)
        return jnp.sum(solution.value**2) + solution.aux["mean"]

    want = jax.grad(loss, 1)(plain, V)
    got = jax.jit(jax.grad(loss, 1), static_argnums=0)(solve, V)
    np.testing.assert_allclose(got, want, rtol=1e-7)
    aux = solve(V, inputs, h0).aux
    np.testing.assert_allclose(aux["mean"], jnp.mean(aux["h"]))


@pytest.mark.full
def test_one_probe_gets_the_worst_and_many_get_their_own():
    solve = rbp_solve(layer, batch_axis=0, **OPTIONS)
    loss = lambda w, probe: jnp.sum(solve(w, INPUTS, jnp.zeros((4, 3)), probe).value)
    step = rbpjax.value_and_grad_with_report(loss)
    _, grad, each = step(V, probe=AdjointReport.zeros((4,), adjoint=jnp.zeros((4, 3))))
    _, same, worst = step(V, probe=AdjointReport.zeros(adjoint=jnp.zeros((4, 3))))
    np.testing.assert_allclose(same, grad)
    assert each.num_steps.shape == (4,) and worst.num_steps.shape == ()
    for name in ("num_steps", "residual", "bound", "forward_steps", "forward_residual"):
        want = getattr(each, name).max()
        np.testing.assert_allclose(getattr(worst, name), want, rtol=1e-6)
    assert worst.converged == each.converged.min() == 1
    np.testing.assert_allclose(worst.cotangent_norm, np.sqrt(12))
    np.testing.assert_allclose(worst.adjoint, each.adjoint)
    for i in range(4):
        assert int(each.forward_steps[i]) == alone(i).num_steps


@pytest.mark.full
def test_one_bad_example_is_told_by_the_one_report():
    few = FixedPointIteration(max_steps=30, tol=1e-10)
    solve = rbp_solve(layer, batch_axis=0, forward=few)
    loss = lambda w, probe: jnp.sum(solve(w, INPUTS, jnp.zeros((4, 3)), probe).value)
    _, _, report = rbpjax.value_and_grad_with_report(loss)(V)
    assert report.converged == 0 and report.forward_status != 0


@pytest.mark.full
def test_batch_and_scale_together():
    """The scale is of one example."""
    f = lambda w, x, h: jax.vmap(mixed, (None, 0, 0))(w, x, h)
    xs = jnp.stack([X, 2 * X])
    solve = rbp_solve(f, batch_axis=0, scale=UNITS, forward=Hybrid(tol=1e-10))
    solution = solve(W, xs, jnp.ones((2, 3)))
    for i in range(2):
        u = jnp.zeros(3)
        for _ in range(200):
            u = jnp.tanh(W @ u + xs[i])
        np.testing.assert_allclose(solution.value[i], UNITS * u, rtol=1e-8)
    assert solution.converged.all()


def test_what_has_no_batch_axis():
    solve = rbp_solve(layer, batch_axis=0)
    with pytest.raises(ValueError, match=r"`batch_axis=0` every array.*`params`"):
        solve(V, {**INPUTS, "rate": RATES[:3]}, jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"`batch_axis=0` every array.*`params`"):
        solve(V, {**INPUTS, "gain": 2.0}, jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="`batch_axis` must be"):
        rbp_solve(layer, batch_axis="batch")
