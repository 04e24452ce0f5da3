"""What is right: the value found, polished by dense Newton in float64.

A value is right if the nearest solution, to which damped Newton with dense Jacobians
goes from the value, is no further away than the precision allows, leaf by leaf. The
problem that is polished is the one that the solver was given: its rounded data, in
float64 arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.comparison.collection.problem import Problem

ALLOWED = {"float64": 1e-6, "float32": 1e-2}
STEPS = 60  # a singular root halves its distance in each
SINGULAR = 1e12  # condition number above which no gradient is asked for


def cast(arrays: Any, precision: str) -> Any:
    """NumPy arrays in the precision, complex ones in that of their parts."""
    single = precision == "float32"
    kinds = {
        "f": np.float32 if single else np.float64,
        "c": np.complex64 if single else np.complex128,
    }

    def one(a: Any) -> np.ndarray:
        a = np.asarray(a)
        return a.astype(kinds.get(a.dtype.kind, a.dtype))

    return jax.tree.map(one, arrays)


class Answer(NamedTuple):
    """The polished value and the exact gradient there.

    Attributes:
      error: of the value found, the largest over the leaves; infinite if Newton does
        not get to a fixed point from it.
      gradient: of ``loss`` for params at the polished value, flat; None where I - J is
        singular.
    """

    error: float
    gradient: np.ndarray | None


class Judge:
    """Polishes values of one problem, in one precision of its data."""

    def __init__(self, problem: Problem, precision: str):
        """Compiles f's residual, Jacobian and pullback on the first use."""
        self.problem = problem
        given = cast((problem.params, problem.inputs, problem.h0), precision)
        self.params, self.inputs, self.h0 = cast(given, "float64")
        self.allowed = problem.allowed or ALLOWED[precision]
        f = problem.smooth or problem.f

        def flat(params: Any, inputs: Any, v: jax.Array) -> jax.Array:
            return ravel(f(params, inputs, self.unravel(v)))

        def look(params: Any, inputs: Any, v: jax.Array, z: jax.Array) -> tuple:
            image, pull = jax.vjp(lambda p: flat(p, inputs, v), params)
            jac = jax.jacfwd(lambda v: flat(params, inputs, v))(v)
            return image - v, jac, ravel(pull(z)[0])

        self._look = jax.jit(look)

    def of(self, params: Any, inputs: Any, h0: Any, precision: str) -> Judge:
        """The judge of other data of the same shapes, without compiling anew."""
        other = copy.copy(self)
        other.allowed = self.problem.allowed or ALLOWED[precision]
        other.params, other.inputs, other.h0 = cast((params, inputs, h0), "float64")
        return other

    def unravel(self, v: Any) -> Any:
        """A flat real vector -> a state."""
        leaves, treedef = jax.tree.flatten(self.h0)
        parts, at = [], 0
        for leaf in leaves:
            size = leaf.size * (1 + np.iscomplexobj(leaf))
            part, at = v[at : at + size], at + size
            if np.iscomplexobj(leaf):
                part = jax.lax.complex(*jnp.split(part, 2))
            parts.append(part.reshape(leaf.shape))
        return jax.tree.unflatten(treedef, parts)

    def look(self, v: np.ndarray, z: np.ndarray | None = None) -> list[np.ndarray]:
        """f(h) - h, J, and (∂f/∂params)ᵀ z, all flat and real."""
        with jax.enable_x64(True), np.errstate(all="ignore"):
            z = np.zeros_like(v) if z is None else z
            return list(map(np.asarray, self._look(self.params, self.inputs, v, z)))

    def answer(self, value: Any) -> Answer:
        """Polishes a value that a solver found."""
        found = host_ravel(value)
        polished = self.polish(found)
        if polished is None:
            return Answer(math.inf, None)
        sizes = self.leaf_norms(polished)
        moved = self.leaf_norms(found - polished)
        relative = [
            0.0 if m == 0 else m / max(s, self.problem.floor, 1e-300)
            for m, s in zip(moved, sizes, strict=True)
        ]
        return Answer(max(relative), self.gradient(polished))

    def polish(self, v: np.ndarray) -> np.ndarray | None:
        """The fixed point that damped Newton reaches, or None.

        Steps are the least ones that solve the linear system, and are shortened until
        the next one is (natural monotonicity: no unit of any leaf enters).
        """
        r, jac, _ = self.look(v)
        for _ in range(STEPS):
            if not (np.isfinite(v).all() and np.isfinite(r).all()):
                return None
            step = solve(jac, r, v)
            if step is None:
                return None
            if self.small(step, v, 1e-14):
                return v + step
            length = 1.0
            while length > 1e-6:
                new = v + length * step
                r, new_jac, _ = self.look(new)
                again = solve(jac, r, v) if np.isfinite(r).all() else None
                if again is not None and _shorter(again, step, 1 - length / 4):
                    break
                length /= 2
            else:  # as near as rounding lets it, or nowhere
                return v if self.small(step, v, 1e-3 * self.allowed) else None
            v, jac = new, new_jac
        return v if self.small(solve(jac, r, v), v, 1e-3 * self.allowed) else None

    def small(self, step: np.ndarray | None, v: np.ndarray, bound: float) -> bool:
        """Whether a step is below ``bound`` in each leaf."""
        if step is None:
            return False
        floor = max(self.problem.floor, 1e-300)
        pairs = zip(self.leaf_norms(step), self.leaf_norms(v), strict=True)
        return all(d <= bound * max(s, floor) for d, s in pairs)

    def leaf_norms(self, v: np.ndarray) -> list[float]:
        """The norm of each leaf of a flat state."""
        parts = np.split(v, np.cumsum(self.leaf_sizes())[:-1])
        return [float(np.linalg.norm(part)) for part in parts]

    def leaf_sizes(self) -> list[int]:
        """The number of real entries of each leaf."""
        leaves = jax.tree.leaves(self.h0)
        return [leaf.size * (1 + np.iscomplexobj(leaf)) for leaf in leaves]

    def gradient(self, v: np.ndarray) -> np.ndarray | None:
        """The gradient of ``loss`` for params, (∂f/∂params)ᵀ (I - Jᵀ)⁻¹ g, by LU."""
        _, jac, _ = self.look(v)
        matrix = np.eye(v.size) - jac.T
        # Singular or not is a matter of I - J without units: D⁻¹(I - J)D.
        norms = np.array(self.leaf_norms(v))
        norms = np.where(norms > 0, norms, 1.0)
        d = np.repeat(norms, self.leaf_sizes())
        if not np.linalg.cond(matrix * d[:, None] / d) < SINGULAR:
            return None
        with jax.enable_x64(True):
            g = host_ravel(jax.grad(lambda v: loss(self.unravel(v)))(jnp.asarray(v)))
        return self.look(v, np.linalg.solve(matrix, g))[2]

    def gradient_error(self, found: Any, exact: np.ndarray) -> float:
        """The relative error of a gradient; absolute below the problem's floor."""
        found = host_ravel(found)
        if not np.isfinite(found).all():
            return math.inf
        size = max(np.linalg.norm(exact), self.problem.floor, 1e-300)
        return float(np.linalg.norm(found - exact) / size)


