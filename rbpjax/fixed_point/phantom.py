"""The phantom gradient in its unrolled form: some damped steps from the fixed point."""

from __future__ import annotations

from functools import partial

from jax import lax

from rbpjax._core import reuse, tree
from rbpjax._core.convolution import channels_last
from rbpjax._core.step import ClosedStep, close, select_state, with_aux
from rbpjax.fixed_point.forward.hybrid import Hybrid
from rbpjax.fixed_point.report import AdjointReport
from rbpjax.fixed_point.solve import rbp_solve
from rbpjax.fixed_point.unroll import check_count, unrolled
from rbpjax.types import ForwardSolver, PyTree, Solution, Solve, StepFn


def unrolled_phantom(
    f: StepFn,
    num_steps: int = 5,
    *,
    damping: float = 0.5,
    forward: ForwardSolver = Hybrid(),
    has_aux: bool = False,
) -> Solve:
    """The phantom gradient (unrolled form): k damped steps from where a solver ended.

    ``solve(params, inputs, h0)`` finds h by ``forward``, takes it as a constant, and
    goes on with τ = 1 - damping and k = ``num_steps``:

        h ← τ f(params, inputs, h) + (1 - τ) h,   k times.

    The gradient is that of these k steps, by back-propagation through them: truncated,
    hence biased. Where the solver converged the steps do not move, and it is that of
    the rule ``Phantom(steps=k, damping=1 - τ)``, which stores no steps. Where it did
    not, each step has a Jacobian of its own, and the gradient still is that of the
    value returned with its start held fixed.

    Cost: the forward solve and k evaluations of f; backward k VJPs. Memory: the
    intermediate values of k evaluations. AD modes: all. The gradient of h0 is zero.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      num_steps: k.
      damping: 1 - τ, in [0, 1).
      forward: any ``ForwardSolver``, as of ``rbp_solve``.
      has_aux: whether f returns a pair ``(h, aux)``; ``Solution.aux`` is then that of
        one evaluation more, at the last state, as with ``rbp_solve``.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution`` with the state after those
      steps as value, its residual measured anew, and their number among the steps and
      products of the forward solve. A probe is accepted and its gradient is zero: no
      adjoint is solved.

    Raises:
      ValueError: if an option is out of its range, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import FixedPointIteration, unrolled_phantom
      >>> def grad(steps):
      ...     three = FixedPointIteration(steps=3)
      ...     solve = unrolled_phantom(
      ...         lambda a, x, h: a * h + x, steps, damping=0.0, forward=three)
      ...     return jax.grad(lambda a: solve(a, 1.0, 0.0).value)(0.5)
      >>> [round(float(grad(k)), 3) for k in (1, 2, 30)]  # h / (1 - a) = 4 at h*
      [1.75, 2.75, 4.0]

    References:
      Geng et al., "On Training Implicit Models", NeurIPS 2021, section 3.2 (the
      unrolling-based phantom gradient), https://arxiv.org/abs/2111.05177.
    """
    check_count("num_steps", num_steps, 1)
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if not number or not 0 <= damping < 1:
        raise ValueError(
            "unrolled_phantom: `damping` must be a Python number in [0, 1); got "
            f"{damping!r}. It is 1 - τ, the weight of the old state."
        )
    state_of = select_state(f) if has_aux else f

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """The state after num_steps damped steps from where the solver ended."""
        step, args, h = close(state_of, params, inputs, h0)
        # Arguments are constant here, so that nothing of this solve is differentiated.
        fixed, start = lax.stop_gradient((args, h))
        find = rbp_solve(lambda args, _, h: step(args, h), forward=forward)
        found = find(fixed, None, start)
        options = num_steps, float(damping)
        last = reuse.run(_moved, (step, *options), args, found.value)
        solution = last._replace(
            num_steps=last.num_steps + found.num_steps,
            num_products=last.num_products + found.num_products,
        )
        return with_aux(f, params, inputs, solution) if has_aux else solution

    return solve


def _moved(
    step: ClosedStep, num_steps: int, damping: float, args: PyTree, h: PyTree
) -> Solution:
    """After so many damped steps from h."""
    once = channels_last(partial(step, args), h, differentiated=True)

    def body(h: PyTree, _: None) -> tuple[PyTree, None]:
        image = once(h)
        return tree.axpy(damping, tree.sub(h, image), image), None

    h, _ = lax.scan(body, lax.stop_gradient(h), length=num_steps)
    return unrolled(step, args, h, num_steps)
