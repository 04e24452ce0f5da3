"""Training as a fixed point: hypergradients in closed form, and the zero ones."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rbpjax
from rbpjax import Adaptive, CGNormal, FixedPointIteration, optimizer_step, soba
from tests.support.problems import CONVERGED_RTOL, assert_close

N = 6
_random = np.random.default_rng(0)
_root = _random.normal(size=(N, N))
A = jnp.asarray(_root @ _root.T / N + 0.5 * np.eye(N))  # condition about 10
B, TARGET = jnp.asarray(_random.normal(size=(2, N)))
PARAMS = {
    "decay": jnp.asarray(_random.uniform(0.1, 1.0, N)),
    "rate": jnp.array(0.1),
    "momentum": jnp.array(0.6),
}


def loss(params, inputs, weights):
    quadratic = 0.5 * weights @ inputs["a"] @ weights - inputs["b"] @ weights
    return quadratic + 0.5 * jnp.sum(params["decay"] * weights**2)


def make(params):
    return optax.sgd(params["rate"], params["momentum"])


INPUTS = {"a": A, "b": B}
STEP = optimizer_step(loss, make)


def start(params):
    return jnp.zeros(N), make(params).init(jnp.zeros(N))


def validation(solve):
    """0.5 ‖w* - target‖² as a function of hyperparameters and data."""

    def of(params, inputs):
        weights = solve(params, inputs, start(params)).value[0]
        return 0.5 * jnp.sum((weights - TARGET) ** 2)

    return of


def closed_form():
    """W* = (A + Λ)⁻¹b: u = (A + Λ)⁻¹(w* - t); ∂/∂λ = -u w*, ∂/∂b = u, ∂/∂A = -u w*ᵀ.

    A enters as wᵀAw / 2, so that its gradient is the symmetric part.
    """
    matrix = A + jnp.diag(PARAMS["decay"])
    w = jnp.linalg.solve(matrix, B)
    u = jnp.linalg.solve(matrix, w - TARGET)
    outer = -jnp.outer(u, w)
    return w, -u * w, {"a": 0.5 * (outer + outer.T), "b": u}


@pytest.mark.parametrize("rule", [Adaptive(tol=1e-12), CGNormal(tol=1e-12)])
def test_hypergradients_are_those_of_the_closed_form(rule):
    """Decay and data through a trained network, by momentum: J is not symmetric."""
    forward = FixedPointIteration(max_steps=5000, tol=1e-14)
    solve = rbpjax.rbp_solve(STEP, forward=forward, backward=rule)
    w, decay_bar, inputs_bar = closed_form()
    solution = jax.jit(solve)(PARAMS, INPUTS, start(PARAMS))
    assert solution.converged
    chex.assert_trees_all_close(solution.value[0], w, rtol=1e-11)
    got = jax.jit(jax.grad(validation(solve), (0, 1)))(PARAMS, INPUTS)
    assert_close((got[0]["decay"], got[1]), (decay_bar, inputs_bar), CONVERGED_RTOL)


def test_step_size_and_momentum_have_no_hypergradient_at_a_minimum():
    """They do not move it: zero there, and not zero on the unfinished path."""
    forward = FixedPointIteration(max_steps=5000, tol=1e-14)
    solve = rbpjax.rbp_solve(STEP, forward=forward)
    there = jax.jit(jax.grad(validation(solve)))(PARAMS, INPUTS)
    path = jax.jit(jax.grad(validation(rbpjax.bptt(STEP, 8))))(PARAMS, INPUTS)
    for name in ("rate", "momentum"):
        # ∇loss and the momentum's trace vanish with the forward residual, 1e-14.
        assert jnp.abs(there[name]) < 1e-11
        assert jnp.abs(path[name]) > 1e-3


def test_the_step_is_the_optimizers_own():
    """Five applications are five updates of optax."""
    h = (weights, state) = start(PARAMS)
    for _ in range(5):
        h = STEP(PARAMS, INPUTS, h)
        grads = jax.grad(lambda w: loss(PARAMS, INPUTS, w))(weights)
        updates, state = make(PARAMS).update(grads, state)
        weights = optax.apply_updates(weights, updates)
    chex.assert_trees_all_equal(h, (weights, state))
    assert jnp.linalg.norm(weights) > 0.1


def test_weights_may_be_any_pytree_and_the_optimizer_any_chain():
    """Decoupled decay by optax.add_decayed_weights, layer by layer: in closed form."""

    def make(params):
        layers = {
            name: optax.chain(optax.add_decayed_weights(params[name]), optax.sgd(0.2))
            for name in ("u", "v")
        }
        return optax.partition(layers, {"u": "u", "v": "v"})

    weights = {"u": jnp.zeros(2), "v": jnp.zeros((3, 1))}
    goal = jax.tree.map(lambda w: w + 3.0, weights)
    plain = lambda params, inputs, w: (
        optax.tree.norm(jax.tree.map(jnp.subtract, w, inputs), squared=True) / 2
    )
    params = {"u": jnp.array(0.5), "v": jnp.array(2.0)}
    solve = rbpjax.rbp_solve(optimizer_step(plain, make))

    def total(params):
        h = solve(params, goal, (weights, make(params).init(weights))).value
        return optax.tree.sum(h[0])

    # w* = 3 / (1 + decay) in each of 2 and 3 entries.
    want = {"u": jnp.array(-6 / 1.5**2), "v": jnp.array(-9 / 9.0)}
    chex.assert_trees_all_close(jax.jit(jax.grad(total))(params), want, rtol=1e-9)


def test_a_counter_in_the_state_is_refused():
    """Adam's bias correction never comes to rest: by name, with a remedy that works."""
    adam = lambda params: optax.adam(params["rate"])
    f = optimizer_step(loss, adam)
    h = (jnp.zeros(N), adam(PARAMS).init(jnp.zeros(N)))
    with pytest.raises(ValueError, match=r"state\[0\]\.count is int32.*rbp_root.*sgd"):
        f(PARAMS, INPUTS, h)
    with pytest.raises(ValueError, match=r"`h` must be \(weights, state\).*got "):
        f(PARAMS, INPUTS, jnp.zeros(N))


