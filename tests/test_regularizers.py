"""Regularizers: dense oracles, and training runs that leave and are brought back."""

import itertools
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import rbpjax
from tests.support.problems import PROBLEMS, dense_jacobian, fixed_point, rows

KEY = jax.random.key(21)
problems = pytest.mark.parametrize("problem", rows(PROBLEMS, ("pytree", "hopfield")))


def arguments(problem):
    return problem.f, problem.params, problem.inputs, fixed_point(problem)


_JACOBIANS = {}  # by the step: each problem has its own


def jacobian(problem):
    if problem.f not in _JACOBIANS:
        dense = jax.jit(partial(dense_jacobian, problem))
        _JACOBIANS[problem.f] = dense(fixed_point(problem))
    return _JACOBIANS[problem.f]


def penalty_of(problem, probes):
    """The compiled penalty of one problem at its fixed point."""
    f, *args = arguments(problem)
    compiled = jax.jit(
        lambda *a: rbpjax.regularizers.jacobian_penalty(None, f, *a[:3], probes=a[3])
    )
    return compiled(*args, probes)


def stacked(rows, like):
    """Flat vectors as a pytree like the state, with a leading axis."""
    return jax.vmap(ravel_pytree(like)[1])(rows)


# --- jacobian_penalty ----------------------------------------------------------------


@problems
def test_jacobian_penalty_is_exact_over_an_orthonormal_basis(problem):
    """Over √n times any orthonormal basis the mean is ‖J‖_F² / n ≥ ρ(J)² / n."""
    jac = jacobian(problem)
    n = len(jac)
    basis = n**0.5 * jnp.linalg.qr(jax.random.normal(KEY, (n, n)))[0].T
    got = penalty_of(problem, stacked(basis, fixed_point(problem)))
    np.testing.assert_allclose(got, jnp.sum(jac**2) / n, rtol=1e-12)
    assert n * got >= jnp.abs(jnp.linalg.eigvals(jac)).max() ** 2


def test_jacobian_penalty_is_exact_over_all_signs():
    """The mean over all 2ⁿ sign vectors, whose covariance is I, is ‖J‖_F² / n."""
    problem = PROBLEMS["linear"]
    signs = jnp.array(list(itertools.product((-1.0, 1.0), repeat=3)))
    jac = jacobian(problem)
    got = penalty_of(problem, signs)
    np.testing.assert_allclose(got, jnp.sum(jac**2) / 3, rtol=1e-12)
    # One probe alone is ‖Jᵀε‖²/n, not ‖Jε‖²/n: J is not symmetric.
    one = penalty_of(problem, signs[1:2])
    np.testing.assert_allclose(one, jnp.sum((jac.T @ signs[1]) ** 2) / 3, rtol=1e-12)
    assert abs(one - jnp.sum((jac @ signs[1]) ** 2) / 3) > 0.01


@problems
def test_jacobian_penalty_is_unbiased(problem):
    """Mean over keys = ‖J‖_F² / n, and so for the gradient, to 5 standard errors."""
    f, params, inputs, h = arguments(problem)
    flat, unravel = ravel_pytree(params)

    def exact(theta):
        moved = problem._replace(params=unravel(theta))
        jac = dense_jacobian(moved, h)
        return jnp.sum(jac**2) / len(jac)

    estimate = lambda theta, key: rbpjax.regularizers.jacobian_penalty(
        key, f, unravel(theta), inputs, h, num_probes=2
    )

    value, grad = jax.jit(jax.value_and_grad(exact))(flat)
    direction = grad / jnp.linalg.norm(grad)

    @jax.jit
    @jax.vmap
    def sample(key):
        value, grad = jax.value_and_grad(estimate)(flat, key)
        return jnp.stack([value, grad @ direction])

    samples = np.asarray(sample(jax.random.split(KEY, 4000)))
    want = np.array([value, grad @ direction])
    standard_error = samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    assert (standard_error < 0.05 * abs(want)).all()
    assert (abs(samples.mean(axis=0) - want) < 5 * standard_error).all()


def test_jacobian_penalty_draws_each_probe_anew():
    """Other keys, and more probes of one key, give other values; one key the same."""
    args = arguments(PROBLEMS["tanh_rnn"])
    penalty = jax.jit(
        lambda key, num_probes=1: rbpjax.regularizers.jacobian_penalty(
            key, *args, num_probes=num_probes
        ),
        static_argnames="num_probes",
    )
    values = [penalty(KEY), penalty(jax.random.key(3)), penalty(KEY, num_probes=2)]
    assert len({float(v) for v in values}) == 3
    assert penalty(KEY) == values[0]


