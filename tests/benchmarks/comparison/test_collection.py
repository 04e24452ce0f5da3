"""The collection: its problems are what they are said to be, and the judge is right."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.comparison.collection import oddities, solvers, verdict
from benchmarks.comparison.collection.drawn import draw
from benchmarks.comparison.collection.experiment import problems_sources
from benchmarks.comparison.collection.judge import Judge, cast, host_ravel, loss
from benchmarks.comparison.collection.problem import Problem
from benchmarks.comparison.collection.problems import problems, tuned
from benchmarks.comparison.collection.solvers import SOLVERS, Found
from benchmarks.comparison.collection.summary import counts
from benchmarks.harness import results
from rbpjax import Solution


def test_there_are_119_and_half_of_them_are_held_out():
    assert len(problems()) >= 119
    assert len(problems()) // 2 == len(tuned()) and tuned() < set(problems())
    families = {p.family for p in problems().values()}
    held_out = {problems()[n].family for n in set(problems()) - tuned()}
    assert held_out == families


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_every_step_keeps_the_types_of_its_state(precision):
    """Without any promotion, in float32 too, or peers could not run it."""
    for name, problem in problems().items():
        given = cast((problem.params, problem.inputs, problem.h0), precision)
        for f in filter(None, (problem.f, problem.smooth)):
            with (
                jax.enable_x64(precision == "float64"),
                jax.numpy_dtype_promotion("strict"),
            ):
                image = jax.eval_shape(f, *given)
                state = jax.eval_shape(lambda h: h, given[2])
            assert jax.tree.all(jax.tree.map(_alike, image, state)), name
        assert all(a.dtype.kind in "fc" for a in jax.tree.leaves(given[0])), name


def _alike(a, b):
    return a.shape == b.shape and a.dtype == b.dtype


def test_what_has_no_fixed_point_has_none():
    """By trying all patterns of signs, and by the left null vector of I - A."""
    assert not oddities.has_fixed_point(*oddities.ABSOLUTE_VALUE)
    x, w = oddities.ABSOLUTE_VALUE
    assert oddities.has_fixed_point(x, 0.1 * w)
    problem = problems()["none: inconsistent affine, I - A singular"]
    left = np.linalg.svd(np.eye(6) - problem.inputs.T)[2][-1]
    np.testing.assert_allclose(left @ problem.inputs, left, atol=1e-14)
    assert abs(left @ problem.params) > 0.1


def cosine():
    """Two leaves of very different size, h = cos(h) and h = 1e6 + h / 2."""
    step = lambda a, x, h: {"u": jnp.cos(a * h["u"]), "v": x + h["v"] / 2}
    h0 = {"u": np.ones(2), "v": np.array(0.0)}
    return Problem("test", step, np.array(1.0), np.array(1e6), h0)


DOTTIE = 0.7390851332151607  # cos x = x


def test_the_judge_measures_each_leaf_by_itself():
    judge = Judge(cosine(), "float64")
    value = {"u": np.full(2, DOTTIE * (1 + 1e-3)), "v": np.array(2e6)}
    assert judge.answer(value).error == pytest.approx(1e-3, rel=1e-6)
    value = {"u": np.full(2, DOTTIE), "v": np.array(2e6 * (1 - 1e-5))}
    assert judge.answer(value).error == pytest.approx(1e-5, rel=1e-6)


def test_the_judge_knows_the_gradient():
    """Of u for a: dh/da = -h sin(h) / (1 + sin(h)) at the fixed point of cos.

    The weights of its two entries are 1 and 1.5.
    """
    judge = Judge(cosine(), "float64")
    answer = judge.answer({"u": np.full(2, 0.7), "v": np.array(1e6)})
    sine = np.sin(DOTTIE)
    want = -2.5 * DOTTIE * DOTTIE * sine / (1 + sine)
    np.testing.assert_allclose(answer.gradient, [want], rtol=1e-10)
    error = judge.gradient_error(np.array(1.01 * want), answer.gradient)
    assert error == pytest.approx(0.01)


def test_the_judge_transposes_and_keeps_to_the_convention_for_complex_numbers():
    """Against JAX's derivative of a direct solve of h = W h + x."""
    problem = problems()["complex affine, ρ 0.97"]
    with jax.enable_x64(True):
        direct = lambda w: jnp.linalg.solve(jnp.eye(10) - w, problem.inputs)
        want = jax.grad(lambda w: loss(direct(w)))(problem.params)
        answer = Judge(problem, "float64").answer(direct(problem.params))
    assert answer.error < 1e-12
    np.testing.assert_allclose(answer.gradient, host_ravel(want), rtol=1e-9)


def test_the_judge_is_absolute_at_zero_and_refuses_what_is_no_fixed_point():
    zero = Judge(problems()["zero: h / 2 from ones"], "float64")
    assert zero.answer(np.full(3, 1e-9)).error == pytest.approx(3**0.5 * 1e-9)
    line = Judge(problems()["none: h + 1"], "float64")
    assert line.answer(np.zeros(2)).error == np.inf


def test_the_judge_polishes_the_rounded_problem():
    """In float32 the weights are the rounded ones: no error where there is none."""
    problem = problems()["affine, ρ 3, I - J well conditioned"]
    w, x, _ = cast((problem.params, problem.inputs, problem.h0), "float32")
    exact = w.astype(float) * x.astype(float) / 4
    assert Judge(problem, "float32").answer(exact).error < 1e-14


