"""Cells ready to use: vanilla, leaky, spiking, GRU, LSTM and linear recurrent units.

Each function returns a ``ReadyCell``: the step function, its initial parameters and its
initial state. Estimators that ask for a ``PreactivationCell`` take all but ``lru``,
``diagonal_rtrl`` takes ``lru``, and those for any step function take all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax.online.cell import PreactivationCell
from rbpjax.online.elementwise import ElementwiseCell
from rbpjax.online.estimator import check_count, check_positive
from rbpjax.types import PyTree

__all__ = ["ReadyCell", "gru", "leaky", "lif", "lru", "lstm", "vanilla"]

Select = Callable[[PyTree], PyTree]
"""``select(params)``: the cell's own parameters, of all."""


class ReadyCell(NamedTuple):
    """A cell with its beginnings.

    Attributes:
      cell: the step function, ``cell(params, x, h) -> h``, for any estimator that
        takes its kind.
      init: ``init(key)``: its parameters, a dict of real arrays.
      h0: its state at rest, zeros.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> made = online.cells.gru(units=4, input_size=2)
      >>> params = made.init(jax.random.key(0))
      >>> est = online.snap1(made.cell, lambda params, h, y: jnp.sum((h - y) ** 2))
      >>> carry = est.init(params, made.h0)
      >>> carry, out = est.step(params, carry, jnp.ones(2), jnp.zeros(4), ())
      >>> out.grads["W"].shape
      (3, 4, 4)
    """

    cell: PreactivationCell | ElementwiseCell
    init: Callable[[jax.Array], dict[str, jax.Array]]
    h0: PyTree


def _itself(params: PyTree) -> PyTree:
    return params


def vanilla(units: int, input_size: int, *, select: Select = _itself) -> ReadyCell:
    """Makes the cell h' = tanh(W h + U x + b).

    Exact: its step is that equation. Cost: O(n² + n k) a step for n units and k
    inputs. All AD modes. Parameters: W ``[n, n]``, U ``[n, k]``, b ``[n]``, the first
    two uniform with variance 1 / n and 1 / k, b zero.

    Args:
      units: the number of units.
      input_size: the size of x, a vector.
      select: where in ``params`` the cell's own are, such as ``lambda p: p["cell"]``
        beside a readout; a function of the pytree.

    Returns:
      A ``ReadyCell`` with a ``PreactivationCell``; the state is a vector of units.

    Raises:
      ValueError: ``units`` or ``input_size`` is no positive int.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> made = online.cells.vanilla(units=3, input_size=2, select=lambda p: p["cell"])
      >>> params = {"cell": made.init(jax.random.key(0)), "readout": jnp.ones((1, 3))}
      >>> made.cell(params, jnp.zeros(2), made.h0).tolist()
      [0.0, 0.0, 0.0]

    References:
      Elman, "Finding structure in time", Cognitive Science 14, 1990.
    """
    return _leaky(units, input_size, 1.0, select)


def leaky(
    units: int, input_size: int, *, leak: float = 0.1, select: Select = _itself
) -> ReadyCell:
    """Makes the cell h' = (1 - α) h + α tanh(W h + U x + b), with the leak α.

    Exact: its step is that equation. Cost: O(n² + n k) a step for n units and k
    inputs. All AD modes. Parameters: as those of ``vanilla``; α is fixed.

    Args:
      units: the number of units.
      input_size: the size of x, a vector.
      leak: α, in (0, 1].
      select: where in ``params`` the cell's own are; a function of the pytree.

    Returns:
      A ``ReadyCell`` with a ``PreactivationCell``; the state is a vector of units.

    Raises:
      ValueError: ``units`` or ``input_size`` is no positive int, or ``leak`` not in
        (0, 1].

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> made = online.cells.leaky(units=2, input_size=1, leak=0.25)
      >>> params = made.init(jax.random.key(0))
      >>> rest = {name: 0 * p for name, p in params.items()}
      >>> made.cell(rest, jnp.ones(1), jnp.ones(2)).tolist()
      [0.75, 0.75]

    References:
      Murray, "Local online learning in recurrent networks with random feedback",
      eLife 8, 2019, https://elifesciences.org/articles/43299, equation 1.
    """
    check_positive("leak", leak, 1.0)
    return _leaky(units, input_size, leak, select)


