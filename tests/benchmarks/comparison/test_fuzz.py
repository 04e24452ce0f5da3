"""The fuzz on a small budget: its answers are right, and it finds planted faults."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from benchmarks.__main__ import main
from benchmarks.comparison.fuzz import draws, maps, oracle, solving, verdicts
from benchmarks.comparison.fuzz.experiment import Fuzz
from benchmarks.harness import checkpoints, results

HONEST = rbpjax.value_and_grad_with_report
LAYOUTS = [
    maps.Layout(6, "array", (), "float64"),
    maps.Layout(6, "matrix", (), "float64"),
    maps.Layout(6, "leaves", (1, 4), "float64"),
    maps.Layout(6, "nest", (2,), "float64"),
    maps.Layout(6, "leaves", (1,), "complex128"),
]


def setting_of(layout, solver=draws.given, rule=None, names=("given", "Direct")):
    return draws.Setting(
        precision="float64",
        forward=names[0],
        backward=names[1],
        solver=solver,
        rule=rbpjax.Direct() if rule is None else rule,
        layout=layout,
        curves=tuple(maps.CURVES),
        weights_count=False,
        warm=False,
        together=True,
    )


def summed(setting, outcome):
    """The counts of one group, by column."""
    part = verdicts.summary(verdicts.Outcome(*(v[None] for v in outcome)), [setting])
    return dict(zip(part["columns"], part["all"], strict=True)), part


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_both_forms_of_a_map_agree(layout):
    """The oracle's F and its Jacobian against JAX's f, with units, for all curves."""
    with jax.enable_x64(True):
        setting = setting_of(layout)
        drawn = draws.draw_problems(np.random.default_rng(0), setting, 30)
        f = maps.step_function(layout, setting.curves, None)
        unit = jnp.asarray(drawn.inputs.unit)
        u = np.random.default_rng(1).normal(size=(30, 6))

        def of_u(params, inputs, unit, u):
            return layout.ravel(f(params, inputs, layout.unravel(unit * u))) / unit

        args = (drawn.params, drawn.inputs, unit, u)
        ours = jax.vmap(of_u)(*args), jax.vmap(jax.jacfwd(of_u, 3))(*args)
    with np.errstate(invalid="ignore"):  # the root of what is negative
        value, slope = oracle.image(drawn.params, drawn.inputs, u)
    jac = oracle.jacobian(drawn.params, drawn.inputs, slope)
    codes = {int(code) for code in drawn.inputs.code.ravel()}
    assert codes == set(maps.CODES.values())
    # Sums of seven terms of at most 1e3 cancel.
    np.testing.assert_allclose(ours[0], value, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(ours[1], jac, rtol=1e-12, atol=1e-11)


def test_dense_answers_are_those_of_the_unrolled_loop():
    """Contractions from far: fixed point, gradient and their uncertainty."""
    layout = LAYOUTS[2]
    with jax.enable_x64(True):
        setting = setting_of(layout, names=("default", "default"))
        drawn = draws.draw_problems(np.random.default_rng(0), setting, 60)
        f = maps.step_function(layout, setting.curves, None)

        def unrolled(params, problem):
            h0 = layout.unravel(problem.h0)
            h = rbpjax.bptt(f, num_steps=400)(params, problem.inputs, h0).value
            v = layout.ravel(h)
            far = layout.ravel(f(params, problem.inputs, h)) - v
            g, q = problem.loss
            left = jnp.max(jnp.abs(far / problem.inputs.unit))
            return jnp.sum(g * v) + 0.5 * jnp.sum(q * v * v), (v, left)

        both = jax.vmap(jax.grad(unrolled, has_aux=True))
        grads, (h, left) = jax.device_get(both(drawn.params, drawn))
    settled = (left < 1e-14) & (np.abs(h).max(1) > 0)
    assert settled.sum() > 15
    found = solving.Found(h * (1 + 1e-3), grads, left < 1, left, left, left < 1)
    right = verdicts.dense(setting, drawn, found)
    near = np.abs(right.u * drawn.inputs.unit / np.where(h == 0, 1, h) - 1).max(1)
    # Rounding of the loop, times what it is amplified by.
    allowed = 1e-14 * np.minimum(right.amplification, 1e9) ** 2
    error = verdicts.judge(setting, drawn, found).error
    mine = settled & (near < 1e-6) & (allowed < 1e-6)
    assert mine.sum() > 12
    assert right.found[mine].all()
    assert (error[mine] <= allowed[mine]).all()


def test_a_map_without_a_fixed_point_has_no_answer():
    """Of the problems that have none, none is ever called right."""
    with jax.enable_x64(True):
        setting = setting_of(LAYOUTS[2], names=("default", "default"))
        drawn = draws.draw_problems(np.random.default_rng(0), setting, 300)
        part = np.flatnonzero(drawn.nowhere)
        assert len(part) > 3
        few = jax.tree.map(lambda v: v[part], drawn)
        outcome = verdicts.judge(setting, few, solving.run(setting, few))
    constant = ~(few.loss.g.any(1) | few.loss.q.any(1))
    assert np.isinf(outcome.error[~constant]).all() and outcome.judged.all()


class Planted:
    """A library with a fault: what it reports or returns is changed."""

    def __init__(self, monkeypatch, change):
        def faulty(loss, has_aux=False):
            honest = HONEST(loss, has_aux=has_aux)

            def with_report(*args, probe):
                value, grads, report = honest(*args, probe=probe)
                bound = jnp.zeros_like(report.converged) + jnp.inf
                grads, converged, bound = change(grads, report.converged, bound)
                report = Reported(report._replace(converged=converged), bound)
                return value, grads, report

            return with_report

        monkeypatch.setattr(rbpjax, "value_and_grad_with_report", faulty)
        with jax.enable_x64(True):
            self.setting = setting_of(LAYOUTS[2])
            draw = np.random.default_rng(0)
            self.problems = draws.draw_problems(draw, self.setting, 60)
            found = solving.run(self.setting, self.problems)
            self.outcome = verdicts.judge(self.setting, self.problems, found)
        self.counts, self.part = summed(self.setting, self.outcome)


class Reported:
    def __init__(self, report, bound):
        self.converged, self.status = report.converged, report.status
        self.bound = bound


def test_a_verdict_that_lies_is_silent(monkeypatch):
    """Always converged, beside a solver that hands back starts that are wrong."""
    planted = Planted(monkeypatch, lambda g, c, b: (g, jnp.ones_like(c), b))
    accuracy = 2.0**-26
    wrong = planted.outcome.judged & (planted.outcome.error > 10 * accuracy)
    assert 5 < wrong.sum() == planted.counts["silent"]
    assert planted.counts["converged"] == planted.counts["judged"]
    assert planted.counts["alarms"] == 0


def test_a_wrong_gradient_is_silent(monkeypatch):
    """All of what is called converged, if it is off by a thousandth."""
    off = lambda g: jax.tree.map(lambda v: 1.001 * v, g)
    planted = Planted(monkeypatch, lambda g, c, b: (off(g), jnp.ones_like(c), b))
    zero = planted.outcome.error == 0
    assert zero.sum() < 5 < planted.counts["silent"]
    assert planted.counts["silent"] == planted.counts["judged"] - zero.sum()


def test_a_bound_that_is_too_small_is_exceeded(monkeypatch):
    planted = Planted(monkeypatch, lambda g, c, b: (g, c, 0 * c))
    assert planted.counts["stated"] == planted.counts["judged"]
    # None is exactly right but where the gradient is zero.
    assert planted.counts["exceeded"] > 40


def test_a_verdict_that_never_comes_is_a_false_alarm(monkeypatch):
    planted = Planted(monkeypatch, lambda g, c, b: (g, 0 * c, b))
    assert planted.counts["converged"] == planted.counts["silent"] == 0
    assert planted.counts["alarms"] == planted.counts["right"] > 20
    assert planted.counts["stated"] == 0


def test_nothing_is_wrong_with_an_infinite_bound_or_a_true_verdict():
    """The four corners, and what is not a number."""
    accuracy = np.full((1, 6), 1e-3)
    blank = np.zeros((1, 6))
    outcome = verdicts.Outcome(*(blank for _ in verdicts.Outcome._fields))
    outcome = outcome._replace(
        judged=np.array([[1, 1, 1, 1, 1, 0]]),
        error=np.array([[1e-4, 0.5, 0.5, np.inf, np.nan, 0.5]]),
        bound=np.array([[1e-4, 1e-2, np.inf, 1e-3, np.inf, 1e-3]]),
        converged=np.array([[1, 1, 0, 0, 1, 1]]),
    )
    masks = verdicts.faults(outcome, accuracy)
    assert masks["silent"].tolist() == [[False, True, False, False, True, False]]
    assert masks["exceeded"].tolist() == [[False, True, False, True, False, False]]
    assert not masks["alarms"].any()


def test_the_solved_estimate_is_asked_for_where_there_is_one(monkeypatch):
    """By ``verify=True`` of the solve; the bound of its report is the one counted."""
    asked, solve_of = [], rbpjax.rbp_solve

    def spied(f, *, verify=False, **options):
        asked.append(verify)
        return solve_of(f, **options)

    def with_bound(loss, has_aux=False):
        def with_report(*args, probe):
            value, grads, report = HONEST(loss, has_aux=has_aux)(*args, probe=probe)
            return value, grads, Reported(report, 0.125 if asked[-1] else 0.25)

        return with_report

    assert solving.can_verify()
    monkeypatch.setattr(rbpjax, "rbp_solve", spied)
    monkeypatch.setattr(rbpjax, "value_and_grad_with_report", with_bound)
    with jax.enable_x64(True):
        setting = setting_of(LAYOUTS[2])
        drawn = draws.draw_problems(np.random.default_rng(0), setting, 2)
        cheap = solving.run(setting, drawn)
        solved = solving.run(setting, drawn, verify=True)
    assert asked == [False, True]
    assert cheap.bound.tolist() == [0.25, 0.25]
    assert solved.bound.tolist() == [0.125, 0.125]


def test_a_rule_that_lies_is_counted():
    """A rule that returns g and says converged: wrong, whatever the verdict."""

    def liar(vjp, g):
        return rbpjax.Solution(g, num_steps=1, residual=0.0, converged=True)

    with jax.enable_x64(True):
        setting = setting_of(LAYOUTS[2], rule=liar)
        drawn = draws.draw_problems(np.random.default_rng(0), setting, 60)
        found = solving.run(setting, drawn)
        counts, _ = summed(setting, verdicts.judge(setting, drawn, found))
        lied = found._replace(converged=np.ones_like(found.converged))
        silent, _ = summed(setting, verdicts.judge(setting, drawn, lied))
    assert counts["right"] < 20
    assert silent["silent"] > 40


def test_settings_cover_every_pair_and_precision():
    """As many groups as the default run has; most problems are nonlinear and solved."""
    fuzz = Fuzz()
    numbers = range(-(-fuzz.num // fuzz.group))
    settings = [fuzz.setting(i) for i in numbers]
    pairs = {(s.forward, s.backward) for s in settings}
    assert pairs == {(f, b) for f in draws.FORWARD for b in draws.BACKWARD}
    assert {s.precision for s in settings} == set(maps.PRECISIONS)
    assert {s.layout.kind for s in settings} == {"array", "matrix", "leaves", "nest"}
    assert {s.curves[2] for s in settings} == set(maps.CURVES) - {"affine", "tanh"}
    assert any(s.warm for s in settings) and any(not s.together for s in settings)
    nonlinear = []
    with jax.enable_x64(True):
        for setting in settings[::5]:
            drawn = draws.draw_problems(np.random.default_rng(0), setting, 8)
            nonlinear += list(drawn.nonlinear & (setting.forward != "given"))
    # A share of 0.5 of 400 would come out above 0.6 once in 30,000 times.
    assert np.mean(nonlinear) > 0.6


@pytest.mark.full
def test_the_command_writes_its_counts_and_replays(capsys):
    """Every problem is counted once on each axis, and a named one can be shown."""
    command = "fuzz --num 30 --group 10 --seed 1".split()
    assert main(command) == 0
    result = json.loads((results.RESULTS / "fuzz.json").read_text())
    part = result["default"]
    assert part["all"][0] == 30
    for axis in [key for key in part if key.startswith("by ")]:
        total = np.sum(list(part[axis].values()), axis=0)
        np.testing.assert_array_equal(total, part["all"])
    capsys.readouterr()
    assert main([*command, "--replay", "2:7"]) == 0
    assert "outcome" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # orbax's own
@pytest.mark.full
def test_an_interrupted_fuzz_resumes(monkeypatch):
    """Stopped after the first save and started again, the counts are the same."""
    command = "fuzz --num 6 --group 2 --threads 1 --seed 1".split()
    path = results.RESULTS / "fuzz.json"
    assert main(command) == 0
    whole = json.loads(path.read_text())["default"]
    save = checkpoints.Checkpoints.save

    def save_and_stop(self, name, step, state):
        save(self, name, step, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", save_and_stop)
        assert main(command) == 130
    assert main(command) == 0
    assert json.loads(path.read_text())["default"] == whole


@pytest.mark.parametrize(
    "name", ["fuzz --num 0", "fuzz --seed -1", "fuzz --replay worst"]
)
def test_bad_arguments_end_in_one_line(name, capsys):
    """Exit code 2 and one line that says what was wrong."""
    assert main(name.split()) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
