"""Outside jit equal calls share a compilation, and only equal ones."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax._core import reuse
from rbpjax._core.step import close
from rbpjax.types import Solution

# Compiles to less than the default.
ITERATION = rbpjax.FixedPointIteration()

W = jnp.array([[0.3, -0.8], [0.8, 0.3]]) * 0.5
X, H = jnp.array([0.4, -0.2]), jnp.zeros(2)


@pytest.fixture
def compiled(caplog):
    """The names of the programs compiled since it was last called."""

    def names():
        made = [r.getMessage() for r in caplog.records if "Finished XLA" in r.message]
        caplog.clear()
        return made

    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        yield names


def step(w, x, h):
    return jnp.tanh(w @ h + x)


def rbp(f):
    return rbpjax.rbp_solve(f, forward=ITERATION)


def gradient(solve, w=W, x=X, h=H):
    return jax.grad(lambda w: jnp.sum(solve(w, x, h).value ** 2))(w)


def unrolled(f, w=W, x=X):
    h = H
    for _ in range(80):
        h = f(w, x, h)
    return h


CALLS = {
    "grad": lambda f: gradient(rbp(f)),
    "bptt": lambda f: gradient(rbpjax.bptt(f, 60, truncation=30, remat=True)),
    "root": lambda f: gradient(rbpjax.rbp_root(lambda w, x, h: h - f(w, x, h))),
    "vmap": lambda f: jax.vmap(lambda w: gradient(rbp(f), w))(W[None]),
    "report": lambda f: rbpjax.value_and_grad_with_report(
        lambda w, probe: rbp(f)(w, X, H, probe).value.sum()
    )(W),
    "hessian": lambda f: jax.jacrev(jax.grad(lambda x: rbp(f)(W, x, H).value.sum()))(X),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_equal_call_compiles_nothing(call, compiled):
    """Also of a function that was made anew; the program is small and a new one."""
    scale = 0.5 + 0.01 * list(CALLS.values()).index(call)  # nobody else's
    make = lambda: lambda w, x, h: scale * jnp.tanh(w @ h + x)
    first = call(make())
    assert compiled()
    second = call(make())
    assert compiled() == []
    jax.tree.map(np.testing.assert_array_equal, first, second)


CHANGES = {
    "number": lambda box: box.update(scale=0.25),
    "number of another kind": lambda box: box.update(scale=1),
    "array": lambda box: box.update(shift=jnp.ones(2)),
    "NumPy array in place": lambda box: box["numpy"].__setitem__(0, 2.0),
    "function": lambda box: box.update(act=jnp.sin),
    "function with a derivative of its own": lambda box: box.update(act=doubled),
    "table": lambda box: box.update(table=np.arange(2000.0)[::-1]),
    "branch": lambda box: box.update(flag=True),
}


@jax.custom_jvp
def doubled(x):
    return jnp.tanh(x)


doubled.defjvp(lambda p, t: (jnp.tanh(p[0]), 2 * t[0] * (1 - jnp.tanh(p[0]) ** 2)))


@jax.custom_vjp
def clipped(x):
    return jnp.tanh(x)


clipped.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


@pytest.mark.parametrize("act", [jax.nn.relu, doubled, clipped])
def test_functions_with_rules_of_their_own_share_a_compilation(act, compiled):
    """Such as relu, whose rule JAX makes anew at each trace."""
    for _ in range(2):
        compiled()
        gradient(rbp(lambda w, x, h: 0.9 * act(w @ h + x)))
    assert compiled() == []


def test_what_a_rule_reads_is_read_at_each_call():
    """A backward pass of its own that scales by a number which changes."""
    box = {"scale": 1.0}

    @jax.custom_vjp
    def scaled(x):
        return jnp.tanh(x)

    scaled.defvjp(
        lambda x: (jnp.tanh(x), x),
        lambda x, g: (box["scale"] * g * (1 - jnp.tanh(x) ** 2),),
    )
    solve = rbp(lambda w, x, h: 0.8 * scaled(w @ h + x))
    step = lambda scale: rbp(lambda w, x, h: 0.8 * fixed(scale, w @ h + x))

    def fixed(scale, z):
        return jnp.tanh(jax.lax.stop_gradient(z) * (1 - scale) + scale * z)

    for scale in (1.0, 0.5, 1.0):
        box["scale"] = scale
        want = jax.jit(lambda w, s=step(scale): gradient(s, w))(W)
        np.testing.assert_allclose(gradient(solve), want, rtol=1e-7)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_f_reads_is_read_at_each_call(change):
    """Value and gradient after the change are those of a loop that reads it too."""
    box = {
        "scale": 0.5,
        "shift": jnp.zeros(2),
        "numpy": np.ones(2),
        "act": jnp.tanh,
        "table": np.arange(2000.0),
        "flag": False,
    }

    def f(w, x, h, jit=jax.jit):
        z = w @ (h * box["numpy"]) + box["shift"]
        z = z + (jnp.asarray(box["table"])[7] - 7) / 1e4
        z = jit(lambda z: 0.5 * z if box["flag"] else z)(z)
        return box["scale"] * box["act"](z) + x

    plain = lambda w, x, h: f(w, x, h, lambda g: g)
    solve = rbp(f)
    results = []
    for act in (lambda box: None, change):
        act(box)
        value = lambda w: jnp.sum(solve(w, X, H).value ** 2)
        got = jax.value_and_grad(value)(W)
        want = jax.value_and_grad(lambda w: jnp.sum(unrolled(plain, w) ** 2))(W)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7)
        results.append(got[1])
    assert jnp.abs(results[0] - results[1]).max() > 1e-5


def test_a_module_that_is_trained():
    """An nnx module closed over: no compilation after the first, and no old weights."""
    nnx = pytest.importorskip("flax.nnx")

    class Cell(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(2, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
            self.linear.kernel.set_value(W.T)

        def __call__(self, x, h):
            return jnp.tanh(self.linear(h) + x)

    cell = Cell()
    solve = rbpjax.rbp_solve(lambda _, x, h: cell(x, h), forward=ITERATION)
    for scale in (1.0, 0.5, 0.25):
        cell.linear.kernel.set_value(scale * W.T)
        want = unrolled(step, scale * W)
        np.testing.assert_allclose(solve(None, X, H).value, want, rtol=1e-9)


def test_other_types_options_and_settings_are_other_programs():
    """float32, weak types, strategies, has_aux, x64: each its own result."""
    solve = rbp(step)
    assert solve(W, X, H).value.dtype == jnp.float64
    narrow = [a.astype(jnp.float32) for a in (W, X, H)]
    assert solve(*narrow).value.dtype == jnp.float32
    with jax.enable_x64(False):
        assert solve(*map(np.asarray, narrow)).value.dtype == jnp.float32
    scalar = rbpjax.rbp_solve(lambda a, x, h: a * h + x, forward=ITERATION)
    np.testing.assert_allclose(scalar(0.5, 1.0, 0.0).value, 2.0)
    np.testing.assert_allclose(scalar(jnp.full(2, 0.5), 1, jnp.zeros(2)).value, 2.0)
    for steps in (3, 4):
        forward = rbpjax.FixedPointIteration(steps=steps)
        found = rbpjax.rbp_solve(step, forward=forward)(W, X, H)
        assert found.num_steps == steps


def test_a_users_solver_is_never_taken_for_another():
    """What a function reads may change, and so may a user's own value object."""
    box = {"h": 1.0}

    @dataclasses.dataclass(frozen=True)
    class Constant:
        def __call__(self, step, h0):
            return Solution(0 * h0 + box["h"], converged=True)

    for forward in (lambda step, h0: Constant()(step, h0), Constant()):
        solve = rbpjax.rbp_solve(step, forward=forward)
        for value in (1.0, 2.0):
            box["h"] = value
            assert (solve(W, X, H).value == value).all()