def _leaky(units: int, input_size: int, leak: float, select: Select) -> ReadyCell:
    """Of leaky units; a leak of 1 forgets at once."""
    check_sizes(units, input_size)

    def activate(z: jax.Array, h: jax.Array) -> jax.Array:
        new = jnp.tanh(z[0])
        return new if leak == 1 else (1 - leak) * h + leak * new

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {k: p[0] for k, p in _affine(key, 1, units, input_size).items()}

    def kernel(params: PyTree) -> jax.Array:
        p = select(params)
        return jnp.concatenate([p["W"], p["U"], p["b"][:, None]], 1)[None]

    cell = PreactivationCell(kernel=kernel, features=_features, activate=activate)
    return ReadyCell(cell, init, jnp.zeros(units))


def lif(
    units: int,
    input_size: int,
    *,
    leak: float = 0.1,
    threshold: float = 1.0,
    adaptation: float = 0.0,
    adaptation_leak: float = 0.01,
    trace_leak: float = 0.1,
    dampening: float = 0.3,
    select: Select = _itself,
) -> ReadyCell:
    """Makes leaky integrate-and-fire units, with adaptive thresholds if wanted.

        v' = (1 - α) v + W z + U x + b - θ z,     a' = (1 - ρ) a + z,
        z' = 1 where v' > θ + β a', else 0,       z̄' = (1 - κ) z̄ + z',

    with the leak α of the voltage, the threshold θ, its adaptation β with the leak ρ,
    and spikes z. The trace z̄ is what a leaky readout sees: read from it.

    A spike has no derivative; in its place stands, in all AD modes, the surrogate
    ∂z'/∂(v' - β a') = (γ / θ) max(0, 1 - |v' - θ - β a'| / θ) with the dampening γ.
    The reset -θ z passes no derivative, as in the eligibility vectors of the paper. So
    all gradients, ``rtrl``'s and ``bptt``'s too, are those of the surrogate. Given to
    ``rflo``, it is e-prop.

    Its step is exactly these equations. Cost: O(n² + n k) a step for n units and k
    inputs. Parameters: as those of ``vanilla``; leaks, threshold and adaptation are
    fixed.

    Args:
      units: the number of units.
      input_size: the size of x, a vector.
      leak: α, in (0, 1].
      threshold: θ, positive.
      adaptation: β, at least 0; with 0 there is no leaf for it in the state.
      adaptation_leak: ρ, in (0, 1].
      trace_leak: κ, in (0, 1].
      dampening: γ, positive.
      select: where in ``params`` the cell's own are; a function of the pytree.

    Returns:
      A ``ReadyCell`` with a ``PreactivationCell``; the state is
      ``{"spikes": z, "trace": z̄, "voltage": v}``, with ``"adaptation": a`` if β > 0,
      vectors of units.

    Raises:
      ValueError: ``units`` or ``input_size`` is no positive int, or another option is
        out of its range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> made = online.cells.lif(units=3, input_size=2)
      >>> loss = lambda params, h, y: jnp.sum((h["trace"] - y) ** 2)
      >>> est = online.rflo(made.cell, loss)
      >>> params = made.init(jax.random.key(0)) | {"b": jnp.array([-2.0, 0.0, 2.0])}
      >>> carry = est.init(params, made.h0)
      >>> carry, out = est.step(params, carry, jnp.zeros(2), jnp.zeros(3), ())
      >>> carry.h["spikes"].tolist()
      [0.0, 0.0, 1.0]

    References:
      Bellec et al., "A solution to the learning dilemma for recurrent networks of
      spiking neurons", Nature Communications 11, 2020,
      https://www.nature.com/articles/s41467-020-17236-y, Methods: the network models
      and their pseudo-derivative.
    """
    check_sizes(units, input_size)
    for name, value in (
        ("leak", leak),
        ("adaptation_leak", adaptation_leak),
        ("trace_leak", trace_leak),
    ):
        check_positive(name, value, 1.0)
    check_positive("threshold", threshold)
    check_positive("dampening", dampening)
    if adaptation != 0:
        check_positive("adaptation", adaptation)

    def activate(z: jax.Array, h: PyTree) -> PyTree:
        reset = threshold * jax.lax.stop_gradient(h["spikes"])
        voltage = (1 - leak) * h["voltage"] + z[0] - reset
        new, above = {}, voltage - threshold
        if adaptation:
            new["adaptation"] = (1 - adaptation_leak) * h["adaptation"] + h["spikes"]
            above = above - adaptation * new["adaptation"]
        spikes = _spike(above / threshold, dampening)
        trace = (1 - trace_leak) * h["trace"] + spikes
        return new | {"spikes": spikes, "trace": trace, "voltage": voltage}

    made = _leaky(units, input_size, 1.0, select)  # with the same parameters
    cell = PreactivationCell(
        kernel=made.cell.kernel,
        features=lambda x, h: _features(x, h["spikes"]),
        activate=activate,
    )
    leaves = ["spikes", "trace", "voltage"] + ["adaptation"] * (adaptation > 0)
    return ReadyCell(cell, made.init, {name: jnp.zeros(units) for name in leaves})


