"""Graphs at a fixed point: the data, what reaches how far, and a small training."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.harness import results
from examples.graphs import data, networks, train

FOLDER = Path(train.__file__).parent


def test_the_script_is_short():
    assert len((FOLDER / "train.py").read_text().splitlines()) <= 200


def test_only_the_first_node_of_a_chain_shows_its_class():
    """Labels are alike along a chain, and edges go down it and nowhere else."""
    nodes = data.chains(3, 60, 0)
    labels = nodes.labels.reshape(3, 60)
    features = nodes.features.reshape(3, 60, data.CLASSES)
    assert np.all(labels == labels[:, :1])
    np.testing.assert_array_equal(features[:, 0].argmax(-1), labels[:, 0])
    assert not features[:, 1:].any()
    senders = np.asarray(nodes.graph.senders)
    np.testing.assert_array_equal(nodes.graph.receivers, senders + 1)
    assert not np.any(senders % 60 == 59) and len(senders) == 3 * 59
    np.testing.assert_array_equal(nodes.test.reshape(3, -1)[0], np.arange(50, 60))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("fixed point", marks=pytest.mark.full),
        "BPTT, 8 steps",
        "explicit, 8 layers",
    ],
)
def test_how_far_a_first_node_reaches(apart, kind):
    """To the end at a fixed point; as many edges as there are layers or steps."""
    nodes = data.chains(1, 30, 0)
    model = networks.Network(kind, networks.RECIPES["chains"], nodes.sizes, 0)
    model.eval()
    step = lambda features: model(nodes.graph, features)[0]
    features = jnp.asarray(nodes.features)
    change = step(features) - step(features.at[0].multiply(2.0))
    reached = np.flatnonzero(np.abs(np.asarray(change)).max(1) > 1e-6)
    # Eight rounds from zero reach seven edges, from the drive eight.
    known = {"fixed point": 29, "BPTT, 8 steps": 7, "explicit, 8 layers": 8}[kind]
    assert reached.max() == known


@pytest.mark.full
def test_the_gradient_is_that_of_bptt_over_all_edges(apart):
    """J is nilpotent on a chain, so that BPTT over its length is exact."""
    nodes, recipe = data.chains(2, 20, 1), networks.RECIPES["chains"]

    def gradient(kind):
        model = networks.Network(kind, recipe, nodes.sizes, 0)
        model.eval()
        loss = lambda model: jnp.sum(model(nodes.graph, nodes.features)[0] ** 2)
        return nnx.to_pure_dict(nnx.grad(loss)(model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.UNROLLED, "BPTT, 20 steps", 20)
        found, known = gradient("fixed point"), gradient("BPTT, 20 steps")
    # Both in float32; the tolerances of both solves are 6e-6 of the state.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-3, atol=1e-4 * abs(b).max()
        ),
        found,
        known,
    )


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_it_learns_what_eight_layers_cannot(apart):
    """Chains of 200 edges, and a planted graph far above one guess in three."""
    train.Graphs(tiny=True).run()
    path = results.RESULTS / "example-graphs-custom.json"
    networks_ = json.loads(path.read_text())["networks"]
    ours, layers = (
        networks_["chains"][kind][0] for kind in ("fixed point", "explicit, 8 layers")
    )
    loss = ours["history"]["mean"]["loss"]
    assert loss[-1] < 0.1 < loss[0]
    assert np.mean(ours["by_distance"][50:]) > 80  # one guess in four is right
    assert np.mean(layers["by_distance"][50:]) < 50
    assert min(ours["history"]["watched"]["converged"]) == 1
    (planted,) = networks_["planted"]["fixed point"]
    assert planted["test"] > 50
    assert path.with_suffix(".png").exists()