@problems
def test_penalties_are_differentiable_in_params_inputs_and_state(problem):
    """First derivatives against finite differences, in all three arguments."""
    f, params, inputs, h = arguments(problem)
    n = ravel_pytree(h)[0].size
    probes = stacked(jax.random.normal(KEY, (2, n)), h)
    both = lambda p, x, h: (
        rbpjax.regularizers.jacobian_penalty(None, f, p, x, h, probes=probes)
        + rbpjax.regularizers.contraction_penalty(f, p, x, h, bound=0.05)
    )
    jax.test_util.check_grads(
        jax.jit(both), (params, inputs, h), 1, modes=("rev",), rtol=1e-5, atol=1e-7
    )


# --- contraction_penalty -------------------------------------------------------------


@problems
@pytest.mark.parametrize("bound", [0.0, 0.1, 0.9])
def test_contraction_penalty_is_that_of_the_column_sums(problem, bound):
    """The mean square excess of the explicit, signed column sums of J."""
    f, *args = arguments(problem)
    jac = np.asarray(jacobian(problem))
    excess = np.maximum(jac.sum(axis=0) - bound, 0)
    got = jax.jit(partial(rbpjax.regularizers.contraction_penalty, f, bound=bound))(
        *args
    )
    np.testing.assert_allclose(got, np.mean(excess**2), rtol=1e-12, atol=1e-15)
    if bound == 0:
        rows = np.maximum(jac.sum(axis=1), 0)
        assert abs(np.mean(rows**2) - got) > 0.01 * got  # not the row sums
        assert got > 1e-4


def test_contraction_penalty_bounds_nonnegative_jacobians():
    """J ≥ 0 with penalty zero has ρ(J) ≤ bound; above it the penalty is positive."""
    w = jax.random.uniform(KEY, (6, 6))
    f = lambda w, x, h: w @ h + x
    for scale in (0.5, 0.99, 1.01, 2.0):
        jac = 0.9 * scale * w / w.sum(axis=0).max()
        penalty = rbpjax.regularizers.contraction_penalty(
            f, jac, jnp.ones(6), jnp.ones(6)
        )
        assert (penalty == 0) == (scale < 1)
        if penalty == 0:
            assert jnp.abs(jnp.linalg.eigvals(jac)).max() <= 0.9


def test_contraction_penalty_is_blind_to_inhibition():
    """The documented limit: J = -2I diverges and costs nothing."""
    f = lambda w, x, h: w @ h + x
    got = rbpjax.regularizers.contraction_penalty(
        f, -2 * jnp.eye(3), jnp.ones(3), jnp.ones(3)
    )
    assert got == 0
    noisy = rbpjax.regularizers.jacobian_penalty(
        KEY, f, -2 * jnp.eye(3), jnp.ones(3), jnp.ones(3)
    )
    assert noisy > 0.1


# --- spectral_normalize --------------------------------------------------------------

SHAPES = pytest.mark.parametrize(
    "shape", rows([(7, 7), (4, 9), (9, 4), (3, 3, 5, 6)], [(4, 9), (3, 3, 5, 6)])
)


def sigma_of(kernel):
    matrix = np.asarray(kernel).reshape(-1, kernel.shape[-1])
    return np.linalg.svd(matrix, compute_uv=False)[0]


@SHAPES
@pytest.mark.parametrize("target", [0.3, 0.95])
def test_spectral_normalize_brings_sigma_to_the_target(shape, target):
    """Against SVD, for square, wide, tall and convolution kernels: σ is the target."""
    kernel = jax.random.normal(KEY, shape)
    assert sigma_of(kernel) > 1.5
    got = rbpjax.regularizers.spectral_normalize(kernel, target)
    np.testing.assert_allclose(sigma_of(got), target, rtol=1e-12)
    # It is a multiple of the kernel, and nothing else.
    np.testing.assert_allclose(got, kernel * (target / sigma_of(kernel)), rtol=1e-12)


@SHAPES
@pytest.mark.parametrize("num_steps", [None, 5])
def test_spectral_normalize_leaves_small_kernels_alone(shape, num_steps):
    """σ ≤ target: the same bits, and an identity for gradients; zero kernels too."""
    kernel = 0.01 * jax.random.normal(KEY, shape)
    normalize = partial(
        rbpjax.regularizers.spectral_normalize, target=0.9, num_steps=num_steps
    )
    assert jnp.array_equal(normalize(kernel), kernel)
    cotangent = jax.random.normal(jax.random.key(3), shape)
    pulled = jax.vjp(normalize, kernel)[1](cotangent)[0]
    assert jnp.array_equal(pulled, cotangent)
    zero = jnp.zeros(shape)
    assert jnp.array_equal(normalize(zero), zero)
    assert jnp.array_equal(jax.vjp(normalize, zero)[1](cotangent)[0], cotangent)


