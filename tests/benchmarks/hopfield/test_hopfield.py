"""The main job on a small budget: what it measures, resumes, and refuses."""

import gzip
import http.server
import json
import threading

import jax
import numpy as np
import pytest

from benchmarks import data, harness, readme
from benchmarks.__main__ import main, parse
from benchmarks.hopfield import experiment as hopfield

QUICK = ("--epochs", "4", "--hidden", "8", "--seeds", "0", "1", "--no-sweep")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few draws and evaluations."""
    monkeypatch.setattr(hopfield, "DRAWS", 2)
    monkeypatch.setattr(hopfield, "BLOCKS", 2)


def run(*arguments) -> dict:
    assert main(["hopfield", *QUICK, *arguments]) == 0
    return json.loads((harness.RESULTS / "hopfield-small-custom.json").read_text())


def without_times(result: dict) -> dict:
    """What must not depend on the machine's speed."""
    methods = {
        name: {k: v for k, v in m.items() if k != "step_seconds"}
        for name, m in result["methods"].items()
    }
    return {**result, "methods": methods, "environment": None}


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_every_method_learns_and_is_measured(capsys):
    """Five methods from one start: the loss falls, all is measured."""
    result = run()
    assert list(result["methods"]) == list(hopfield.METHODS)
    first = [m["history"]["loss"][0] for m in result["methods"].values()]
    assert all(f == first[0] for f in first)  # the same start
    for name, m in result["methods"].items():
        history = {k: np.array(v, float) for k, v in m["history"].items()}
        assert history["loss"].shape == (3, 2)  # [evaluation, seed]
        assert (history["loss"][-1] < 0.8 * history["loss"][0]).all()
        assert (history["spectral_radius"] > 0).all()
        assert (history["forward_residual"][-1] < 1e-5).all()
        solves = name not in ("bptt", "tbptt")
        assert np.isfinite(history["adjoint_residual"][-1]).all() == solves
        assert m["temporary_bytes"] > 0 and m["step_seconds"]["median"] > 0
    # Two exact methods and BPTT agree on the first gradients, hence on early losses.
    last = {k: np.array(m["history"]["loss"][-1]) for k, m in result["methods"].items()}
    np.testing.assert_allclose(last["neumann"], last["bptt"], rtol=1e-2)
    np.testing.assert_allclose(last["cg"], last["bptt"], rtol=1e-2)
    assert "| Neumann-RBP" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_run_resumes_bit_for_bit(monkeypatch):
    """Stopped after each block in turn and started again, the result is the same."""
    methods = ("--methods", "tbptt", "cg")
    whole = without_times(run(*methods))
    blocks = []

    def stop_after_one(steps, total, label, done=0):
        for step in steps:
            yield step
            blocks.append((label, step))
            raise KeyboardInterrupt

    monkeypatch.setattr(hopfield, "progress", stop_after_one)
    for _ in range(4):
        assert main(["hopfield", *QUICK, *methods]) == 130
    assert blocks == [("TBPTT", 0), ("TBPTT", 1), ("CG-RBP", 0), ("CG-RBP", 1)]
    assert without_times(run(*methods)) == whole
    assert not list(harness.CHECKPOINTS.iterdir())  # nothing left of a finished run


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_is_named(monkeypatch, capsys, tmp_path):
    """A damaged checkpoint ends the run in one line; --fresh starts over."""
    monkeypatch.setattr(harness, "CHECKPOINTS", tmp_path / "a" / "checkpoints")

    def stop(steps, *_):
        yield next(iter(steps))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hopfield, "progress", stop)
        assert main(["hopfield", *QUICK, "--methods", "cg"]) == 130
    for path in harness.CHECKPOINTS.rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["hopfield", *QUICK, "--methods", "cg"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "damaged checkpoint" in message
    assert main(["hopfield", *QUICK, "--methods", "cg", "--fresh"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "lstm"], "unknown method 'lstm'; choose from bptt"),
        (["--dataset", "cifar"], "unknown dataset 'cifar'; choose from digits, mnist"),
        (["--preset", "large"], "unknown preset 'large'"),
        (["--truncation", "60"], "truncation 60 is beyond the 50 updates"),
        (["--truncation", "0"], "truncation must be at least 1; got 0"),
        (["--truncation", "many"], "many"),
        (["--num-images", "11"], "num_images must be 1 to 10"),
        (["--learning-rate", "0"], "learning_rate must be positive"),
        (["--seeds", "1", "1"], "seeds must be one or more different numbers"),
        (["--methods"], "no methods"),
        (["--bogus", "3"], "--bogus"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, says, capsys):
    """One line that says what is wrong, and exit code 2."""
    assert main(["hopfield", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert says in message


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "MNIST_URL", f"http://127.0.0.1:{server.server_port}/")
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
        digest = __import__("hashlib").sha256((mirror / name).read_bytes()).hexdigest()
        monkeypatch.setitem(data.MNIST, name, digest)
    got, got_labels = data.mnist()
    np.testing.assert_array_equal(got, images.reshape(2, 28, 28))
    np.testing.assert_array_equal(got_labels, labels)


def test_corruption_removes_half_of_the_on_pixels():
    """The input of the retrieval has half of the on-pixels, and no new ones."""
    options = hopfield.resolve(hopfield.Hopfield())
    images = hopfield.load_images(options)
    assert images.shape == (10, 64) and set(np.unique(images)) == {0, 1}
    corrupted = hopfield.corrupt(images, 3)
    assert (corrupted <= images).all()
    on = images.sum(1)
    np.testing.assert_array_equal(corrupted.sum(2), np.tile(on - on // 2, (3, 1)))
    assert (corrupted[0] != corrupted[1]).any()


def test_images_survive_packing():
    """unpack inverts pack, for sides that are not a multiple of eight bits."""
    images = np.random.default_rng(0).integers(0, 2, (3, 25)).astype(np.float32)
    got = hopfield.unpack(hopfield.pack(images), 5)
    np.testing.assert_array_equal(got, images.reshape(3, 5, 5))


def test_the_step_is_the_papers():
    """One update against Wσ(h/2) with W = W₀ + W₀ᵀ, no self-loops, visible clamped."""
    network = hopfield.Network(visible=2, hidden=1)
    random = np.random.default_rng(0)
    w, h = random.normal(size=(5, 5)), random.normal(size=5)
    clamp = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    effective = w + w.T
    np.fill_diagonal(effective, 0)
    want = effective @ (1 / (1 + np.exp(-0.5 * h)))
    want[:2] = clamp[:2]
    with jax.enable_x64(True):
        weights = hopfield.symmetric(jax.numpy.asarray(w))
        got = network.step(weights, jax.numpy.asarray(clamp), jax.numpy.asarray(h))
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_no_progress_bar_where_the_output_is_no_terminal(capsys):
    """Nothing is drawn into a pipe or a file."""
    assert list(harness.progress(range(3), 3, "x")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_results_are_whole_or_not_at_all(monkeypatch):
    """A write that fails leaves the former file; what is not finite becomes null."""
    harness.write_json("x", {"a": np.float32(0.1), "b": [float("nan"), 1]})
    before = harness.read_json("x")
    assert before == {"a": 0.1, "b": [None, 1]}
    with pytest.raises(TypeError):
        harness.write_json("x", {"a": object()})
    assert harness.read_json("x") == before
    (harness.RESULTS / "x.json").write_text("{")
    with pytest.raises(harness.UsageError, match=r"damaged result file x\.json"):
        harness.read_json("x")


def test_readme_shows_the_committed_results(monkeypatch):
    """README's generated blocks are what the result files say."""
    monkeypatch.undo()
    text = readme.README.read_text()
    assert readme.render(text) == text


def test_help_exits_with_zero(capsys):
    """--help is no error."""
    with pytest.raises(SystemExit) as exit_:
        parse(["hopfield", "--help"])
    assert exit_.value.code == 0
    assert "--truncation" in capsys.readouterr().out
