"""What a solve executes, counted by callbacks from inside the compiled program."""

import dataclasses
from functools import partial

import jax
import numpy as np

from rbpjax import Direct, Solution


def noted(calls: list, value):
    """``value``, unchanged; each time that it is computed ``calls`` grows by one.

    By a pure callback on one number, which goes when nobody reads the value.
    """

    def note(v: np.ndarray) -> np.ndarray:
        calls.append(1)
        return np.zeros_like(v)

    first, *others = jax.tree.leaves(value)
    entry = jax.lax.stop_gradient(first).ravel()[0]
    kind = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
    first = first + jax.pure_callback(note, kind, entry, vmap_method="sequential")
    return jax.tree.unflatten(jax.tree.structure(value), [first, *others])


def noted_map(calls: list, linear, like, rule):
    """The linear map for ``rule``, each product with it or its transpose noted."""
    if isinstance(rule, Direct):  # which maps it over a basis, and does not transpose
        return lambda v: noted(calls, linear(v))
    transpose = lambda v: jax.linear_transpose(linear, like)(v)[0]
    return partial(
        jax.custom_derivatives.linear_call,
        lambda _, v: noted(calls, linear(v)),
        lambda _, v: noted(calls, transpose(v)),
        (),
    )


def counted_products(rule, step, h, g, start=None):
    """``(products, solution)`` of a rule whose report is read.

    The products with J or Jᵀ that are executed, one that measures the residual too.
    """
    return _products(rule, step, h, g, start, slice(None))


def count_products(rule, step, h, g) -> tuple[int, int]:
    """Products with J or Jᵀ of a rule whose report nobody reads; its steps."""
    made, (_, steps) = _products(rule, step, h, g, None, slice(2))
    return made, int(steps)


def _products(rule, step, h, g, start, read):
    calls = []
    options = {} if start is None else {"start": start}

    # The linearization is an argument: as a constant it would keep the compiler busy.
    @jax.jit
    def solve(vjp, g):
        linear = noted_map(calls, lambda v: vjp(v)[0], g, rule)
        return tuple(rule(linear, g, **options))[read]

    solution = jax.block_until_ready(solve(jax.vjp(step, h)[1], g))
    jax.effects_barrier()
    return len(calls), Solution(*solution) if len(solution) > 2 else solution


def counted_evaluations(solver, f, h0):
    """``(evaluations and products, solution)`` of a forward solver, all of it read.

    Evaluations of f, and products with its Jacobian if the solver linearizes it.
    """
    calls = []
    if hasattr(solver, "backward"):
        rule = solver.backward

        def counted(linear, r):
            solution = rule(noted_map(calls, linear, r, rule), r)
            read = lambda z: z + 0 * solution.residual
            return solution._replace(value=jax.tree.map(read, solution.value))

        solver = dataclasses.replace(solver, backward=counted)
    step = lambda h: noted(calls, f(h))
    solution = jax.block_until_ready(jax.jit(lambda h0: solver(step, h0))(h0))
    jax.effects_barrier()
    return len(calls), solution
