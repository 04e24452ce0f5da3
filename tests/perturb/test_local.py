"""Local losses: unbiased for their sum with gradients stopped, by enumeration."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import NodePerturbation, WeightPerturbation
from rbpjax.perturb.difference import Exact
from tests.support.perturb import TIGHT, distance, signs, table

LAYERS = 3


def cell(params, x, h, noise):
    """A layer with its own readout; recurrent where ``params`` say so."""
    a = params["w"] @ x + params["r"] @ h + noise["a"]
    h = jnp.tanh(a)
    b = params["out"] @ h + noise["b"]
    return h, b, {"a": a, "b": b}


def loss(out, y):
    return jnp.sum((out - y) ** 2)


def network(steps=1, seed=0):
    """Three layers of two units and one output, and their data."""
    draw = jax.random.normal
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"w": (LAYERS, 2, 2), "r": (LAYERS, 2, 2), "out": (LAYERS, 1, 2)}
    stacked = {n: draw(k, s) for (n, s), k in zip(shapes.items(), keys, strict=False)}
    params = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(LAYERS)]
    xs = 0.5 + draw(keys[3], (steps, 2))
    h0 = [0.1 * jnp.ones(2) * (i + 1) for i in range(LAYERS)]
    return params, xs, h0, xs[:, :1] ** 2


def total(params, xs, h0, ys, stop=True, last=False):
    """The sum of the local losses, in plain loops."""
    still, value = {"a": jnp.zeros(2), "b": jnp.zeros(1)}, 0.0
    for i, (p, h) in enumerate(zip(params, h0, strict=True)):
        states = []
        for x, y in zip(xs, ys, strict=True):
            h, out, _ = cell(p, x, h, still)
            states.append(h)
            if not last or i + 1 == LAYERS:
                value += loss(out, y)
        xs = jax.lax.stop_gradient(states) if stop else states
    return value


def exact_rule(size):
    """All signs of the nodes of a layer."""
    return NodePerturbation(
        num_samples=2**size, difference=Exact(), noise=table(signs(size))
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_unbiased_for_the_sum_of_local_losses(steps):
    """Over all signs; not for the sum without stops, nor for the last loss."""
    data = network(steps)
    f = perturb.local_value_and_grad([cell] * LAYERS, loss, exact_rule(3 * steps))
    values, grads = jax.jit(f)(jax.random.key(0), *data)
    want = jax.grad(total)(*data)
    assert distance(list(grads), want) < TIGHT
    assert abs(values.sum() - total(*data)) < TIGHT * total(*data)
    for other in (dict(stop=False), dict(stop=False, last=True)):
        wrong = jax.grad(lambda p, other=other: total(p, *data[1:], **other))(data[0])
        assert distance(list(grads), wrong) > 0.01
    # The last layer alone has its true gradient.
    whole = jax.grad(lambda p: total(p, *data[1:], stop=False, last=True))(data[0])
    assert distance(grads[-1], whole[-1]) < TIGHT


def test_layers_have_noise_and_losses_of_their_own():
    """Equal layers draw different noise; a loss a layer; other rules too."""
    params, xs, h0, ys = network()
    seen = []

    def noise(key, indices, size, dtype):
        seen.append(jax.random.key_data(key).tolist())
        return perturb.noise.rademacher(key, indices, size, dtype)

    weights = [1.0, 0.0, -3.0]
    losses = [lambda o, y, c=c: c * loss(o, y) for c in weights]
    for rule in (NodePerturbation(), WeightPerturbation(num_samples=2)):
        plain, scaled = (
            jax.jit(perturb.local_value_and_grad([cell] * LAYERS, one, rule))(
                jax.random.key(0), params, xs, h0, ys
            )
            for one in (loss, losses)
        )
        for i, c in enumerate(weights):
            by = jax.tree.map(lambda x, c=c: c * x, plain[1][i])
            # A difference of 1e-8 of the loss has eight digits.
            chex.assert_trees_all_close(scaled[1][i], by, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(scaled[0], jnp.array(weights) * plain[0])
    f = perturb.local_value_and_grad(
        [cell] * LAYERS, loss, NodePerturbation(noise=noise)
    )
    f(jax.random.key(0), params, xs, h0, ys)
    assert len({tuple(key) for key in seen}) == LAYERS


@pytest.mark.full
def test_what_is_not_finite_stays_in_its_layer():
    """A loss of NaN above leaves the gradients of the other layers alone; vmap, too."""
    params, xs, h0, ys = network()
    losses = [loss, lambda o, y: jnp.nan * jnp.sum(o), loss]
    rule = NodePerturbation(num_samples=2, difference=Exact())
    key = jax.random.key(0)
    both = (
        jax.jit(perturb.local_value_and_grad([cell] * LAYERS, one, rule))(
            key, params, xs, h0, ys
        )[1]
        for one in (loss, losses)
    )
    for i, (fine, got) in enumerate(zip(*both, strict=True)):
        if i == 1:
            assert jnp.isnan(got["w"]).all()
        else:
            chex.assert_trees_all_equal(fine, got)
    f = perturb.local_value_and_grad([cell] * LAYERS, loss, rule)
    many = jax.vmap(f, (None, None, 0, None, None))
    values, _ = many(key, params, jnp.stack([xs, jnp.nan * xs]), h0, ys)
    assert jnp.isfinite(values[0]).all() and jnp.isnan(values[1]).all()


def test_what_does_not_fit_is_named():
    """Cells, losses, parameters, states."""
    params, xs, h0, ys = network()
    rule, key = NodePerturbation(), jax.random.key(0)
    with pytest.raises(ValueError, match="at least one cell"):
        perturb.local_value_and_grad([], loss, rule)
    with pytest.raises(ValueError, match="3 cells and 2 losses"):
        perturb.local_value_and_grad([cell] * 3, [loss] * 2, rule)
    with pytest.raises(ValueError, match="`rule` must be"):
        perturb.local_value_and_grad([cell], loss, Exact())
    f = perturb.local_value_and_grad([cell] * 3, loss, rule)
    with pytest.raises(ValueError, match="`params` must be a sequence"):
        f(key, params[:2], xs, h0, ys)
    with pytest.raises(ValueError, match="`h0` must be a sequence"):
        f(key, params, xs, h0[0], ys)
    with pytest.raises(ValueError, match="`key` must be one PRNG key"):
        f(0, params, xs, h0, ys)