@jax.custom_jvp
def _spike(above: jax.Array, dampening: float) -> jax.Array:
    """1 where it is positive, else 0, with a triangle for its derivative."""
    del dampening
    return (above > 0).astype(above.dtype)


@_spike.defjvp
def _spike_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    above, dampening = primals
    slope = dampening * jnp.maximum(1 - jnp.abs(above), 0)
    return _spike(above, dampening), slope.astype(above.dtype) * tangents[0]


def gru(units: int, input_size: int, *, select: Select = _itself) -> ReadyCell:
    """Makes gated recurrent units, with the reset after the product.

        r, u = σ(W₁ h + U₁ x + b₁), σ(W₂ h + U₂ x + b₂),
        h' = u h + (1 - u) tanh(r (W₃ h) + U₃ x + b₃).

    With the reset before the product, as in the paper, one parameter would reach many
    units at once, and the cell would have no pre-activations of its own.

    Exact: its step is that equation. Cost: O(n² + n k) a step for n units and k
    inputs. All AD modes. Parameters: W ``[3, n, n]``, U ``[3, n, k]``, b ``[3, n]``,
    the first two uniform with variance 1 / n and 1 / k, b zero.

    Args:
      units: the number of units.
      input_size: the size of x, a vector.
      select: where in ``params`` the cell's own are; a function of the pytree.

    Returns:
      A ``ReadyCell`` with a ``PreactivationCell`` of four gates; the state is a vector
      of units.

    Raises:
      ValueError: ``units`` or ``input_size`` is no positive int.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> made = online.cells.gru(units=3, input_size=2)
      >>> params = made.init(jax.random.key(0))
      >>> made.cell(params, jnp.ones(2), made.h0).shape
      (3,)

    References:
      Cho et al., "Learning Phrase Representations using RNN Encoder–Decoder for
      Statistical Machine Translation", https://arxiv.org/abs/1406.1078; the reset as
      in cuDNN's GRU.
    """
    check_sizes(units, input_size)

    def activate(z: jax.Array, h: jax.Array) -> jax.Array:
        update = jax.nn.sigmoid(z[1])
        return update * h + (1 - update) * jnp.tanh(jax.nn.sigmoid(z[0]) * z[2] + z[3])

    def kernel(params: PyTree) -> jax.Array:
        p = select(params)
        both = jnp.concatenate([p["W"], p["U"], p["b"][..., None]], 2)
        state = jnp.arange(both.shape[2]) < units  # the features that are h
        inside = jnp.where(state[None], both[2], 0)
        outside = jnp.where(state[None], 0, both[2])
        return jnp.concatenate([both[:2], inside[None], outside[None]])

    cell = PreactivationCell(kernel=kernel, features=_features, activate=activate)
    init = lambda key: _affine(key, 3, units, input_size)
    return ReadyCell(cell, init, jnp.zeros(units))


