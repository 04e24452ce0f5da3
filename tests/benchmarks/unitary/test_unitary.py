"""The unitary benchmarks on a small budget: what they measure, resume, and refuse."""

import json

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.data import sequences
from benchmarks.harness import checkpoints, results, training
from benchmarks.unitary import learning, networks
from rbpjax.unitary.activation import identity, modulus


def run(part, *arguments):
    assert main(["unitary", "--parts", part, *arguments]) == 0
    name = f"unitary-{part}-custom"
    assert (results.RESULTS / f"{name}.png").stat().st_size < 200_000
    return json.loads((results.RESULTS / f"{name}.json").read_text())


@pytest.mark.full
def test_cost_norms_and_memory(capsys):
    """The measurements come out whole, and say what the room promises."""
    cost = run("cost", "--largest", "16")
    assert cost["cases"]["real, 1 channel"]["16"]["ratio"]["median"] > 0
    norms = run("norms", "--num-steps", "100", "--seeds", "0")["networks"]
    assert max(norms["unitary, linear"]["state_deviation"]) < 1e-12
    assert max(norms["orthogonal, modulus"]["gradient_deviation"]) < 1e-12
    assert max(norms["unitary, linear, float32"]["gradient_deviation"]) < 1e-4
    histories = run("memory", "--num-steps", "100")["histories"]
    assert all(row["100"]["error"] < 1e-10 for row in histories.values())
    assert "| linear: Inverse" in capsys.readouterr().out


QUICK = ("--shorten", "0.02", "--delay", "5", "--length", "8", "--seeds", "0")


@pytest.mark.filterwarnings("ignore")  # orbax's own
@pytest.mark.full
def test_an_interrupted_task_resumes_bit_for_bit(monkeypatch):
    """Stopped after two blocks and started again, the curves are the same."""
    options = ("--networks", "linear", *QUICK)
    whole = run("copying", *options)["networks"]["linear"]

    def stop_after_two(steps, total, label, done=0):
        for count, step in enumerate(steps):
            if count == 2 and not done:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(training, "progress", stop_after_two)
    assert main(["unitary", "--parts", "copying", *options]) == 130
    resumed = run("copying", *options)["networks"]["linear"]
    del whole["seconds"], resumed["seconds"]
    assert whole == resumed
    assert not list(checkpoints.CHECKPOINTS.glob("*/"))  # locks are files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.full
def test_longer_copying_has_a_delay_of_its_own(capsys):
    """Five steps here, not the thousand of `copying`: seen in the baseline's loss."""
    options = ("--networks", "lstm", "--shorten", "0.04", "--seeds", "0")
    result = run("copying-long", *options, "--long-delay", "5")
    assert result["memoryless"] == pytest.approx(10 * np.log(8) / 25, rel=1e-5)
    assert list(result["networks"]) == ["lstm"]
    assert "| LSTM" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.full
def test_every_network_trains():
    """Each kind of network, small, lowers the loss of the adding problem."""
    task = sequences.adding(4, 0)
    made = {
        "linear": networks.unitary(task, 8, identity, 1.0, 0.1),
        "modulus": networks.unitary(task, 8, modulus, 1.0, 0.1),
        "mixed": networks.mixed(task, 8, 8, 0.1),
        "exprnn": networks.exp_rnn(task, 8),
        "lstm": networks.lstm(task, 8),
    }
    plan = learning.Training(100, 16, 1e-2, 1e-3, blocks=2)
    for name, network in made.items():
        checkpoint = checkpoints.Checkpoints("test", {}, fresh=True)
        log = learning.learn(task, network, plan, 0, name, checkpoint)
        assert log["iterations"] == [0, 50, 100]
        assert log["loss"][-1] < 0.8 * log["loss"][0]


def test_copying_data_by_hand():
    """Ten symbols, blanks, one go signal; the symbols are due after it."""
    x, y = sequences.copying(7, 0).batch(jax.random.key(0), 3)
    assert x.shape == (3, 27, 9) and y.shape == (3, 27)
    np.testing.assert_array_equal(x[:, :10].argmax(-1) + 1, y[:, -10:])
    np.testing.assert_array_equal(x[:, :10].sum(-1), 1)
    assert x[:, 16, 8].sum() == 3  # the go signal, delay - 1 blanks after the symbols
    np.testing.assert_array_equal(x[:, 10:].sum((1, 2)), 1)
    np.testing.assert_array_equal(y[:, :17], 0)


def test_adding_data_by_hand():
    """One mark in each half; the target is the sum of the marked numbers."""
    x, y = sequences.adding(10, 0).batch(jax.random.key(0), 50)
    marks = np.array(x[..., 1])
    np.testing.assert_array_equal(marks[:, :5].sum(1), 1)
    np.testing.assert_array_equal(marks[:, 5:].sum(1), 1)
    expected = [
        row[m > 0].sum() for row, m in zip(np.array(x[..., 0]), marks, strict=True)
    ]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "speed"), "--parts: any of cost"),
        (("--networks", "gru"), "--networks: any of linear"),
        (("--dataset", "cifar"), "--dataset: any of digits, mnist"),
        (("--num-steps", "3"), "--num-steps: at least 100"),
        (("--shorten", "2"), "--shorten: above 0"),
    ],
)
def test_bad_arguments_end_in_one_line(capsys, arguments, message):
    """Exit code 2 and the name of the option."""
    assert main(["unitary", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
