"""Which of the four regimes a recurrence is in, and which gradient suits it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rbpjax._core import tree
from rbpjax._core.keys import check_key
from rbpjax._core.step import as_state, check_like, floats
from rbpjax.fixed_point.contract import apply_solver
from rbpjax.fixed_point.forward.iteration import FixedPointIteration
from rbpjax.fixed_point.iterate import ratio
from rbpjax.types import PyTree, Status, StepFn

FEW = 7
"""Units with which a step of RTRL costs no more than ten of f."""


class Method(NamedTuple):
    """A row of the table of methods that ``diagnose_recurrence`` chooses from.

    Attributes:
      name: its public name, with an option where that matters.
      mean: what its gradient is.
      needs: its assumption, in words.
      holds: the assumption, of the numbers that were found.
      memory: the numbers that it stores.
      cost: steps of f that one of its steps costs, about: a product with J is one, one
        with its transpose two.
    """

    name: str
    mean: str
    needs: str
    holds: Callable[[Recurrence], jax.Array]
    memory: Callable[[Recurrence], jax.Array]
    cost: Callable[[Recurrence], jax.Array]


class Recurrence(NamedTuple):
    """What ``diagnose_recurrence`` found; arrays, and a table when printed.

    Arrays with one entry a method are in the order of ``METHODS``.

    Attributes:
      steps: T, the length of the sequence.
      units: n, the numbers in the state.
      parameters: P, the numbers in the parameters.
      constant: whether the inputs are the same at all steps.
      settles: whether the state comes to rest when the last input is held.
      settling_steps: the steps that this took.
      fading: ‖cᵀJ_T ⋯ J_{T-k+1}‖ / ‖c‖ at lags k = 1 to T, the root mean square over
        random cotangents c at the end; ``[T]``.
      horizon: the first lag from which on it is below ``tol``; infinite if it is not
        below it at the first step of the sequence.
      least_gain: the least ‖Jv‖ / ‖v‖ of random v, over all steps.
      largest_gain: the largest one.
      elementwise: whether no unit sees another one's state.
      holds: whether each method's assumption holds.
      memory: the numbers that each method stores.
      cost: the steps of f that a step of each method costs.
      recommended: of the methods without noise whose assumption holds, the first of
        those with the least memory; for an exact gradient it may be twice as much as
        for a truncated one.
    """

    steps: jax.Array
    units: jax.Array
    parameters: jax.Array
    constant: jax.Array
    settles: jax.Array
    settling_steps: jax.Array
    fading: jax.Array
    horizon: jax.Array
    least_gain: jax.Array
    largest_gain: jax.Array
    elementwise: jax.Array
    holds: jax.Array
    memory: jax.Array
    cost: jax.Array
    recommended: jax.Array

    def __repr__(self) -> str:
        """A table; the plain tuple while it is being traced, or of a batch."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in self) or self.steps.ndim:
            return f"Recurrence{tuple.__repr__(self)}"
        return _table(self)

    __str__ = __repr__


PRESERVED = 1e-3
"""How far from 1 the gains of a norm-preserving step may be."""


def _preserves(d: Recurrence) -> jax.Array:
    return (d.least_gain > 1 - PRESERVED) & (d.largest_gain < 1 + PRESERVED)


def _always(d: Recurrence) -> jax.Array:
    return jnp.ones_like(d.settles)


def _number(value: float) -> Callable[[Recurrence], jax.Array]:
    return lambda d: jnp.full_like(d.units, value)


# Where memories are equal the first one is recommended. A new method is one row.
METHODS: tuple[Method, ...] = (
    Method(
        "rbp_solve",
        "exact",
        "constant inputs, and it settles",
        lambda d: d.constant & d.settles,
        lambda d: 8 * d.units,
        _number(3),
    ),
    Method(
        "unitary.recomputed_scan",
        "exact",
        "norm-preserving, with a known inverse",
        _preserves,
        lambda d: 8 * d.units,
        _number(4),
    ),
    Method(
        "online.diagonal_rtrl",
        "exact",
        "element-wise recurrence",
        lambda d: d.elementwise,
        lambda d: d.units + d.parameters,
        _number(4),
    ),
    Method(
        "online.bptt(truncation=…)",
        "truncated",
        "gradients fade within half of the sequence",
        lambda d: d.horizon <= d.steps / 2,
        lambda d: d.units * jnp.minimum(d.horizon, d.steps),
        _number(3),
    ),
    Method(
        "online.rtrl",
        "exact",
        "few units",
        lambda d: d.units <= FEW,
        lambda d: d.units * d.parameters,
        lambda d: 3 + d.units,
    ),
    Method(
        "online.bptt",
        "exact",
        "memory for the sequence",
        _always,
        lambda d: d.units * d.steps,
        _number(3),
    ),
    Method(
        "online.uoro",
        "unbiased, noisy",
        "many short updates, or no end",
        _always,
        lambda d: d.units + d.parameters,
        _number(6),
    ),
    Method(
        "perturb.NodePerturbation",
        "unbiased, noisy",
        "no backward pass at all",
        _always,
        lambda d: 2 * d.units,
        _number(2),
    ),
)


