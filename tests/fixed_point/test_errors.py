"""What the caller can get wrong: a ValueError with the name, the values, a remedy."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import rbpjax
from rbpjax import RBP, AdjointReport, CGNormal, FixedPointIteration, Neumann, Solution

A, X, H = jnp.full(2, 0.5), jnp.ones(2), jnp.zeros(2)


def step(a, x, h):
    return a * h + x


def solve(f=step, h0=H, probe=None, **strategies):
    return rbpjax.rbp_solve(f, **strategies)(A, X, h0, probe)


def gradient(**strategies):
    solve = rbpjax.rbp_solve(step, **strategies)
    return jax.grad(lambda a: jnp.sum(solve(a, X, H).value))(A)


def traced_field(make):
    """A strategy made with a tracer: an array in a static field, seen by jax.grad."""
    return jax.grad(lambda t: jnp.sum(make(t)(lambda v: 0.5 * v, X).value))(1e-3)


BAD_STATES = {
    "integer": (lambda: solve(h0=jnp.zeros(2, int)), "`h0`.*int64[2].*Cast it"),
    "bool": (lambda: solve(h0=jnp.zeros(2, bool)), "`h0`.*bool[2].*Cast it"),
    "string": (lambda: solve(h0={"a": H, "b": "x"}), "`h0`.*type str.*into f itself"),
    "key": (lambda: solve(h0=jax.random.key(0)), "`h0`.*key<fry>.*into `inputs`"),
    "empty": (lambda: solve(h0=()), "`h0` must have at least one array.*()"),
}
BAD_STEPS = {
    "shape": (
        lambda: solve(lambda a, x, h: jnp.ones(3)),
        "`f`'s output.*`h0`.*float64[3].*float64[2]",
    ),
    "dtype": (
        lambda: solve(lambda a, x, h: x, h0=H.astype(jnp.float32)),
        "`f`'s output.*float64[2].*float32[2].*cast",
    ),
    "structure": (
        lambda: solve(lambda a, x, h: {"h": h}),
        "`f`'s output.*{'h': 'float64[2]'}.*float64[2]",
    ),
    "output": (
        lambda: solve(lambda a, x, h: (h, 2 * h)),
        "`f`'s output.*select h",
    ),
    "output_bptt": (
        lambda: rbpjax.bptt(lambda a, x, h: (h, 2 * h), 3)(A, X, H),
        "`f`'s output.*select h",
    ),
    "shape_tbptt": (
        lambda: rbpjax.bptt(lambda a, x, h: h[:1], 3, truncation=1)(A, X, H),
        "`f`'s output.*float64[1].*float64[2]",
    ),
    "shape_vjp": (
        lambda: rbpjax.rbp_vjp(lambda a, x, h: h[:1], A, X, H, H),
        "`f`'s output.*float64[1].*float64[2]",
    ),
    "shape_jvp": (
        lambda: rbpjax.rbp_jvp(lambda a, x, h: h[:1], A, X, H, (A, X)),
        "`f`'s output.*float64[1].*float64[2]",
    ),
    "shape_diagnose": (
        lambda: rbpjax.diagnostics.spectral_radius(
            jax.random.key(0), lambda a, x, h: h[:1], A, X, H
        ),
        "`f`'s output.*float64[1].*float64[2]",
    ),
    "cotangent": (
        lambda: rbpjax.rbp_vjp(step, A, X, H, jnp.ones(3)),
        "`cotangent`.*`h_star`.*float64[3].*float64[2]",
    ),
    "not_callable": (lambda: rbpjax.rbp_solve("tanh"), "`f` must be callable.*'tanh'"),
}
BAD_FIELDS = {
    "neumann_both": (
        lambda: Neumann(steps=3, tol=1e-3),
        "`steps`.*`tol`.*steps=3, tol=0.001",
    ),
    "neumann_steps": (lambda: Neumann(steps=-1), "Neumann.*`steps`.*at least 0.*-1"),
    "neumann_float": (lambda: Neumann(steps=3.0), "Neumann.*`steps`.*int.*3.0"),
    "neumann_bool": (lambda: Neumann(steps=True), "Neumann.*`steps`.*int.*True"),
    "neumann_array": (
        lambda: Neumann(steps=jnp.arange(3)),
        "`steps`.*Array.*cannot be options, but for scalars",
    ),
    "neumann_scalar": (lambda: Neumann(steps=jnp.int32(-3)), "`steps`.*at least 0.*-3"),
    "neumann_kind": (lambda: Neumann(steps=jnp.float32(3)), "`steps`.*integer.*Array"),
    "neumann_tol_array": (lambda: Neumann(tol=jnp.array(1.5)), "`tol`.*[0, 1).*1.5"),
    "neumann_tol": (lambda: Neumann(tol=-1e-3), "Neumann.*`tol`.*[0, 1).*-0.001"),
    "neumann_budget": (lambda: Neumann(max_steps=0), "`max_steps`.*at least 1.*0"),
    "cg_budget": (
        lambda: CGNormal(max_steps=0),
        "CGNormal.*`max_steps`.*at least 1.*0",
    ),
    "cg_tol": (lambda: CGNormal(tol=-1.0), "CGNormal.*`tol`.*-1.0"),
    "cg_nan": (lambda: CGNormal(tol=float("nan")), "CGNormal.*`tol`.*nan"),
    "cg_ridge": (lambda: CGNormal(ridge=-1.0), "CGNormal.*`ridge`.*-1.0"),
    "cg_tracer": (
        lambda: traced_field(lambda t: CGNormal(ridge=t)),
        "`ridge`.*Tracer.*cannot be options",
    ),
    "forward_tracer": (
        lambda: traced_field(lambda t: RBP(FixedPointIteration(damping=t))),
        "`damping`.*Tracer.*cannot be options",
    ),
    "rbp_solver": (
        lambda: RBP("anderson"),
        "RBP.*`solver` must be a forward solver.*FixedPointIteration().*'anderson'",
    ),
    "rbp_seed": (lambda: RBP(seed=0.5), "RBP.*`seed`.*0.5"),
    "rbp_key": (lambda: RBP(seed=jax.random.key(0)), "RBP.*`seed`.*cannot be options"),
    "forward_both": (
        lambda: FixedPointIteration(steps=3, tol=1e-3),
        "`steps`.*`tol`.*steps=3, tol=0.001",
    ),
    "forward_budget": (
        lambda: FixedPointIteration(max_steps=0),
        "`max_steps`.*at least 1.*0",
    ),
    "forward_steps": (lambda: FixedPointIteration(steps=-2), "`steps`.*at least 0.*-2"),
    "forward_damping": (
        lambda: FixedPointIteration(damping=1.0),
        "`damping`.*[0.0, 1.0).*1.0",
    ),
    "forward_tol": (lambda: FixedPointIteration(tol="small"), "`tol`.*'small'"),
}
BAD_STRATEGIES = {
    "backward_class": (
        lambda: rbpjax.rbp_solve(step, backward=Neumann),
        "Neumann is a class.*Neumann()",
    ),
    "forward_class": (
        lambda: rbpjax.rbp_solve(step, forward=rbpjax.Anderson),
        "Anderson is a class.*Anderson()",
    ),
    "solver_class": (
        lambda: RBP(rbpjax.Anderson),
        "RBP.*`solver` must be a forward solver.*class.*Anderson()",
    ),
    "forward_name": (
        lambda: solve(forward="anderson"),
        "`forward` must be callable.*'anderson'.*instances",
    ),
    "backward_name": (
        lambda: solve(backward="cg"),
        "`backward` must be callable.*'cg'.*Neumann(steps=20)",
    ),
    "rule_array": (
        lambda: gradient(backward=lambda vjp, g: g),
        "backward rule.*must return rbpjax.Solution(.*got ",
    ),
    "rule_shape": (
        lambda: gradient(backward=lambda vjp, g: Solution(value=g[:1], converged=True)),
        "value returned by the backward rule.*float64[1].*float64[2]",
    ),
    "solver_tuple": (
        lambda: solve(forward=lambda step, h0: (h0, 0, 0.0, True)),
        "forward solver.*must return rbpjax.Solution(.*got tuple",
    ),
    "solver_dtype": (
        lambda: solve(
            forward=lambda step, h0: Solution(
                value=h0.astype(jnp.float32), converged=True
            )
        ),
        "value returned by the forward solver.*float32[2].*float64[2]",
    ),
}
BAD_PROBES = {
    "type": (
        lambda: solve(probe=jnp.zeros(4)),
        "`probe` must be an AdjointReport.*AdjointReport.zeros()",
    ),
    "tuple": (lambda: solve(probe=(0.0,) * 6), "`probe` must be.*got tuple"),
    "shape": (
        lambda: solve(probe=AdjointReport.zeros((3,))),
        "`probe.num_steps`.*float64[3].*jax.vmap",
    ),
    "dtype": (
        lambda: solve(probe=AdjointReport.zeros()._replace(num_steps=0)),
        "`probe.num_steps`.*int64[]",
    ),
    "adjoint": (
        lambda: solve(probe=AdjointReport.zeros(adjoint=jnp.zeros(3))),
        "`probe.adjoint` must have.*of `h0`.*float64[3].*float64[2]",
    ),
    "start": (
        lambda: rbpjax.rbp_vjp(step, A, X, H, H, start={"h": H}),
        "`start` must have the structure.*of `h_star`.*float64[2]",
    ),
    "rule": (
        lambda: rbpjax.rbp_vjp(step, A, X, H, H, backward=lambda vjp, g: None, start=H),
        "takes no start.*rule(vjp, cotangent, start=z)",
    ),
}
CASES = {
    f"{table}-{name}": case
    for table, cases in {
        "state": BAD_STATES,
        "step": BAD_STEPS,
        "field": BAD_FIELDS,
        "strategy": BAD_STRATEGIES,
        "probe": BAD_PROBES,
    }.items()
    for name, case in cases.items()
}


def literal(pattern: str) -> str:
    """A regular expression in which only ``.*`` is special."""
    return "(?s)" + ".*".join(re.escape(part) for part in pattern.split(".*"))


@pytest.mark.parametrize(("call", "pattern"), CASES.values(), ids=CASES)
def test_message_names_argument_values_and_remedy(call, pattern):
    """Each mistake raises ValueError with a message a newcomer can act on."""
    with pytest.raises(ValueError, match=literal(pattern)):
        call()


def test_errors_come_while_tracing():
    """Under jit a mistake raises before anything runs."""
    with pytest.raises(ValueError, match="`h0`"):
        jax.jit(solve, static_argnums=0).lower(step, jnp.zeros(2, int))


@pytest.mark.parametrize("transform", [jax.jvp, jax.jacfwd])
def test_forward_mode_raises_type_error(transform):
    """As documented, jvp and jacfwd through rbp_solve raise; rbp_jvp is the way."""
    value = lambda a: rbpjax.rbp_solve(step)(a, X, H).value
    with pytest.raises(TypeError, match=r"custom_vjp.*write `rbp_jvp"):
        jax.jvp(value, (A,), (A,)) if transform is jax.jvp else jax.jacfwd(value)(A)
    h_dot = rbpjax.rbp_jvp(step, A, X, value(A), (A, 0 * X)).value
    # h* = x / (1 - a): ∂h*/∂a · a = a x / (1 - a)²
    assert jnp.abs(h_dot - 2.0).max() < 1e-10


def test_a_solver_that_needs_what_f_has_not_is_named():
    """Newton of an f with a backward pass of its own: not called forward mode."""
    own = jax.custom_vjp(lambda h: h)
    own.defvjp(lambda h: (h, None), lambda _, g: (g,))
    f = lambda a, x, h: a * own(h) + x
    newton = rbpjax.rbp_solve(f, forward=rbpjax.Newton())
    with pytest.raises(TypeError, match=r"Newton\(\) needs products with J.*Anderson"):
        newton(A, X, H)


def test_methods_share_one_call():
    """BPTT takes the same call, probe included, so that methods can be swapped."""
    for make in (partial(rbpjax.bptt, num_steps=3), rbpjax.rbp_solve):
        assert make(step)(A, X, H, probe=AdjointReport.zeros()).value.shape == (2,)
