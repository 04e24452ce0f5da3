"""The contract: what an estimator is, and what it carries.

Legend: J = ∂f/∂h and F = ∂f/∂θ at the present step, δ = ∂loss/∂h at the new state,
G = ∂h/∂θ the influence, which obeys the affine recursion

    G ← J G + F.

Each estimator carries G, an unbiased estimate of it, or a truncation of it, and turns
it into the gradient of the present loss,

    ∂loss/∂θ (direct) + δ F + δ J G.

The second term, δ F, is exact in every estimator here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rbpjax._core.keys import check_key
from rbpjax._core.sharding import coupling, vary_like
from rbpjax._core.step import as_state, check_like, floats, merge
from rbpjax.types import PyTree, StepFn

LossFn = Callable[[PyTree, PyTree, PyTree], jax.Array]
"""``loss(params, h, y) -> scalar``, at the state *after* the step."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Axes:
    """What the leading axes of an influence are, outermost first; static.

    Attributes:
      names: ``"copies"`` (of ``combine.average``, which share their state) and
        ``"sequences"`` (of ``combine.per_sequence``, each with a state of its own).

    Example:
      >>> from rbpjax.online.estimator import Axes
      >>> Axes(("copies", "sequences")).names
      ('copies', 'sequences')
    """

    names: tuple[str, ...] = ()


class Carry(NamedTuple):
    """What an estimator carries from step to step: data of constant size.

    It is a pytree, and can be carried by ``lax.scan``, stored, or reset (see
    ``combine.reset``).

    Attributes:
      h: the state; same pytree as ``h0``.
      influence: the estimate of G = ∂h/∂θ in the form of the estimator; ``()`` for
        ``bptt``.
      metric: running statistics that are no influence; ``()`` except for
        ``kalman_nobacktrack``.
      axes: what the leading axes of influence and metric are, for ``combine.reset``
        and ``combine.renormalize``; static.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> est = online.rtrl(lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h))
      >>> carry = est.init(jnp.array(0.5), jnp.zeros(3))
      >>> carry.h.shape, carry.influence.shape, carry.metric
      ((3,), (3,), ())
    """

    h: PyTree
    influence: PyTree
    metric: PyTree = ()
    axes: Axes = Axes()


class OnlineOutput(NamedTuple):
    """What a step returns beside its carry.

    Attributes:
      loss: the loss after the step, a scalar.
      grads: the gradient of ``loss`` in ``params``; same pytree as ``params``, with
        None in place of the leaves that are not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> est = online.rtrl(lambda a, x, h: a * h + x, lambda a, h, y: (h - y) ** 2)
      >>> carry = est.init(jnp.array(0.5), jnp.array(1.0))
      >>> _, out = est.step(jnp.array(0.5), carry, 1.0, 0.0, ())
      >>> float(out.loss), float(out.grads)  # (a + 1)² and 2 (a + 1)
      (2.25, 3.0)
    """

    loss: jax.Array
    grads: PyTree


class InitFn(Protocol):
    """``init(params, h0) -> Carry``, with zero influence."""

    def __call__(self, params: PyTree, h0: PyTree) -> Carry:
        """Returns the carry before the first step."""
        ...


class NoiseFn(Protocol):
    """``noise(key, carry)``: the random signs of one step, as data."""

    def __call__(self, key: jax.Array, carry: Carry) -> PyTree:
        """Returns the noise; its shapes are those of every later step too."""
        ...


