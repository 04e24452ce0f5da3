"""Strategies and calls: bad input is named, rules are values."""

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
