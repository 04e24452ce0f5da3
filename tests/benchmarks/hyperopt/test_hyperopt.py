"""Hyperparameter optimization on a small budget: what it finds, resumes, refuses."""

import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rbpjax
from benchmarks.__main__ import main
from benchmarks.harness import checkpoints, results, training
from benchmarks.hyperopt import cleaning as hyperopt_cleaning
from benchmarks.hyperopt import decay as hyperopt_decay
from benchmarks.hyperopt import descent as hyperopt_descent
from benchmarks.hyperopt import paper as hyperopt_paper
from benchmarks.hyperopt import quadratics as hyperopt_quadratics

pytestmark = pytest.mark.filterwarnings("ignore")  # orbax's own
QUICK = ("--steps", "2", "--seeds", "3")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few images, one rule or two."""
    monkeypatch.setitem(hyperopt_cleaning.SIZES, "digits", (60, 100))
    monkeypatch.setattr(hyperopt_cleaning, "RIDGE", 1e-2)
    rules = {"Adaptive": rbpjax.Neumann(tol=1e-8, max_steps=5000)}  # compiles sooner
    monkeypatch.setattr(hyperopt_cleaning, "RULES", rules)
    monkeypatch.setattr(hyperopt_decay, "RULES", rules)
    monkeypatch.setattr(hyperopt_decay, "SIZES", (30, 50))
    monkeypatch.setattr(hyperopt_decay, "NOISE", 5)
    monkeypatch.setattr(hyperopt_decay, "GRID", np.array([1e-3, 1e-2]))
    monkeypatch.setitem(hyperopt_paper.SIZES, "digits", (20,))
    monkeypatch.setattr(hyperopt_paper, "UNITS", (4,))


def run(part, *arguments):
    assert main(["hyperopt", "--parts", part, *QUICK, *arguments]) == 0
    name = f"hyperopt-{part}-custom"
    assert (results.RESULTS / f"{name}.png").stat().st_size < 200_000
    return json.loads((results.RESULTS / f"{name}.json").read_text())


@pytest.mark.full
def test_cleaning_is_exact_and_lowers_the_validation_loss(capsys):
    """The hypergradient is that of a dense solve; two steps of Adam tell examples."""
    result = run("cleaning", "--seeds", "3", "4")
    rule = result["rules"]["Adaptive"]
    for point in ("start", "end"):
        # Both residuals are 1e-8, the condition number of I - J below 1e4.
        assert rule["hypergradient"][point]["error"] < 1e-4
    history = {k: np.array(v) for k, v in rule["history"].items()}
    assert history["outer_loss"].shape == (2, 3)  # [seed, step]
    assert (np.diff(history["outer_loss"]) < 0).all()
    assert (history["auc"][:, 0] == 0.5).all() and (history["auc"][:, -1] > 0.7).all()
    assert (history["forward_residual"] <= 1e-8).all()
    assert (history["adjoint_residual"] <= 1e-8).all()
    assert "AUC (least)" in capsys.readouterr().out


def test_a_resumed_descent_is_the_same(monkeypatch):
    """Stopped after each block in turn and started again, numbers are the same."""
    solve = rbpjax.rbp_solve(lambda p, x, h: 0.5 * h + p * x)

    def outer(p, given, h, probe=None):
        solution = solve(p, given, h, probe=probe)
        return jnp.sum((solution.value - 1) ** 2), (solution, {"p": p[0]})

    descent = hyperopt_descent.Descent(outer, optax.adam(0.1))

    def run():
        at = jnp.array([2.0, 3.0]), jnp.zeros(2), jnp.zeros(2)
        checkpoint = checkpoints.Checkpoints("test", {}, fresh=False)
        return descent.run("toy", at[0], at[1], at[2], 10, checkpoint)

    params, table, _ = run()
    checkpoints.Checkpoints("test", {}, fresh=True)
    blocks = []

    def stop_after_one(steps, total, label, done=0):
        for step in steps:
            yield step
            blocks.append(step)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress", stop_after_one)
        for _ in range(hyperopt_descent.BLOCKS):
            with pytest.raises(KeyboardInterrupt):
                run()
    assert blocks == [0, 1, 2, 3]
    again, table_again, _ = run()
    np.testing.assert_array_equal(again, params)
    assert all((table[k] == table_again[k]).all() for k in table)
    # A row a step and the end's; the last measures belong to what is returned.
    assert len(table["outer_loss"]) == 11
    np.testing.assert_array_equal(table["p"][[0, -1]], [0.0, params[0]])


@pytest.mark.full
def test_decay_is_measured():
    """Two steps lower the validation loss; the decays that are drawn have moved."""
    result = run("decay")
    history = {
        k: np.array(v) for k, v in result["rules"]["Adaptive"]["history"].items()
    }
    assert (np.diff(history["outer_loss"]) < 0).all()
    assert (history["log_decay_noise"][:, -1] > history["log_decay_noise"][:, 0]).all()
    # The grid holds the start, and so its loss.
    grid = np.array(result["grid"]["outer_loss"])
    np.testing.assert_allclose(grid[:, 1], history["outer_loss"][:, 0], rtol=1e-5)


@pytest.mark.full
def test_quadratics_reach_the_closed_form(monkeypatch):
    """Every rule that says it converged is right; all do at condition 10."""
    monkeypatch.setattr(hyperopt_quadratics, "SIZE", 8)
    monkeypatch.setattr(hyperopt_quadratics, "PRODUCTS", (64,))
    monkeypatch.setattr(hyperopt_quadratics, "CONDITIONS", (10,))
    kept = ("Neumann", "CG, symmetric J")
    rules = {k: hyperopt_quadratics.RULES[k] for k in kept}
    monkeypatch.setattr(hyperopt_quadratics, "RULES", rules)
    cases = run("quadratics")["cases"]
    assert set(cases["gradient descent, κ = 10"]) == set(kept)
    assert set(cases["momentum, κ = 10"]) == {"Neumann"}
    for entries in cases.values():
        for entry in entries.values():
            end = entry["to_target"]
            # Residual 1e-6 × condition 10 of H; u's error reaches the decays as -δu w*.
            assert all(end["converged"]) and max(end["error"]) < 1e-4


@pytest.mark.full
def test_the_papers_setup_is_measured(monkeypatch):
    """BPTT and one implicit method from one start; BPTT agrees with itself."""
    kept = {k: hyperopt_paper.METHODS[k] for k in ("BPTT", "Neumann-RBP")}
    monkeypatch.setattr(hyperopt_paper, "METHODS", kept)
    methods = run("paper")["methods"]
    first = {k: m["history"]["outer_loss"]["median"][0] for k, m in methods.items()}
    assert first["BPTT"] == first["Neumann-RBP"]
    np.testing.assert_allclose(methods["BPTT"]["cosine"]["end"], 1, rtol=1e-6)
    assert max(np.abs(methods["Neumann-RBP"]["cosine"]["start"])) <= 1
    # Nothing is solved by BPTT.
    assert methods["BPTT"]["history"]["adjoint_residual"]["median"] == [None] * 3


def test_step_size_and_momentum_of_the_paper_do_nothing_at_a_fixed_point():
    """Exactly zero at rest, by any rule: the part that Adam sees is the transient."""
    given = hyperopt_paper.make("digits", 0)
    params, (layers, v) = hyperopt_paper.start(given, 0)
    flat = lambda h: jax.flatten_util.ravel_pytree(h)[0]
    # Where the network stands is a minimum of this loss.
    loss = lambda params, given, w: 0.5 * jnp.sum((flat(w) - flat(layers)) ** 2)
    f = rbpjax.optimizer_step(loss, hyperopt_paper.momentum)
    g = jax.tree.map(jnp.ones_like, (layers, v))
    bar = jax.jit(lambda h: rbpjax.rbp_vjp(f, params, given, h, g)[0][0])
    assert all(x == 0 for x in jax.tree.leaves(bar((layers, v))))
    elsewhere = jax.tree.map(lambda x: x + 1, layers), v
    assert all(x != 0 for x in jax.tree.leaves(bar(elsewhere)))


def test_the_papers_update_by_hand():
    """v ← βv - (1 - β)g, then w ← w + αv, with each tensor's own α and β."""
    one = lambda x: [{"weights": jnp.float32(x), "bias": jnp.float32(2 * x)}]
    params = {"step_size": one(-1.0), "momentum": one(0.5)}
    updates, v = hyperopt_paper.momentum(params).update(one(3.0), one(1.0))
    for name, factor in (("weights", 1), ("bias", 2)):
        beta = 1 / (1 + np.exp(-0.5 * factor))
        want = beta * factor - (1 - beta) * 3 * factor
        np.testing.assert_allclose(v[0][name], want, rtol=1e-6)
        alpha = np.exp(-1.0 * factor)
        np.testing.assert_allclose(updates[0][name], alpha * want, rtol=1e-5)


