"""Vector arithmetic on pytree states, safe in scale and dtype.

Inner products are the real ones, Re⟨x̄, y⟩, so that complex states are treated as the
pairs of real numbers that a step function, which need not be holomorphic, sees.
Reductions accumulate in float32 at least: a bfloat16 sum would lose the residual.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding
from rbpjax._core.sharding import is_sharded, typed_like
from rbpjax.types import PyTree


def apart(x: PyTree) -> PyTree:
    """The same values, which JAX does not know for those of ``x``.

    For what the forward pass of a ``custom_vjp`` keeps of its arguments. JAX 0.8 to
    0.12 take another argument for a residual that is one, where the function made
    constants and a loop around it is differentiated twice. Costs nothing: the compiler
    removes it.
    """
    return jax.tree.map(lambda u: lax.squeeze(lax.expand_dims(u, (0,)), (0,)), x)


def real_dtype(tree: PyTree) -> jnp.dtype:
    """The real dtype, float32 at least, in which norms of ``tree`` are computed."""
    bits = max((jnp.finfo(x.dtype).bits for x in jax.tree.leaves(tree)), default=32)
    return jnp.dtype(jnp.float64 if bits > 32 else jnp.float32)


def coarsest_eps(tree: PyTree) -> float:
    """The largest machine epsilon among the dtypes of the leaves."""
    return max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree))


def default_tol(tree: PyTree) -> float:
    """Three quarters of the digits: ε^¾ is 6e-6 in float32, 2e-12 in float64."""
    return coarsest_eps(tree) ** 0.75


def tol_for(tree: PyTree, tol: float | jax.Array | None) -> float | jax.Array:
    """``tol``, or the default of the state ``tree``; an array in the state's dtype."""
    if tol is None:
        return default_tol(tree)
    return tol.astype(real_dtype(tree)) if isinstance(tol, jax.Array) else tol


def add(x: PyTree, y: PyTree) -> PyTree:
    """``x + y``, leaf by leaf."""
    return jax.tree.map(jnp.add, x, y)


def sub(x: PyTree, y: PyTree) -> PyTree:
    """``x - y``, leaf by leaf."""
    return jax.tree.map(jnp.subtract, x, y)


def widen(x: jax.Array) -> jax.Array:
    """``x`` in float32 at least, so that a half-precision update rounds once."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def scale(a: jax.Array | float, x: PyTree) -> PyTree:
    """``a * x`` for a real scalar ``a``, in the dtypes of ``x``."""

    def leaf(u: jax.Array) -> jax.Array:
        wide = widen(u)
        return (jnp.asarray(a).astype(wide.dtype) * wide).astype(u.dtype)

    return jax.tree.map(leaf, x)


def divide(x: PyTree, a: jax.Array) -> PyTree:
    """``x / a`` for a real scalar ``a``, in the dtypes of ``x``.

    In float32 at least: compiled, a quotient is a product with 1 / a, which float16
    cannot represent below 1.5e-5. Complex leaves part by part: a complex quotient would
    square ``a``.
    """

    def leaf(u: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(u):
            return lax.complex(leaf(u.real), leaf(u.imag))
        wide = widen(u)
        return (wide / a.astype(wide.dtype)).astype(u.dtype)

    return jax.tree.map(leaf, x)


def multiply(factors: PyTree, x: PyTree) -> PyTree:
    """Each leaf of ``x`` times the real scalar in its place in ``factors``."""
    return jax.tree.map(scale, factors, x)


def axpy(a: jax.Array | float, x: PyTree, y: PyTree) -> PyTree:
    """``a * x + y`` for a real scalar ``a``, in the dtypes of ``y``."""

    def leaf(u: jax.Array, v: jax.Array) -> jax.Array:
        wide = widen(v)
        a_wide = jnp.asarray(a).astype(wide.dtype)
        return (a_wide * u.astype(wide.dtype) + wide).astype(v.dtype)

    return jax.tree.map(leaf, x, y)


def where(condition: jax.Array, x: PyTree, y: PyTree) -> PyTree:
    """``x`` if the scalar ``condition`` holds, else ``y``."""
    return jax.tree.map(lambda u, v: jnp.where(condition, u, v), x, y)


def scale_leaves(scales: jax.Array, x: PyTree) -> PyTree:
    """Each leaf times its entry of ``scales``, in float32 at least."""

    def leaf(a: jax.Array, u: jax.Array) -> jax.Array:
        wide = widen(u)
        return a.astype(wide.dtype) * wide

    leaves, treedef = jax.tree.flatten(x)
    pairs = zip(scales, leaves, strict=True)
    return jax.tree.unflatten(treedef, [leaf(a, u) for a, u in pairs])


def cast_like(x: PyTree, like: PyTree) -> PyTree:
    """``x`` in the dtypes of ``like``."""
    return jax.tree.map(lambda u, v: u.astype(v.dtype), x, like)


def entries(x: PyTree) -> int:
    """The number of entries, of all parts of a coupled state; 1 where there is none."""
    return max(sum(u.size for u in jax.tree.leaves(x)) * sharding.parts(), 1)


def vdot(x: PyTree, y: PyTree) -> jax.Array:
    """The real inner product Re⟨x̄, y⟩."""
    return sharding.total(own_vdot(x, y))


def own_vdot(x: PyTree, y: PyTree) -> jax.Array:
    """What the part of a coupled state that is here adds to ``vdot``."""
    dtype = real_dtype((x, y))

    def leaf(u: jax.Array, v: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(u):
            return leaf(u.real, v.real) + leaf(u.imag, v.imag)
        return jnp.sum(u.astype(dtype) * v.astype(dtype))

    return sum(map(leaf, jax.tree.leaves(x), jax.tree.leaves(y)), jnp.zeros((), dtype))


def products(rows: PyTree, x: PyTree) -> jax.Array:
    """The inner product of each of the stacked states ``rows`` with the state ``x``.

    One product of a matrix and a vector a leaf, which on CPU is faster than that many
    sums. Sums, as in ``vdot``, where an explicit mesh shards the state.
    """
    dtype = real_dtype(x)

    def leaf(b: jax.Array, u: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(u):
            return leaf(b.real, u.real) + leaf(b.imag, u.imag)
        if is_sharded(u):
            return jax.vmap(lambda row: own_vdot(row, u))(b)
        over = tuple(range(u.ndim))
        return lax.dot_general(
            b.astype(dtype),
            u.astype(dtype),
            ((tuple(i + 1 for i in over), over), ((), ())),
            precision=lax.Precision.HIGHEST,
        )

    return sharding.total(jax.tree.reduce(jnp.add, jax.tree.map(leaf, rows, x)))


def norm(x: PyTree) -> jax.Array:
    """The 2-norm ‖x‖, for vectors whose entries' squares are representable."""
    return jnp.sqrt(vdot(x, x))


