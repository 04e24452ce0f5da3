"""What a step returns beside the state: ``has_aux`` of every maker of a solve."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax

W = jnp.array([[0.3, -0.8], [0.8, 0.3]]) * 0.7
X, H = jnp.array([0.4, -0.2]), jnp.zeros(2)
TIGHT = {
    "forward": rbpjax.FixedPointIteration(tol=1e-13),
    "backward": rbpjax.Adaptive(tol=1e-12),
}


def f(w, x, h):
    z = w @ h + x
    return jnp.tanh(z), {"drive": z, "sizes": (jnp.sum(w**2) * h, jnp.int32(7))}


def state(w, x, h):
    return f(w, x, h)[0]


def find(w, x, h):
    return jax.lax.fori_loop(0, 400, lambda _, h: state(w, x, h), h)


MAKERS = {
    "rbp_solve": lambda f, **o: rbpjax.rbp_solve(f, **TIGHT, **o),
    "bptt": partial(rbpjax.bptt, num_steps=400),
    "rbp_fixed_point": lambda f, **o: rbpjax.rbp_fixed_point(
        f, backward=TIGHT["backward"], **o
    )(find),
}


def total(solution):
    aux = solution.aux
    return jnp.sum(solution.value) + jnp.sum(aux["drive"] ** 2 + aux["sizes"][0])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_aux_is_that_of_the_fixed_point_and_differentiable(make):
    """Value and gradient are those of f evaluated by hand at an unrolled h*."""
    solve = make(f, has_aux=True)

    def by_hand(w, x):
        h, _ = jax.lax.scan(lambda h, _: (state(w, x, h), None), H, length=300)
        aux = f(w, x, h)[1]
        return jnp.sum(h) + jnp.sum(aux["drive"] ** 2 + aux["sizes"][0])

    want = jax.jit(jax.value_and_grad(by_hand, (0, 1)))(W, X)
    loss = lambda w, x: total(solve(w, x, H))
    for transform in (lambda g: g, jax.jit):
        got = transform(jax.value_and_grad(loss, (0, 1)))(W, X)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)
    assert solve(W, X, H).aux["sizes"][1] == 7
    assert make(state)(W, X, H).aux is None


def test_aux_under_vmap():
    solve = MAKERS["rbp_solve"](f, has_aux=True)
    xs = jnp.stack([X, 2 * X, -X])
    batch = jax.vmap(lambda x: solve(W, x, H))(xs)
    for i, x in enumerate(xs):
        one = solve(W, x, H)
        np.testing.assert_allclose(batch.aux["drive"][i], one.aux["drive"], rtol=1e-9)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_step_without_a_pair_is_refused(make):
    with pytest.raises(ValueError, match=r"pair \(h, aux\).*has_aux=True; got"):
        make(state, has_aux=True)(W, X, H)
    with pytest.raises(ValueError, match=r"has_aux=True"):
        make(f)(W, X, H)