def test_data_by_hand():
    """Disjoint splits, half of the labels wrong and none of those right; AUC."""
    given = hyperopt_cleaning.make("digits", 0)
    clean = hyperopt_descent.images("digits", 0, (60, 100))
    np.testing.assert_array_equal(given.y != clean[0][1], given.wrong)
    assert given.wrong.sum() == 30 and len(given.test[1]) == 1797 - 160
    assert abs((np.concatenate([x for x, _ in clean]) ** 2).sum(1).mean() - 1) < 1e-5
    score, wrong = jnp.array([0.9, 0.5, 0.5, 0.1]), jnp.array([0, 0, 1, 1], bool)
    assert hyperopt_cleaning.auc(score, wrong) == 7 / 8  # three wins and a tie of four
    assert hyperopt_descent.paired([1.0, 3.0], [0.0, 0.0]) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "speed"), "--parts: any of cleaning"),
        (("--dataset", "cifar"), "--dataset: any of digits, mnist"),
        (("--seeds", "1", "1"), "--seeds: one or more, no two alike"),
        (("--seeds", "-1"), "--seeds: at least 0; got -1"),
        (("--steps", "0"), "--steps: at least 1"),
    ],
)
def test_bad_arguments_end_in_one_line(capsys, arguments, message):
    """Exit code 2 and the name of the option."""
    assert main(["hyperopt", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_data_are_named(tmp_path, monkeypatch, capsys):
    """A folder without MNIST ends in one line."""
    monkeypatch.setenv("RBPJAX_DATA", str(tmp_path))
    arguments = ["--parts", "cleaning", "--dataset", "mnist", *QUICK]
    assert main(["hyperopt", *arguments]) == 2
    assert "has no mnist/train-images-idx3-ubyte.gz" in capsys.readouterr().err
