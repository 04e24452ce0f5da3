"""Evolution strategies in windows: the contract, and what its estimators share.

A long unroll is cut into windows, with an update of the parameters after each. Of
every perturbation there are two runs, at θ + σ v and θ - σ v. They go on from their own
states in the next window, so that what earlier perturbations did shows in later losses.
An estimator says which v a window has, and which the difference of its losses is
credited to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rbpjax._core.keys import check_key
from rbpjax._core.sharding import vary_like
from rbpjax._core.step import as_state, check_like
from rbpjax._core.strategy import count, function, real, strategy
from rbpjax._core.tree import real_dtype
from rbpjax.perturb.difference import Central, quotient
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.perturb.samples import (
    axis,
    draw,
    numbers,
    over_samples,
    scaled,
    size_of,
    spread,
    summed,
    unflatten,
    weighted_sum,
    widest,
)
from rbpjax.perturb.unroll import check_length
from rbpjax.perturb.weight import check_params
from rbpjax.types import PyTree, StepFn

LossFn = Callable[[PyTree, PyTree, PyTree], jax.Array]
"""``loss(params, h, target) -> scalar``, at the state *after* the step."""


class EvolutionCarry(NamedTuple):
    """What an evolution strategy carries from window to window: of constant size.

    It is a pytree, and can be carried by ``lax.scan``, or stored. Where a sequence has
    ended, take a new one from ``init``: ``online.combine.reset(carry, fresh, ended)``
    selects.

    Attributes:
      ahead: the states of the runs at θ + σ v; leaves ``[num_samples, …]``. Of
        ``truncated_es``, whose runs start from one state, that state.
      behind: the same at θ - σ v; ``()`` for ``truncated_es``.
      credit: what the next difference of losses is credited to, but for the next noise;
        like ``params``, leaves ``[num_samples, …]``, in float32 at least.
      sigma: the size σ of the perturbations, for the whole sequence.
      started: whether a window has been run; a bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h)
      >>> est = perturb.pes(f, loss, num_samples=4)
      >>> carry = est.init(jnp.array(0.5), jnp.zeros(3))
      >>> carry.ahead.shape, carry.credit.shape, bool(carry.started)
      ((4, 3), (4,), False)
    """

    ahead: PyTree
    behind: PyTree
    credit: PyTree
    sigma: jax.Array
    started: jax.Array


class EvolutionOutput(NamedTuple):
    """What a window returns beside its carry.

    Attributes:
      loss: the sum of the losses of the window, averaged over all perturbed runs.
      grads: the estimate of its gradient; same pytree as ``params``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> est = perturb.pes(lambda a, x, h: h + a * x, lambda a, h, y: h)
      >>> a, x = jnp.array(0.5), jnp.ones(2)
      >>> carry = est.init(a, jnp.array(0.0))
      >>> noise = est.noise(jax.random.key(0), carry)
      >>> _, out = est.step(a, carry, x, None, noise)
      >>> round(float(out.loss), 3), round(float(out.grads), 3)  # a + 2 a, and 3
      (1.5, 3.0)
    """

    loss: jax.Array
    grads: PyTree


class EvolutionInit(Protocol):
    """``init(params, h0) -> EvolutionCarry``: all runs at ``h0``."""

    def __call__(self, params: PyTree, h0: PyTree) -> EvolutionCarry:
        """Returns the carry before the first window."""
        ...


class EvolutionNoise(Protocol):
    """``noise(key, carry)``: the directions of one window, as data."""

    def __call__(self, key: jax.Array, carry: EvolutionCarry) -> jax.Array:
        """Returns the directions, ``[num_samples, parameters]``."""
        ...


class EvolutionStep(Protocol):
    """``step(params, carry, inputs, targets, noise) -> (carry, output)``."""

    def __call__(
        self,
        params: PyTree,
        carry: EvolutionCarry,
        inputs: PyTree,
        targets: PyTree,
        noise: jax.Array,
    ) -> tuple[EvolutionCarry, EvolutionOutput]:
        """Runs one window; ``inputs`` and ``targets`` have a leading time axis."""
        ...


class Evolution(NamedTuple):
    """A gradient estimator for windows: three pure functions, as in ``online``.

    All of them run under ``jit``, ``vmap`` and ``lax.scan``. Noise is data, so that a
    run can be repeated, and all sign patterns be enumerated with ``vmap``. Sequences
    that stand at different places are a ``vmap`` over carries, inputs and noise. Memory
    and cost are those of the method that made it. As many samples run at once as
    ``WeightPerturbation`` runs by default: no more perturbed parameters are held.

    With ``axis_name`` all three functions are called inside the ``shard_map``, where
    each device draws, runs and carries its share of the samples. Gradients and losses
    come out the same on all devices. A carry that goes through the ``shard_map`` has
    the specification ``P(axis_name)`` for ``ahead``, ``behind`` and ``credit`` and
    ``P()`` for the rest; of ``truncated_es``, ``P()`` for ``ahead`` too.

    Attributes:
      init: ``init(params, h0) -> EvolutionCarry``, all runs at ``h0``.
      noise: ``noise(key, carry)``: the directions of one window.
      step: ``step(params, carry, inputs, targets, noise) -> (EvolutionCarry,
        EvolutionOutput)``; ``inputs`` and ``targets`` are those of one window, with a
        leading time axis, which says how long it is.

    Raises:
      ValueError: from ``init``, if ``params`` is not floating-point or ``h0`` has no
        arrays; from ``noise``, if ``key`` is no PRNG key; from ``step``, if ``carry``
        or ``noise`` is that of another estimator, other parameters or another state,
        the window has no step, ``f`` does not return its state's structure, shapes and
        dtypes, or ``loss`` no floating-point scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> f = lambda W, x, h: jnp.tanh(W @ h + x)
      >>> loss = lambda W, h, y: jnp.sum((h - y) ** 2)
      >>> est = perturb.nres(f, loss, num_samples=8)
      >>> def train_step(state, window):
      ...     W, carry, key = state
      ...     key, now = jax.random.split(key)
      ...     carry, out = est.step(W, carry, *window, est.noise(now, carry))
      ...     return (W - 0.01 * out.grads, carry, key), out.loss
      >>> W = 0.5 * jnp.eye(2)
      >>> windows = jnp.ones((9, 5, 2)), jnp.zeros((9, 5, 2))  # 9 windows of 5 steps
      >>> state = W, est.init(W, jnp.zeros(2)), jax.random.key(0)
      >>> state, losses = jax.lax.scan(train_step, state, windows)
      >>> losses.shape
      (9,)

    References:
      Vicol, Metz, Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation
      Graphs with Persistent Evolution Strategies", ICML 2021.
    """

    init: EvolutionInit
    noise: EvolutionNoise
    step: EvolutionStep


Choice = Callable[[PyTree, jax.Array, PyTree], tuple[PyTree, PyTree]]
"""``(credit, started, noise) -> (direction, credit)`` of one window."""


@strategy
class Pairs:
    """The options of all evolution strategies: antithetic pairs of perturbed runs."""

    num_samples: int = count(default=1)
    axis_name: str | None = axis()
    sigma: float | None = real(default=None, above=0.0)
    noise: Noise = function(
        default=rademacher, meaning="a callable such as perturb.noise.rademacher"
    )


def persistent(f: StepFn, loss: LossFn, pairs: Pairs, choose: Choice) -> Evolution:
    """An estimator whose runs go on from their own states."""

    def init(params: PyTree, h0: PyTree) -> EvolutionCarry:
        params, h0 = check_params(params), as_state(h0, mixed=True)
        carry = _start(pairs, params, h0)
        states = _copies(pairs, carry.ahead)
        return carry._replace(ahead=states, behind=states)

    def step(
        params: PyTree,
        carry: EvolutionCarry,
        inputs: PyTree,
        targets: PyTree,
        noise: jax.Array,
    ) -> tuple[EvolutionCarry, EvolutionOutput]:
        h = jax.tree.map(lambda a: a[0], getattr(carry, "ahead", ()))
        params, noise = _checked(
            pairs, f, loss, init, params, carry, h, inputs, targets, noise
        )
        direction, credit = choose(carry.credit, carry.started, noise)
        here = spread(pairs, (params, inputs, targets))
        run = lambda sign, states: _runs(
            f, loss, here, sign * carry.sigma, direction, states
        )
        ahead, above = run(1, carry.ahead)
        behind, below = run(-1, carry.behind)
        out = _estimate(pairs, above, below, carry.sigma, credit, params)
        return EvolutionCarry(ahead, behind, credit, carry.sigma, _now(carry)), out

    return Evolution(init, _noise(pairs), step)


def restarted(f: StepFn, loss: LossFn, pairs: Pairs) -> Evolution:
    """An estimator whose runs all start from the unperturbed state of each window."""

    def init(params: PyTree, h0: PyTree) -> EvolutionCarry:
        params, h0 = check_params(params), as_state(h0, mixed=True)
        return _start(pairs, params, h0)

    def step(
        params: PyTree,
        carry: EvolutionCarry,
        inputs: PyTree,
        targets: PyTree,
        noise: jax.Array,
    ) -> tuple[EvolutionCarry, EvolutionOutput]:
        h = getattr(carry, "ahead", ())
        params, noise = _checked(
            pairs, f, loss, init, params, carry, h, inputs, targets, noise
        )
        states, here = _copies(pairs, h), spread(pairs, (params, inputs, targets))
        run = lambda sign: _runs(f, loss, here, sign * carry.sigma, noise, states)[1]
        out = _estimate(pairs, run(1), run(-1), carry.sigma, noise, params)
        h, _ = _window(f, loss, params, h, inputs, targets)
        return EvolutionCarry(h, (), noise, carry.sigma, _now(carry)), out

    return Evolution(init, _noise(pairs), step)


def _noise(pairs: Pairs) -> EvolutionNoise:
    def noise(key: jax.Array, carry: EvolutionCarry) -> jax.Array:
        check_key(key)
        each = numbers(pairs)
        size = size_of(carry.credit) // len(each)
        return draw(pairs.noise, key, each, size, widest(carry.credit))

    return noise


def _start(pairs: Pairs, params: PyTree, h0: PyTree) -> EvolutionCarry:
    wide = jax.tree.map(lambda p: jnp.zeros_like(p, real_dtype(p)), params)
    sigma = Central(sigma=pairs.sigma).width(params)
    carry = EvolutionCarry(h0, (), wide, sigma, jnp.array(False))
    carry = vary_like(carry, (params, h0))
    return carry._replace(credit=_copies(pairs, carry.credit))


def _copies(pairs: Pairs, tree: PyTree) -> PyTree:
    """One for each sample of this device."""
    number = len(numbers(pairs))
    times = lambda a: jnp.broadcast_to(a, (number, *a.shape))
    return spread(pairs, jax.tree.map(times, tree))


def _now(carry: EvolutionCarry) -> jax.Array:
    """True, varying over the same axes."""
    return carry.started | True


def _window(
    f: StepFn, loss: LossFn, params: PyTree, h: PyTree, inputs: PyTree, targets: PyTree
) -> tuple[PyTree, jax.Array]:
    """The state after a window, and the sum of its losses."""

    def body(h: PyTree, data: tuple[PyTree, PyTree]) -> tuple[PyTree, jax.Array]:
        h = f(params, data[0], h)
        return h, loss(params, h, data[1])

    h, losses = jax.lax.scan(body, h, (inputs, targets))
    return h, jnp.sum(losses)


def _runs(
    f: StepFn,
    loss: LossFn,
    here: tuple[PyTree, PyTree, PyTree],
    amount: jax.Array,
    directions: PyTree,
    states: PyTree,
) -> tuple[PyTree, jax.Array]:
    """The windows of all samples, with ``amount`` of their directions."""
    params, inputs, targets = here

    def one(v: PyTree, h: PyTree) -> tuple[PyTree, jax.Array]:
        moved = jax.tree.map(jnp.add, params, scaled(amount, v, params))
        return _window(f, loss, moved, h, inputs, targets)

    return over_samples(one, (directions, states), size_of(params))


def _estimate(
    pairs: Pairs,
    above: jax.Array,
    below: jax.Array,
    sigma: jax.Array,
    credit: PyTree,
    params: PyTree,
) -> EvolutionOutput:
    slopes = quotient(above, below, 2 * sigma) / pairs.num_samples
    grads = summed(pairs, weighted_sum(slopes, credit, params))
    value = jnp.sum(above / 2 + below / 2) / pairs.num_samples
    return EvolutionOutput(summed(pairs, value), grads)


def _checked(
    pairs: Pairs,
    f: StepFn,
    loss: LossFn,
    init: EvolutionInit,
    params: PyTree,
    carry: EvolutionCarry,
    h: PyTree,
    inputs: PyTree,
    targets: PyTree,
    noise: jax.Array,
) -> tuple[PyTree, PyTree]:
    """Parameters, and noise as trees; ValueError for what does not fit together."""
    params = check_params(params)
    if not isinstance(carry, EvolutionCarry):
        raise ValueError(
            "`carry` must be the EvolutionCarry that `init(params, h0)` or the last "
            f"step returned; got {type(carry).__name__}."
        )
    like = jax.eval_shape(init, params, h)
    remedy = (
        "A carry belongs to the estimator, the parameters and the state that it was "
        "made for: make one with this estimator's `init`."
    )
    check_like(carry, like, "`carry`", "what `init(params, h)` returns", remedy)
    check_length(inputs, targets)
    first = jax.tree.map(lambda a: jnp.asarray(a)[0], (inputs, targets))
    here, h, (x, y) = spread(pairs, (params, h, first))
    remedy = "A step that returns (h, output) must select h."
    made = jax.eval_shape(f, here, x, h)
    check_like(made, h, "`f`'s output", "its state `h`", remedy)
    value = jax.eval_shape(loss, here, h, y)
    scalar = getattr(value, "shape", None) == ()
    if not scalar or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            "`loss(params, h, target)` must return a floating-point scalar; got "
            f"{value}. Take the mean, or select the loss if it returns (loss, aux)."
        )
    number = len(jax.tree.leaves(carry.credit)[0])
    want, got = (number, size_of(params)), jnp.shape(noise)
    if got != want:
        raise ValueError(
            f"`noise` must have the shape of what `noise(key, carry)` returns, {want}; "
            f"got {got}. Draw it with this `noise`."
        )
    wide = jax.tree.map(lambda c: c[0], carry.credit)
    one = lambda v: jax.tree.map(
        lambda a, c: a.astype(c.dtype), unflatten(v, wide), wide
    )
    return params, vary_like(jax.vmap(one)(jnp.asarray(noise)), carry.credit)