def loss(h: Any) -> jax.Array:
    """Half the squared norm, the entries of a leaf with weights from 1 to 2.

    Without weights the loss of a state that f normalizes is constant.
    """

    def one(a: jax.Array) -> jax.Array:
        weights = 1 + jnp.arange(a.size).astype(a.real.dtype) / a.size
        return jnp.sum(weights * jnp.abs(a.ravel()) ** 2) / 2

    return jnp.sum(jnp.stack([one(a) for a in jax.tree.leaves(h)]))


def solve(jac: np.ndarray, r: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """The d with (I - J) d = r, the least one of several, or None if there is none.

    Where I - J is singular, r must be in its range, but for a part that is rounding.
    """
    matrix = np.eye(r.size) - jac
    if not np.isfinite(matrix).all():
        return None
    for method in (np.linalg.solve, _least):
        with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
            rounding = 1e-14 * (np.linalg.norm(v) + np.linalg.norm(r + v))
            d = method(matrix, r)
            left = np.linalg.norm(matrix @ d - r)
            if left <= 1e-3 * np.linalg.norm(r) + rounding:
                return d
    return None


def _shorter(a: np.ndarray, b: np.ndarray, by: float) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.linalg.norm(a) <= by * np.linalg.norm(b))


def _least(matrix: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(matrix, r, rcond=None)[0]


def ravel(h: Any) -> jax.Array:
    """The flat real vector of a state, complex leaves as real and imaginary parts."""
    return ravel_pytree(
        [(a.real, a.imag) if jnp.iscomplexobj(a) else a for a in jax.tree.leaves(h)]
    )[0]


def host_ravel(h: Any) -> np.ndarray:
    """The same in NumPy and float64."""
    parts = [np.zeros(0)]
    for leaf in map(np.asarray, jax.tree.leaves(h)):
        pair = (leaf.real, leaf.imag) if np.iscomplexobj(leaf) else (leaf,)
        parts += [np.ravel(a).astype(np.float64) for a in pair]
    return np.concatenate(parts)
