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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from rbpjax.fixed_point import tree
from rbpjax.fixed_point.adaptive import Adaptive
from rbpjax.fixed_point.forward import FixedPointIteration
from rbpjax.types import (
    BackwardRule,
    ForwardSolver,
    LinearMap,
    PyTree,
    Solution,
    StepFn,
)


class AdjointReport(NamedTuple):
    """What the backward pass did; all leaves are floats.

    It comes out of the backward pass as the *gradient of the loss with respect to a
    probe*, ``AdjointReport.zeros()`` handed to the solve. Where one probe serves
    several solves, their reports add up, as gradients do; inside ``jax.vmap`` give one
    probe an example, inside ``lax.scan`` one a step.

    Attributes:
      num_steps: steps of the backward rule.
      residual: ‖g + Jᵀz - z‖ / ‖g‖.
      converged: 1 if the rule reached its tolerance, else 0.
      cotangent_norm: ‖g‖; zero where no gradient arrived, or no adjoint was solved
        (``bptt``).
    """

    num_steps: Any
    residual: Any
    converged: Any
    cotangent_norm: Any

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> AdjointReport:
        """A probe: zeros of ``shape``, for example ``(batch,)`` to map over."""
        return cls(*(jnp.zeros(shape) for _ in cls._fields))


# A step function with its parameters in one pytree, and a solver of its fixed point
# from a start, which may be any pytree: (args, h) -> h and (step, args, start) -> …
ClosedStep = Callable[[PyTree, PyTree], PyTree]
ClosedSolver = Callable[[ClosedStep, PyTree, PyTree], Solution]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve(
    step: ClosedStep,
    solver: ClosedSolver,
    rule: BackwardRule,
    args: PyTree,
    start: PyTree,
    probe: AdjointReport | None,
) -> Solution:
    """Solves h = step(args, h) by ``solver``; the gradient is by ``rule``."""
    return solver(step, args, start)


def _solve_fwd(step, solver, rule, args, start, probe):
    # The solve itself, not the solver: the next order differentiates this line.
    solution = _solve(step, solver, rule, args, start, probe)
    return solution, (args, solution.value, probe)


def _solve_bwd(step, solver, rule, saved, cotangents):
    args, h, probe = saved
    g = cotangents.value
    _, vjp = jax.vjp(step, args, h)  # the one linearization

    def adjoint_step(adjoint_args: PyTree, z: PyTree) -> PyTree:
        args, h, g = adjoint_args
        _, vjp_h = jax.vjp(partial(step, args), h)
        return tree.add(g, vjp_h(z)[0])

    def adjoint_solver(_: ClosedStep, adjoint_args: PyTree, vjp: Any) -> Solution:
        # The linearization comes in as the start. It is a function of (args, h), on
        # which the solution already depends through adjoint_step, so the start's zero
        # cotangent is right for it too.
        return apply_rule(rule, lambda v: vjp(v)[1], adjoint_args[2])

    z = _solve(adjoint_step, adjoint_solver, rule, (args, h, g), vjp, None)
    report = None
    if probe is not None:
        raw = (z.num_steps, z.residual, z.converged, tree.to_unit(g)[1])
        report = AdjointReport(
            *(
                tree.vary_like(lax.stop_gradient(r).astype(p.dtype), p)
                for r, p in zip(raw, probe, strict=True)
            )
        )
    # None is a zero cotangent: a fixed point does not depend on where one starts.
    return vjp(z.value)[0], None, report


_solve.defvjp(_solve_fwd, _solve_bwd)


