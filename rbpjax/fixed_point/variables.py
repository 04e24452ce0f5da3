"""Solves in other variables: in units of one's own, and a batch as its examples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rbpjax._core import tree
from rbpjax._core.step import as_state, is_array
from rbpjax.fixed_point.report import AdjointReport
from rbpjax.types import PyTree, Solution, Solve, StepFn

Maker = Callable[[StepFn], Solve]
"""Makes a solver of a step function."""


def scaled(make: Maker, scale: PyTree, f: StepFn) -> Solve:
    """The solver of h = f(h) that ``make`` makes for u = h / scale.

    Of h* = scale u* the gradient is that of h*, which does not depend on the scale.
    """
    given = jax.tree.map(lambda s: jnp.asarray(s, float), scale)
    if not all(map(_positive, jax.tree.leaves(given))):
        raise ValueError(
            f"rbp_solve: `scale` must be positive and finite; got {scale!r}."
        )
    given = jax.tree.map(tree.power_of_two, lax.stop_gradient(given))

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        h0 = as_state(h0)
        units = _like(given, h0)
        inverse = jax.tree.map(lambda unit: 1 / unit, units)

        def in_units(params: PyTree, inputs: PyTree, u: PyTree) -> PyTree:
            image = f(params, inputs, tree.multiply(units, u))
            if jax.tree.structure(image) != jax.tree.structure(u):
                return image  # refused by who checks it
            return tree.multiply(inverse, image)

        if probe is not None and probe.adjoint is not None:
            # Of an equal loss the adjoint of u is that of h times the scale.
            probe = probe._replace(adjoint=_adjoint_in(probe.adjoint, units))
        solution = make(in_units)(params, inputs, tree.multiply(inverse, h0), probe)
        return solution._replace(value=tree.multiply(units, solution.value))

    return solve


def _like(scale: PyTree, h: PyTree) -> PyTree:
    """The scale as a pytree like ``h``, real, in float32 at least."""

    def leaf(unit: jax.Array, u: jax.Array) -> jax.Array:
        return jnp.broadcast_to(unit, u.shape).astype(tree.widen(u.real).dtype)

    try:
        return jax.tree.map(
            lambda s, part: jax.tree.map(partial(leaf, s), part), scale, h
        )
    except ValueError as error:
        show = lambda t: jax.tree.map(lambda a: jax.typeof(a).str_short(), t)
        raise ValueError(
            "rbp_solve: `scale` must be a pytree like `h0`, or a prefix of it, whose "
            f"arrays broadcast to its; got {show(scale)} for {show(h)}."
        ) from error


@jax.custom_vjp
def _adjoint_in(z: PyTree, units: PyTree) -> PyTree:
    """An adjoint in other units; what comes back in its place is in the old ones."""
    return tree.multiply(units, z)


_adjoint_in.defvjp(
    lambda z, units: (_adjoint_in(z, units), units),
    lambda units, new: (
        tree.multiply(jax.tree.map(lambda unit: 1 / unit, units), new),
        None,
    ),
)


def _positive(x: jax.Array) -> bool:
    """Whether it is, as far as that is known."""
    if isinstance(x, jax.core.Tracer):
        return True
    return bool(np.all((np.asarray(x) > 0) & np.isfinite(np.asarray(x))))


def batched(make: Maker, f: StepFn, axis: int) -> Solve:
    """The solver of a batch, each of whose examples is solved by itself."""

    def one(params: PyTree, inputs: PyTree, h: PyTree) -> PyTree:
        """F of one example: of a batch of one."""
        expand = lambda x: jnp.expand_dims(x, axis) if is_array(x) else x
        image = f(params, jax.tree.map(expand, inputs), jax.tree.map(expand, h))
        return jax.tree.map(lambda x: jnp.squeeze(x, axis), image)

    solve_one = make(one)

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        h0 = as_state(h0)
        size = _batch_size(inputs, h0, axis)
        leaves, treedef = jax.tree.flatten(inputs)
        arrays = [x for x in leaves if is_array(x)]

        def example(
            arrays: list, h: PyTree, z: PyTree, probe: AdjointReport | None
        ) -> tuple[PyTree, Solution]:
            rest = iter(arrays)
            filled = [next(rest) if is_array(x) else x for x in leaves]
            if probe is not None:
                probe = probe._replace(adjoint=z)
            found = solve_one(params, jax.tree.unflatten(treedef, filled), h, probe)
            return found.value, found._replace(value=None)

        z = None if probe is None else probe.adjoint
        each = None if probe is None else _each(probe._replace(adjoint=None), size)
        of_all = jax.vmap(example, in_axes=(axis, axis, axis, 0), out_axes=(axis, 0))
        value, rest = of_all(arrays, h0, z, each)
        return rest._replace(value=value)

    return solve


def _batch_size(inputs: PyTree, h: PyTree, axis: int) -> int:
    """The length of the batch axis; ValueError unless all arrays have it."""
    arrays = [x for x in jax.tree.leaves((inputs, h)) if is_array(x)]
    shapes = [jnp.shape(x) for x in arrays]
    sizes = {s[axis] if -len(s) <= axis < len(s) else None for s in shapes}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None:
        show = lambda t: jax.tree.map(
            lambda a: jax.typeof(a).str_short() if is_array(a) else None, t
        )
        raise ValueError(
            f"rbp_solve: with `batch_axis={axis}` every array of `inputs` and `h0` "
            f"must have that axis, of one length; got {show(inputs)} and {show(h)}. "
            "What all examples share belongs into `params`."
        )
    return size


def _each(probe: AdjointReport, size: int) -> AdjointReport:
    """A probe for each example: those given, or one whose report is the worst."""
    given = any(jnp.ndim(x) for x in jax.tree.leaves(probe))
    return probe if given else _spread(probe, size)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(probe: AdjointReport, size: int) -> AdjointReport:
    """The probe ``size`` times."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (size,)), probe)


def _worst(size: int, _: None, reports: AdjointReport) -> tuple[AdjointReport]:
    """What is worst in the reports of the examples; the norm of all cotangents."""
    worst = jax.tree.map(jnp.max, reports)
    return (
        worst._replace(
            converged=jnp.min(reports.converged),
            cotangent_norm=tree.norm(reports.cotangent_norm),
        ),
    )


_spread.defvjp(lambda probe, size: (_spread(probe, size), None), _worst)