def diagnose_recurrence(
    key: jax.Array,
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h0: PyTree,
    *,
    tol: float = 0.01,
    probes: int = 4,
) -> Recurrence:
    """Says which regime a recurrence is in, and which gradient suits it.

    Runs f over a sequence and measures what the four regimes ask for: whether the
    state settles when its input is held, how fast cotangents fade on the way back,
    whether steps preserve norms, and whether units see each other. Prints as a table of
    the methods: which of them apply, what their gradients are, what they store and what
    a step costs.

    An estimate from random directions along one trajectory, not a proof: ``settles`` is
    of the last input, ``elementwise`` and the gains are of the states that were met.
    Training moves all of them: diagnose again. What needs more than f tells is in the
    table in words: that the inverse of a step is known, that updates may be noisy.

    Cost: 2 · probes + 1 products with J and ``probes`` with its transpose a step, and
    up to 1,000 steps with the last input. Memory: the trajectory, T states. AD modes:
    none is of use. Wrap it in ``jax.jit`` to call it often.

    Args:
      key: PRNG key of the directions.
      f: step function ``f(params, x, h) -> h``.
      params: its parameters.
      inputs: leaves ``[T, …]``, one x a step.
      h0: the first state; all leaves floating-point.
      tol: what a cotangent has to fade to for the rest to be left out, in (0, 1).
      probes: number of random directions a step, at least 1.

    Returns:
      A ``Recurrence``.

    Raises:
      ValueError: if ``inputs`` has no time axis, an option is out of its range, f
        changes the state, or ``key`` is no PRNG key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.diagnostics import diagnose_recurrence
      >>> f = lambda w, x, h: jnp.tanh(w @ h + x)
      >>> w = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
      >>> xs, h0 = jax.random.normal(jax.random.key(1), (50, 2)), jnp.zeros(2)
      >>> found = diagnose_recurrence(jax.random.key(0), f, w, xs, h0)
      >>> bool(found.settles), bool(found.constant), bool(found.elementwise)
      (True, False, False)
      >>> bool(found.horizon < 10)  # gradients fade: truncate BPTT there
      True

    References:
      Products of Jacobians: Pascanu, Mikolov and Bengio,
      https://arxiv.org/abs/1211.5063, section 2.1. The table is ours.
    """
    check_key(key)
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 < tol < 1:
        raise ValueError(f"`tol` must be a Python number in (0, 1); got {tol!r}.")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(
            f"`probes` must be a Python int of at least 1; got {probes!r}."
        )
    inputs, h0 = jax.tree.map(jnp.asarray, inputs), as_state(h0)
    shapes = [x.shape for x in jax.tree.leaves(inputs)]
    if len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] in ((), (0,)):
        raise ValueError(
            "`inputs` must be a sequence: leaves with one leading time axis, of at "
            f"least one step; got shapes {shapes}. For a map without a sequence there "
            "is `diagnose`."
        )
    made = jax.eval_shape(f, params, jax.tree.map(lambda x: x[0], inputs), h0)
    check_like(made, h0, "`f`'s output", "`h0`", "A step must return h alone.")
    # One program: called eagerly, each loop would be compiled on its own.
    return jax.jit(partial(_measure, f, tol, probes))(key, params, inputs, h0)


def _measure(
    f: StepFn,
    tol: float,
    probes: int,
    key: jax.Array,
    params: PyTree,
    inputs: PyTree,
    h0: PyTree,
) -> Recurrence:
    """The numbers, and the table of methods from them."""
    steps = len(jax.tree.leaves(inputs)[0])
    keys = jax.random.split(key, steps + 1)
    last = jax.tree.map(lambda x: x[-1], inputs)

    def forward(h: PyTree, now: tuple) -> tuple:
        x, key = now
        image, jvp = jax.linearize(partial(f, params, x), h)
        return image, (h, *_gains(jvp, key, h, probes))

    h, (states, gains, seen) = lax.scan(forward, h0, (inputs, keys[1:]))
    rest = apply_solver(FixedPointIteration(), partial(f, params, last), h)
    fading = _fading(f, params, inputs, states, _draws(keys[0], h, probes))
    # The last lag that is not below; one more than that is the first of the rest.
    above = jnp.where(fading < tol, 0, jnp.arange(1, steps + 1))  # of NaN, too
    horizon = (jnp.max(above) + 1).astype(fading.dtype)
    settled = (rest.status == Status.CONVERGED) | (rest.status == Status.ROUNDING)
    same = [jnp.all(x == x[:1]) for x in jax.tree.leaves(inputs)]
    size = lambda t: float(sum(u.size for u in jax.tree.leaves(floats(t))))
    number = lambda v: jnp.asarray(v, gains.dtype)
    found = Recurrence(
        steps=number(steps),
        units=number(size(h0)),
        parameters=number(size(params)),
        constant=jnp.all(jnp.stack(same)),
        settles=settled,
        settling_steps=rest.num_steps,
        fading=fading,
        horizon=jnp.where(horizon > steps, jnp.inf, horizon),
        least_gain=jnp.min(gains),
        largest_gain=jnp.max(gains),
        elementwise=jnp.max(seen) <= tree.coarsest_eps(h0) ** 0.5,
        holds=settled,
        memory=gains,
        cost=gains,
        recommended=rest.num_steps,
    )
    column = lambda of: jnp.stack([of(method)(found) for method in METHODS])
    found = found._replace(
        holds=column(lambda m: m.holds),
        memory=column(lambda m: m.memory),
        cost=column(lambda m: m.cost),
    )
    quiet = jnp.array(["noisy" not in method.mean for method in METHODS])
    usable = found.holds & quiet
    exact = jnp.array([method.mean == "exact" for method in METHODS])
    memory = jnp.where(exact, found.memory, 2 * found.memory)
    memory = jnp.where(usable, memory, jnp.inf)
    return found._replace(recommended=jnp.argmin(memory).astype(jnp.int32))


