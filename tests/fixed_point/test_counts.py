"""What a gradient costs, counted: evaluations, products, dots, bytes. No clock.

The numbers are those of the docstrings, or derived here; a change that makes a solve
dearer, or a program larger, fails.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import (
    CG,
    GMRES,
    RBP,
    RRE,
    Adaptive,
    Anderson,
    BiCGSTAB,
    CGNormal,
    FixedPointIteration,
    Neumann,
    Newton,
    Solution,
)
from tests.support.counters import count_products, counted_products
from tests.support.families import FAMILIES
from tests.support.hlo import assert_no_more, count, loop_bodies
from tests.support.problems import rows

N = 40
RHO, TOL = 0.6, 1e-8


def rotation(rho=RHO):
    """rho × an orthogonal matrix: each term of the series is rho times the last."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
    return jnp.asarray(rho * q)


def counted(rule, jac):
    """Products and steps of one solve."""
    g = jnp.asarray(np.random.default_rng(1).normal(size=N))
    return count_products(rule, lambda h: jac @ h, g, g)


def test_the_counter_counts():
    """Products with J and with Jᵀ, and not those that nobody reads."""

    def rule(vjp, g):
        jvp = jax.linear_transpose(vjp, g)
        z = jax.lax.fori_loop(0, 5, lambda _, z: vjp(z), jvp(g)[0])
        return Solution(value=z, num_steps=jnp.int32(5), residual=vjp(vjp(z)))

    g, jac = jnp.ones(N), rotation()
    assert count_products(rule, lambda h: jac @ h, g, g) == (6, 5)
    assert counted_products(rule, lambda h: jac @ h, g, g)[0] == 8


# The series ends with the first term below half of the tolerance.
TERMS = math.ceil(math.log(TOL / 2) / math.log(RHO))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Neumann(steps=0), 0),
        (Neumann(steps=7), 7),
        (Neumann(tol=TOL), TERMS),
        (Adaptive(tol=TOL), TERMS),
        (RBP(FixedPointIteration(steps=7)), 7),
    ],
    ids=repr,
)
def test_products_of_the_series(rule, expected):
    """One product a term, none for a report that nobody reads; the default no more."""
    assert counted(rule, rotation())[0] <= expected


@pytest.mark.parametrize(
    "family",
    rows(
        ["symmetric [0, 0.9]", "0.95 × orthogonal", "Ginibre, ρ = 1.5"],
        ["Ginibre, ρ = 1.5"],
    ),
)
@pytest.mark.parametrize(
    ("rule", "a_step", "a_pass"),
    [
        # One VJP and one JVP a step; one of each more for a restart: the true residual
        # and the first search direction.
        (CGNormal(tol=TOL), 2, 2),
        # Two VJPs a step, and one to measure the true residual.
        (BiCGSTAB(tol=TOL), 2, 1),
        (GMRES(tol=TOL, restart=20), 1, 1),
    ],
    ids=repr,
)
def test_products_of_a_krylov_step(rule, a_step, a_pass, family):
    """Steps × what the docstring says, and as many passes as there were restarts."""
    jac = jnp.asarray(FAMILIES[family](np.random.default_rng(0), N))
    made, taken = counted(rule, jac)
    # A pass of GMRES is at most `restart` steps; the others rarely restart in float64.
    passes = math.ceil(taken / 20) + 1 if isinstance(rule, GMRES) else 4
    assert taken < made <= a_step * taken + a_pass * passes


# Products with J or Jᵀ to 1e-8, which may only be lowered. Of the last family the mean
# over 600 cotangents, 240 at version 0.2.0: last bits alone make it 150 to 500.
BUDGET = {
    "symmetric [0, 0.9]": 37,
    "symmetric [-0.99, 0.99]": 53,
    "0.95 × orthogonal": 90,
    "Ginibre, ρ = 0.5": 25,
    "Ginibre, ρ = 0.95": 61,
    "Ginibre, ρ = 0.99": 65,
    "non-normal, ρ = 0.5": 27,
    "symmetric [-1.5, 0.9]": 43,
    "Ginibre, ρ = 1.5": 240,
}


@pytest.mark.parametrize(
    "family",
    rows(
        FAMILIES.keys(),
        ("symmetric [-0.99, 0.99]", "Ginibre, ρ = 0.5", "Ginibre, ρ = 1.5"),
    ),
)
def test_products_of_the_default(family):
    """The default's products on nine families of 40 units."""
    jac = jnp.asarray(FAMILIES[family](np.random.default_rng(0), N))
    if family == "Ginibre, ρ = 1.5":
        g = jnp.asarray(np.random.default_rng(1).normal(size=(600, N)))
        rule = Adaptive(tol=TOL)
        found = jax.jit(jax.vmap(lambda g: rule(lambda v: jac.T @ v, g)))(g)
        assert found.converged.all()
        made = np.mean(found.num_products)
    else:
        made = counted(Adaptive(tol=TOL), jac)[0]
    assert made <= BUDGET[family]


