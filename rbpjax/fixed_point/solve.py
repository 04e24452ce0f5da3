"""The transform: a forward solver in, a differentiable solver out.

Derivation. Let h* = f(θ, x, h*) and J = ∂f/∂h, at h*. Differentiating both sides,

    (I - J) dh* = ∂f/∂θ dθ + ∂f/∂x dx,

so that the cotangent g of h* reaches θ as (∂f/∂θ)ᵀ z, and x as (∂f/∂x)ᵀ z, with

    z = g + Jᵀ z                                (Liao et al. 2018, equation 9).

The equation of z is itself a fixed-point problem, of the step z ↦ g + Jᵀz with the
arguments (θ, x, h*, g). Its solver is the backward rule. The one ``custom_vjp`` below
therefore solves its own adjoint by calling itself, and reverse-mode derivatives of
every order follow: the adjoint problem's Jacobian is Jᵀ, its adjoint rule the same.

Nothing here depends on how many steps the forward solver took: (θ, x, h*) are saved,
and f is linearized once, at h*, outside the backward loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from jax import lax

from rbpjax._core import reuse, sharding, tree
from rbpjax._core.convolution import channels_last
from rbpjax._core.step import (
    ClosedStep,
    close,
    convert,
    has_products,
    select_state,
    with_aux,
)
from rbpjax._core.strategy import filled, split
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.backward.rule import apply_rule, check_rule
from rbpjax.fixed_point.bound import error_bound
from rbpjax.fixed_point.contract import apply_solver, check_solver
from rbpjax.fixed_point.forward.hybrid import Hybrid
from rbpjax.fixed_point.report import AdjointReport, as_probe, reported
from rbpjax.fixed_point.speech import (
    Line,
    OnFailure,
    check_choice,
    heard,
    speaking,
    watched,
)
from rbpjax.fixed_point.variables import batched, scaled
from rbpjax.types import (
    BackwardRule,
    ForwardSolver,
    PyTree,
    Solution,
    Solve,
    StepFn,
)

# A solver of a closed step's fixed point from a start, which may be any pytree:
# (step, args, start) -> Solution.
ClosedSolver = Callable[[ClosedStep, PyTree, PyTree], Solution]


_NO_FORWARD_MODE = (
    "rbp_solve is a custom_vjp function: jax.jvp, jacfwd and jax.hessian do not apply "
    "to it. For a directional derivative write `rbp_jvp(f, params, inputs, h_star, "
    "(params_dot, inputs_dot)).value`, for a Jacobian `jax.jacrev(...)`, for a Hessian "
    "`jax.jacrev(jax.grad(loss))`."
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _solve(
    step: ClosedStep,
    solver: ClosedSolver,
    rule: BackwardRule,
    verify: bool,
    args: PyTree,
    start: PyTree,
    probe: AdjointReport | None,
    numbers: list,
) -> Solution:
    """Solves h = step(args, h) by ``solver``; the gradient is by ``rule``.

    ``numbers``: those of the rule that may be traced.
    """
    return solver(step, args, start)


def _solve_fwd(step, solver, rule, verify, args, start, probe, numbers):
    # The solve itself, not the solver: the next order differentiates this line.
    solution = _solve(step, solver, rule, verify, args, start, probe, numbers)
    # Of how it was found, only what is reported is kept, and what a rule starts from.
    bare = Solution(solution.value, aux=solution.aux)
    kept = bare if probe is None else solution
    args, probe, numbers = tree.apart((args, probe, numbers))
    return solution, (args, kept, probe, numbers)


def _solve_bwd(step, solver, rule, verify, saved, cotangents):
    args, found, probe, numbers = saved
    h, g = found.value, cotangents.value
    with _axes_in_scope():
        image, vjp = jax.vjp(step, args, h)  # the one linearization

    def adjoint_step(adjoint_args: PyTree, z: PyTree) -> PyTree:
        args, h, g = adjoint_args
        _, vjp_h = jax.vjp(partial(step, args), h)
        return tree.add(g, vjp_h(z)[0])

    def adjoint_solver(_: ClosedStep, adjoint_args: PyTree, start: Any) -> Solution:
        # The linearization comes in with the start. It is a function of (args, h), on
        # which the solution already depends through adjoint_step, so the start's zero
        # cotangent is right for it too.
        vjp, z, numbers = start
        g = adjoint_args[2]
        return apply_rule(filled(rule, numbers), lambda v: vjp(v)[1], g, z)

    begin = None if probe is None else probe.adjoint
    if begin is None and found.aux is not None:
        begin = found.aux.transposed(g)
    start = vjp, begin, numbers
    adjoint = adjoint_step, adjoint_solver, rule, False
    z = _solve(*adjoint, (args, h, g), start, None, numbers)
    report = None
    if probe is not None:
        with sharding.summed(lambda z: vjp(z)[1], h):
            bound = error_bound(step, args, h, image, vjp, g, z.value, found, verify)
            report = reported(found, z, g, bound, probe)
    # None is a zero cotangent: a fixed point does not depend on where one starts.
    return vjp(z.value)[0], None, report, None


_solve.defvjp(_solve_fwd, _solve_bwd)


@contextlib.contextmanager
def _axes_in_scope() -> Iterator[None]:
    """Says what to write where JAX has forgotten the axis name of a ``vmap``."""
    try:
        yield
    except NameError as error:
        raise ValueError(
            f"rbp_solve: f has a collective over the axis of a `jax.vmap` ({error}), "
            "whose name is gone where JAX differentiates outside of it. Take the "
            "gradient inside, `jax.vmap(jax.grad(loss), axis_name=...)`, or write f "
            "for the whole batch, `h.mean(0)` in place of `lax.pmean`."
        ) from None


def _no_forward_mode(error: TypeError) -> bool:
    """Whether it is JAX's refusal of forward mode through a ``custom_vjp``."""
    return str(error).startswith("can't apply forward-mode")