def lstm(units: int, input_size: int, *, select: Select = _itself) -> ReadyCell:
    """Makes long short-term memory, without peepholes.

        i, f, o = σ(Wⱼ h + Uⱼ x + bⱼ), g = tanh(W₄ h + U₄ x + b₄),
        c' = f c + i g,    h' = o tanh(c').

    Exact: its step is that equation. Cost: O(n² + n k) a step for n units and k
    inputs. All AD modes. Parameters: W ``[4, n, n]``, U ``[4, n, k]``, b ``[4, n]``,
    gates in the order i, f, o, g, the first two uniform with variance 1 / n and 1 / k,
    b zero but for the forget gate's, which is one.

    Args:
      units: the number of units.
      input_size: the size of x, a vector.
      select: where in ``params`` the cell's own are; a function of the pytree.

    Returns:
      A ``ReadyCell`` with a ``PreactivationCell`` of four gates; the state is
      ``{"c": …, "h": …}``, two vectors of units.

    Raises:
      ValueError: ``units`` or ``input_size`` is no positive int.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> made = online.cells.lstm(units=3, input_size=2)
      >>> state = made.cell(made.init(jax.random.key(0)), jnp.ones(2), made.h0)
      >>> state["c"].shape, state["h"].shape
      ((3,), (3,))

    References:
      Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 9, 1997; the
      forget gate: Gers, Schmidhuber, Cummins, "Learning to Forget", Neural Computation
      12, 2000.
    """
    check_sizes(units, input_size)

    def activate(z: jax.Array, h: PyTree) -> PyTree:
        write, keep, show = jax.nn.sigmoid(z[:3])
        c = keep * h["c"] + write * jnp.tanh(z[3])
        return {"c": c, "h": show * jnp.tanh(c)}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = _affine(key, 4, units, input_size)
        return params | {"b": params["b"].at[1].set(1.0)}

    def kernel(params: PyTree) -> jax.Array:
        p = select(params)
        return jnp.concatenate([p["W"], p["U"], p["b"][..., None]], 2)

    cell = PreactivationCell(
        kernel=kernel, features=lambda x, h: _features(x, h["h"]), activate=activate
    )
    h0 = {"c": jnp.zeros(units), "h": jnp.zeros(units)}
    return ReadyCell(cell, init, h0)


