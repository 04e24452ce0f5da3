"""The perturbation benchmark on a small budget: what it measures, resumes, refuses."""

import json

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import checkpoints, results, training
from benchmarks.perturb import costs as perturb_costs
from benchmarks.perturb import learning as perturb_learning
from benchmarks.perturb import tasks as perturb_tasks


@pytest.fixture(autouse=True)
def fresh_tasks():
    """Tasks are made once a process: not those of another test."""
    perturb_tasks.make.cache_clear()
    yield
    perturb_tasks.make.cache_clear()


QUICK = ("--budget", "320", "--units", "4", "--seeds", "0")


def run(part, *arguments):
    assert main(["perturb", "--parts", part, *arguments]) == 0
    name = f"perturb-{part}-custom"
    assert (results.RESULTS / f"{name}.png").stat().st_size < 200_000
    return json.loads((results.RESULTS / f"{name}.json").read_text())


@pytest.mark.filterwarnings("ignore")  # orbax's own
@pytest.mark.full
def test_an_interrupted_task_resumes_bit_for_bit(monkeypatch, capsys):
    """Stopped after seven blocks and started again, the curves are the same."""
    options = (*QUICK, "--methods", "anp+d")
    whole = run("copying", *options)["methods"]
    assert "| ANP, decorrelated" in capsys.readouterr().out

    def stop_after_seven(steps, total, label, done=0):
        for count, step in enumerate(steps):
            if count == 7 and not done:
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress", stop_after_seven)
        assert main(["perturb", "--parts", "copying", *options]) == 130
    assert run("copying", *options)["methods"] == whole
    assert not list(checkpoints.CHECKPOINTS.glob("*/"))  # locks are files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arm", ["tbptt1", "wp", "np_instant", "anp_code", "bptt+d"])
@pytest.mark.full
def test_every_kind_of_arm_learns(arm):
    """A few hundred passes lower the loss that all of them are given."""
    setting = perturb_learning.Setting("recall", 8, 8, 960, 1e-3)
    checkpoint = checkpoints.Checkpoints("test", {}, fresh=True)
    curve = perturb_learning.learn(setting, arm, (0,), (1e-2,), 1.0, checkpoint)
    assert curve.shape == (perturb_learning.BLOCKS + 1, 1)
    assert curve[-1, 0] < 0.8 * curve[0, 0]


@pytest.mark.full
def test_cost_is_measured(monkeypatch):
    """A small cost run comes out whole, memory apart from the number of samples."""
    small = dict(samples=100, chunk=10, units=8, steps=5, inputs=10, outputs=10)
    monkeypatch.setattr(perturb_costs, "MANY", small)
    rules = perturb_costs.many(2)["rules"]
    memory = rules["NP"]["temporary_bytes"]
    assert memory["1000"] - memory["100"] <= 4 * 1000
    assert rules["ANP"]["ratio"]["median"] > 0


def test_copying_by_hand():
    """Symbols, blanks, marks; test, validation and training never share a sequence."""
    task = perturb_tasks.make("copying", 0)
    xs, ys = task.batch(jax.random.key(0), 50)
    assert xs.shape == (20, 50, 10) and ys.shape == (20, 50, 8)
    np.testing.assert_array_equal(xs[:5, :, 1:9], ys[15:])
    np.testing.assert_array_equal(xs[..., 0], 1)
    np.testing.assert_array_equal(xs[5:15, :, 1:], 0)
    np.testing.assert_array_equal(xs[15:, :, 9], 1)
    np.testing.assert_array_equal(ys[:15], 0)
    validation = perturb_tasks.make("copying", perturb_tasks.VALIDATION_SEED)
    remainder = lambda ys: set((np.argmax(ys[15:], -1).sum(0) % 8).tolist())
    assert remainder(task.test[1]) == {0} and remainder(validation.test[1]) == {1}
    assert remainder(task.batch(jax.random.key(1), 500)[1]) == {2, 3, 4, 5, 6, 7}
    assert task.score(task.test[1], task.test[1]) == 0


def test_mackey_glass_by_hand():
    """What is due is the series 15 units later (or ago), and it is chaotic."""
    ahead, recall = (perturb_tasks.make(n, 3) for n in ("forecast", "recall"))
    xs, ys = ahead.batch(jax.random.key(0), 4)
    np.testing.assert_array_equal(xs[15:, :, 1], ys[:-15, :, 0])
    past, due = recall.batch(jax.random.key(0), 4)
    np.testing.assert_array_equal(past[:-15, :, 1], due[15:, :, 0])
    # Chaos has parted the series from their first value on.
    a, b = perturb_tasks.series(5, 2, 600)
    assert 0.1 < a.std() < 0.4 and abs(np.corrcoef(a[:100], b[:100])[0, 1]) < 0.9


def test_weather_is_split_in_time(tmp_path, monkeypatch, capsys):
    """Training hours, then validation, then test; no hour of one in another."""
    values = np.arange(35_064.0)[:, None] + np.zeros((1, 12))
    names = ["Visibility", "DryBulbFarenheit", "DryBulbCelsius", *"abcdefghi"]
    names = [n if n != "c" else "WetBulbCelsius" for n in names]
    monkeypatch.setattr(
        perturb_tasks.hours, "weather", lambda: (values.astype(np.float32), names)
    )
    tasks = {
        "test": perturb_tasks.make("weather", 0),
        "validation": perturb_tasks.make("weather", perturb_tasks.VALIDATION_SEED),
    }
    scale = values[:31_600, 0]
    hour = lambda x: np.asarray(x) * scale.std() + scale.mean()
    xs, ys = tasks["test"].batch(jax.random.key(0), 500)
    assert xs.shape == (48, 500, 11)
    assert hour(ys).max() < 31_600
    np.testing.assert_allclose(hour(ys)[:, 0, 0] - hour(xs)[:, 0, 2], 24, atol=0.05)
    for name, (low, high) in {
        "validation": (31_599.9, 33_600),
        "test": (33_599.9, 35_064),
    }.items():
        xs, ys = tasks[name].test
        assert hour(xs[..., 1:]).min() > low and hour(ys).max() < high
    monkeypatch.undo()


def test_missing_and_damaged_data_are_named(tmp_path, monkeypatch, capsys):
    """A folder without the weather, or with another file under its name."""
    monkeypatch.setenv("RBPJAX_DATA", str(tmp_path))
    assert main(["perturb", "--parts", "weather", *QUICK]) == 2
    assert "has no weather/WTH_2010-2013_hourly.csv.gz" in capsys.readouterr().err
    (tmp_path / "weather").mkdir()
    (tmp_path / "weather" / "WTH.csv").write_text("date\n")
    assert main(["perturb", "--parts", "weather", *QUICK]) == 2
    assert "WTH.csv is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "speed"), "--parts: any of forecast"),
        (("--methods", "rtrl"), "--methods: any of bptt"),
        (("--seeds", "1", "1"), "--seeds: one or more, no two alike"),
        (("--seeds", "1000"), "it is for validation"),
        (("--budget", "3"), "--budget: at least 320"),
        (("--units", "1"), "--units: at least 2"),
    ],
)
def test_bad_arguments_end_in_one_line(capsys, arguments, message):
    """Exit code 2 and the name of the option."""
    assert main(["perturb", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