def liar(right, problem, arrays):
    """Says converged, of the start or of the right value, with a zero gradient."""
    judge = Judge(problem, "float64")
    value = judge.unravel(judge.polish(np.ones(4))) if right else arrays[2]
    gradient = jax.tree.map(np.zeros_like, arrays[0])
    return Found(value, True, "converged", 7, gradient, True)


def test_a_liar_is_silent(monkeypatch):
    """One that lies about its value, and one that does so about the gradient alone."""
    monkeypatch.setitem(SOLVERS, "default", partial(liar, False))
    wrong = verdict.solve_one("default", "float64", "quick: 0.5 cos(h)")
    assert (wrong["verdict"], wrong["gradient"]) == ("silent", "silent")
    none = verdict.solve_one("default", "float64", "none: h + 1")
    assert (none["verdict"], none["gradient"]) == ("silent", "silent")
    monkeypatch.setitem(SOLVERS, "default", partial(liar, True))
    half = verdict.solve_one("default", "float64", "quick: 0.5 cos(h)")
    assert (half["verdict"], half["gradient"]) == ("solved", "silent")


def test_a_gradient_at_a_singular_root_is_undefined_and_a_report_alone_can_lie():
    problem = problems()["MGH Powell singular, h - F"]
    judge, zero = Judge(problem, "float64"), np.zeros(4)
    say = lambda value, converged: Found(value, converged, "", 1, zero, True)
    at_root = verdict.judged(judge, say(zero, True))
    assert (at_root["verdict"], at_root["gradient"]) == ("solved", "undefined")
    assert not at_root["report_alone_wrong"]
    far = verdict.judged(judge, say(np.ones(4), False))
    assert (far["verdict"], far["gradient"]) == ("flagged", "flagged")
    assert far["report_alone_wrong"]


@pytest.mark.full
def test_what_is_said_to_have_a_fixed_point_has_one():
    """Newton reaches one from the start, from near it, or after some damped steps.

    But for Sinkhorn at ε = 0.01, which has one by theory, beyond what Newton resolves.
    """
    random = np.random.default_rng(0)
    for name, problem in problems().items():
        if not problem.has_answer or name.endswith("ε 0.01"):
            continue
        judge = Judge(problem, "float64")
        start = host_ravel(problem.h0)
        near = [s * random.normal(size=start.size) for s in (0, 0.01, 0.1, 1, 1, 3)]
        assert any(_found(judge, start + d, k) for d in near for k in (0, 30)), name


def _found(judge, v, damped_steps):
    for _ in range(damped_steps):
        v = v + 0.5 * judge.look(v)[0]
    return judge.polish(v) is not None


def test_random_problems_are_those_of_their_seed():
    first, again = draw("affine", 3, 2, 7), draw("affine", 3, 2, 7)
    other = draw("affine", 3, 2, 8)
    assert (first[1].params == again[1].params).all()
    assert not (first[1].params == other[1].params).any()
    assert not (first[0].params == first[1].params).any()


@pytest.mark.filterwarnings("ignore")  # orbax's own
@pytest.mark.full
def test_the_random_problems_of_a_liar_are_silent(monkeypatch):
    """A solver that returns its start and says converged: every kind is counted."""
    lie = lambda step, h0: Solution(value=h0, converged=True)
    monkeypatch.setitem(solvers.OURS, "default", lambda: lie)
    command = "collection --random --count 1 --solver default --precision float64"
    assert main(command.split()) == 0
    found = json.loads((results.RESULTS / "collection-random.json").read_text())
    counted = found["solvers"]["default"]["float64"]["all"]
    assert counted["silent"] == counted["problems"] == 30


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_the_command_writes_its_counts(capsys):
    solvers = ["--solver", "default", "scipy-hybr"]
    names = ["--problems", "quick: 0.5", "none: h + 1"]
    assert main(["collection", *solvers, *names]) == 0
    found = json.loads((results.RESULTS / "collection-custom.json").read_text())
    for solver in ("default", "scipy-hybr"):
        for precision in ("float64", "float32"):
            counted = found["solvers"][solver][precision]["all"]
            assert (counted["problems"], counted["silent"]) == (2, 0)
            assert counted["solved"] == 2
    assert "held out" in capsys.readouterr().out
    assert main(["collection", "--problems", "no such problem"]) == 2


def test_rows_of_peers_are_kept_only_of_the_same_problems(capsys):
    command = "collection --solver default --precision float64 --keep-peers".split()
    command += ["--problems", "quick: 0.5"]
    row = {"all": counts({}), "report": counts({}), "tune": counts({})}
    rows = {"scipy-hybr": {"float64": row}, "iteration": {"float64": row}}
    kept = {"problems_sources": problems_sources(), "solvers": rows}
    results.prepare()
    results.write_json("collection", kept)
    assert main(command) == 0
    found = json.loads((results.RESULTS / "collection-custom.json").read_text())
    assert list(found["solvers"]) == ["default", "scipy-hybr"]
    results.write_json("collection", kept | {"problems_sources": "others"})
    assert main(command) == 2
    assert "--keep-peers" in capsys.readouterr().err
