"""The implicit layer: gradients of the functional transform, trained and restored."""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import rbpjax
from rbpjax.nn import FixedPoint, report_metrics
from tests.support.problems import FORWARD, IDENTITY_RTOL, assert_close

N = 5
X = jax.random.normal(jax.random.key(1), (3, N))
H0 = jnp.zeros((3, N))
RULE = rbpjax.CGNormal(tol=1e-12)


class Cell(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.normal(0.2)
        self.linear = nnx.Linear(
            N, N, kernel_init=init, param_dtype=jnp.float64, rngs=rngs
        )

    def __call__(self, x, h):
        return jnp.tanh(self.linear(h) + x)


def layer_of(seed=0, **strategies):
    return FixedPoint(Cell(nnx.Rngs(seed)), **strategies)


def test_gradients_are_those_of_the_functional_transform():
    """For the parameters, against rbp_solve on the bare arrays."""
    layer = layer_of(forward=FORWARD, backward=RULE)
    loss = lambda layer: jnp.sum(jnp.sin(layer(X, H0).value) * jnp.arange(5.0)[None])
    got = nnx.jit(nnx.grad(loss))(layer)["cell"]["linear"]
    linear = layer.cell.linear
    f = lambda p, x, h: jnp.tanh(h @ p["kernel"] + p["bias"][None] + x)
    solve = rbpjax.rbp_solve(f, forward=FORWARD, backward=RULE)
    params = {"kernel": linear.kernel[...], "bias": linear.bias[...]}
    value = lambda p: jnp.sum(jnp.sin(solve(p, X, H0).value) * jnp.arange(5.0)[None])
    want = jax.jit(jax.grad(value))(params)
    got = {"kernel": got["kernel"][...], "bias": got["bias"][...]}
    assert_close(got, want, IDENTITY_RTOL)


def test_the_report_comes_out_of_a_training_step():
    """value_and_grad over the split module: one step lowers the loss, and reports."""
    layer = layer_of()
    graph, params = nnx.split(layer, nnx.Param)

    @jax.jit
    def step(params):
        def loss(params, probe):
            layer = nnx.merge(graph, params)
            return jnp.mean((layer(X, H0, probe).value - 0.5) ** 2)

        value, grads, report = rbpjax.value_and_grad_with_report(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), report

    first, params, report = step(params)
    second, _, _ = step(params)
    assert second < first
    assert report.converged == 1 and report.num_steps > 0 and report.residual < 1e-11


def test_it_trains_and_is_restored_like_any_layer(tmp_path):
    """Five Adam steps by nnx.Optimizer; the layer out of orbax gives the same state."""
    layer = layer_of()
    optimizer = nnx.Optimizer(layer, optax.adam(0.05), wrt=nnx.Param)
    loss = lambda layer: jnp.mean((layer(X, H0).value - 0.5) ** 2)

    @nnx.jit
    def step(layer, optimizer):
        value, grads = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam is not strict
        losses = [float(step(layer, optimizer)) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.split(layer)[1])
        checkpointer.wait_until_finished()
        graph, blank = nnx.split(layer_of(seed=9))
        state = checkpointer.restore(tmp_path / "layer", blank)
    again = nnx.merge(graph, state)
    chex.assert_trees_all_equal(again(X, H0).value, layer(X, H0).value)


class Dropped(Cell):
    """Half of the units are dropped, by a mask of 0 and 2."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, h):
        return self.dropout(super().__call__(x, h))


def test_dropout_draws_one_mask_a_solve():
    """Value and gradient are those of 300 steps with a mask of numbers; then a new one.

    ρ(J) is at most 2 · 0.2 · 2√5 = 1.8 by the kernel's norm, and 0.6 here, so that 300
    steps are the fixed point.
    """
    layer = FixedPoint(Dropped(nnx.Rngs(3)), forward=FORWARD, backward=RULE)
    weights = jnp.arange(5.0)[None]
    loss = lambda h: jnp.sum(jnp.sin(h) * weights)

    def next_mask():
        """What the cell would draw now, without drawing it."""
        return nnx.clone(layer.cell).dropout(jnp.ones((3, N)))

    masks = []
    for _ in range(2):
        masks.append(next_mask())
        linear = layer.cell.linear

        def unrolled(kernel, mask=masks[-1], bias=linear.bias[...]):
            step = lambda h, _: (mask * jnp.tanh(h @ kernel + bias[None] + X), None)
            return loss(jax.lax.scan(step, H0, length=300)[0])

        want, want_grad = jax.jit(jax.value_and_grad(unrolled))(linear.kernel[...])
        call = lambda layer: loss(layer(X, H0).value)
        value, grads = nnx.jit(nnx.value_and_grad(call))(layer)
        assert_close(value, want, IDENTITY_RTOL)
        assert_close(grads["cell"]["linear"]["kernel"][...], want_grad, IDENTITY_RTOL)
    assert not jnp.array_equal(*masks), "the mask is a new one in each solve"
    before = next_mask()
    layer.eval()
    layer(X, H0)
    layer.train()
    assert jnp.array_equal(before, next_mask()), "nothing is drawn in evaluation"


class Normalized(Cell):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(
            N, momentum=0.9, param_dtype=jnp.float64, rngs=rngs, dtype=jnp.float64
        )
        # flax makes these in float32.
        self.norm.mean = nnx.BatchStat(jnp.linspace(-0.1, 0.1, N))
        self.norm.var = nnx.BatchStat(jnp.linspace(1.0, 2.0, N))

    def __call__(self, x, h):
        return jnp.tanh(self.norm(self.linear(h)) + x)


def test_batch_statistics_are_frozen_in_a_solve_and_move_once():
    """h* is that of the running statistics; these move by what the batch has at h*."""
    layer = FixedPoint(Normalized(nnx.Rngs(0)), forward=FORWARD, backward=RULE)
    cell = layer.cell
    mean, var = cell.norm.mean[...], cell.norm.var[...]
    kernel, bias = cell.linear.kernel[...], cell.linear.bias[...]

    def step(h):
        z = (h @ kernel + bias[None] - mean[None]) / jnp.sqrt(var + 1e-5)[None]
        return jnp.tanh(z + X)

    with jax.numpy_dtype_promotion("standard"):  # flax's statistics are not strict
        h = layer(X, H0).value
    assert_close(step(h), h, 1e-9)  # the solver's tolerance is 1e-12
    z = h @ kernel + bias[None]
    assert_close(cell.norm.mean[...], 0.9 * mean + 0.1 * z.mean(0), 1e-6)
    assert_close(cell.norm.var[...], 0.9 * var + 0.1 * z.var(0), 1e-6)
    assert not cell.norm.use_running_average, "the layer's own switch is as it was"


class Counting(Cell):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x, h):
        self.calls[...] = self.calls[...] + 1
        return super().__call__(x, h)


def test_a_cell_that_changes_its_state_is_refused():
    """What is neither a key nor a statistic must not move."""
    layer = FixedPoint(Counting(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"`cell` \(Counting\) changes its own state"):
        layer(X, H0)
    with pytest.raises(ValueError, match="`cell` must be a module called as"):
        FixedPoint("tanh")


class WithEnergy(Cell):
    def __call__(self, x, h):
        return super().__call__(x, h), jnp.sum(h**2)


def test_aux_is_that_of_the_fixed_point():
    """Its value and gradient are those of the same function of h*."""
    plain = layer_of(forward=FORWARD, backward=RULE)
    layer = FixedPoint(
        WithEnergy(nnx.Rngs(0)), forward=FORWARD, backward=RULE, has_aux=True
    )
    of_aux = nnx.value_and_grad(lambda layer: layer(X, H0).aux)
    of_value = nnx.value_and_grad(lambda layer: jnp.sum(layer(X, H0).value ** 2))
    assert_close(of_aux(layer), of_value(plain), IDENTITY_RTOL)
    h = layer(X, H0).value
    key = jax.random.key(0)
    assert_close(
        layer.jacobian_penalty(key, X, h), plain.jacobian_penalty(key, X, h), 1e-12
    )


def test_penalty_and_radius_are_those_of_the_dense_jacobian():
    """Of 2,000 probes: each has a relative deviation of at most √2, so 3 % in all."""
    layer = layer_of()
    h = layer(X, H0).value
    dense = jax.jacobian(lambda h: layer.cell(X, h))(h).reshape(h.size, h.size)
    penalty = layer.jacobian_penalty(jax.random.key(0), X, h, num_probes=2000)
    assert_close(penalty, jnp.sum(dense**2) / h.size, 0.13)  # four deviations
    radius = layer.spectral_radius(jax.random.key(0), X, h)
    assert_close(radius, jnp.abs(jnp.linalg.eigvals(dense)).max(), 0.02)
    grads = nnx.grad(lambda x: layer.jacobian_penalty(jax.random.key(0), x, h))(X)
    assert jnp.linalg.norm(grads) > 0, "it is differentiable in the inputs"
    of_h = jax.grad(lambda h: layer.jacobian_penalty(jax.random.key(0), X, h))(h)
    assert jnp.array_equal(of_h, jnp.zeros_like(h)), "and h is held"


def test_a_state_that_is_handed_on_is_a_warm_start():
    layer = layer_of(forward=rbpjax.FixedPointIteration(tol=1e-9))
    first = layer(X, H0)
    assert layer(X, first.value).num_steps <= 1 < 5 < first.num_steps
    assert layer(X + 1e-4, first.value).num_steps < first.num_steps


class TwoScales(nnx.Module):
    """A fine and a coarse state, each driven by the other at its own resolution."""

    def __init__(self):
        self.gain = nnx.Param(jnp.array(0.4))

    def __call__(self, x, states):
        fine, coarse = states
        pooled = fine.reshape(-1, 2).mean(axis=1)
        gain = self.gain[...]
        return [
            jnp.tanh(gain * (fine + jnp.repeat(coarse, 2)) + x),
            gain * (coarse - pooled),
        ]


def test_a_state_of_several_resolutions():
    """A list of arrays: value and gradient are those of 200 steps, 0.8²⁰⁰ from it."""
    x = jnp.linspace(-1.0, 1.0, 8)
    start = [jnp.zeros(8), jnp.zeros(4)]
    layer = FixedPoint(TwoScales(), forward=FORWARD, backward=RULE)

    def solved(layer):
        fine, coarse = layer(x, start).value
        return jnp.sum(fine**2) + jnp.sum(coarse * jnp.arange(4.0))

    def unrolled(layer):
        step = lambda h, _: (layer.cell(x, h), None)
        fine, coarse = jax.lax.scan(step, start, length=200)[0]
        return jnp.sum(fine**2) + jnp.sum(coarse * jnp.arange(4.0))

    got, want = nnx.value_and_grad(solved)(layer), nnx.value_and_grad(unrolled)(layer)
    assert_close(got, want, IDENTITY_RTOL)


@pytest.mark.parametrize(
    ("numbers", "left"),
    [
        ({}, 0),
        ({"forward_residual": 0.01, "residual": 0.5}, 0),
        ({"forward_residual": 0.4}, 1),
        ({"residual": 1.5}, 1),
        ({"radius": 1.3}, 1),
        ({"residual": jnp.nan}, 1),
        ({"forward_residual": jnp.inf}, 1),
        ({"radius": jnp.nan}, 1),
    ],
)
def test_metrics_say_whether_it_has_left_equilibrium(numbers, left):
    """Each limit by itself, and what is not finite."""
    numbers = {k: jnp.asarray(v) for k, v in numbers.items()}
    radius = numbers.pop("radius", None)
    report = rbpjax.AdjointReport.zeros()._replace(**numbers)
    found = jax.jit(lambda r: report_metrics(r, radius=radius, prefix="deq/"))(report)
    assert found["deq/left_equilibrium"] == left
    assert ("deq/radius" in found) == (radius is not None)


def test_a_tolerance_that_is_an_array_is_data_of_the_layer():
    """It may change between calls of one program, and takes no gradient."""

    @nnx.jit
    def steps(layer):
        return layer(X, H0).num_steps

    layer = layer_of(forward=rbpjax.FixedPointIteration(tol=jnp.array(1e-2)))
    few = steps(layer)
    layer.forward = nnx.data(rbpjax.FixedPointIteration(tol=jnp.array(1e-9)))
    assert steps(layer) > few
    grads = nnx.grad(lambda layer: jnp.sum(layer(X, H0).value))(layer)
    assert set(nnx.to_pure_dict(grads)) == {"cell"}
