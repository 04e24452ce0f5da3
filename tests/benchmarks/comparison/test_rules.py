"""The comparison of rules on its smallest problem: references, settings, resuming."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.comparison import costs as rules_costs
from benchmarks.comparison import products, rules, summary
from benchmarks.comparison import report as rules_report
from benchmarks.comparison import tune as rules_tune
from benchmarks.comparison.method import Method, Program, Refused, Setting
from benchmarks.comparison.problems import bilevel, flat, reference, rnn
from benchmarks.harness import checkpoints, results

SMALL = "rules --problems bilevel-10 --libraries rbpjax --repetitions 2 --no-costs"


def test_reference_of_the_quadratic_in_closed_form():
    """h* = A⁻¹b; with z = A⁻¹(h* - target) the gradient is (-z h*, z)."""
    problem = bilevel(10.0)
    exact, _ = reference(problem)
    matrix = problem.constants["hessian"].astype(np.float64)
    matrix += np.diag(np.asarray(problem.params, np.float64))
    h = np.linalg.solve(matrix, np.asarray(problem.inputs, np.float64))
    z = np.linalg.solve(matrix, h - np.asarray(problem.target, np.float64))
    np.testing.assert_allclose(exact, np.concatenate([-z * h, z]), rtol=1e-9)


def test_reference_by_iteration_is_that_of_a_long_unrolled_loop():
    """Against float64 BPTT over 300 steps of a small RNN; ρ(J) is below ‖W‖."""
    problem = rnn(0.9, batch=3, units=8)
    exact, rho = reference(problem)
    assert 0.3 < rho < 0.9
    with jax.enable_x64(True):
        wide = lambda x: jax.tree.map(lambda u: jnp.asarray(u, jnp.float64), x)
        problem = problem._replace(target=wide(problem.target))
        step = lambda p, x: lambda h, _: (problem.f(p, x, h), None)

        def loss(p, x):
            h = jnp.zeros(x.shape)
            return problem.loss(jax.lax.scan(step(p, x), h, None, 300)[0])

        args = wide((problem.params, problem.inputs))
        want = flat(jax.jit(jax.grad(loss, (0, 1)))(*args))
    np.testing.assert_allclose(exact, want, rtol=1e-9, atol=1e-12)


def fake(law):
    """A method whose error is ``law`` of the backward tolerance, without a compiler."""

    def program(problem, setting):
        gradient = [np.array([1.0 + law(setting)])]
        return Program(lambda: (0.0, gradient), 0.1, 0)

    return Method("fake", "fake", program)


@pytest.mark.parametrize("factor", [0.01, 1.0, 300.0])
def test_the_search_meets_both_errors_and_not_by_far(factor):
    """Errors proportional to the larger tolerance: the loosest within a factor 7."""
    method = fake(lambda setting: factor * max(setting))
    sweep = rules_tune.Sweep(method, bilevel(10.0), np.array([1.0]))
    sweep.search(best=np.inf)
    for target in rules_tune.TARGETS:
        chosen = sweep.chosen(target)
        error = sweep.points[chosen]["error"]
        assert error <= target
        assert error > 0.15 * target or max(chosen) >= 0.3


def test_a_method_that_leaps_gets_one_last_trial():
    """An error that no tolerance moves, until the finest one does."""
    method = fake(lambda setting: 0.5 if max(setting) > 2e-7 else 1e-6)
    sweep = rules_tune.Sweep(method, bilevel(10.0), np.array([1.0]))
    sweep.search(best=np.inf)
    assert sweep.chosen(1e-3) == Setting(rules_tune.FINEST, rules_tune.FINEST)


def test_polishing_loosens_what_does_not_matter():
    """Where the error is the backward tolerance's, the forward one is loosened."""
    method = fake(lambda setting: setting.backward + 1e-3 * setting.forward)
    sweep = rules_tune.Sweep(method, bilevel(10.0), np.array([1.0]))
    sweep.search(best=np.inf)
    before = sweep.chosen(1e-3)
    sweep.polish()
    after = sweep.chosen(1e-3)
    assert after.forward > before.forward and after.backward >= before.backward


def test_polishing_goes_on_as_long_as_it_goes():
    """A method that leaps: the loosest tolerances with the same error, within 2."""
    law = lambda setting: 1e-6 if max(setting) < 0.1 else 0.5
    sweep = rules_tune.Sweep(fake(law), bilevel(10.0), np.array([1.0]))
    sweep.search(best=np.inf)
    assert max(sweep.chosen(1e-5)) < 0.01
    sweep.polish()
    assert min(sweep.chosen(1e-5)) >= 0.05


