"""The main job on a small budget: what it measures, resumes, and refuses."""

import json

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import checkpoints, results, training
from benchmarks.hopfield import experiment as hopfield
from benchmarks.hopfield import images, learning
from benchmarks.hopfield import network as network_

QUICK = ("--epochs", "4", "--hidden", "8", "--seeds", "0", "1", "--no-sweep")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few draws and evaluations."""
    monkeypatch.setattr(hopfield, "DRAWS", 2)
    monkeypatch.setattr(learning, "BLOCKS", 2)


def run(*arguments) -> dict:
    assert main(["hopfield", *QUICK, *arguments]) == 0
    return json.loads((results.RESULTS / "hopfield-small-custom.json").read_text())


def without_times(result: dict) -> dict:
    """What must not depend on the machine's speed."""
    methods = {
        name: {k: v for k, v in m.items() if k != "step_seconds"}
        for name, m in result["methods"].items()
    }
    return {**result, "methods": methods, "environment": None}


@pytest.mark.filterwarnings("ignore")  # orbax's own
@pytest.mark.full
def test_every_method_learns_and_is_measured(capsys):
    """Five methods from one start: the loss falls, all is measured."""
    result = run()
    assert list(result["methods"]) == list(learning.METHODS)
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
@pytest.mark.full
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

    monkeypatch.setattr(training, "progress", stop_after_one)
    for _ in range(4):
        assert main(["hopfield", *QUICK, *methods]) == 130
    assert blocks == [("TBPTT", 0), ("TBPTT", 1), ("CG-RBP", 0), ("CG-RBP", 1)]
    assert without_times(run(*methods)) == whole
    # Nothing left of a finished run; locks are files.
    assert not list(checkpoints.CHECKPOINTS.glob("*/"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.full
def test_a_damaged_checkpoint_is_named(monkeypatch, capsys, tmp_path):
    """A damaged checkpoint ends the run in one line; --fresh starts over."""
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "a" / "checkpoints")

    def stop(steps, *_):
        yield next(iter(steps))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress", stop)
        assert main(["hopfield", *QUICK, "--methods", "cg"]) == 130
    for path in checkpoints.CHECKPOINTS.rglob("*"):
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
        (
            ["--methods", "lstm"],
            "--methods: any of bptt, tbptt, rbp, cg, neumann; got 'lstm'",
        ),
        (["--dataset", "cifar"], "--dataset: any of digits, mnist; got 'cifar'"),
        (["--preset", "large"], "--preset: any of small, paper; got 'large'"),
        (["--truncation", "60"], "--truncation: 60 is beyond the 50 updates"),
        (["--truncation", "0"], "--truncation: at least 1; got 0"),
        (["--num-images", "11"], "--num-images: at least 1, at most 10; got 11"),
        (["--learning-rate", "0"], "--learning-rate: above 0; got 0"),
        (["--seeds", "1", "1"], "--seeds: one or more, no two alike; got [1, 1]"),
        (["--methods"], "--methods: one or more"),
        (["--seeds", "-1"], "--seeds: at least 0; got -1"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, says, capsys):
    """One line that says what is wrong, and exit code 2."""
    assert main(["hopfield", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert says in message


def test_corruption_removes_half_of_the_on_pixels():
    """The input of the retrieval has half of the on-pixels, and no new ones."""
    options = hopfield.resolve(hopfield.Hopfield())
    shown = images.load_images(options.dataset, 10)
    assert shown.shape == (10, 64) and set(np.unique(shown)) == {0, 1}
    corrupted = images.corrupt(shown, 3)
    assert (corrupted <= shown).all()
    on = shown.sum(1)
    np.testing.assert_array_equal(corrupted.sum(2), np.tile(on - on // 2, (3, 1)))
    assert (corrupted[0] != corrupted[1]).any()


def test_images_survive_packing():
    """unpack inverts pack, for sides that are not a multiple of eight bits."""
    drawn = np.random.default_rng(0).integers(0, 2, (3, 25)).astype(np.float32)
    got = images.unpack(images.pack(drawn), 5)
    np.testing.assert_array_equal(got, drawn.reshape(3, 5, 5))


def test_the_step_is_the_papers():
    """One update against Wσ(h/2) with W = W₀ + W₀ᵀ, no self-loops, visible clamped."""
    network = network_.Network(visible=2, hidden=1)
    random = np.random.default_rng(0)
    w, h = random.normal(size=(5, 5)), random.normal(size=5)
    clamp = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    effective = w + w.T
    np.fill_diagonal(effective, 0)
    want = effective @ (1 / (1 + np.exp(-0.5 * h)))
    want[:2] = clamp[:2]
    with jax.enable_x64(True):
        weights = network_.symmetric(jax.numpy.asarray(w))
        got = network.step(weights, jax.numpy.asarray(clamp), jax.numpy.asarray(h))
        np.testing.assert_allclose(got, want, rtol=1e-12)