class OnlineStepFn(Protocol):
    """``step(params, carry, x, y, noise) -> (Carry, OnlineOutput)``."""

    def __call__(
        self, params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        """Takes one step on the input ``x``, with the target ``y`` after it."""
        ...


class Estimator(NamedTuple):
    """A gradient estimator: three pure functions, as in optax.

    All of them run under ``jit``, ``vmap`` and ``lax.scan``. Noise is data, so that a
    run can be repeated, and all sign patterns be enumerated with ``vmap``. Memory and
    cost are those of the method that made it.

    Attributes:
      init: ``init(params, h0) -> Carry``, with zero influence.
      noise: ``noise(key, carry)``: the random signs of one step; ``()`` for a
        deterministic estimator.
      step: ``step(params, carry, x, y, noise) -> (Carry, OnlineOutput)``; x and y are
        those of one step, for ``bptt`` those of a sequence.

    States and parameters may have different dtypes, such as bfloat16 states with
    float32 parameters: every part of the carry keeps the dtype that ``init`` gave it,
    and norms are taken in float32 at least.

    Raises:
      ValueError: from ``init``, if ``params`` or ``h0`` is complex or not made of
        arrays; from ``noise``, if ``key`` is no PRNG key; from ``step``, if ``carry``
        or ``noise`` is that of another estimator, other parameters or another state,
        if ``f`` does not return its state's structure, shapes and dtypes, or ``loss``
        no floating-point scalar.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f = lambda W, x, h: jnp.tanh(W @ h + x)
      >>> est = online.uoro(f, lambda W, h, y: jnp.sum((h - y) ** 2))
      >>> def train_step(state, xy):
      ...     W, carry, key = state
      ...     key, signs = jax.random.split(key)
      ...     noise = est.noise(signs, carry)
      ...     carry, out = est.step(W, carry, *xy, noise)
      ...     return (W - 0.1 * out.grads, carry, key), out.loss
      >>> W, xys = 0.5 * jnp.eye(2), (jnp.ones((9, 2)), jnp.zeros((9, 2)))
      >>> state = W, est.init(W, jnp.zeros(2)), jax.random.key(0)
      >>> state, losses = jax.lax.scan(train_step, state, xys)
      >>> losses.shape
      (9,)

    References:
      The recursion G ← J G + F: Williams, Zipser, "A Learning Algorithm for
      Continually Running Fully Recurrent Neural Networks", Neural Computation 1, 1989.
      The form: ``optax.GradientTransformation``.
    """

    init: InitFn
    noise: NoiseFn
    step: OnlineStepFn


def no_noise(key: jax.Array, carry: Carry) -> tuple[()]:
    """The noise of a deterministic estimator: none."""
    del key, carry
    return ()


def checked(
    init: InitFn, noise: NoiseFn, step: OnlineStepFn, blank: InitFn | None = None
) -> Estimator:
    """An estimator that refuses the carries, the noise and the keys of others.

    Shapes alone are compared, while tracing. ``blank`` is ``init`` without its checks.
    """

    def checked_init(params: PyTree, h0: PyTree) -> Carry:
        carry = init(params, h0)
        lead = vary_like((carry.influence, carry.metric), (params, carry.h))
        return carry._replace(influence=lead[0], metric=lead[1])

    def draw(key: jax.Array, carry: Carry) -> PyTree:
        check_key(key)
        return noise(key, carry)

    def checked_step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        check_real(params, "params")
        if not isinstance(carry, Carry):
            raise ValueError(
                "`carry` must be the Carry that `init(params, h0)` or the last step "
                f"returned; got {type(carry).__name__}."
            )
        like = jax.eval_shape(blank or init, params, carry.h)
        check_like(carry, like, "`carry`", "what `init(params, h)` returns", _CARRY)
        noise = vary_like(_as_noise(noise, draw, like), carry.h)
        return step(params, carry, x, y, noise)

    return Estimator(checked_init, draw, checked_step)


_CARRY = (
    "A carry belongs to the estimator, the parameters and the state that it was made "
    "for: make one with this estimator's `init`."
)


def _as_noise(noise: PyTree, draw: NoiseFn, carry: Carry) -> PyTree:
    """``noise`` in the dtypes of what ``draw`` makes; ValueError for other shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    like = jax.eval_shape(draw, key, carry)
    if not jax.tree.leaves(like):
        return noise  # of an estimator that draws none, and looks at none
    maker, remedy = "what `noise(key, carry)` returns", "Draw it with this `noise`."
    check_shapes(noise, like, "`noise`", maker, remedy)
    return jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), noise, like)


def check_shapes(
    tree: PyTree, like: PyTree, name: str, like_name: str, remedy: str
) -> None:
    """Raises ValueError unless both have the same structure and shapes."""
    got, want = (jax.tree.map(jnp.shape, t) for t in (tree, like))
    if got != want:
        raise ValueError(
            f"{name} must have the structure and shapes of {like_name}, {want}; got "
            f"{got}. {remedy}"
        )


class Parts(NamedTuple):
    """A complex leaf as two real ones.

    Attributes:
      re: its real part.
      im: its imaginary part.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.online.estimator import Parts, parts
      >>> parts({"h": jnp.array([1 + 2j])})["h"].im.tolist()
      [2.0]
    """

    re: jax.Array
    im: jax.Array


def parts(tree: PyTree) -> PyTree:
    """The floating-point leaves of ``tree`` as real arrays, ``Parts`` of complex ones.

    A step need not be holomorphic, so that its derivatives are those of these.
    """
    split = lambda x: Parts(x.real, x.imag) if jnp.iscomplexobj(x) else x
    return jax.tree.map(split, floats(tree))


def whole(tree: PyTree) -> PyTree:
    """The leaves of which ``parts`` made ``tree``."""
    is_pair = lambda x: isinstance(x, Parts)
    join = lambda x: jax.lax.complex(*x) if is_pair(x) else x
    return jax.tree.map(join, tree, is_leaf=is_pair)


class Observed(NamedTuple):
    """One step and its loss as functions of the floating-point leaves alone.

    States are in ``parts``: all arrays here but ``h_next`` are real.

    Attributes:
      h_next: the new state, all its leaves, as ``f`` returned it.
      f: ``f(params, h) -> h``.
      params: the floating-point leaves of the parameters.
      h: the floating-point leaves of the old state.
      loss: the value of the loss at ``h_next``.
      direct: ∂loss/∂θ at fixed state.
      delta: δ = ∂loss/∂h at ``h_next``.
    """

    h_next: PyTree
    f: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    h: PyTree
    loss: jax.Array
    direct: PyTree
    delta: PyTree


def observe(
    f: StepFn, loss: LossFn, params: PyTree, h: PyTree, x: PyTree, y: PyTree
) -> Observed:
    """Takes one step of ``f`` and differentiates the loss at its result.

    The state is advanced outside of any transformation, so that it stays unbatched
    when many estimates run beside one state (see ``combine.average``).
    """
    check_functions(f, loss, params, x, h, y)
    axes = coupling(f, params, x, h)
    if axes:
        raise ValueError(
            f"f has collectives over the axes {sorted(axes, key=str)}, and the "
            "estimator of each device carries the influence on its own part of the "
            "state alone. Leave out `shard_map` or the axis name: write f for the "
            "whole state, and put arrays that are sharded into `jax.jit`."
        )
    h_next = f(params, x, h)

    def float_f(p: PyTree, s: PyTree) -> PyTree:
        return parts(f(merge(p, params), x, merge(whole(s), h)))

    def float_loss(p: PyTree, s: PyTree) -> jax.Array:
        return loss(merge(p, params), merge(whole(s), h_next), y)

    # Inside shard_map each device has its own estimate, also of parameters they share.
    p, s = vary_like((floats(params), parts(h)), h_next)
    gradient = jax.value_and_grad(float_loss, argnums=(0, 1))
    value, (direct, delta) = gradient(p, parts(h_next))
    return Observed(h_next, float_f, p, s, value, direct, delta)


def start(params: PyTree, h0: PyTree) -> PyTree:
    """``h0`` with arrays for leaves; ValueError where ``params`` is complex."""
    check_real(params, "params")
    return as_state(h0, mixed=True)


def check_functions(
    f: StepFn, loss: LossFn, params: PyTree, x: PyTree, h: PyTree, y: PyTree
) -> None:
    """Raises ValueError unless f maps states to states, and the loss to scalars."""
    check_real(params, "params")
    remedy = "A step that returns (h, output) must select h."
    out = jax.eval_shape(f, params, x, h)
    check_like(out, h, "`f`'s output", "its state `h`", remedy)
    value = jax.eval_shape(loss, params, h, y)
    scalar = getattr(value, "shape", None) == ()
    if not scalar or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"`loss(params, h, y)` must return a floating-point scalar; got {value}. "
            "Take the mean, or select the loss if it returns (loss, auxiliary)."
        )


def check_real(tree: PyTree, name: str) -> None:
    """Raises ValueError where a leaf is complex."""
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"`{name}` holds a complex leaf of shape {jnp.shape(leaf)}, and must "
                "be real here. Hold its real and imaginary part instead."
            )


def check_count(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a Python int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"`{name}` must be a Python int of at least 1; got {value!r}. Arrays and "
            "tracers cannot be options."
        )


def check_positive(name: str, value: object, most: float = float("inf")) -> None:
    """Raises ValueError unless ``value`` is a Python number in (0, most]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= most:
        raise ValueError(
            f"`{name}` must be a Python number in (0, {most}]; got {value!r}. Arrays "
            "and tracers cannot be options."
        )
