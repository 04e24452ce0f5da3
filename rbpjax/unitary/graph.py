"""Unitary convolution on graphs: e^{itA} X U of node features X, by sparse products."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def graph_exp(
    propagate: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    time: float | jax.Array = 1.0,
    *,
    mix: jax.Array | None = None,
    norm: float = 1.0,
    steps: int | None = None,
    terms: int | None = None,
) -> jax.Array:
    """e^{itA} X U: node features carried over a graph without loss of norm.

    A is symmetric (or Hermitian), so that e^{itA} is unitary: features do not become
    alike however many layers there are. It is never formed: with z = t/steps,

        e^{itA} = (e^{izA})^steps,    e^{izA} ≈ Σ_{n ≤ terms} (izA)ⁿ/n!,

    by ``steps`` times ``terms`` = m products with A. The remainder of a step is below
    r^(m + 1)/(m + 1)! · 1/(1 - r/(m + 2)) with r = z·norm. With the defaults r ≤ 1 and
    m = 18 (10 in float32), and that is below rounding: the norm is kept to a few ε a
    step, and with fewer ``terms`` to the bound.

    Cost: the products; memory of a reverse-mode gradient: all partial sums, ``steps``
    times ``terms`` arrays like X. AD modes: all, in what ``propagate`` closes over too.

    Args:
      propagate: the product v ↦ A v of complex arrays [nodes, C], such as
        `normalized_adjacency` makes.
      x: features, a real or complex array [nodes, C].
      time: t, a real scalar; it may be traced, and be learnt.
      mix: U, [C, C], such as `orthogonal_exp` makes, or None for the unit matrix.
      norm: a bound of ‖A‖, 1 for a normalized adjacency.
      steps: number of steps, at least t·norm; None for the least one, where t is a
        Python number.
      terms: order of the polynomial, None for rounding.

    Returns:
      A complex array [nodes, C]; NaN where a traced t is beyond steps/norm.

    Raises:
      ValueError: if ``x`` is no floating-point array [nodes, C], ``mix`` does not fit
        it, ``time`` is traced and ``steps`` None or too few, ``norm``, ``steps`` or
        ``terms`` is no such number, or ``propagate`` returns another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.unitary import graph_exp, normalized_adjacency
      >>> ring = jnp.arange(6)
      >>> propagate = normalized_adjacency(ring, (ring + 1) % 6, 6)
      >>> x = jnp.eye(6)[:, :1]  # a point
      >>> later = graph_exp(propagate, x, 10.0)
      >>> bool(abs(jnp.linalg.norm(later) - 1) < 1e-5)
      True

    References:
      Kiani, Fesser and Weber, "Unitary convolutions for learning on graphs and groups",
      NeurIPS 2024, https://arxiv.org/abs/2410.05499 (separable unitary convolution,
      e^{itA} X U).
    """
    if getattr(x, "ndim", 0) != 2 or not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            "`x` must be a floating-point or complex array [nodes, C]; got "
            f"{getattr(x, 'dtype', type(x).__name__)}{getattr(x, 'shape', '')}. Use "
            "jax.vmap for batches."
        )
    if mix is not None and jnp.shape(mix) != (x.shape[1],) * 2:
        raise ValueError(
            f"`mix` must have the shape {(x.shape[1],) * 2} of C × C channels; got "
            f"{jnp.shape(mix)}."
        )
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not norm > 0:
        raise ValueError(f"`norm` must be a positive Python number; got {norm!r}.")
    steps = _steps(time, norm, steps)
    _check_count("terms", terms)
    wide = jnp.finfo(x.dtype).bits == 64
    out_dtype, real = ("complex128", "float64") if wide else ("complex64", "float32")
    if terms is None:
        terms = 18 if wide else 10
    t = jnp.asarray(time).astype(real)
    # Beyond what was promised the series is wrong without a sign of it.
    z = jnp.where(jnp.abs(t) * norm <= steps * (1 + 1e-6), t, jnp.nan) / steps
    turn = jax.lax.complex(jnp.zeros_like(z), z)

    def one_step(y: jax.Array, _: None) -> tuple[jax.Array, None]:
        def horner(partial_sum: jax.Array, n: jax.Array) -> tuple[jax.Array, None]:
            return y + turn / n * _checked(propagate(partial_sum), y), None

        orders = jnp.arange(terms, 0, -1).astype(out_dtype)
        return jax.lax.scan(horner, y, orders)[0], None

    y = x.astype(out_dtype)
    if mix is not None:
        y = y @ jnp.asarray(mix).astype(out_dtype)
    return jax.lax.scan(one_step, y, None, steps)[0]


def normalized_adjacency(
    senders: jax.Array,
    receivers: jax.Array,
    nodes: int,
    *,
    weights: jax.Array | None = None,
) -> Callable[[jax.Array], jax.Array]:
    """The product v ↦ D^{-1/2} A D^{-1/2} v of an undirected graph, a sum over edges.

    Exact. A is symmetric whatever the edges, D its row sums, and the 2-norm of the
    product at most 1 for weights that are not negative. A node without edges is mapped
    to zero. Cost of a product: O(edges · C). AD modes: all, in the weights too.

    Args:
      senders: integer array [edges], one end of each edge. Each edge is given once, for
        both directions; a loop counts once.
      receivers: integer array [edges], the other end.
      nodes: number of nodes.
      weights: array [edges] of positive weights, or None for ones.

    Returns:
      A function of real or complex arrays [nodes, C].

    Raises:
      ValueError: if the ends are no integer arrays of one length, ``weights`` has
        another length, or ``nodes`` is no Python int of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.unitary import normalized_adjacency
      >>> path = normalized_adjacency(jnp.array([0, 1]), jnp.array([1, 2]), 3)
      >>> (2 * path(jnp.eye(3)) ** 2).round(3).tolist()  # 1/√2 each
      [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]

    References:
      Kipf and Welling, https://arxiv.org/abs/1609.02907, equation 2 (without the loops
      that are added there).
    """
    senders, receivers = jnp.asarray(senders), jnp.asarray(receivers)
    integers = all(jnp.issubdtype(e.dtype, jnp.integer) for e in (senders, receivers))
    if not integers or senders.ndim != 1 or senders.shape != receivers.shape:
        raise ValueError(
            "`senders` and `receivers` must be integer arrays of one length; got "
            f"{senders.dtype}{senders.shape} and {receivers.dtype}{receivers.shape}."
        )
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise ValueError(f"`nodes` must be a Python int of at least 1; got {nodes!r}.")
    w = jnp.ones(senders.shape) if weights is None else jnp.asarray(weights)
    if w.shape != senders.shape:
        raise ValueError(
            f"`weights` must have the edges' shape {senders.shape}; got {w.shape}."
        )
    total = lambda values, ends: jax.ops.segment_sum(values, ends, nodes)
    back = jnp.where(senders == receivers, 0, w)  # a loop is one entry
    degree = total(w, receivers) + total(back, senders)
    alone = degree == 0
    scale = jnp.where(alone, 0, jax.lax.rsqrt(jnp.where(alone, 1, degree)))

    def product(v: jax.Array) -> jax.Array:
        column = lambda a: a.astype(v.dtype)[:, None]
        v = column(scale) * v
        there = total(column(w) * v[senders], receivers)
        return column(scale) * (there + total(column(back) * v[receivers], senders))

    return product


def _steps(time: float | jax.Array, norm: float, steps: int | None) -> int:
    """The number of steps: given, or the least one."""
    _check_count("steps", steps)
    known = isinstance(time, int | float) and not isinstance(time, bool)
    if steps is None and not known:
        raise ValueError(
            "`steps` must be given where `time` is an array: a Python int of at least "
            f"|time| · norm; got {type(time).__name__}."
        )
    least = max(1, math.ceil(abs(time) * norm)) if known else 1
    if steps is not None and steps < least:
        raise ValueError(
            f"`steps` must be at least |time| · norm, {least}; got {steps}. Leave out "
            "`steps` for that number."
        )
    return least if steps is None else steps


def _check_count(name: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not whole or value < 1):
        raise ValueError(
            f"`{name}` must be a Python int of at least 1, or None; got {value!r}."
        )


def _checked(out: jax.Array, y: jax.Array) -> jax.Array:
    if jnp.shape(out) != y.shape or jnp.result_type(out) != y.dtype:
        raise ValueError(
            f"`propagate` must return an array like its argument, {y.dtype}{y.shape}; "
            f"got {jnp.result_type(out)}{jnp.shape(out)}."
        )
    return out
