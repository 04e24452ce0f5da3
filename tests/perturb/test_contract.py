"""Strategies and calls: bad input is named, rules are values."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import ActivityPerturbation, NodePerturbation, WeightPerturbation
from rbpjax.perturb.credit import Trace
from rbpjax.perturb.difference import Central, Exact, OneSided
from tests.support.perturb import RULES, dense, estimate


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: OneSided(sigma=0.0),
            r"`sigma` must be a Python number in \(0.0, inf\)",
        ),
        (lambda: Central(sigma=0), r"`sigma` must be a Python number in"),
        (lambda: Central(sigma=jnp.array(0.1)), "`sigma` must be a Python number"),
        (
            lambda: Trace(decay=1.5),
            r"`decay` must be a Python number in \[0.0, 1.0\]; got 1.5",
        ),
        (lambda: NodePerturbation(num_samples=0), "`num_samples`"),
        (
            lambda: NodePerturbation(num_samples=10, chunk=3),
            "`chunk` = 3 must divide `num_samples` = 10",
        ),
        (lambda: NodePerturbation(noise="normal"), "`noise` must be a callable"),
        (lambda: WeightPerturbation(credit=None), "`credit` must be a callable"),
        (lambda: WeightPerturbation(every_step=1), "`every_step` must be True or"),
        (lambda: ActivityPerturbation(norm="layer"), "`norm` must be None or"),
        (lambda: ActivityPerturbation(scale=True), "`scale` must be a Python number"),
        (lambda: perturb.paper_code(0), "`num_units`"),
    ],
)
def test_bad_fields_are_named(make, message):
    """Strategies validate what they are given when they are made."""
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_are_values():
    """Equal rules are equal, hash alike, print as written: one compilation."""
    for rule in RULES:
        again = type(rule)(**vars(rule))
        assert again == rule and hash(again) == hash(rule)
        assert repr(rule).startswith(type(rule).__name__)
        assert not jax.tree.leaves(rule)


def test_bad_calls_are_named():
    """Losses, parameters and rules of the wrong kind: the argument and a remedy."""
    net = dense(examples=3)
    with pytest.raises(ValueError, match="scalar or a vector"):
        estimate(net._replace(loss=lambda o, y: o - y), RULES[0])
    with pytest.raises(ValueError, match=r"3 losses.*leading axis of 3"):
        bare = dense()._replace(loss=lambda o, y: jnp.ones(3) * jnp.sum(o))
        estimate(bare, RULES[0])
    with pytest.raises(ValueError, match=r"int.*'steps'"):
        estimate(net._replace(params=net.params | {"steps": 3}), RULES[0])
    with pytest.raises(ValueError, match="`inputs` has no leaves"):
        estimate(net._replace(inputs=None), RULES[0])
    with pytest.raises(ValueError, match="`rule` must be"):
        perturb.recurrent_value_and_grad(net.cell, net.loss, Exact())
    with pytest.raises(ValueError, match="recurrent_value_and_grad"):
        perturb.value_and_grad(jnp.sum, NodePerturbation())
    with pytest.raises(ValueError, match="needs the steps"):
        perturb.value_and_grad(jnp.sum, RULES[3])
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"must return a scalar.*has_aux"):
        perturb.value_and_grad(lambda p: (p, p), RULES[2])(key, jnp.ones(()))


def test_callables_of_a_rule_keep_their_shapes():
    """Noise, credit, difference, norm: what they return is not cut or broadcast."""
    net = dense(examples=3)
    node = lambda **k: NodePerturbation(num_samples=2, **k)
    made = lambda rows, columns: lambda k, i, size, d: jnp.ones((rows, size + columns))
    for rule, words in (
        (node(noise=made(2, 1)), r"`noise\(.*\[2, 27\]; got float64\[2, 28\]"),
        (node(noise=made(2, -1)), "`noise"),
        (node(noise=made(1, 0)), r"`noise.*got float64\[1, 27\]"),
        (node(noise=lambda k, i, size, d: jnp.ones(size)), "`noise"),
        (node(credit=jnp.sum), r"`credit\(delta\)` must return.*got \(\)"),
        (node(readout_credit=lambda d: d[:1]), r"`readout_credit\(delta\)`"),
        (node(difference=lambda run, clean: clean[0]), r"`difference\(run, clean\)`"),
        (
            WeightPerturbation(every_step=True, credit=lambda d: d[:1]),
            r"`credit\(delta\)`",
        ),
        (
            ActivityPerturbation(norm=lambda leaves: [(jnp.ones(3), 1)] * len(leaves)),
            r"`norm\(leaves\)` must return a pair",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            estimate(net, rule)


def test_keys_and_lengths_are_named():
    """No key, a swapped one, no steps, sequences of two lengths."""
    net = dense(examples=3)
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, RULES[0])
    for key in (None, 0, net.params):
        with pytest.raises(ValueError, match="`key` must be one PRNG key"):
            f(key, *net.data)
    g = perturb.value_and_grad(jnp.sum, RULES[2])
    with pytest.raises(ValueError, match="`key` must be one PRNG key"):
        g(jnp.ones(3), jax.random.key(0))
    key, steps = jax.random.key(0), "`inputs` and `targets` must be sequences"
    for n in (0, 2):
        with pytest.raises(ValueError, match=steps):
            f(key, net.params, net.inputs[:n], net.h0, net.targets[: n // 2])


def test_inputs_may_be_shared_by_the_examples():
    """x [T, i] beside h [B, n]: as if every example had its own copy."""
    net = dense(examples=3)
    shared = net._replace(inputs=net.inputs[:, 0])
    copied = net._replace(inputs=jnp.broadcast_to(net.inputs[:, :1], net.inputs.shape))
    for rule in RULES:
        chex.assert_trees_all_close(
            estimate(shared, rule), estimate(copied, rule), rtol=1e-9, atol=1e-9
        )