@SHAPES
def test_spectral_normalize_is_differentiable(shape):
    """Against finite differences, through σ too; and by the power method the same."""
    kernel = jax.random.normal(KEY, shape)
    exact = lambda k: rbpjax.regularizers.spectral_normalize(k, 0.9)
    jax.test_util.check_grads(exact, (kernel,), 1, rtol=1e-5, atol=1e-6)
    # σ₂/σ₁ < 0.97 here: 1000 steps leave 0.97^2000, far below rounding.
    power = lambda k: rbpjax.regularizers.spectral_normalize(k, 0.9, num_steps=1000)
    cotangent = jax.random.normal(jax.random.key(3), shape)
    pull = lambda f: jax.vjp(f, kernel)[1](cotangent)[0]
    np.testing.assert_allclose(pull(power), pull(exact), rtol=1e-8, atol=1e-10)
    # A multiple of the kernel maps to the same: the gradient is orthogonal to it.
    inner = jnp.vdot(pull(exact), kernel)
    assert abs(inner) < 1e-12 * jnp.linalg.norm(pull(exact)) * jnp.linalg.norm(kernel)


def test_spectral_normalize_of_an_orthogonal_kernel():
    """All singular values equal, a pole of a decomposition's derivative: finite."""
    kernel = 2 * jnp.linalg.qr(jax.random.normal(KEY, (5, 5)))[0]
    got, pull = jax.vjp(
        lambda k: rbpjax.regularizers.spectral_normalize(k, 0.9), kernel
    )
    np.testing.assert_allclose(got @ got.T, 0.81 * np.eye(5), atol=1e-12)
    assert jnp.isfinite(pull(jnp.ones((5, 5)))[0]).all()


def test_power_method_approaches_sigma_from_below():
    """With more steps σ rises to the exact one, and the kernel falls to the target."""
    kernel = jax.random.normal(KEY, (30, 20))
    sizes = [
        sigma_of(rbpjax.regularizers.spectral_normalize(kernel, 0.9, num_steps=k))
        for k in (1, 3, 10, 300)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.93
    assert 0.9 * (1 - 1e-12) <= sizes[-1] < 0.9 * (1 + 1e-6)


@pytest.mark.parametrize("padding", ["SAME", "circular"])
def test_convolution_norm_is_bounded_by_root_taps(padding):
    """The dense operator of a 3 × 3 convolution has norm ≤ 3σ of the matrix."""
    kernel = jax.random.normal(KEY, (3, 3, 2, 2))

    def conv(flat):
        image = flat.reshape(1, 5, 5, 2)
        if padding == "circular":
            image = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        out = jax.lax.conv_general_dilated(
            image,
            rbpjax.regularizers.spectral_normalize(kernel, 0.9 / 3),
            (1, 1),
            "VALID" if padding == "circular" else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out.reshape(-1)

    operator = np.asarray(jax.jacobian(conv)(jnp.zeros(50)))
    assert 0.3 < np.linalg.norm(operator, 2) <= 0.9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_spectral_normalize_keeps_the_dtype(dtype):
    """A half-precision kernel stays one, at the target to its own precision."""
    kernel = jax.random.normal(KEY, (8, 8)).astype(dtype)
    got = rbpjax.regularizers.spectral_normalize(kernel, 0.9)
    assert got.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(sigma_of(got.astype(jnp.float64)), 0.9, rtol=4 * eps)


# --- bad input -----------------------------------------------------------------------

LINEAR = (lambda w, x, h: w @ h + x, jnp.eye(2), jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rbpjax.regularizers.jacobian_penalty(None, *LINEAR),
            "give `key` or, with key=None, `probes`",
        ),
        (
            lambda: rbpjax.regularizers.jacobian_penalty(
                KEY, *LINEAR, probes=jnp.ones((1, 2))
            ),
            "give `key` or, with key=None, `probes`",
        ),
        (
            lambda: rbpjax.regularizers.jacobian_penalty(
                None, *LINEAR, probes=jnp.ones((2, 3))
            ),
            r"`probes` must be like `h`.*\(2, 3\).*\(2,\)",
        ),
        (
            lambda: rbpjax.regularizers.jacobian_penalty(KEY, *LINEAR, num_probes=0),
            "`num_probes` must be at least 1; got 0",
        ),
        (
            lambda: rbpjax.regularizers.contraction_penalty(*LINEAR, bound=-0.1),
            "`bound` must not be negative; got -0.1",
        ),
        (
            lambda: rbpjax.regularizers.contraction_penalty(
                lambda w, x, h: h, None, None, jnp.ones(2, complex)
            ),
            "`h` must be real",
        ),
        (
            lambda: rbpjax.regularizers.contraction_penalty(
                lambda w, x, h: h[:1], None, None, jnp.ones(2)
            ),
            "`f`'s output must have the structure",
        ),
        (
            lambda: rbpjax.regularizers.spectral_normalize(jnp.ones(3), 0.9),
            "at least two axes",
        ),
        (
            lambda: rbpjax.regularizers.spectral_normalize(jnp.ones((3, 3), int), 0.9),
            "floating-point array.*int64",
        ),
        (
            lambda: rbpjax.regularizers.spectral_normalize(jnp.eye(3), 0.0),
            "`target` must be positive; got 0.0",
        ),
        (
            lambda: rbpjax.regularizers.spectral_normalize(
                jnp.eye(3), 0.9, num_steps=0
            ),
            "`num_steps` must be at least 1; got 0",
        ),
    ],
)
def test_bad_input(call, message):
    """Each is a ValueError that names the argument and the value."""
    with pytest.raises(ValueError, match=message):
        call()


