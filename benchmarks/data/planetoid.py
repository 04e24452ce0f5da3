"""The Planetoid citation graphs: safe arrays, never a pickle that may run code.

What is public are pickles. They are downloaded with checksums and read by an unpickler
that knows seven names, each a stand-in of ours that only keeps what it is given; the
arrays are rebuilt from their bytes. RBPJAX_DATA may hold the result instead, as
``planetoid/NAME.npz``.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import pickle
from typing import Any

import numpy as np
import scipy.sparse

from benchmarks.data.fetch import fetch, is_local
from benchmarks.harness.options import UsageError, require

# The name of its contents in git, in place of a SHA-256.
PUBMED_BLOB = ("ind.pubmed.allx", "3b86bccf08111c37c632a9dd8ab63db25ea76361")
# Of Pubmed there is the whole graph, but the features of 1,060 of 19,717 nodes only.
NPZ = {
    "cora": "planetoid/cora.npz",
    "citeseer": "planetoid/citeseer.npz",
    "pubmed": "planetoid/pubmed_partial.npz",
}


@dataclasses.dataclass(frozen=True)
class Planetoid:
    """A citation graph.

    Attributes:
      features: sparse ``float32[node, word]``, as given: not normalized.
      labels: ``int32[node]``; -1 where there is none (15 nodes of Citeseer).
      edges: ``int32[edge, 2]``, both directions, no repeats, no self-loops.
      train, validation, test: the nodes of the standard split.
      complete: whether the features of all nodes are there.
    """

    features: scipy.sparse.csr_matrix
    labels: np.ndarray
    edges: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    complete: bool = True

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def planetoid(name: str) -> Planetoid:
    """The graph ``name``: cora, citeseer or pubmed; UsageError if it cannot be had."""
    if is_local():
        arrays = np.load(fetch(NPZ[name]), allow_pickle=False)
        csr = tuple(arrays[f"features_{k}"] for k in ("data", "indices", "indptr"))
        return Planetoid(
            scipy.sparse.csr_matrix(csr, shape=tuple(arrays["features_shape"])),
            arrays["labels"],
            arrays["edges"],
            arrays["train_idx"],
            arrays["val_idx"],
            arrays["test_idx"],
            "features_known" not in arrays,
        )
    return assemble({part: _download(f"ind.{name}.{part}") for part in PARTS})


# --- from the public files -----------------------------------------------------------

PARTS = ("y", "tx", "ty", "allx", "ally", "graph", "test.index")


def _download(name: str) -> bytes:
    """The file ``name`` with the right contents."""
    path = fetch(f"planetoid/{name}")
    content = path.read_bytes()
    if name != PUBMED_BLOB[0]:
        return content
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    require(blob.hexdigest() == PUBMED_BLOB[1], f"{path} is damaged: delete it")
    return content


def assemble(files: dict[str, bytes]) -> Planetoid:
    """A graph from the contents of its seven files.

    ``allx`` and ``ally`` are the nodes 0, 1, …; row j of ``tx`` and ``ty`` is the node
    in line j of ``test.index``. The first nodes, as many as ``y`` has, are for
    training, the next 500 for validation.
    """
    read = {part: _read(files[part]) for part in PARTS[:-1]}
    test = np.array(files["test.index"].split(), np.int32)
    graph = read["graph"]
    shape = (len(graph), read["allx"].shape[1])
    features = scipy.sparse.lil_matrix(shape, dtype=np.float32)
    features[: read["allx"].shape[0]] = read["allx"]
    features[test] = read["tx"]
    one_hot = np.zeros((len(graph), read["ally"].shape[1]))
    one_hot[: len(read["ally"])] = read["ally"]
    one_hot[test] = read["ty"]
    labels = np.where(one_hot.any(1), one_hot.argmax(1), -1).astype(np.int32)
    pairs = [(i, j) for i, neighbors in graph.items() for j in neighbors if i != j]
    directed = np.array(pairs, np.int32)
    edges = np.unique(np.concatenate([directed, directed[:, ::-1]]), axis=0)
    first = len(read["y"])
    return Planetoid(
        features.tocsr(),
        labels,
        edges,
        np.arange(first, dtype=np.int32),
        np.arange(first, first + 500, dtype=np.int32),
        np.sort(test),
    )


def _read(content: bytes) -> Any:
    """What a pickle of arrays, sparse matrices and dictionaries of lists holds."""
    try:
        return _plain(_Reader(io.BytesIO(content), encoding="latin1").load())
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"a Planetoid file cannot be read: {error}") from None


class _Kept:
    """Stands for any object of a pickle: keeps how it was made, and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Matrix(_Kept):
    """scipy's csr_matrix."""


class _Array(_Kept):
    """numpy's ndarray."""


class _DType(_Kept):
    """numpy's dtype."""


class _Reader(pickle.Unpickler):
    """Knows the names that occur in these files, and makes inert records of them."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for one of seven names; UsageError for any other."""
        known = {
            "csr_matrix": _Matrix,
            "ndarray": _Array,
            "dtype": _DType,
            "_reconstruct": lambda *_: _Array(),
            "defaultdict": lambda *_: collections.OrderedDict(),
            "list": list,
            "encode": lambda text, _: text,  # how Python 3 writes bytes
        }
        require(name in known, f"a Planetoid file asks for {module}.{name}: not read")
        return known[name]


def _plain(record: Any) -> Any:
    """Arrays and matrices from their records."""
    if isinstance(record, _Array):
        _, shape, dtype, fortran, content = record.state
        content = content.encode("latin1") if isinstance(content, str) else content
        code, (_, order, *_) = dtype.arguments[0], dtype.state
        array = np.frombuffer(content, np.dtype(code).newbyteorder(order))
        return array.reshape(shape, order="F" if fortran else "C")
    if isinstance(record, _Matrix):
        state = record.state
        csr = tuple(_plain(state[k]) for k in ("data", "indices", "indptr"))
        shape = state["_shape"] if "_shape" in state else state["shape"]
        return scipy.sparse.csr_matrix(csr, shape=shape)
    return record