def max_abs(x: PyTree) -> jax.Array:
    """The largest modulus of an entry."""
    dtype = real_dtype(x)
    zero = jnp.zeros((), dtype)
    leaves = [jnp.max(jnp.abs(u), initial=0).astype(dtype) for u in jax.tree.leaves(x)]
    return sharding.largest(jax.tree.reduce(jnp.maximum, leaves, zero))


def power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two up to ``x`` ≥ 0, by its bits; 1 where x = 0.

    Neither it nor its inverse leaves the normal numbers. A compiled 2^⌊log₂ x⌋ is not
    always a power of two, and what is scaled by another number is rounded.
    """
    info = jnp.finfo(x.dtype)
    kind = jnp.int64 if info.bits == 64 else jnp.int32
    exponent = kind(-1) << info.nmant  # all bits but those of the mantissa
    bits = lax.bitcast_convert_type(x, kind) & exponent
    power = lax.bitcast_convert_type(bits, x.dtype)
    power = jnp.minimum(power, float(2.0 ** (info.maxexp - 2)))
    return jnp.where(power == 0, 1, power).astype(x.dtype)


def to_unit(x: PyTree) -> tuple[PyTree, jax.Array]:
    """``(x / ‖x‖, ‖x‖)``; ``(0, 0)`` for zero.

    The largest entry is brought near 1, by a power of two and so without rounding,
    before entries are squared: the squares of 1e-20 vanish in float32, and with them
    the gradient of a loss so scaled.
    """
    power = power_of_two(max_abs(x))
    x = scale(1 / power, x)
    length = norm(x)
    safe_length = jnp.where(length == 0, 1, length).astype(length.dtype)
    return divide(x, safe_length), power * length


def rms(x: PyTree) -> tuple[jax.Array, ...]:
    """The root mean square of each leaf, for squares that are representable."""
    return tuple(norm(u) / entries(u) ** 0.5 for u in jax.tree.leaves(x))


def rounding(x: PyTree) -> jax.Array:
    """What one rounding of each entry leaves, as a norm: ε‖x‖, with each leaf's ε."""
    eps = lambda u: float(jnp.finfo(u.dtype).eps)
    parts = [eps(u) * norm(u).astype(real_dtype(x)) for u in jax.tree.leaves(x)]
    return jnp.linalg.norm(jnp.stack(parts)) if len(parts) > 1 else parts[0]


def last_places(h: PyTree) -> PyTree:
    """An error of one unit in the last place of each entry, of alternating sign."""

    def leaf(u: jax.Array) -> jax.Array:
        signs = jnp.where(jnp.arange(u.size) % 2, -1, 1).reshape(u.shape)
        return (jnp.finfo(u.dtype).eps * signs).astype(u.dtype) * u

    return jax.tree.map(leaf, h)


def all_finite(x: PyTree) -> jax.Array:
    """Whether every entry is finite."""
    leaves = [jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(x)]
    own = jax.tree.reduce(jnp.logical_and, leaves, jnp.array(True))
    return sharding.everywhere(own)


def empty_rows(num: int, like: PyTree) -> PyTree:
    """``num`` states of zeros, stacked along a new leading axis.

    Broadcast from data, not made from nothing: so they are sharded as ``like`` is, and
    vary over its axes.
    """
    return jax.tree.map(lambda u: jnp.broadcast_to(0 * u, (num, *u.shape)), like)


def put(rows: PyTree, i: jax.Array | int, x: PyTree) -> PyTree:
    """``rows`` with the state ``x`` in row ``i``."""
    # Slices, since scatters are not defined on meshes with explicit axis types.
    update = lambda b, u: lax.dynamic_update_index_in_dim(b, u, i, 0)
    return jax.tree.map(update, rows, x)


def take(rows: PyTree, i: jax.Array | int) -> PyTree:
    """Row ``i`` of stacked states."""
    pick = lambda b: lax.dynamic_index_in_dim(b, i, 0, keepdims=False)
    return jax.tree.map(pick, rows)


def adjoint(linear: Callable[[PyTree], PyTree], like: PyTree) -> Callable:
    """The adjoint of a map of states under the real inner product of this module.

    For real states it is the transpose: of v ↦ Jᵀv, it is u ↦ Ju.
    """
    transpose = jax.linear_transpose(linear, like)
    conj = lambda x: jax.tree.map(jnp.conj, x)
    return lambda u: conj(transpose(conj(u))[0])


def random_unit(key: jax.Array, like: PyTree) -> PyTree:
    """A random direction of norm one with the structure and dtypes of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(sharding.own_key(key), len(leaves))
    draws = [
        jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return typed_like(to_unit(jax.tree.unflatten(treedef, draws))[0], like)