def lru(
    units: int,
    input_size: int,
    *,
    r_min: float = 0.0,
    r_max: float = 0.99,
    max_phase: float = 6.283,
    select: Select = _itself,
) -> ReadyCell:
    """Makes linear recurrent units, h' = λ h + γ (B x) with complex diagonal λ.

        λ = exp(-exp(nu) + i exp(phase)),    γ = exp(gamma).

    The modulus stays below one whatever is learnt. At the start λ is uniform in the
    part of the ring between the two moduli with phases up to ``max_phase``, and
    γ = √(1 - |λ|²), with which white inputs make states of the same size at all λ. A
    memory over T steps asks for moduli near 1 - 1 / T.

    Exact: its step is that equation. Cost: O(n k) a step for n units and k inputs. All
    AD modes. Parameters: nu, phase, gamma ``[n]``, and B ``[2, n, k]``, its real and
    imaginary part, normal with variance 1 / (2 k) each.

    Args:
      units: the number of units.
      input_size: the size of x, a vector.
      r_min: the smallest modulus at the start, a number.
      r_max: the largest modulus at the start, below one.
      max_phase: the largest phase at the start, in radians.
      select: where in ``params`` the cell's own are; a function of the pytree.

    Returns:
      A ``ReadyCell`` with an ``ElementwiseCell``; the state is a complex vector of
      units. A readout is often the real part of C h.

    Raises:
      ValueError: ``units`` or ``input_size`` is no positive int, ``max_phase`` not in
        (0, 2π], or not 0 ≤ r_min < r_max < 1.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> made = online.cells.lru(units=4, input_size=2, r_min=0.9)
      >>> loss = lambda params, h, y: jnp.sum((h.real - y) ** 2)
      >>> est = online.diagonal_rtrl(made.cell, loss)
      >>> params = made.init(jax.random.key(0))
      >>> carry = est.init(params, made.h0)
      >>> carry, out = est.step(params, carry, jnp.ones(2), jnp.zeros(4), ())
      >>> carry.h.dtype, out.grads["nu"].shape
      (dtype('complex64'), (4,))

    References:
      Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences",
      https://arxiv.org/abs/2303.06349, section 3 and appendix A.
    """
    check_sizes(units, input_size)
    check_positive("max_phase", max_phase, 2 * jnp.pi)
    if not 0 <= r_min < r_max < 1:
        raise ValueError(
            f"`r_min` and `r_max` must be moduli, 0 <= r_min < r_max < 1; got {r_min} "
            f"and {r_max}. For long memories take both near one: 0.99 and 0.999."
        )

    def own(params: PyTree) -> PyTree:
        p = select(params)
        return {name: p[name] for name in ("nu", "phase", "gamma")}

    def activate(own: PyTree, z: jax.Array, h: jax.Array) -> jax.Array:
        modulus, turn = jnp.exp(-jnp.exp(own["nu"])), jnp.exp(own["phase"])
        factor = jax.lax.complex(modulus * jnp.cos(turn), modulus * jnp.sin(turn))
        drive = jnp.exp(own["gamma"]) * z
        return factor * h + jax.lax.complex(drive[0], drive[1])

    def init(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        # Uniform in area: so the square of the modulus is uniform.
        square = jax.random.uniform(keys[0], (units,), minval=r_min**2, maxval=r_max**2)
        square = jnp.maximum(square, jnp.finfo(square.dtype).tiny)
        phase = max_phase * jax.random.uniform(
            keys[1], (units,), minval=jnp.finfo(square.dtype).eps
        )
        return {
            "nu": jnp.log(-0.5 * jnp.log(square)),
            "phase": jnp.log(phase),
            "gamma": 0.5 * jnp.log1p(-square),
            "B": jax.random.normal(keys[2], (2, units, input_size))
            / (2 * input_size) ** 0.5,
        }

    cell = ElementwiseCell(
        kernel=lambda params: select(params)["B"],
        own=own,
        features=lambda x: x,
        activate=activate,
    )
    zeros = jnp.zeros(units)
    return ReadyCell(cell, init, jax.lax.complex(zeros, zeros))


def check_sizes(units: int, input_size: int) -> None:
    """Raises ValueError unless both are positive ints."""
    check_count("units", units)
    check_count("input_size", input_size)


def _affine(
    key: jax.Array, gates: int, units: int, input_size: int
) -> dict[str, jax.Array]:
    """W, U and b of some gates."""
    keys = jax.random.split(key)

    def uniform(key: jax.Array, size: int) -> jax.Array:
        bound = (3 / size) ** 0.5
        shape = (gates, units, size)
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    return {
        "W": uniform(keys[0], units),
        "U": uniform(keys[1], input_size),
        "b": jnp.zeros((gates, units)),
    }


def _features(x: jax.Array, h: jax.Array) -> jax.Array:
    """h, x, and a one for the bias."""
    return jnp.concatenate([h, x, jnp.ones(1, h.dtype)])