def test_programs_compare_by_what_they_compute():
    """Equal and unequal pairs; what cannot be compared says so."""

    def program(f, h=H):
        return close(f, W, X, h)[0]

    same = [step, lambda v, y, k: jnp.tanh(v @ k + y)]
    assert program(same[0]) == program(same[1])
    assert hash(program(same[0])) == hash(program(same[1]))
    others = [
        lambda w, x, h: jnp.tanh(w @ x + h),
        lambda w, x, h: jnp.tanh(h @ w + x),
        lambda w, x, h: jnp.sin(w @ h + x),
        lambda w, x, h: jnp.tanh(w @ h + x) + 0.0,
        lambda w, x, h: jax.lax.cond(h[0] > 0, jnp.sin, jnp.cos, w @ h + x),
        lambda w, x, h: jax.lax.cond(h[0] > 0, jnp.cos, jnp.sin, w @ h + x),
        lambda w, x, h: jax.nn.relu(w @ h + x),
    ]
    made = [program(f) for f in (same[0], *others)]
    for i, a in enumerate(made):
        assert [a == b for b in made] == [i == j for j in range(len(made))]
    jitted = jax.jit(lambda h: h * np.arange(300.0)[:2].sum() + np.ones((300, 1))[0])
    assert program(lambda w, x, h: jitted(h)) == program(lambda w, x, h: jitted(h))


def test_programs_with_callbacks_are_not_kept():
    """Python functions cannot be compared, and would be kept in vain."""
    f = lambda w, x, h: jax.pure_callback(lambda a: 0.5 * a, H, h) + x
    before = reuse._compiled.cache_info().misses
    np.testing.assert_allclose(rbp(f)(W, X, H).value, 2 * X, rtol=1e-9)
    assert reuse._compiled.cache_info().misses == before


def test_inside_jit_nothing_is_kept():
    """There the program is part of what is around it, as ever."""
    before = reuse._compiled.cache_info()
    jax.jit(lambda w: gradient(rbp(step), w))(W)
    assert reuse._compiled.cache_info() == before
    text = str(jax.make_jaxpr(lambda w: rbp(step)(w, X, H).value)(W))
    assert "_solved" not in text


def test_no_more_programs_are_kept_than_said():
    for i in range(reuse.KEPT + 10):
        reuse._compiled(abs, i)
    assert reuse._compiled.cache_info().currsize == reuse.KEPT