def test_the_remedy_for_counters_and_small_steps():
    """The minimum itself, in float32, trained by Adam or with steps of 1e-5.

    There I - J = 1e-5 H is known to ε / 1e-5 = 1 % at best; of the gradient's own
    equation, only the two tolerances (6e-6), the rounding of the data and the
    condition number of 10 matter: 1e-3 is ten times their product.
    """
    params, inputs = jax.tree.map(lambda a: a.astype(jnp.float32), (PARAMS, INPUTS))
    zeros = jnp.zeros(N, jnp.float32)
    minimum = lambda p, x: jnp.linalg.solve(x["a"] + jnp.diag(p["decay"]), x["b"])

    def adam(p, x, w):
        optimizer = optax.adam(optax.exponential_decay(0.1, 100, 0.7))
        state = optimizer.init(w)

        def body(_, carry):
            w, state = carry
            updates, state = optimizer.update(jax.grad(loss, 2)(p, x, w), state)
            return optax.apply_updates(w, updates), state

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.fori_loop(0, 3000, body, (w, state))[0]

    def small_steps(p, x, w):
        step = optimizer_step(loss, lambda p: optax.sgd(1e-5))
        w = minimum(p, x) + 0 * w  # where so many of them would lead
        return step(p, x, (w, optax.sgd(1e-5).init(w)))[0]

    _, decay_bar, _ = closed_form()
    for train in (adam, small_steps):
        solve = rbpjax.rbp_root(jax.grad(loss, argnums=2), solver=train)

        def of(p, probe=None, solve=solve):
            weights = solve(p, inputs, zeros, probe).value
            return 0.5 * jnp.sum((weights - TARGET.astype(jnp.float32)) ** 2)

        run = jax.jit(rbpjax.value_and_grad_with_report(of))
        _, grads, report = run(params)
        chex.assert_trees_all_close(
            grads["decay"].astype(jnp.float64), decay_bar, rtol=1e-3
        )
        assert report.converged == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_plain_iteration_rests_though_the_momentum_is_all_rounding(dtype):
    """The momentum tends to zero, and never gets below the rounding of its terms."""
    cast = lambda tree: jax.tree.map(lambda u: jnp.asarray(u, dtype), tree)
    solve = rbpjax.rbp_solve(STEP, forward=FixedPointIteration(max_steps=5000))
    params = cast(PARAMS)
    begin = cast((jnp.zeros(N), make(params).init(jnp.zeros(N, dtype))))
    found = jax.jit(solve)(params, cast(INPUTS), begin)
    assert found.converged and found.num_products < 2000
    right = jnp.linalg.solve(A + jnp.diag(PARAMS["decay"]), B)
    error = jnp.linalg.norm(found.value[0].astype(float) - right)
    # What converged promises, for a condition of about 10.
    assert error <= float(jnp.finfo(dtype).eps) ** 0.5 * jnp.linalg.norm(right)


