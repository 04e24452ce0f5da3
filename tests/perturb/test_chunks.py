"""How many samples run at once by default: any number of them, in bounded memory."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import ActivityPerturbation, NodePerturbation, WeightPerturbation
from rbpjax.perturb.difference import Exact
from rbpjax.perturb.samples import fitting
from tests.support.perturb import TIGHT, dense, distance
from tests.support.problems import rows

# Wide and long enough that four samples are more than 2¹⁷ entries: of the parameters,
# 70,000, or of the nodes of all steps, 79,200. Eight outputs' losses are one.
WIDE = dense(units=256, outputs=8, steps=300)
WIDE = WIDE._replace(loss=lambda out, y: jnp.mean((out - y) ** 2))
RULES = {
    "weight": WeightPerturbation,
    "node": NodePerturbation,
    "activity": ActivityPerturbation,
    "every step": partial(WeightPerturbation, every_step=True),
}


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [
        (128, 35_000, 4),  # 3.7 fit
        (128, 10_000, 8),  # 13.1 fit
        (128, 1_024, 128),
        (6, 10**6, 3),  # four do not divide six
        (7, 10**6, 1),
        (3, 10**6, 3),
        (5, 0, 5),
    ],
)
def test_the_default_is_the_largest_divisor_that_fits(samples, size, expected):
    """2¹⁷ entries on a CPU, four samples at least."""
    assert fitting(samples, size) == expected


def lowered(rule, net, **fields):
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule(**fields))
    return jax.jit(f).lower(jax.random.key(0), *net.data).compile()


@pytest.mark.parametrize("rule", rows(RULES, ["weight"]))
def test_memory_is_that_of_four_samples(rule):
    """Compiled temporary bytes: of a chunk of four; a tenth of those of all 64."""
    asked = {
        chunk: lowered(rule, WIDE, num_samples=64, chunk=chunk)
        .memory_analysis()
        .temp_size_in_bytes
        for chunk in (None, 4, 64)
    }
    assert asked[None] == asked[4]
    assert 5 * asked[None] < asked[64]


@pytest.mark.full
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_default_changes_no_value(rule):
    """One at a time, six at once, and by default: sums in another order."""
    cut = lambda a: a[:100]  # 26,400 nodes, of which three divide six
    net = WIDE._replace(inputs=cut(WIDE.inputs), targets=cut(WIDE.targets))
    call = lambda chunk: lowered(
        rule, net, num_samples=6, chunk=chunk, difference=Exact()
    )(jax.random.key(1), *net.data)
    few, default, all_of_them = map(call, (1, None, 6))
    # Weights and nodes by the ten thousand: sums of 1e5 numbers, not of 512.
    assert distance(default[1], all_of_them[1]) < 100 * TIGHT
    assert distance(few[1], all_of_them[1]) < 100 * TIGHT


EVOLUTIONS = {
    "pes": perturb.pes,
    "nres": perturb.nres,
    "truncated_es": perturb.truncated_es,
}


@pytest.mark.parametrize("method", rows(EVOLUTIONS, ["pes"]))
def test_evolution_strategies_run_four_pairs_at_once(method, monkeypatch):
    """As all at once, with 12 sets of perturbed parameters less, and rounding."""
    f = lambda w, x, h: jnp.tanh(w @ h + x)
    # A coarse σ: the quotient magnifies rounding by 1/σ = 10.
    est = method(f, lambda w, h, y: jnp.sum(h**2), num_samples=16, sigma=0.1)
    w = jax.random.normal(jax.random.key(0), (200, 200)) / 200**0.5
    carry = est.init(w, jnp.ones(200))
    arguments = w, carry, jnp.ones((3, 200)), None, est.noise(jax.random.key(1), carry)

    def compiled():
        return jax.jit(lambda *a: est.step(*a)).lower(*arguments).compile()

    default = compiled()
    monkeypatch.setattr("rbpjax.perturb.samples._AT_ONCE", {"cpu": 10**9})
    whole = compiled()
    bytes_of = lambda program: program.memory_analysis().temp_size_in_bytes
    assert bytes_of(whole) - bytes_of(default) > 11 * w.nbytes
    (after, out), (want, expected) = default(*arguments), whole(*arguments)
    assert distance(after.ahead, want.ahead) < 100 * TIGHT
    assert distance(out, expected) < 100 * TIGHT
