"""One problem, whole on one device, and in parts on a mesh of eight.

A batch of 16 states of 8 units, coupled by a synchronized mean over the batch and by
the weights over the units: no part of it can be solved alone. The layouts say which
axes of the state are split, and write f for one part, collectives and all.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import rbpjax
from rbpjax import RRE, Anderson, Broyden, FixedPointIteration, Hybrid, Newton
from tests.support.problems import RULES, ZEROS, replace

BATCH, UNITS = 16, 8
# As tight as rounding allows, so that the only difference is the order of sums.
TOL = 3e-15
SOLVERS = {
    "hybrid": Hybrid(tol=TOL),
    "iteration": FixedPointIteration(tol=TOL),
    "steps": FixedPointIteration(steps=150),
    "anderson": Anderson(tol=TOL),
    "broyden": Broyden(tol=TOL),
    "rre": RRE(tol=TOL),
    "newton": Newton(rbpjax.Adaptive(tol=1e-8), tol=TOL),
}


def table(default: set, solvers: Iterable, rules: Iterable, *others: Iterable) -> list:
    """Parameters (solver, rule, …) for all combinations.

    Those of ``default`` are run by default. The long form takes each pair of a solver
    and a rule once, with the others in turn, so that each of them meets all solvers
    and rules; the rest is marked ``product``.
    """
    made, turns = [], list(itertools.product(*others))
    for (i, solver), (j, rule) in itertools.product(
        enumerate(solvers), enumerate(rules)
    ):
        for k, turn in enumerate(turns):
            row = (solver, rule, *turn)
            covers = k == (i + j) % len(turns)
            mark = pytest.mark.full if covers else pytest.mark.product
            marks = () if row in default else mark
            made.append(pytest.param(*row, id="-".join(map(str, row)), marks=marks))
    return made


def rule_of(name: str) -> Callable:
    return replace(RULES[name], tol=1e-14)


def data():
    """``(w, x, weights)``: ‖J‖ is about 0.6; x differs much between examples."""
    k1, k2 = jax.random.split(jax.random.key(17))
    w = 0.6 * jnp.linalg.qr(jax.random.normal(k1, (UNITS, UNITS)))[0]
    x = jax.random.normal(k2, (BATCH, UNITS)) * jnp.linspace(0.1, 2, BATCH)[:, None]
    return w, x, jnp.linspace(-1.0, 2.0, BATCH * UNITS).reshape(BATCH, UNITS)


def whole_step(w, x, h):
    return jnp.tanh((h - h.mean(0)[None]) @ w.T + x)


class Layout(NamedTuple):
    """A mesh, how the state and the weights are split over it, and f for one part."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    h: P
    w: P
    step: Callable

    def mesh(self, axis_type=AxisType.Auto):
        return jax.make_mesh(
            self.shape, self.axes, axis_types=(axis_type,) * len(self.axes)
        )


def batch_step(w, x, h):
    return jnp.tanh((h - lax.pmean(h.mean(0), "a")[None]) @ w.T + x)


def gather_step(w, x, h):  # rows of w here
    all_units = lax.all_gather(h - h.mean(0)[None], "b", axis=1, tiled=True)
    return jnp.tanh(all_units @ w.T + x)


def scatter_step(w, x, h):  # columns of w here
    part = (h - h.mean(0)[None]) @ w.T
    return jnp.tanh(lax.psum_scatter(part, "b", scatter_dimension=1, tiled=True) + x)


def both_step(w, x, h):
    h = h - lax.pmean(h.mean(0), "a")[None]
    return jnp.tanh(lax.all_gather(h, "b", axis=1, tiled=True) @ w.T + x)


LAYOUTS = {
    "batch": Layout((8,), ("a",), P("a"), P(), batch_step),
    "gather": Layout((8,), ("b",), P(None, "b"), P("b"), gather_step),
    "scatter": Layout((8,), ("b",), P(None, "b"), P(None, "b"), scatter_step),
    "both": Layout((2, 4), ("a", "b"), P("a", "b"), P("b"), both_step),
}


@cache
def alone(solver: str, rule: str):
    """Gradients for w and x, and the report, on one device."""
    solve = rbpjax.rbp_solve(
        whole_step, forward=SOLVERS[solver], backward=rule_of(rule)
    )

    def loss(w, x, weights, probe):
        return jnp.sum(weights * jnp.sin(solve(w, x, 0 * x, probe).value))

    return jax.device_get(jax.jit(jax.grad(loss, (0, 1, 3)))(*data(), ZEROS()))


@cache
def dense():
    """The gradients for w and x by a dense solve."""
    w, x, weights = data()
    flat = lambda f: lambda v: f(v.reshape(x.shape)).ravel()
    step = flat(lambda h: whole_step(w, x, h))
    h = jnp.zeros(x.size)
    for _ in range(30):
        jac = jax.jacobian(step)(h)
        h = h + jnp.linalg.solve(jnp.eye(h.size) - jac, step(h) - h)
    g = (weights * jnp.cos(h.reshape(x.shape))).ravel()
    z = jnp.linalg.solve(jnp.eye(h.size) - jax.jacobian(step)(h).T, g)
    h, z = h.reshape(x.shape), z.reshape(x.shape)
    return jax.device_get(jax.vjp(lambda w, x: whole_step(w, x, h), w, x)[1](z))


def in_parts(layout: Layout, solver, rule, check_vma: bool, step=None) -> Callable:
    """``(w, x, weights, probes) -> loss`` by a shard_map, a probe for each device."""
    solve = rbpjax.rbp_solve(step or layout.step, forward=solver, backward=rule)

    def local(w, x, weights, probes):
        probe = jax.tree.map(lambda p: p.reshape(()), probes)
        value = solve(w, x, 0 * x, probe).value
        return lax.psum(jnp.sum(weights * jnp.sin(value)), layout.axes)

    return jax.shard_map(
        local,
        mesh=layout.mesh(),
        in_specs=(layout.w, layout.h, layout.h, P(*layout.axes)),
        out_specs=P(),
        check_vma=check_vma,
    )


def gradient_in_parts(layout: Layout, solver, rule, check_vma: bool, step=None):
    """Gradients for w and x, and the reports of all devices in a row."""
    loss = in_parts(layout, solver, rule, check_vma, step)
    found = jax.jit(jax.grad(loss, (0, 1, 3)))(*data(), ZEROS(layout.shape))
    w_bar, x_bar, reports = jax.device_get(found)
    return w_bar, x_bar, jax.tree.map(lambda r: r.reshape(-1), reports)


def assert_reports(reports, want):
    """All devices report the same, and what one device with the whole would."""
    for name in ("converged", "num_steps", "status", "forward_steps", "residual"):
        found = getattr(reports, name)
        assert np.all(found == found[0]), (name, found)
    assert np.all(reports.converged == want.converged), reports
    # The last digit of a residual decides about the last step or pass.
    for name in ("num_steps", "forward_steps"):
        found, steps = getattr(reports, name)[0], getattr(want, name)
        assert abs(found - steps) <= max(2, 0.2 * steps), (name, found, steps)
    np.testing.assert_allclose(reports.cotangent_norm, want.cotangent_norm, rtol=1e-12)
    for name in ("residual", "forward_residual"):
        found = getattr(reports, name)
        np.testing.assert_allclose(found, getattr(want, name), rtol=0, atol=1e-12)