def evaluations(forward, backward):
    """How often the compiled gradient runs f, and the forward solver's steps."""
    calls = []

    def note(h):
        calls.append(1)
        return np.zeros_like(h)

    def f(w, x, h):
        entry = jax.lax.stop_gradient(h)[0]
        kind = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
        return jnp.tanh(w @ h + x + jax.pure_callback(note, kind, entry))

    solve = rbpjax.rbp_solve(f, forward=forward, backward=backward)
    w, x = rotation(), jnp.linspace(-1, 1, N)

    def loss(w):
        solution = solve(w, x, jnp.zeros(N))
        return jnp.sum(jnp.sin(solution.value)), solution.num_steps

    grad, taken = jax.jit(jax.grad(loss, has_aux=True))(w)
    jax.block_until_ready(grad)
    return len(calls), int(taken)


@pytest.mark.parametrize(
    "forward",
    [
        FixedPointIteration(),
        Anderson(),
        RRE(),
        Newton(BiCGSTAB(tol=0.1)),
        FixedPointIteration(damping=0.1),
    ],
)
@pytest.mark.parametrize(
    "backward", rows([Adaptive(), Neumann(steps=5), CGNormal()], [Adaptive()])
)
def test_evaluations_of_f_in_a_gradient(forward, backward):
    """One a step, one that looks at the last iterate, one linearization; no more."""
    made, taken = evaluations(forward, backward)
    assert taken < made <= taken + 2


@pytest.mark.parametrize("k", [0, 10])
def test_an_exact_count_is_exact(k):
    """`steps` evaluations, the residual none reads is not computed, and the one more
    is the linearization."""
    made, _ = evaluations(FixedPointIteration(steps=k), Neumann(steps=3))
    assert k <= made <= k + 1


# --- the compiled program ------------------------------------------------------------

W = jax.random.normal(jax.random.key(0), (16, 16)) / 8
X = jax.random.normal(jax.random.key(1), (4, 16))


def step(w, x, h):
    return jnp.tanh(h @ w + x)


def gradient(forward, backward):
    """The compiled gradient for w and x."""
    solve = rbpjax.rbp_solve(step, forward=forward, backward=backward)
    loss = lambda w, x: jnp.sum(jnp.sin(solve(w, x, jnp.zeros_like(X)).value))
    return jax.jit(jax.grad(loss, (0, 1))).lower(W, X).compile()


# A product is a dot of the state's shape; those of Anderson's and GMRES's small systems
# are not.
STATE_PRODUCT = r"= f64\[4,16\]\S* (?:dot\(|custom-call\([^\n]*(?:gemm|matmul|dot))"


@pytest.mark.parametrize(
    ("backward", "products"),
    [
        (Neumann(), [1, 1]),
        (RBP(Anderson()), [1]),
        (RBP(RRE()), [1]),
        (CG(), [1, 1]),
        (CGNormal(), [2, 2]),
        (BiCGSTAB(), [1, 2]),
        (GMRES(), [1, 1]),
        (Adaptive(), [1, 1, 1, 2, 2, 2]),
    ],
    ids=repr,
)
def test_products_in_the_loops_of_a_gradient(backward, products):
    """What each loop repeats, with one product in the forward loop."""
    compiled = gradient(FixedPointIteration(), backward)
    found = [count(STATE_PRODUCT, body) for body in loop_bodies(compiled)]
    assert_no_more(found, [1, *products])


@pytest.mark.parametrize(
    "forward", [FixedPointIteration(), Anderson(), RRE()], ids=repr
)
def test_products_of_a_whole_program(forward):
    """f in its loop, Jᵀ in the series' two, and one linearization; f is not repeated.

    The series' outer loop makes a block's last product, which shows what is left. The
    gradient for w is a product of another shape; that for x needs none.
    """
    text = gradient(forward, Neumann()).as_text()
    assert 0 < count(STATE_PRODUCT, text) <= 4
    assert 0 < count(r"= f64\[16,16\]\S* dot\(", text) <= 1


def test_newton_linearizes_once_a_step_and_keeps_the_tangent_loop_free_of_f():
    """Two products: f in Newton's loop, J in its rule's; then the linearization."""
    compiled = gradient(Newton(BiCGSTAB(tol=1e-2)), Neumann())
    found = [count(STATE_PRODUCT, body) for body in loop_bodies(compiled)]
    # Newton's loop holds f, and of BiCGSTAB's two the outer one; each loop is counted
    # without those inside it. Two are the series'.
    assert_no_more(found, [1, 1, 1, 1, 2])


BIG = jnp.ones((64, 1024))


@pytest.mark.parametrize(
    ("rule", "states"),
    [
        # What the docstrings count, and the unit cotangent. XLA keeps a second copy of
        # GMRES's basis while it writes a row.
        (Neumann(steps=20), 3),
        (Neumann(), 3),
        (CGNormal(), 7),
        (BiCGSTAB(), 9),
        (Adaptive(), 9),
        (GMRES(restart=10), 23),
        (RBP(Anderson(memory=5)), 18),
        (RBP(RRE(memory=5)), 18),
        (CG(), 6),
    ],
    ids=repr,
)
def test_states_in_memory(rule, states):
    """Temporary memory of a backward solve, in states."""
    solve = lambda g: rule(lambda v: 0.5 * jnp.roll(v, 1, 0), g).value
    compiled = jax.jit(solve).lower(BIG).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= (states + 0.1) * BIG.nbytes