def _solved(
    step: ClosedStep,
    forward: ForwardSolver,
    backward: BackwardRule,
    verify: bool,
    on_failure: OnFailure,
    line: Line | None,
    back: Line | None,
    args: PyTree,
    h0: PyTree,
    probe: AdjointReport | None,
    numbers: tuple[list, list],
) -> Solution:
    """The solve with these options; ``numbers``: those of the two strategies."""

    def found(numbers: list, args: PyTree, start: PyTree) -> Solution:
        once = channels_last(partial(step, args), start)
        return apply_solver(filled(forward, numbers), watched(once, line), start)

    # Numbers, and what a solver of a user's own closes over, go in with the start: the
    # fixed point does not depend on them.
    consts, of_rule = lax.stop_gradient(numbers)
    call, rule = found, speaking(backward, on_failure, back)
    if not reuse.is_value(forward):
        closed = convert(partial(found, consts), args, h0)
        call, consts = closed.call, lax.stop_gradient(closed.consts)
    solver = lambda _, args, start: call(start[1], args, start[0])
    return _solve(step, solver, rule, verify, args, (h0, consts), probe, of_rule)


def _found(
    f: StepFn,
    options: tuple,
    numbers: tuple[list, list],
    params: PyTree,
    inputs: PyTree,
    h0: PyTree,
    probe: AdjointReport | None = None,
) -> Solution:
    """The solution of ``f``, found with those options."""
    _, _, verify, on_failure, line, _ = options
    step, args, h0 = close(f, params, inputs, h0)
    probe = as_probe(probe, h0)
    if verify and probe is not None and not has_products(partial(step, args), h0):
        raise TypeError(
            "rbp_solve: `verify=True` needs products with J, and f has a function with "
            "a backward pass of its own (custom_vjp). Leave `verify` out: the bound is "
            "then estimated without."
        )
    try:
        solution = reuse.run(_solved, (step, *options), args, h0, probe, numbers)
    except TypeError as error:
        if not _no_forward_mode(error):
            raise
        raise TypeError(_NO_FORWARD_MODE) from error
    value, *diagnostics, _ = solution  # the last is for the backward pass
    solution = Solution(value, *map(lax.stop_gradient, diagnostics))
    if line is not None:
        line.ended(solution)
    return heard(solution, on_failure, "forward")