# --- training runs -------------------------------------------------------------------
#
# An amplifier h = x + W softplus(h) that is paid for the gain it reaches: the loss, the
# mean of 1/h, is smallest where h* is largest, at ρ(J) → 1 and beyond, where there is
# no fixed point to reach.

N, BATCH, STEPS, LATE = 8, 4, 150, 5
X = jax.random.uniform(jax.random.key(1), (BATCH, N))
W0 = 0.075 * jax.random.uniform(jax.random.key(2), (N, N))
OPTIMIZER = optax.adam(0.01)


def amplifier(w, x, h):
    return x + jax.nn.softplus(h) @ w.T


def radius(w, h):
    jac = jax.vmap(lambda x, h: jax.jacobian(partial(amplifier, w, x))(h))(X, h)
    return jnp.abs(jnp.linalg.eigvals(jac)).max()


REGULARIZERS = {
    "jacobian_penalty": lambda w, h, key: (
        12 * rbpjax.regularizers.jacobian_penalty(key, amplifier, w, X, h, num_probes=4)
    ),
    "contraction_penalty": lambda w, h, key: (
        100 * rbpjax.regularizers.contraction_penalty(amplifier, w, X, h, bound=0.7)
    ),
    "spectral_normalize": lambda w, h, key: 0.0,
}


@cache
def training(name):
    """``run(w, steps) -> (w, losses, radii, converged)`` with a regularizer or none."""
    penalty = REGULARIZERS.get(name, lambda w, h, key: 0.0)
    used = (
        partial(rbpjax.regularizers.spectral_normalize, target=0.9)
        if name == "spectral_normalize"
        else lambda w: w
    )
    forward = rbpjax.FixedPointIteration(max_steps=500, tol=1e-6)
    solve = rbpjax.rbp_solve(amplifier, forward=forward)

    def loss(w, key):
        w = used(w)
        solution = solve(w, X, jnp.zeros((BATCH, N)))
        task = jnp.mean(1 / solution.value)
        h = jax.lax.stop_gradient(solution.value)
        # Without a fixed point the task has no gradient: the report decides.
        kept = jnp.where(solution.converged, task, 0) if name != "none" else task
        seen = (task, radius(w, h), solution.converged)
        return kept + penalty(w, h, key), seen

    def update(carry, key):
        w, state = carry
        grads, seen = jax.grad(loss, has_aux=True)(w, key)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to int32
            updates, state = OPTIMIZER.update(grads, state)
        return (optax.apply_updates(w, updates), state), seen

    @partial(jax.jit, static_argnums=1)
    def run(w, steps):
        keys = jax.random.split(KEY, steps)
        (w, _), seen = jax.lax.scan(update, (w, OPTIMIZER.init(w)), keys)
        return w, *seen

    return run


def no_fixed_point(w):
    """Whether the amplifier has none: its slopes tend to W, of positive entries."""
    w = np.asarray(w)
    return np.all(w >= 0) and np.abs(np.linalg.eigvals(w)).max() > 1


@cache
def left():
    """The unregularized run, the step at which it left, and its W a little later."""
    _, losses, radii, converged = training("none")(W0, STEPS)
    first = int(np.argmin(converged))
    w, *_ = training("none")(W0, first + LATE)
    return losses, radii, converged, first, w