def _draws(key: jax.Array, like: PyTree, probes: int) -> PyTree:
    """Random directions of norm one, stacked."""
    draw = lambda key: tree.random_unit(key, like)
    return jax.vmap(draw)(jax.random.split(key, probes))


def _gains(
    jvp: Callable[[PyTree], PyTree], key: jax.Array, h: PyTree, probes: int
) -> tuple[jax.Array, jax.Array]:
    """‖Jv‖ of random unit v, and how much units see of each other.

    Of a J that couples no units J(m ∘ v) = m ∘ Jv for any numbers m, one a unit. Leaves
    of equal shape are taken for parts of the same units.
    """
    vs = _draws(key, h, probes)
    images = jax.vmap(jvp)(vs)
    mask = {
        u.shape: jax.random.uniform(jax.random.fold_in(key, i), u.shape, jnp.float32)
        for i, u in enumerate(jax.tree.leaves(h))
    }
    masked = lambda t: jax.tree.map(lambda u: mask[u.shape].astype(u.dtype) * u, t)
    off = jax.vmap(lambda v, w: tree.norm(tree.sub(jvp(masked(v)), masked(w))))
    norms = jax.vmap(tree.norm)(images)
    return norms, ratio(jnp.max(off(vs, images)), jnp.max(norms))


def _fading(
    f: StepFn, params: PyTree, inputs: PyTree, states: PyTree, cotangents: PyTree
) -> jax.Array:
    """The root mean square norm of cotangents of the last state, at lags 1 to T."""

    def back(now: tuple, past: tuple) -> tuple:
        directions, logs = now
        x, h = past
        _, vjp = jax.vjp(partial(f, params, x), h)
        images = jax.vmap(lambda c: vjp(c)[0])(directions)
        # Kept at norm one, so that neither vanishing nor exploding leaves the range.
        directions, norms = jax.vmap(tree.to_unit)(images)
        logs = logs + jnp.log(norms.astype(logs.dtype))
        return (directions, logs), logs

    probes = len(jax.tree.leaves(cotangents)[0])
    start = cotangents, jnp.zeros(probes, tree.real_dtype(cotangents))
    _, logs = lax.scan(back, start, (inputs, states), reverse=True)
    return jnp.exp(jax.nn.logsumexp(2 * logs[::-1], axis=1) / 2) / probes**0.5


def _table(d: Recurrence) -> str:
    """The diagnosis in words and numbers."""
    d = jax.tree.map(np.asarray, d)
    show = lambda x: f"{float(x):.3g}"
    yes = lambda condition: "yes" if condition else "no"
    fades = f"to {show(d.fading[-1])} over all {show(d.steps)} steps"
    head = [
        ("settles at a constant input", yes(d.settles)),
        ("inputs are constant", yes(d.constant)),
        ("a cotangent fades", fades),
        ("  and may be cut off after", f"{show(d.horizon)} steps"),
        ("‖Jv‖ / ‖v‖", f"{show(d.least_gain)} … {show(d.largest_gain)}"),
        ("element-wise", yes(d.elementwise)),
        ("units, parameters", f"{show(d.units)}, {show(d.parameters)}"),
    ]
    rows = [("method", "gradient", "numbers stored", "cost", "needs")]
    for i, method in enumerate(METHODS):
        needs = f"{method.needs}: {'yes' if d.holds[i] else 'NO'}"
        rows.append(
            (method.name, method.mean, show(d.memory[i]), show(d.cost[i]), needs)
        )
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    body = [
        "".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines = [f"{name:<30}{value}" for name, value in head]
    last = f"recommended: {METHODS[int(d.recommended)].name}"
    return "\n".join(["Recurrence", *lines, "", *body, "", last])