CROSS = jnp.asarray(_random.normal(size=(N, 3)))  # p has three numbers


def inner(p, x, w):
    """With w* = A⁻¹(b + Cp)."""
    return 0.5 * w @ x["a"] @ w - (x["b"] + CROSS @ p["c"]) @ w


def outer(p, y, w):
    return 0.5 * jnp.sum((w - y) ** 2) + 0.5 * jnp.sum(p["c"] ** 2)


def bilevel_solution():
    """(p*, w*, u*) of u = A⁻¹(w* - y), p + Cᵀu = 0: linear in p."""
    inv = jnp.linalg.inv(A)
    matrix = jnp.eye(3) + CROSS.T @ inv @ inv @ CROSS
    p = jnp.linalg.solve(matrix, -CROSS.T @ inv @ (inv @ B - TARGET))
    w = inv @ (B + CROSS @ p)
    return p, w, inv @ (w - TARGET)


def whole_batches():
    # Below 2 / λ for the largest eigenvalue of A, and of I + CᵀA⁻²C, far below.
    made = {"outer_optimizer": optax.sgd(0.004), "inner_optimizer": optax.sgd(0.2)}
    return soba(inner, outer, **made), {"c": jnp.zeros(3)}, jnp.ones(N)


def test_directions_are_those_of_the_paper():
    """At a point where nothing is at rest, by dense second derivatives."""
    descent, _, _ = whole_batches()
    p, w, u = (jnp.asarray(_random.normal(size=n)) for n in (3, N, N))
    state = descent.init({"c": p}, w)._replace(adjoint=u)
    got = descent.directions(state, INPUTS, TARGET)
    hessian = jax.hessian(inner, 2)({"c": p}, INPUTS, w)
    cross = jax.jacobian(jax.grad(inner, 2))({"c": p}, INPUTS, w)["c"]
    want = (
        {"c": p - cross.T @ u},
        hessian @ w - B - CROSS @ p,
        hessian @ u - (w - TARGET),
    )
    chex.assert_trees_all_close(tuple(got), want, rtol=1e-12)
    assert jnp.linalg.norm(cross + CROSS) < 1e-12  # the sign of the paper's ∇²₂₁G


def test_whole_batches_converge_to_the_closed_form():
    """Outer, inner and adjoint, together; there the direction is the hypergradient."""
    descent, p, w = whole_batches()
    step = lambda state, _: (descent.update(state, INPUTS, TARGET), None)
    run = jax.jit(lambda state: jax.lax.scan(step, state, length=4000)[0])
    end = run(descent.init(p, w))
    want = bilevel_solution()
    got = end.params["c"], end.weights, end.adjoint
    # The slowest rate is about that of the outer steps, 1 - 0.004 · 2.4: e⁻³⁸ in all.
    for value, wanted in zip(got, want, strict=True):
        assert_close(value, wanted, 1e-10)
    # For other params too: held there, inner and adjoint come to the exact adjoint.
    held = soba(
        inner,
        outer,
        outer_optimizer=optax.set_to_zero(),
        inner_optimizer=optax.sgd(0.2),
    )
    state = held.init({"c": jnp.array([1.0, -2.0, 0.5])}, w)
    step = lambda state, _: (held.update(state, INPUTS, TARGET), None)
    state = jax.jit(lambda s: jax.lax.scan(step, s, length=2000)[0])(state)
    weights = jnp.linalg.solve(A, B + CROSS @ state.params["c"])
    assert_close(state.adjoint, jnp.linalg.solve(A, weights - TARGET), 1e-10)
    trained = rbpjax.rbp_root(jax.grad(inner, argnums=2), backward=Adaptive(tol=1e-12))
    value = lambda p: outer(p, TARGET, trained(p, INPUTS, w).value)
    direction = held.directions(state, INPUTS, TARGET)
    assert_close(direction.params, jax.jit(jax.grad(value))(state.params), 1e-8)


