"""The citation experiment on a graph of 40 nodes: gradients, resuming, complaints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from benchmarks.__main__ import main
from benchmarks.citation import costs as citation_costs
from benchmarks.citation import experiment as citation
from benchmarks.citation.experiment import Citation, make_task, paired, resolve
from benchmarks.citation.training import Trainer, random_split
from benchmarks.data.planetoid import Planetoid
from benchmarks.harness import checkpoints, results

NODES, WORDS, CLASSES = 400, 90, 3


@pytest.fixture(autouse=True)
def graph(monkeypatch):
    """Three communities whose words and neighbors are mostly their own."""
    random = np.random.default_rng(0)
    labels = np.arange(NODES, dtype=np.int32) % CLASSES
    own = labels[:, None] == np.arange(WORDS)[None] % CLASSES
    words = random.random((NODES, WORDS)) < np.where(own, 0.2, 0.05)
    pairs = random.integers(0, NODES, (4000, 2)).astype(np.int32)
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (same | (random.random(4000) < 0.1))]
    edges = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    nodes = np.arange(NODES, dtype=np.int32)
    made = Planetoid(
        scipy.sparse.csr_matrix(words.astype(np.float32)),
        labels,
        edges,
        nodes[:30],
        nodes[30:130],
        nodes[130:],
    )
    monkeypatch.setattr(citation, "planetoid", lambda name: made)
    monkeypatch.setattr(citation_costs, "ROUNDS", (100, 10000))
    return made


@pytest.mark.parametrize(
    "method",
    [
        "neumann",
        *(pytest.param(m, marks=pytest.mark.full) for m in ("adaptive", "cg", "rbp")),
    ],
)
def test_gradient_is_that_of_the_unrolled_network(graph, method):
    """All converge: 0.9^300 = 2e-14, and 0.9^200 = 7e-10 for RBP's steps."""
    options = resolve(Citation(num_steps=300, truncation=200))
    task = make_task(options, graph)

    def grads(name):
        trainer = Trainer(task, citation.METHODS[name](options))
        params = trainer.init(0)[0]
        grad = jax.jit(jax.grad(trainer.loss, has_aux=True))
        return grad(params, jnp.asarray(graph.train), jax.random.key(1))[0]

    ours, truth = grads(method), grads("bptt")
    assert len(jax.tree.leaves(ours)) == 6
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        # Both tolerances are 1e-4, and errors grow by up to 1 / (1 - 0.9).
        error = jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
        assert error < 3e-3, error


def test_a_split_is_a_partition(graph):
    parts = random_split(graph, 3)
    assert [len(p) for p in parts] == [4, 196, 200]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(NODES))
    assert not np.array_equal(parts[0], random_split(graph, 4)[0])


@pytest.mark.full
def test_learns_writes_and_resumes(monkeypatch):
    """A killed run goes on, and ends where an uninterrupted one does."""
    command = "citation --methods adaptive --splits standard --seeds 0 1 --no-costs"
    assert main([*command.split(), "--epochs", "20"]) == 0
    path = results.RESULTS / "citation-cora-custom.json"
    whole = json.loads(path.read_text())["splits"]["standard"]
    found = whole["methods"]["adaptive"]
    assert min(found["test_accuracy"]) > 0.6  # chance is 1/3
    assert max(found["spectral_radius"]) < 0.9 + 1e-4
    assert len(whole["baselines"]["sgc"]) == 1

    saves = []
    save = checkpoints.Checkpoints.save

    def killed(self, name, step, state):
        save(self, name, step, state)
        saves.append(name)
        if len(saves) == 7:  # in the second seed
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpoints, "save", killed)
    assert main([*command.split(), "--epochs", "20"]) == 130
    assert main([*command.split(), "--epochs", "20"]) == 0
    assert len(saves) == 10, "nothing was trained twice"
    again = json.loads(path.read_text())["splits"]["standard"]
    for part in (whole, again):
        part["methods"]["adaptive"].pop("seconds")
    assert again == whole


@pytest.mark.full
def test_costs_and_the_paper_network():
    arguments = "--model paper --methods bptt neumann --epochs 20 --seeds 0 1"
    assert main(["citation", *arguments.split(), "--num-steps", "10"]) == 0
    result = json.loads(
        (results.RESULTS / "citation-cora-paper-custom.json").read_text()
    )
    bytes_ = {n: c["temporary_bytes"] for n, c in result["costs"].items()}
    assert bytes_["neumann"]["100"] == bytes_["neumann"]["10000"]
    assert bytes_["bptt"]["10000"] > 50 * bytes_["bptt"]["100"]
    methods = result["splits"]["random"]["methods"]
    assert methods["bptt"]["adjoint_residual"] == [None, None]
    assert len(citation.rows(result, "random")) == 4


@pytest.mark.full
def test_without_features_only_costs(graph, monkeypatch, capsys):
    partial = dataclasses.replace(graph, complete=False)
    monkeypatch.setattr(citation, "planetoid", lambda name: partial)
    assert main(["citation", "--dataset", "pubmed", "--methods", "neumann"]) == 0
    assert "time and memory only" in capsys.readouterr().out
    assert main(["citation", "--dataset", "pubmed", "--no-costs"]) == 2


def test_paired_difference():
    mean, error = paired([1.0, 2.0, 6.0], [0.0, 0.0, 0.0])
    assert mean == 3.0
    assert error == pytest.approx((14 / 2 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dataset dblp", "--dataset: any of cora, citeseer, pubmed; got 'dblp'"),
        ("--model gcn", "--model: any of convergent, paper"),
        ("--methods newton", "--methods: any of adaptive"),
        ("--splits public", "--splits: any of standard"),
        ("--epochs 3", "multiple of 2"),
        ("--truncation 101", "beyond the 100 rounds"),
        ("--seeds 1 1", "no two alike"),
        ("--learning-rate 0", "--learning-rate: above 0"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, words, capsys):
    assert main(["citation", *arguments.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
