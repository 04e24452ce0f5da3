"""Citation graphs from files made like the public ones, and from bad files."""

import collections
import pickle

import numpy as np
import pytest
import scipy.sparse

from benchmarks.data.planetoid import assemble
from benchmarks.harness.options import UsageError

KNOWN, TEST = 6, np.array([8, 6, 7])  # nodes 0 … 5, and three more out of order
LABELS = np.array([0, 1, 2, 0, 1, 2, 2, 1, 0])
EDGES = {0: [1, 8, 8], 1: [0], 2: [2, 6], 3: [], 4: [], 5: [7], 6: [2], 7: [5], 8: [0]}


def files(edges=EDGES):
    """The seven files, pickled by the protocol of Python 2, and the features."""
    random = np.random.default_rng(0)
    features = scipy.sparse.random(9, 5, 0.5, "csr", np.float32, rng=random)
    one_hot = np.eye(3, dtype=np.int32)[LABELS]
    parts = {
        "y": one_hot[:3],
        "allx": features[:KNOWN],
        "ally": one_hot[:KNOWN],
        "tx": features[TEST],
        "ty": one_hot[TEST],
        "graph": collections.defaultdict(list, edges),
    }
    content = {name: pickle.dumps(part, 2) for name, part in parts.items()}
    return content | {"test.index": b"8\n6\n7\n"}, features


def test_everything_is_where_the_nodes_are():
    content, features = files()
    graph = assemble(content)
    np.testing.assert_array_equal(graph.features.toarray(), features.toarray())
    np.testing.assert_array_equal(graph.labels, LABELS)
    np.testing.assert_array_equal(graph.train, [0, 1, 2])
    np.testing.assert_array_equal(graph.test, [6, 7, 8])
    # Repeats once, self-loops not at all, both directions.
    expected = [(0, 1), (0, 8), (1, 0), (2, 6), (5, 7), (6, 2), (7, 5), (8, 0)]
    assert list(map(tuple, graph.edges.tolist())) == expected


def test_a_node_without_a_label_is_minus_one():
    content, _ = files(EDGES | {9: [0]})
    assert assemble(content).labels[9] == -1


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("exit 1",)


def test_a_pickle_that_would_run_something_is_refused():
    content, _ = files()
    with pytest.raises(UsageError, match=r"asks for \w+\.system: not read"):
        assemble(content | {"graph": pickle.dumps(Evil(), 2)})


def test_a_damaged_file_is_one_line():
    content, _ = files()
    with pytest.raises(UsageError, match="cannot be read"):
        assemble(content | {"tx": content["tx"][:-20]})