def test_inner_steps():
    """K of them are K - 1 with the params held, and a step; many, the hypergradient."""
    make = lambda outer_rate, **options: soba(
        inner,
        outer,
        outer_optimizer=optax.sgd(outer_rate),
        inner_optimizer=optax.sgd(0.2, 0.3),  # with a state to keep
        **options,
    )
    p = {"c": jnp.array([1.0, -2.0, 0.5])}
    first = make(0.1).init(p, jnp.ones(N))
    held = make(0.0).update(make(0.0).update(first, INPUTS, TARGET), INPUTS, TARGET)
    want = make(0.1).update(held, INPUTS, TARGET)
    got = make(0.1, inner_steps=3).update(first, INPUTS, TARGET)
    chex.assert_trees_all_close(got, want, rtol=1e-13)
    chex.assert_trees_all_equal(
        make(0.1, inner_steps=1).update(first, INPUTS, TARGET),
        make(0.1).update(first, INPUTS, TARGET),
    )
    # Eigenvalues from 0.5: heavy ball leaves far less than 0.9 a step, e⁻³¹ of 300.
    many = jax.jit(make(0.1, inner_steps=300).update)(first, INPUTS, TARGET)
    weights = jnp.linalg.solve(A, B + CROSS @ p["c"])
    adjoint = jnp.linalg.solve(A, weights - TARGET)
    assert_close((p["c"] - many.params["c"]) / 0.1, p["c"] + CROSS.T @ adjoint, 1e-10)


def batches():
    """Five of the inner loss, three of the outer; their means are the whole."""
    noise = _random.normal(size=(5, N, N)) * 0.05
    noise = noise + noise.transpose(0, 2, 1)
    shift = _random.normal(size=(5, N)), _random.normal(size=(3, N))
    centred = lambda x: x - x.mean(0)
    around = lambda x, noise: jnp.asarray(np.asarray(x) + centred(noise))
    return {"a": around(A, noise), "b": around(B, shift[0])}, around(TARGET, shift[1])


def test_directions_of_batches_are_unbiased():
    """The mean over all pairs of batches is the direction of the whole losses."""
    descent, _, _ = whole_batches()
    p, w, u = (jnp.asarray(_random.normal(size=n)) for n in (3, N, N))
    state = descent.init({"c": p}, w)._replace(adjoint=u)
    xs, ys = batches()
    pairs = jax.vmap(lambda x: jax.vmap(lambda y: descent.directions(state, x, y))(ys))(
        xs
    )
    mean = jax.tree.map(lambda d: d.mean((0, 1)), pairs)
    want = descent.directions(state, INPUTS, TARGET)
    chex.assert_trees_all_close(mean, want, rtol=1e-10, atol=1e-12)
    assert max(jnp.ptp(d[:, 0], 0).max() for d in jax.tree.leaves(pairs)) > 0.1


def test_batches_with_falling_steps_come_near():
    """Errors fall with the step size: to less than half in sixteen times the steps."""
    xs, ys = batches()
    slow = lambda rate: optax.sgd(lambda k: rate / (1 + k / 200) ** 0.7)
    descent = soba(inner, outer, outer_optimizer=slow(0.01), inner_optimizer=slow(0.15))

    def step(state, key):
        first, second = jax.random.split(key)
        i, j = jax.random.randint(first, (), 0, 5), jax.random.randint(second, (), 0, 3)
        x, y = jax.tree.map(lambda x: x[i], xs), ys[j]
        return descent.update(state, x, y), state.params["c"]

    keys = jax.random.split(jax.random.key(0), 32_000)
    start = descent.init({"c": jnp.zeros(3)}, jnp.zeros(N))
    with jax.numpy_dtype_promotion("standard"):
        _, path = jax.jit(lambda s: jax.lax.scan(step, s, keys))(start)
    far = jnp.linalg.norm(path - bilevel_solution()[0][None], axis=1)
    early, late = far[1000:2000].mean(), far[-4000:].mean()
    assert late < 0.5 * early and late < 0.1 * far[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inner": 3}, r"`inner`.*inner\(params, inputs, weights\).*got 3"),
        ({"inner_optimizer": 0.1}, r"`inner_optimizer`.*optax.sgd.*got 0.1"),
        ({"inner_steps": 0}, r"`inner_steps`.*at least 1.*got 0"),
        ({"inner_steps": 2.0}, r"`inner_steps`.*int.*got 2.0"),
    ],
)
def test_what_is_no_loss_or_optimizer_is_refused(change, words):
    """By the name of the argument."""
    options = {"inner": inner, "outer": outer, "outer_optimizer": optax.sgd(0.1)}
    options |= {"inner_optimizer": optax.sgd(0.1)} | change
    with pytest.raises(ValueError, match=words):
        soba(options.pop("inner"), options.pop("outer"), **options)