def test_a_library_that_raises_when_loosened_keeps_what_it_has():
    """A breakdown at a loose tolerance is the end of that direction alone."""

    def program(problem, setting):
        if setting.forward > 1e-3:
            raise Refused("too loose")
        return Program(lambda: (0.0, [np.array([1 + 0.1 * setting.backward])]), 0.1, 0)

    sweep = rules_tune.Sweep(
        Method("fake", "fake", program), bilevel(10.0), np.array([1.0])
    )
    sweep.trial(Setting(1e-4, 1e-4))
    sweep.polish()
    chosen = sweep.chosen(1e-3)
    assert 5e-4 <= chosen.forward <= 1e-3 and 5e-3 <= chosen.backward <= 1e-2


def test_a_library_that_raises_is_recorded():
    """What a method raises is a line in the result, not the end of the run."""

    def program(problem, setting):
        def call():
            raise RuntimeError("A form of breakdown")

        return Program(call, None, None)

    method = Method("fake", "fake", program)
    sweep = rules_tune.Sweep(method, bilevel(10.0), np.array([1.0]))
    sweep.search(best=np.inf)
    assert "breakdown" in sweep.failure and sweep.chosen(1e-3) is None


def test_products_are_counted():
    """Three powers of a matrix are three products; CG counts J and Jᵀ both."""
    from rbpjax import CGNormal, Neumann

    jac, g = jnp.diag(jnp.linspace(0.1, 0.5, 4)), jnp.ones(4)
    count = lambda rule: products.count_products(rule, lambda h: jac @ h, g, g)
    assert count(Neumann(steps=3)) == (3, 3)
    found, taken = count(CGNormal(tol=1e-3))
    assert found >= 2 * taken >= 2


@pytest.mark.full
def test_no_rule_takes_fewer_products_than_the_limit():
    """Symmetric: CG is next to GMRES; and 20 unknowns need 20 products at most."""
    counts = rules_costs._products(bilevel(10.0, size=20))
    assert 5 < counts["fewest"] <= 20
    assert all(n >= counts["fewest"] for n in counts.values() if n)
    assert counts["CG"] <= counts["fewest"] + 2
    assert counts["CGNormal"] > 2 * counts["fewest"]


@pytest.mark.full
def test_the_smallest_run_and_its_report(monkeypatch):
    """Errors within their targets, steps reported, a table; then a run resumes."""
    assert main(SMALL.split()) == 0
    result = json.loads((results.RESULTS / "rules-custom.json").read_text())
    entry = result["problems"]["bilevel-10"]
    for target, found in entry["targets"].items():
        assert found["turns"]["default"]["method"] == "rbpjax Adaptive"
        for method in summary.rows(entry, target).values():
            assert method["error"] <= float(target)
            assert method["forward"] > 0 and method["q25"] <= 1.01 * method["q75"]
        assert found["turns"]["default"]["steps"]["backward"] > 0
        assert rules_report.ratio(entry, target, "default") is None  # without a peer
    text = rules_report.tables(result)
    assert "bilevel, κ = 10" in text and "rbpjax" in text

    # An interrupted run goes on after the problems that it has.
    checkpoint = checkpoints.Checkpoints(
        "rules", {"repetitions": 2, "libraries": ["rbpjax"]}, False
    )
    checkpoint.once("bilevel-10", lambda: entry)
    monkeypatch.setattr(rules.Rules, "measure", lambda *_: pytest.fail("measured anew"))
    assert main(SMALL.split()) == 0
    again = json.loads((results.RESULTS / "rules-custom.json").read_text())
    assert again["problems"] == result["problems"]
    assert not checkpoint.folder.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "rules --problems nothing",
        "rules --libraries rbpjax scipy",
        "rules --libraries jaxopt",
        "rules --repetitions 0",
        "rules --report",  # without a result
    ],
)
def test_bad_arguments_end_in_one_line(arguments, capsys):
    """Exit code 2 and one line that says what was wrong."""
    assert main(arguments.split()) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_settings_are_what_the_library_was_given():
    """Ours at a tighter setting takes more steps, forward and backward."""
    from benchmarks.comparison.peers import steps

    problem = bilevel(10.0)
    loose = steps("rbpjax Adaptive", problem, Setting(1e-2, 1e-2))
    tight = steps("rbpjax Adaptive", problem, Setting(1e-4, 1e-4))
    assert all(tight[k] > loose[k] for k in ("forward", "backward"))
