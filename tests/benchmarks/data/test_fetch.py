"""Data: from a folder, from a server, damaged, missing."""

import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.data.fetch import registry
from benchmarks.data.images import mnist


def test_missing_and_damaged_data_end_in_one_line(tmp_path, monkeypatch, capsys):
    """A folder without the files, and a file with another checksum, are named."""
    monkeypatch.setenv("RBPJAX_DATA", str(tmp_path))
    assert main(["hopfield", "--dataset", "mnist"]) == 2
    assert "has no mnist/train-images-idx3-ubyte.gz" in capsys.readouterr().err
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"not MNIST")
    assert main(["hopfield", "--dataset", "mnist"]) == 2
    message = capsys.readouterr().err
    assert "is damaged" in message and message.count("\n") == 1


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A web server on this machine in the place of the MNIST mirror."""
    root = tmp_path / "mirror"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("RBPJAX_DATA", raising=False)
    monkeypatch.setattr(registry(), "path", tmp_path / "cache")
    for name in registry().registry:
        if name.startswith("mnist/"):
            address = f"http://127.0.0.1:{server.server_port}/{Path(name).name}"
            monkeypatch.setitem(registry().urls, name, address)
    yield root
    server.shutdown()
    server.server_close()


def test_a_corrupt_download_ends_in_one_line_and_is_not_kept(mirror, tmp_path, capsys):
    """A download with another checksum is refused, named, and leaves no file behind."""
    (mirror / "train-images-idx3-ubyte.gz").write_bytes(b"corrupt")
    assert main(["hopfield", "--dataset", "mnist"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "could not be downloaded" in message
    assert not list((tmp_path / "cache").rglob("*.gz"))


def test_a_download_is_read_as_idx(mirror, monkeypatch):
    """A file with the right checksum becomes images and labels."""
    images = np.arange(2 * 784, dtype=np.uint32).astype(np.uint8)
    labels = np.array([7, 3], np.uint8)
    for name, header, body in (
        ("train-images-idx3-ubyte.gz", 16, images),
        ("train-labels-idx1-ubyte.gz", 8, labels),
    ):
        (mirror / name).write_bytes(gzip.compress(bytes(header) + body.tobytes()))
        digest = hashlib.sha256((mirror / name).read_bytes()).hexdigest()
        monkeypatch.setitem(registry().registry, f"mnist/{name}", f"sha256:{digest}")
    got, got_labels = mnist()
    np.testing.assert_array_equal(got, images.reshape(2, 28, 28))
    np.testing.assert_array_equal(got_labels, labels)