def rbp_solve(
    f: StepFn,
    *,
    forward: ForwardSolver = FixedPointIteration(),
    backward: BackwardRule = Adaptive(),
) -> Callable[..., Solution]:
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

    Memory: params, inputs and h* are saved, nothing that grows with steps. Cost of the
    gradient: one linearization of f, plus what the rule says. AD modes: reverse, to
    every order (``jax.grad`` of ``jax.grad``, ``jacrev``); ``jax.jvp`` and ``jacfwd``
    raise TypeError, use ``rbp_jvp``. Composes with ``jit``, ``vmap``, ``scan``,
    ``remat``, ``shard_map``. f may close over arrays, traced ones and modules too, and
    they receive gradients; integers and PRNG keys may be anywhere in params and inputs.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      forward: solver called as ``forward(step, h0)``; any ``ForwardSolver``.
      backward: rule called as ``backward(vjp, cotangent)``; any ``BackwardRule``.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution``, where ``h0`` is a pytree of
      floating-point (or complex) arrays, ``Solution.value`` a pytree like it, and
      ``probe`` an ``AdjointReport`` whose gradient is the report (see there).

    Raises:
      ValueError: by ``solve``, while tracing, if h0 is not made of floating-point
        arrays, if f changes its structure, shapes or dtypes, or if a solver or rule
        returns something else than a ``Solution`` of that kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> f = lambda w, x, h: jnp.tanh(w @ h + x)
      >>> w = jnp.array([[0.3, -0.8], [0.8, 0.3]])
      >>> solve = rbp_solve(f, backward=Adaptive(tol=1e-10))
      >>> x, h0 = jnp.array([0.1, 0.2]), jnp.zeros(2)
      >>> loss = lambda w: jnp.sum(solve(w, x, h0).value ** 2)
      >>> jax.jit(jax.grad(loss))(w).shape
      (2, 2)

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      equations 4 to 9, https://arxiv.org/abs/1803.06396.
    """
    for name, value in (("f", f), ("forward", forward), ("backward", backward)):
        if not callable(value):
            raise ValueError(
                f"rbp_solve: `{name}` must be callable; got {value!r}. "
                "Strategies are instances, such as Neumann(20), not names."
            )

    def forward_solver(step: ClosedStep, args: PyTree, start: PyTree) -> Solution:
        solution = forward(partial(step, args), start)
        return check_solution(solution, start, f"the forward solver {forward!r}")

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """Solves h* = f(params, inputs, h*) from h0."""
        step, args, h0 = close(f, params, inputs, h0)
        probe = _as_probe(probe, h0)
        solution = _solve(step, forward_solver, backward, args, h0, probe)
        value, *diagnostics = solution
        return Solution(value, *map(lax.stop_gradient, diagnostics))

    return solve


def rbp_vjp(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h_star: PyTree,
    cotangent: PyTree,
    rule: BackwardRule = Adaptive(),
) -> tuple[tuple[PyTree, PyTree], Solution]:
    """The gradient of a fixed point, as a plain function of the fixed point.

    Solves (I - Jᵀ) z = g by ``rule`` and returns (∂f/∂θ)ᵀz and (∂f/∂x)ᵀz. Exact,
    truncated or unbiased as the rule is, provided that h_star is a fixed point.

    Cost: one linearization of f and one rule. AD modes: those of the rule's loops.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree; integer leaves get float0 cotangents, as in ``jax.vjp``.
      inputs: pytree, likewise.
      h_star: the fixed point, a pytree of floating-point arrays.
      cotangent: g, a pytree like ``h_star``.
      rule: any ``BackwardRule``.

    Returns:
      ``((params_bar, inputs_bar), solution)``, the latter with the adjoint z as value.

    Raises:
      ValueError: if f changes the state, or ``cotangent`` is not like ``h_star``.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda a, x, h: a * h + x  # h* = x / (1 - a), ∂h*/∂x = 1 / (1 - a)
      >>> a, x = jnp.array([0.5]), jnp.array([1.0])
      >>> (_, x_bar), _ = rbp_vjp(f, a, x, jnp.array([2.0]), jnp.array([1.0]))
      >>> x_bar.round(9).tolist()
      [2.0]

    References:
      Liao et al. 2018, equations 8 and 9.
    """
    step, args, h_star = close(f, params, inputs, h_star)
    _check_like(cotangent, h_star, "`cotangent`", "`h_star`")
    cotangent = jax.tree.map(jnp.asarray, cotangent)
    _, vjp = jax.vjp(step, args, h_star)
    solution = apply_rule(rule, lambda v: vjp(v)[1], cotangent)
    _, params_bar, inputs_bar = vjp(solution.value)[0]
    return (params_bar, inputs_bar), solution


def rbp_jvp(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h_star: PyTree,
    tangents: tuple[PyTree, PyTree],
    rule: BackwardRule = Adaptive(),
) -> Solution:
    """The directional derivative of a fixed point: forward mode.

    Solves (I - J) ḣ = ∂f/∂θ θ̇ + ∂f/∂x ẋ by ``rule``, which is handed v ↦ Jv in the
    place of v ↦ Jᵀv. Under ``jax.vmap`` over tangents it is what ``jacfwd`` would do.

    Cost: one linearization of f, one evaluation of its tangent, one rule.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree of floating-point arrays.
      inputs: pytree of floating-point arrays.
      h_star: the fixed point.
      tangents: ``(params_dot, inputs_dot)``, pytrees like params and inputs.
      rule: any ``BackwardRule``.

    Returns:
      ``Solution`` with ḣ as value, a pytree like ``h_star``.

    Raises:
      ValueError: if f changes the state.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda a, x, h: a * h + x
      >>> a, x, h = jnp.array([0.5]), jnp.array([1.0]), jnp.array([2.0])
      >>> h_dot = rbp_jvp(f, a, x, h, (jnp.zeros(1), jnp.ones(1))).value
      >>> h_dot.round(9).tolist()
      [2.0]

    References:
      Liao et al. 2018, equation 6.
    """
    step, args, h_star = close(f, params, inputs, h_star)
    consts, params, inputs = args
    drive = lambda p, x: step((consts, p, x), h_star)
    _, h_dot = jax.jvp(drive, (params, inputs), tangents)
    _, jvp = jax.linearize(partial(step, args), h_star)
    return apply_rule(rule, jvp, h_dot)


def value_and_grad(
    loss: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree, AdjointReport]]:
    """``jax.value_and_grad`` that also returns the report of the adjoint solve.

    Args:
      loss: scalar function that takes ``probe`` as keyword and hands it to a solve.
      argnums: as in ``jax.value_and_grad``.
      has_aux: as in ``jax.value_and_grad``.

    Returns:
      ``(*args, **kwargs) -> (value, grads, report)``. Several solves with one probe add
      their reports up. A report of zeros says that no adjoint was solved.

    Example:
      >>> import jax.numpy as jnp
      >>> solve = rbp_solve(lambda a, x, h: a * h + x)
      >>> def loss(a, x, probe):
      ...     return jnp.sum(solve(a, x, jnp.zeros(1), probe=probe).value)
      >>> value, grad, report = value_and_grad(loss)(jnp.array([0.5]), jnp.ones(1))
      >>> grad.round(6).tolist(), float(report.converged)
      ([4.0], 1.0)
    """

    def with_report(*args: Any, **kwargs: Any) -> tuple[Any, PyTree, AdjointReport]:
        def probed(probe: AdjointReport, *args: Any) -> Any:
            return loss(*args, probe=probe, **kwargs)

        single = isinstance(argnums, int)
        wanted = tuple(
            i % len(args) + 1 for i in ((argnums,) if single else tuple(argnums))
        )
        value, (report, *grads) = jax.value_and_grad(
            probed, argnums=(0, *wanted), has_aux=has_aux
        )(AdjointReport.zeros(), *args)
        return value, grads[0] if single else tuple(grads), report

    return with_report


def close(
    f: StepFn, params: PyTree, inputs: PyTree, h: PyTree
) -> tuple[ClosedStep, PyTree, PyTree]:
    """Full closure conversion: ``(step, args, h)`` with f = step(args, ·).

    f is traced once. All arrays that it closes over, integers and keys included, become
    arguments, without which ``custom_vjp`` could not give them gradients. h is checked
    against f's output, and its leaves made strongly typed arrays.
    """
    h = jax.tree.map(_state_leaf, h)
    if not jax.tree.leaves(h):
        raise ValueError(f"`h0` must have at least one array; got {h!r}.")
    trace = jax.make_jaxpr(f, return_shape=True)
    jaxpr, out = trace(params, inputs, h)
    _check_like(out, h, "`f`'s output", "`h0`")
    axes = tree.varying_axes(jaxpr.out_avals)
    if axes - tree.varying_axes(map(jax.typeof, jax.tree.leaves(h))):
        h = tree.vary(h, axes)  # inside shard_map, f's output varies where h did not
        jaxpr, _ = trace(params, inputs, h)
    treedef = jax.tree.structure(h)

    def step(args: PyTree, h: PyTree) -> PyTree:
        consts, params, inputs = args
        call = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr.jaxpr, consts))
        image = call(*jax.tree.leaves((params, inputs, h)))
        return tree.vary_like(jax.tree.unflatten(treedef, image), h)

    return step, (tuple(jaxpr.consts), params, inputs), h


def apply_rule(rule: BackwardRule, vjp: LinearMap, cotangent: PyTree) -> Solution:
    """``rule(vjp, cotangent)``, checked to be a solution like the cotangent."""
    solution = rule(vjp, cotangent)
    return check_solution(solution, cotangent, f"the backward rule {rule!r}")


def check_solution(solution: object, like: PyTree, source: str) -> Solution:
    """``solution`` with array fields, or ValueError if it is not one for ``like``."""
    if not isinstance(solution, Solution):
        raise ValueError(
            f"{source} must return rbpjax.Solution(value, num_steps, residual, "
            f"converged); got {type(solution).__name__}."
        )
    _check_like(solution.value, like, f"the value returned by {source}", "the start")
    value, *diagnostics = solution
    return Solution(value, *map(jnp.asarray, diagnostics))


def _check_like(x: PyTree, like: PyTree, name: str, like_name: str) -> None:
    """Raises ValueError unless both have the same structure, shapes and dtypes."""
    show = lambda t: jax.tree.map(lambda a: jax.typeof(a).str_short(), t)
    describe = lambda t: jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), t)
    try:
        same = describe(x) == describe(like)
        shown = show(x)
    except TypeError:  # a leaf that is no array
        same, shown = False, x
    if not same:
        raise ValueError(
            f"{name} must have the structure, shapes and dtypes of {like_name}; got "
            f"{shown} for {show(like)}. A step that returns (h, output) must select h; "
            "one that promotes the dtype must cast its result back."
        )


def _state_leaf(x: object) -> jax.Array:
    """A leaf of the state as a strongly typed array; ValueError if it is not real."""
    try:
        x = jnp.asarray(x)
    except TypeError:
        raise ValueError(
            f"`h0` must be a pytree of arrays; got a leaf of type {type(x).__name__}. "
            "Put what is not an array into f itself."
        ) from None
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            f"`h0` must be made of floating-point or complex arrays; got {x.dtype}"
            f"{list(x.shape)}. Cast it, or move integers and keys into `inputs`."
        )
    return lax.convert_element_type(x, x.dtype) if x.weak_type else x


def _as_probe(probe: AdjointReport | None, h: PyTree) -> AdjointReport | None:
    """The probe as arrays, varying over devices as the state does."""
    if probe is None:
        return None
    if not isinstance(probe, AdjointReport):
        raise ValueError(
            "`probe` must be an AdjointReport, such as AdjointReport.zeros(); got "
            f"{type(probe).__name__}."
        )
    for name, leaf in zip(probe._fields, map(jnp.asarray, probe), strict=True):
        if leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"`probe.{name}` must be a floating-point scalar here; got "
                f"{leaf.dtype}{list(leaf.shape)}. Map over probes with jax.vmap, or "
                "scan over them, one for each solve."
            )
    return tree.vary_like(AdjointReport(*map(jnp.asarray, probe)), h)
