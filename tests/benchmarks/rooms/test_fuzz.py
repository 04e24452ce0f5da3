"""The fuzz of the rooms, run small; and that it would see what it looks for."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from benchmarks.rooms import fuzz, newer, streaming
from benchmarks.rooms.fuzz import FuzzRooms
from rbpjax import online, perturb, unitary
from rbpjax.online import balance


@pytest.mark.full
def test_a_round_finds_nothing():
    """One group of each kind: no case wrong, no group crashed."""
    result = FuzzRooms(cases=1, group=10, seed=3).run()
    assert result["silently_wrong"] == result["crashed_groups"] == 0
    assert set(result["kinds"]) == set(fuzz.KINDS)
    assert all(kind["cases"] >= 10 for kind in result["kinds"].values())


def test_wrong_and_not_finite_and_crashed_are_told_apart(monkeypatch):
    """Errors beyond the bound count, also NaN; an exception is a crashed group."""
    bad = lambda random, size: ("", np.array([0.5, 2.0, np.nan]))
    monkeypatch.setattr(fuzz, "KINDS", {"bad": bad, "crash": lambda *_: 1 / 0})
    assert fuzz.run_group(0, 0, 3)[:3] == (3, 2, np.inf)
    assert fuzz.run_group(0, 1, 3) == (0, 0, 0, 0, 1)


def _half_damped(f, num_steps, *, damping, **options):
    return rbpjax.reversible(f, num_steps, damping=damping / 2, **options)


def _nearly_orthogonal(name):
    return lambda w: 1.001 * getattr(unitary, name)(w)


FAULTS = {
    "streaming: sparse": (
        "online",
        {"snap": lambda cell, loss, **_: online.snap1(cell, loss)},
    ),
    "unitary: dense": (
        "unitary",
        {
            name: _nearly_orthogonal(name)
            for name in vars(unitary)
            if name.startswith("orthogonal_")
        },
    ),
    "perturbation: windows": (
        "perturb",
        dict.fromkeys(("pes", "nres"), perturb.truncated_es),
    ),
    "fixed point: reversible": ("rbpjax", {"reversible": _half_damped}),
}


@pytest.mark.filterwarnings("ignore:Some donated buffers")
@pytest.mark.parametrize("kind", FAULTS)
def test_another_method_in_its_place_would_be_seen(monkeypatch, kind):
    """In one of three groups: some set-ups are alike for both."""
    room, others = FAULTS[kind]
    real = getattr(newer, room)
    look = lambda: max(
        newer.KINDS[kind](np.random.default_rng((7, i)), 5)[1].max() for i in range(3)
    )
    with jax.enable_x64(True):
        assert look() <= 1
        monkeypatch.setattr(newer, room, types.SimpleNamespace(**vars(real) | others))
        assert look() > 1


def test_a_constant_with_units_would_be_seen(monkeypatch):
    """With 1e-7 added to all norms other units give other estimates."""

    def old(v, w):
        norm = lambda tree: jnp.sqrt(
            sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))
        )
        root = lambda v, w: jnp.sqrt((norm(w) + 1e-7) / (norm(v) + 1e-7))
        return balance.Scales(tuple(map(root, v.vectors, w.vectors)), ())

    def worst(seed):
        random = np.random.default_rng(seed)
        monkeypatch.setattr(streaming, "UNITS", ["uoro"])
        return streaming.units(random, 5)[1].max()

    assert worst(0) <= 1
    # The module, which the function of that name hides.
    monkeypatch.setattr(sys.modules["rbpjax.online.uoro"], "balance", old)
    assert worst(0) > 1
