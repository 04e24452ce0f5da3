"""Arrays that are sharded under jit: batch, weights and units, on eight devices.

Here the compiler divides one program, and f is written for the whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rbpjax
from tests.support import sharded
from tests.support.hlo import count, whole_loops
from tests.support.problems import RULES, ZEROS, assert_close
from tests.support.sharded import LAYOUTS, SOLVERS, alone, assert_reports, rule_of

# How the state and the weights are split; fsdp: weights are stored in parts only.
SHARDINGS = {
    "batch": (P("d"), P()),
    "fsdp": (P("d"), P("d")),
    "state": (P(None, "d"), P("d")),
    "both": (P("d", "e"), P("e")),
}
DEFAULT = {
    ("anderson", "bicgstab", "fsdp", AxisType.Auto),
}
TABLE = [
    row
    for row in sharded.table(
        DEFAULT, SOLVERS, RULES, SHARDINGS, (AxisType.Auto, AxisType.Explicit)
    )
    # jax.scipy's gmres does not know explicit sharding.
    if row.values[1::2] != ("callable", AxisType.Explicit)
]


def mesh_of(name, kind):
    shape, axes = ((2, 4), ("d", "e")) if name == "both" else ((8,), ("d",))
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(shape))


def step_of(kind):
    """The step; on explicit meshes it says what is gathered for the product."""
    if kind == AxisType.Auto:
        return sharded.whole_step

    def step(w, x, h):
        spec = jax.typeof(h).sharding.spec
        rows = h - jax.reshard(h.mean(0), P(spec[1]))[None]
        product = jax.reshard(rows, P(spec[0], None)) @ jax.reshard(w, P()).T
        return jnp.tanh(jax.reshard(product, spec) + x)

    return step


@pytest.mark.parametrize(("solver", "rule", "name", "kind"), TABLE)
def test_sharded_arrays_give_the_gradient_of_one_device(solver, rule, name, kind):
    *want, report = alone(solver, rule)
    mesh, (h_spec, w_spec) = mesh_of(name, kind), SHARDINGS[name]
    solve = rbpjax.rbp_solve(
        step_of(kind), forward=SOLVERS[solver], backward=rule_of(rule)
    )

    def loss(w, x, weights, probe):
        return jnp.sum(weights * jnp.sin(solve(w, x, 0 * x, probe).value))

    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        w, x, weights = sharded.data()
        args = put(w, w_spec), put(x, h_spec), put(weights, h_spec), ZEROS()
        *got, found = jax.jit(jax.grad(loss, (0, 1, 3)))(*args)
        if kind == AxisType.Explicit:
            assert got[0].sharding.is_equivalent_to(args[0].sharding, 2)
        got, found = jax.device_get((got, found))
    assert_close(got, want, 1e-12)
    assert_reports(jax.tree.map(np.atleast_1d, found), report)


@pytest.mark.full
@pytest.mark.parametrize("rule", ["neumann", "adaptive", "direct", "cg_normal"])
def test_shards_of_different_size(rule):
    """A batch of 13 over 8 devices, as a constraint inside jit: some have one row."""
    w, x, weights = (a[:13] if len(a) == 16 else a for a in sharded.data())
    solve = rbpjax.rbp_solve(
        sharded.whole_step, forward=SOLVERS["hybrid"], backward=rule_of(rule)
    )
    mesh = mesh_of("batch", AxisType.Auto)

    def loss(w, x, probe, split):
        if split:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("d")))
        value = solve(w, x, 0 * x, probe).value
        return jnp.sum(weights * jnp.sin(value))

    grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    *want, report = jax.device_get(grad(w, x, ZEROS(), False))
    *got, found = jax.device_get(grad(w, x, ZEROS(), True))
    assert_close(got, want, 1e-12)
    assert_reports(jax.tree.map(np.atleast_1d, found), report)


def collectives(solve, *args):
    """The all-reduces in each loop of a program, inner loops included."""
    compiled = jax.jit(solve).lower(*args).compile()
    loops = whole_loops(compiled)
    return sorted(count(r" all-reduce(?:-start)?\(", loop) for loop in loops)


def test_steps_between_two_looks_have_no_collective():
    """Units over devices, and an f without collectives: it is the looks that talk.

    One step of the loop is one evaluation of f; the look is a loop of one turn or none
    inside it, entered every `check_every` steps.
    """
    put = lambda a: jax.device_put(
        a, NamedSharding(mesh_of("state", AxisType.Auto), P("d"))
    )
    x = put(jnp.ones(64))
    f = lambda w, x, h: jnp.tanh(w * h + x)
    solve = lambda solver: (
        lambda w, x: rbpjax.rbp_solve(f, forward=solver)(w, x, 0 * x).value
    )
    assert sum(collectives(solve(rbpjax.FixedPointIteration(steps=20)), x, x)) == 0
    found = collectives(solve(rbpjax.FixedPointIteration(check_every=10)), x, x)
    # In the look, and so in the loop around it: one for all its sums of squares, again
    # in the branch for states that are tiny or huge.
    assert found == [2, 2], found


@pytest.mark.parametrize("check_vma", [True, False])
def test_collectives_of_a_state_in_parts(check_vma):
    """Inside shard_map: one for each of f's own, and one for all sums of a look."""
    layout = LAYOUTS["batch"]
    solver = rbpjax.FixedPointIteration(check_every=10)
    rule = rbpjax.Neumann(steps=20)
    loss = sharded.in_parts(layout, solver, rule, check_vma)
    w, x, weights = sharded.data()
    value = lambda w, x: loss(w, x, weights, ZEROS(layout.shape))
    look, whole = collectives(value, w, x)
    assert (look, whole) == (2, 3)  # for states that are tiny or huge once more
    # Backward, a step of a fixed number has f's own one alone.
    assert 1 in collectives(jax.grad(value), w, x)
