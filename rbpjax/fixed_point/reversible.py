"""A damped iteration that runs backwards: the exact gradient without its history.

Two coupled states y and z start at h0, and with β = 1 - damping a step is

    y' = (1 - β) y + β f(z),    z' = (1 - β) z + β f(y'),

whose inverse needs no more than two evaluations of f:

    z = (z' - β f(y')) / (1 - β),    y = (y' - β f(z)) / (1 - β).

The two evaluations are those that the VJP of the step needs anyway. What the division
by 1 - β does to rounding errors is measured where states were stored: at the anchors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import reuse, sharding, tree
from rbpjax._core.convolution import channels_last
from rbpjax._core.step import (
    ClosedStep,
    close,
    floats,
    merge,
    others,
    select_state,
    with_aux,
)
from rbpjax.fixed_point.bound import Bound
from rbpjax.fixed_point.iterate import Look, judged, ratio
from rbpjax.fixed_point.report import AdjointReport, as_probe, reported
from rbpjax.fixed_point.speech import OnFailure, check_choice, heard
from rbpjax.fixed_point.unroll import check_count
from rbpjax.types import PyTree, Solution, Solve, Status, StepFn


def reversible(
    f: StepFn,
    num_steps: int,
    *,
    damping: float = 0.5,
    anchors: int = 8,
    has_aux: bool = False,
    on_failure: OnFailure = "nan",
) -> Solve:
    """The gradient of ``num_steps`` damped steps, run backwards instead of stored.

    ``solve(params, inputs, h0)`` moves two states y and z, which both start at h0: with
    β = 1 - damping

        y ← (1 - β) y + β f(params, inputs, z),
        z ← (1 - β) z + β f(params, inputs, y).

    Each step can be undone, and the backward pass undoes them one by one. A fixed point
    of f is one of both states; the value is z.

    Exact for the z it returns, converged or not, up to rounding; h0 has a gradient.
    Going back multiplies rounding errors: by 1 / damping a step where f does not couple
    the states, and by up to 1 / damping² where they settle slowly. So ``anchors``
    states are kept on the way, evenly spaced, from which the way back starts anew.
    ``num_steps / anchors`` steps at a damping of 0.5 lose up to 0.6 digits each: with
    the default, 40 steps keep half of the digits of float32, 100 those of float64. The
    digits lost are *measured* at each anchor, and where they leave less than half of
    those of the gradient (as ``report.converged`` has it), it is NaN by default: take
    more anchors, or more damping. A damping of 0.995 needs none for 1,000 steps in
    float64.

    Cost: two evaluations of f a step, backward two evaluations and two VJPs. Memory:
    2 · anchors + 6 states, whatever ``num_steps``. States in half precision are carried
    in float32. AD modes: reverse, to every order (the next order stores its history);
    ``jax.jvp`` and ``jacfwd`` raise TypeError. Composes with ``jit``, ``vmap``,
    ``scan``; f may close over traced arrays, and integers and keys may be in params and
    inputs.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      num_steps: T, the number of steps, of two evaluations of f each.
      damping: 1 - β, the weight of the old state, strictly between 0 and 1.
      anchors: number of states kept, as pairs (y, z); the first is h0. Of T or more of
        them nothing is recomputed from afar.
      has_aux: whether f returns a pair ``(h, aux)``; ``Solution.aux`` is then that of
        one evaluation more, at the last state, as with ``rbp_solve``.
      on_failure: what happens where rounding has spoilt the gradient: it is NaN
        (``"nan"``), a RuntimeWarning or RuntimeError says so, or nothing but the report
        does, as in ``rbp_solve``.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution`` with the last z as value.
      The gradient of a probe is a report: ``residual`` is the largest distance between
      a state recomputed and the anchor there, relative to the larger of the anchor and
      the last state, leaf by leaf; ``bound`` is four times the largest product of such
      a distance and the share of the cotangent that arrives there, an estimate of the
      gradient's relative error; ``num_steps`` and ``num_products`` are T and 2T.

    Raises:
      ValueError: if an option is out of its range, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import reversible
      >>> solve = reversible(lambda a, x, h: a * h + x, 1, damping=0.25)
      >>> loss = lambda a, h0: solve(a, 1.0, h0).value
      >>> z = solve(0.8, 1.0, 2.0).value
      >>> a_bar, h_bar = jax.grad(loss, (0, 1))(0.8, 2.0)
      >>> [round(float(u), 2) for u in (z, a_bar, h_bar)]
      [2.72, 2.74, 0.76]

    References:
      McCallum, Arora and Foster, "Reversible Deep Equilibrium Models", 2025, equations
      5 to 8, https://arxiv.org/abs/2509.12917; the anchors are this library's.
    """
    check_count("num_steps", num_steps, 1)
    check_count("anchors", anchors, 1)
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if not number or not 0 < damping < 1:
        raise ValueError(
            "reversible: `damping` must be a Python number strictly between 0 and 1; "
            f"got {damping!r}. Without damping a step cannot be undone: use bptt."
        )
    check_choice(on_failure)
    state_of = select_state(f) if has_aux else f
    options = num_steps, min(anchors, num_steps), float(damping), on_failure

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """The state z after num_steps steps from h0."""
        step, args, h = close(state_of, params, inputs, h0)
        solution = reuse.run(_solved, (step, *options), args, h, as_probe(probe, h))
        return with_aux(f, params, inputs, solution) if has_aux else solution

    return solve


class _Plan(NamedTuple):
    """What is static.

    Attributes:
      step: the closed step function, for states in the dtypes of h0.
      num_steps: T.
      anchors: how many pairs are kept, at most T.
      damping: 1 - β.
      on_failure: what happens where rounding has spoilt the gradient.
    """

    step: ClosedStep
    num_steps: int
    anchors: int
    damping: float
    on_failure: OnFailure

    def legs(self) -> list[tuple[int, int]]:
        """The steps from an anchor to the next, and how often there are so many."""
        length, longer = divmod(self.num_steps, self.anchors)
        legs = [(length + 1, longer), (length, self.anchors - longer)]
        return [leg for leg in legs if leg[1]]

    def mix(self, old: PyTree, image: PyTree) -> PyTree:
        """(1 - β) old + β image."""
        d = self.damping
        return jax.tree.map(lambda u, v: d * u + (1 - d) * v, old, image)

    def unmix(self, new: PyTree, image: PyTree) -> PyTree:
        """The old of which ``mix`` made ``new``."""
        d = self.damping
        return jax.tree.map(lambda u, v: (u - (1 - d) * v) / d, new, image)


class _Pair(NamedTuple):
    """The coupled states, or their cotangents."""

    y: PyTree
    z: PyTree


class _Back(NamedTuple):
    """The carry of the backward pass: the pair, its cotangent, that of the args."""

    pair: _Pair
    g: _Pair
    args_bar: PyTree


class _Drift(NamedTuple):
    """What the anchors told.

    Attributes:
      largest: the largest relative distance of a recomputed state.
      error: four times the largest of them times the share of the cotangent.
      cotangent: the largest norm of the cotangent so far.
    """

    largest: jax.Array
    error: jax.Array
    cotangent: jax.Array


def _solved(
    step: ClosedStep,
    num_steps: int,
    anchors: int,
    damping: float,
    on_failure: OnFailure,
    args: PyTree,
    h0: PyTree,
    probe: AdjointReport | None,
) -> Solution:
    """The solution, with a residual that the compiler removes when nobody reads it."""
    plan = _Plan(step, num_steps, anchors, damping, on_failure)
    h = _last(plan, floats(args), others(args), h0, probe)
    return _judged(plan, args, h)._replace(value=h)


def _judged(plan: _Plan, args: PyTree, h: PyTree) -> Solution:
    """The residual at the last state, and what its rate says."""
    args, h = lax.stop_gradient((args, h))
    once = partial(plan.step, args)
    with sharding.summed(once, h):
        found = judged(once, h, plan.num_steps, tree.default_tol(h))
    return found._replace(num_products=found.num_products + plan.num_steps)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _last(
    plan: _Plan, args: PyTree, rest: PyTree, h0: PyTree, probe: AdjointReport | None
) -> PyTree:
    """The last z. ``args``: what can be differentiated of them; ``rest``: what not."""
    pair = _run(plan, merge(args, rest), h0, _start(h0), plan.num_steps)
    return tree.cast_like(pair.z, h0)


def _last_fwd(plan, args, rest, h0, probe):
    whole = merge(args, rest)
    pair, anchors = _start(h0), []
    for length, count in plan.legs():
        leg = lambda pair, _, n=length: (_run(plan, whole, h0, pair, n), pair)
        pair, kept = lax.scan(leg, pair, length=count)
        anchors.append(kept)
    given = tree.apart((args, rest, h0, probe))
    return tree.cast_like(pair.z, h0), (*given, anchors, pair)


def _last_bwd(plan, saved, g):
    args, rest, h0, probe, anchors, end = saved
    wide = jax.tree.map(tree.widen, g)
    image_of = lambda both: _apply(plan, merge(both[0], rest), h0, both[1])
    ordered = channels_last(image_of, (args, end.z), differentiated=True)
    apply = lambda args, h: ordered((args, h))

    def undo(now: _Back, _: None) -> tuple[_Back, None]:
        """One step back."""
        (y, z), (gy, gz), args_bar = now
        image, vjp = jax.vjp(apply, args, y)
        z = plan.unmix(z, image)
        d = plan.damping
        of_args, of_y = vjp(tree.scale(1 - d, gz))
        gy, gz = tree.add(gy, of_y), tree.scale(d, gz)
        image, vjp = jax.vjp(apply, args, z)
        y = plan.unmix(y, image)
        also, of_z = vjp(tree.scale(1 - d, gy))
        gz, gy = tree.add(gz, of_z), tree.scale(d, gy)
        args_bar = tree.add(args_bar, tree.add(of_args, also))
        return _Back(_Pair(y, z), _Pair(gy, gz), args_bar), None

    def leg(
        length: int, carry: tuple[_Back, _Drift], anchor: _Pair
    ) -> tuple[tuple[_Back, _Drift], None]:
        """From an anchor, or the end, back to the anchor before."""
        now, drift = carry
        now, _ = lax.scan(undo, now, length=length)
        drift = _compared(drift, now.pair, anchor, end, now.g)
        return (now._replace(pair=anchor), drift), None

    with sharding.summed(partial(apply, args), h0):
        zeros = jax.tree.map(jnp.zeros_like, args)
        cotangent = _Pair(tree.scale(0.0, wide), wide)
        size = tree.to_unit(cotangent)[1]
        carry = _Back(end, cotangent, zeros), _Drift(0 * size, 0 * size, size)
        for (length, _), kept in zip(plan.legs()[::-1], anchors[::-1], strict=True):
            carry, _ = lax.scan(partial(leg, length), carry, kept, reverse=True)
        now, drift = carry
        eps = tree.coarsest_eps(end)
        error = jnp.where(jnp.isnan(drift.error), jnp.inf, drift.error)
        bound = Bound(error, jnp.full_like(error, eps**0.5))
        good = bound.error <= bound.accuracy
        h_bar = tree.cast_like(tree.add(*now.g), h0)
        backward = Solution(
            (now.args_bar, h_bar),
            jnp.int32(plan.num_steps),
            jnp.int32(2 * plan.num_steps),
            drift.largest,
            jnp.where(good, jnp.int32(Status.CONVERGED), jnp.int32(Status.ROUNDING)),
            good,
        )
        said = heard(backward, plan.on_failure, "backward", owner="reversible")
        report = None
        if probe is not None:
            found = _judged(plan, merge(args, rest), tree.cast_like(end.z, h0))
            # There is no adjoint to go on from.
            backward = backward._replace(value=tree.scale(0.0, g))
            report = reported(found, backward, g, bound, probe)
    args_bar, h_bar = said.value
    return args_bar, None, h_bar, report


_last.defvjp(_last_fwd, _last_bwd)


def _start(h0: PyTree) -> _Pair:
    """Both states at h0, in float32 at least."""
    wide = sharding.vary_like(jax.tree.map(tree.widen, h0), h0)
    return _Pair(wide, wide)


def _apply(plan: _Plan, args: PyTree, h0: PyTree, h: PyTree) -> PyTree:
    """F(h), for a state that may be wider than h0."""
    return jax.tree.map(tree.widen, plan.step(args, tree.cast_like(h, h0)))


def _run(plan: _Plan, args: PyTree, h0: PyTree, pair: _Pair, length: int) -> _Pair:
    """``length`` steps of the pair."""
    apply: Callable = channels_last(partial(_apply, plan, args, h0), pair.z)

    def body(pair: _Pair, _: None) -> tuple[_Pair, None]:
        y = plan.mix(pair.y, apply(pair.z))
        return _Pair(y, plan.mix(pair.z, apply(y))), None

    return lax.scan(body, pair, length=length)[0]


def _compared(
    before: _Drift, found: _Pair, anchor: _Pair, end: _Pair, g: _Pair
) -> _Drift:
    """With the pair recomputed at an anchor, and the cotangent that arrives there.

    Both errors and cotangents change about geometrically between two anchors, so that
    their product is largest at one of the ends.
    """
    change, size = Look.at(found, anchor).change, Look.at(anchor, end).size
    size = jnp.where(size == 0, jnp.max(size), size)  # a leaf that is zero at both
    drift = jnp.max(ratio(change, size))
    cotangent = tree.to_unit(g)[1]
    largest = jnp.maximum(before.cotangent, cotangent)
    error = 4 * drift * ratio(cotangent, largest)  # f may bend
    return _Drift(
        jnp.maximum(before.largest, drift), jnp.maximum(before.error, error), largest
    )