def rbp_solve(
    f: StepFn,
    *,
    forward: ForwardSolver = Hybrid(),
    backward: BackwardRule = Adaptive(),
    has_aux: bool = False,
    verify: bool = False,
    batch_axis: int | None = None,
    scale: PyTree | None = None,
    on_failure: OnFailure = "ignore",
    progress: bool = False,
) -> Solve:
    """Transforms a step function into a differentiable solver of its fixed point.

    ``solve(params, inputs, h0)`` returns h* = f(params, inputs, h*). Its gradient is
    that of the fixed point, whatever way the forward solver took to it: with
    J = ∂f/∂h at h* and the cotangent g = ∂L/∂h*, the backward rule solves

        (I - Jᵀ) z = g,

    and params and inputs receive (∂f/∂θ)ᵀz and (∂f/∂x)ᵀz.

    Exact up to the two tolerances where the backward rule is (the default needs only
    that I - J is invertible); non-convergence is never raised from compiled code but
    reported, forward in the ``Solution``, backward through the probe. A forward
    residual r leaves an error of about ‖(I - J)⁻¹‖ r in the gradient.

    The gradient with respect to ``h0`` is zero by definition: a fixed point does not
    depend on its start. ``num_steps``, ``residual`` and ``converged`` carry none.

    Memory: h* and what f needs of params and inputs are saved, nothing that grows with
    steps. Cost of the gradient: one linearization of f, plus what the rule says. Under
    ``jit``, what f computes without h (a normalized kernel, a mask, the product of the
    inputs with a matrix) is taken out of the loops by the compiler; write f as it reads
    best.

    AD modes: reverse, to every order (``jax.grad`` of ``jax.grad``, ``jacrev``);
    ``jax.jvp`` and ``jacfwd`` raise TypeError, use ``rbp_jvp``. Composes with ``jit``,
    ``vmap``, ``scan``, ``remat``, ``shard_map``. f may close over arrays, traced ones
    and modules too, and they receive gradients; integers, PRNG keys and what is no
    array (functions, strings) may be anywhere in params and inputs.

    Inside ``shard_map``, the devices of an axis over which f has collectives hold the
    parts of one state: sums over the state, and with them all decisions, go over that
    axis too, which is found in f. Give each device a probe of its own; their reports
    are alike. So it is for the rows of a ``vmap`` with an axis name, the gradient taken
    inside of it. A solver or rule of your own is refused there, unless its attribute
    ``axis_names`` says that it sums so.

    Outside ``jit`` f is read at each call as it then is, and calls of what computes the
    same by the same strategies share one compilation: about a millisecond a call.

    What a step computes besides the state comes out with ``has_aux``: f returns
    (h, aux), and ``Solution.aux`` is that of one evaluation more, at h*, differentiated
    like any function.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      forward: solver called as ``forward(step, h0)``; any ``ForwardSolver``. Its
        ``tol`` and ``max_steps`` may be traced, of a schedule, say; one of your own may
        close over traced values.
      backward: rule called as ``backward(vjp, cotangent)``; any ``BackwardRule``. Its
        ``tol``, ``steps`` and ``max_steps`` may be traced.
      has_aux: whether f returns a pair ``(h, aux)``, aux any pytree of arrays.
      verify: whether the report's bound on the gradient's error rests on solves of its
        own, too (needs products with J). Without, it is an estimate by eight products.
        With it, errors of the size of rounding and of the residuals are drawn at
        random, twice, and followed through both solves: four solves to a low accuracy.
      batch_axis: an axis of h0, and of every array in inputs, along which f computes
        independent examples. Each is then solved by itself, as under ``vmap``: it stops
        when it is done, and all fields of the ``Solution`` but ``value`` have the shape
        [batch]. ``None``: one solve, whose state is the whole.
      scale: units of h, where numbers of different units share an array: a pytree like
        h0 (of one example), or a prefix of it, of positive arrays that broadcast. The
        solves are those of h / scale, rounded to powers of two; what is returned is h.
      on_failure: what happens where a solve, forward or backward, does not converge,
        under ``jit`` too: nothing (``"ignore"``), a RuntimeWarning of one line
        (``"warn"``), NaN in its value and so in what is computed from it (``"nan"``), a
        RuntimeError (``"raise"``; from compiled code JAX's error with that text, when
        the result is waited for). A truncated rule fails with a residual above 1.
      progress: whether each evaluation of f and each product rewrites a line that says
        how the solves go, in a terminal or notebook. Slow: each of them calls Python.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution``, where ``h0`` is a pytree of
      floating-point (or complex) arrays, ``Solution.value`` a pytree like it, and
      ``probe`` an ``AdjointReport`` whose gradient is the report, and which may bring
      an adjoint to start from (see there).

    Raises:
      ValueError: by ``solve``, while tracing, if h0 is not made of floating-point
        arrays, if f changes its structure, shapes or dtypes, or if a solver or rule
        returns something else than a ``Solution`` of that kind.
      TypeError: by ``solve``, with ``verify`` and a probe, if f has a backward pass of
        its own and no products with J.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import Adaptive, rbp_solve
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> f = lambda w, x, h: jnp.tanh(w @ h + x)
      >>> w = jnp.array([[0.3, -0.8], [0.8, 0.3]])
      >>> solve = rbp_solve(f, backward=Adaptive(tol=1e-5))
      >>> x, h0 = jnp.array([0.1, 0.2]), jnp.zeros(2)
      >>> loss = lambda w: jnp.sum(solve(w, x, h0).value ** 2)
      >>> print(jax.jit(jax.grad(loss))(w))
      [[-0.013   0.0323]
       [-0.0266  0.0661]]

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      equations 4 to 9, https://arxiv.org/abs/1803.06396.
    """
    for name, value in (("f", f), ("forward", forward), ("backward", backward)):
        if not callable(value):
            raise ValueError(
                f"rbp_solve: `{name}` must be callable; got {value!r}. "
                "Strategies are instances, such as Neumann(steps=20), not names."
            )

    check_solver(forward)
    check_rule(backward)
    check_choice(on_failure)
    if not isinstance(verify, bool):
        raise ValueError(f"rbp_solve: `verify` must be True or False; got {verify!r}.")
    if isinstance(batch_axis, bool) or not isinstance(batch_axis, int | None):
        raise ValueError(
            f"rbp_solve: `batch_axis` must be an int or None; got {batch_axis!r}."
        )
    line, back = None, None
    if progress:
        line, back = Line("forward", "evaluations"), Line("backward", "products")
    of_forward, forward = split(forward)
    of_backward, backward = split(backward)
    options = (forward, backward, verify, on_failure, line, back)

    def make(state_of: StepFn) -> Solve:
        """The solver of these options for a step function."""
        return partial(_found, state_of, options, (of_forward, of_backward))

    with_units = make if scale is None else partial(scaled, make, scale)
    state_of = select_state(f) if has_aux else f
    if batch_axis is None:
        solve_state = with_units(state_of)
    else:
        solve_state = batched(with_units, state_of, batch_axis)

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """Solves h* = f(params, inputs, h*) from h0."""
        solution = solve_state(params, inputs, h0, probe)
        return with_aux(f, params, inputs, solution) if has_aux else solution

    return solve