def test_training_leaves_the_convergent_region_without_a_regularizer():
    """The forward iteration fails from some step on, and training stays there.

    Where J → W as h grows, ρ(W) > 1 says that there is no fixed point to be found.
    """
    _, radii, converged, first, w = left()
    radii, failed = np.asarray(radii), ~np.asarray(converged)
    assert radii[0] < 0.5 and np.all(np.diff(radii[:first]) > 0)
    assert 3 < first < 50
    assert not failed[:first].any() and failed[first : first + 15].all()
    assert no_fixed_point(w)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_training_stays_with_a_regularizer(name):
    """From the same start every step converges, ρ(J) < 1, and the loss halves."""
    _, losses, radii, converged = training(name)(W0, STEPS)
    assert np.asarray(converged).all() and np.asarray(radii).max() < 1
    # All of them leave room to learn: the gain the run was after doubles at least.
    assert losses[-1] < 0.6 * losses[0]
    assert radii[-1] > 0.5


@pytest.mark.parametrize("name", REGULARIZERS)
def test_diverging_training_is_brought_back(name):
    """Switched on after the run has left, each brings it back, and it stays."""
    *_, w = left()
    _, losses, radii, converged = training(name)(w, STEPS)
    assert no_fixed_point(w)
    assert not converged[0] or name == "spectral_normalize"
    back = int(np.argmax(converged))
    assert back < 30
    assert np.asarray(converged[back:]).all()
    assert np.asarray(radii[back:]).max() < 1
    assert losses[-1] < 0.6 * training(name)(W0, STEPS)[1][0]


def test_penalties_leave_the_solve_out_where_told():
    """With stop_gradient(h) the penalty's gradient is that of J at fixed h, no more."""
    w = 3 * W0
    solve = rbpjax.rbp_solve(amplifier)
    h = jax.jit(lambda w: solve(w, X, jnp.zeros((BATCH, N))).value)
    penalty = jax.jit(
        lambda w, h: rbpjax.regularizers.contraction_penalty(
            amplifier, w, X, h, bound=0.1
        )
    )
    cut = jax.grad(lambda w: penalty(w, jax.lax.stop_gradient(h(w))))(w)
    whole = jax.grad(lambda w: penalty(w, h(w)))(w)
    chex.assert_trees_all_close(cut, jax.grad(penalty)(w, h(w)), rtol=1e-9)
    assert jnp.linalg.norm(whole - cut) > 0.01 * jnp.linalg.norm(cut)
    # The whole gradient is that of the composed function: a finite difference.
    d = jax.random.normal(KEY, w.shape)
    value = lambda t: penalty(w + t * d, h(w + t * d))
    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(jnp.vdot(whole, d), slope, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e30])
@pytest.mark.parametrize("num_steps", [None, 100])
def test_kernels_of_any_size_are_bounded(size, num_steps):
    """float32, also where the squares of entries are out of range."""
    kernel = np.random.default_rng(0).standard_normal((5, 4)) * size
    kernel = kernel.astype(np.float32)
    sigma = np.linalg.norm(kernel.astype(float), 2)
    target = jnp.float32(sigma / 3)
    got = rbpjax.regularizers.spectral_normalize(kernel, target, num_steps=num_steps)
    # 100 steps leave (σ₂/σ₁)²⁰⁰ of the gap, and σ₂/σ₁ is 0.9.
    np.testing.assert_allclose(got, kernel / 3, rtol=1e-5, atol=1e-6 * sigma)


def test_a_traced_target_that_is_not_positive_is_told():
    """NaN, not a kernel of the other sign or none."""
    cut = jax.jit(rbpjax.regularizers.spectral_normalize)
    for target in (-1.0, 0.0, jnp.nan):
        assert jnp.isnan(cut(jnp.ones((2, 2)), target)).all()


def test_counts_keys_and_probes_are_what_they_should_be():
    """Floats and bools as counts, integers as keys, probes of another dtype."""
    f, h = lambda w, x, h: w * h, jnp.ones(2)
    penalty = lambda key, **k: rbpjax.regularizers.jacobian_penalty(
        key, f, 1.0, None, h, **k
    )
    for count in (True, 2.5, jnp.array(3)):
        with pytest.raises(ValueError, match="`num_probes` must be at least 1"):
            penalty(jax.random.key(0), num_probes=count)
        with pytest.raises(ValueError, match="`num_steps` must be at least 1"):
            rbpjax.regularizers.spectral_normalize(jnp.eye(2), 0.5, num_steps=count)
    with pytest.raises(ValueError, match="`key` must be one PRNG key"):
        penalty(0)
    for probes in (jnp.ones((1, 2), jnp.float32), jnp.ones(2), jnp.ones((0, 2))):
        with pytest.raises(ValueError, match="`probes` must"):
            penalty(None, probes=probes)
