"""Steps with leaves that are no arrays, and steps that change the state's dtype."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax._core.step import close, convert, only_arrays

W = jnp.array([[0.3, -0.8], [0.8, 0.3]]) * 0.7
X, H = jnp.array([0.4, -0.2]), jnp.zeros(2)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "activation", "name", "none"],
    meta_fields=["units"],
)
@dataclasses.dataclass
class Module:
    """As equinox has them: functions and strings are leaves like arrays."""

    w: jax.Array
    activation: object = jnp.tanh
    name: object = "layer"
    none: object = None
    units: int = 2

    def __call__(self, x, h):
        assert self.name == "layer" and self.units == 2 and self.none is None
        return self.activation(self.w @ h + x)


def plain(w, x, h):
    return jnp.tanh(w @ h + x)


def dense_gradient():
    """Of sum(h*²) for W and X, by a dense solve of (I - Jᵀ) z = 2h*."""
    h = H
    for _ in range(400):
        h = plain(W, X, h)
    jac = jax.jacobian(plain, 2)(W, X, h)
    z = jnp.linalg.solve(jnp.eye(2) - jac.T, 2 * h)
    return jax.vjp(lambda w, x: plain(w, x, h), W, X)[1](z)


MAKERS = {
    "rbp": lambda f: rbpjax.rbp_solve(
        f,
        forward=rbpjax.FixedPointIteration(tol=1e-13),
        backward=rbpjax.Adaptive(tol=1e-12),
    ),
    "bptt": lambda f: rbpjax.bptt(f, 400),
    "truncated": lambda f: rbpjax.bptt(f, 400, truncation=120),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_leaves_that_are_no_arrays_are_set_aside(make):
    """In params and in inputs, eagerly and under jit, beside arrays with gradients."""
    solve = make(lambda p, x, h: x["scale"](p(x["x"], h)))

    def loss(w, x):
        inputs = {"x": x, "scale": lambda u: u, "label": "inputs", "n": 3}
        return jnp.sum(solve(Module(w), inputs, H).value ** 2)

    for transform in (lambda f: f, jax.jit):
        got = transform(jax.grad(loss, (0, 1)))(W, X)
        for a, b in zip(got, dense_gradient(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)


def test_rbp_vjp_and_jvp_have_none_in_their_place():
    """The gradient has None for them, and tangents may have anything."""
    h = jax.lax.fori_loop(0, 400, lambda _, h: plain(W, X, h), H)
    step = lambda p, x, h: p(x, h)
    (bar, x_bar), _ = rbpjax.rbp_vjp(
        step, Module(W), X, h, 2 * h, backward=rbpjax.Direct()
    )
    assert bar.activation is None and bar.name is None and bar.units == 2
    for a, b in zip((bar.w, x_bar), dense_gradient(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    w_dot, x_dot = W.T, 2 * X
    for module_dot in (Module(w_dot), Module(w_dot, None, None)):
        h_dot = rbpjax.rbp_jvp(
            step, Module(W), X, h, (module_dot, x_dot), backward=rbpjax.Direct()
        ).value
        want = jnp.vdot(dense_gradient()[0], w_dot) + dense_gradient()[1] @ x_dot
        np.testing.assert_allclose(2 * h @ h_dot, want, rtol=1e-9)


def test_conversion_keeps_what_is_no_array_of_the_examples():
    """``call`` takes None, or other such leaves, for them."""
    closed = convert(lambda p, h: p["f"](p["w"] * h), {"f": jnp.sin, "w": 2.0}, 1.0)
    want = np.sin(6.0)
    for function in (None, jnp.cos):
        params = {"f": function, "w": 2.0}
        np.testing.assert_allclose(closed.call(closed.consts, params, 3.0), want)
    assert only_arrays({"f": jnp.sin, "w": 2.0}) == {"f": None, "w": 2.0}


@pytest.mark.full
def test_a_closure_is_read_at_each_call():
    """Outside jit, numbers, arrays, functions and the reading of them may change."""
    box = {"scale": 0.5, "shift": jnp.zeros(2), "act": jnp.tanh}
    f = lambda w, x, h: box["scale"] * box["act"](w @ h) + x + box["shift"]
    solve = rbpjax.rbp_solve(f)
    loss = lambda w: jnp.sum(solve(w, X, H).value)
    changes = [{}, {"scale": 0.25}, {"shift": jnp.ones(2)}, {"act": jnp.sin}]
    for change in changes:
        box |= change
        now = dict(box)
        fresh = rbpjax.bptt(
            lambda w, x, h, now=now: (
                now["scale"] * now["act"](w @ h) + x + now["shift"]
            ),
            200,
        )
        want = jax.value_and_grad(lambda w, s=fresh: jnp.sum(s(w, X, H).value))(W)
        for a, b in zip(jax.value_and_grad(loss)(W), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8)


def narrow(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def test_a_step_that_promotes_is_refused_with_lines_that_work():
    """Both lines of the message, run as written, solve the problem."""
    f = lambda w, x, h: jnp.tanh(w @ h + x)
    h0 = narrow(H)
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match="changes the dtype") as error,
    ):
        close(f, W, X, h0)
    up, back = str(error.value).split("`")[-4:-1:2]
    with jax.numpy_dtype_promotion("standard"):
        assert rbpjax.rbp_solve(f)(W, X, eval(up)).value.dtype == jnp.float64
    scope: dict = {"f": f}
    exec(f"def g(p, x, h):\n  new = f(p, x, h)\n  {back}", scope)
    with jax.numpy_dtype_promotion("standard"):
        made = rbpjax.rbp_solve(scope["g"])(W, X, h0)
    assert made.value.dtype == jnp.float32


def test_the_lines_for_a_state_of_several_leaves_work_too():
    f = lambda params, inputs, h: {
        "a": jnp.tanh(W @ h["a"]) + h["b"],
        "b": 0.5 * h["b"],
    }
    params = inputs = None
    h0 = {"a": narrow(H), "b": jnp.zeros(2)}
    standard = jax.numpy_dtype_promotion("standard")
    with standard, pytest.raises(ValueError, match="changes the dtype") as error:
        close(f, params, inputs, h0)
    up, back = str(error.value).split("`")[-4:-1:2]
    scope: dict = {"f": f, "jax": jax, "h0": h0, "params": None, "inputs": None}
    with jax.numpy_dtype_promotion("standard"):
        exec(f"up = {up}\ndef g(p, x, h):\n  new = f(p, x, h)\n  {back}", scope)
        close(f, None, None, scope["up"])
        close(scope["g"], None, None, h0)


def test_other_differences_are_not_called_promotion():
    """A shape, a structure: the dtype's remedy would mislead."""
    for f in (lambda p, x, h: h[:1], lambda p, x, h: (h, h)):
        with pytest.raises(ValueError, match="select h, or say has_aux=True"):
            close(f, None, None, narrow(H))
