"""Cases of the estimators, histories and kernels that came with version 0.2."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import rbpjax
from benchmarks.rooms.streaming import (
    CELL,
    EPS,
    Problem,
    Random,
    dense,
    distance,
    draw,
    loss,
    oracle,
    run,
    transformed,
)
from rbpjax import online, perturb, unitary


def _elementwise(is_complex: bool) -> online.ElementwiseCell:
    """Two gates and two numbers of its own a unit; the complex one not holomorphic."""

    def real(own: Any, z: jax.Array, h: jax.Array) -> jax.Array:
        decay, turn = own
        gate = jax.nn.sigmoid(z[1] + decay)
        return gate * h * jnp.cos(turn) + (1 - gate) * jnp.tanh(z[0])

    def twofold(own: Any, z: jax.Array, h: jax.Array) -> jax.Array:
        decay, turn = own
        kept = jax.nn.sigmoid(decay) * jnp.exp(1j * turn) * h
        return kept + 0.3 * jnp.conj(h) + jnp.tanh(z[0]) + 1j * jnp.sin(z[1])

    return online.ElementwiseCell(
        kernel=lambda p: p["W"],
        own=lambda p: (p["decay"], p["turn"]),
        features=lambda x: jnp.concatenate([x, jnp.ones(1)]),
        activate=twofold if is_complex else real,
    )


def _elementwise_loss(p: Any, h: jax.Array, y: jax.Array) -> jax.Array:
    square = jnp.sum((h.real - y) ** 2 + h.imag * y)
    return square + 0.1 * jnp.sum(jnp.sin(p["W"])) * jnp.sum(h.real)


def elementwise(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Diagonal RTRL at parameters that change, against autodiff."""
    n, steps = int(random.integers(1, 6)), int(random.integers(1, 7))
    is_complex = bool(random.integers(2))
    gain = random.choice([0.0, 0.3, 1.0, 3.0], size=(size, 1, 1, 1, 1))
    normal = lambda *shape: jnp.asarray(random.standard_normal((size, *shape)))
    drift = lambda *shape: normal(1, *shape) + 0.1 * normal(steps, *shape)
    params = {
        "W": gain * drift(2, n, n + 1),
        "decay": drift(n),
        "turn": drift(n),
    }
    h0 = normal(n) + (1j * normal(n) if is_complex else 0)
    problem = Problem(params, h0, normal(steps, n), normal(steps, n))
    cell = _elementwise(is_complex)

    def one(problem: Problem) -> Any:
        est = online.diagonal_rtrl(cell, _elementwise_loss)
        out, _ = run(est, problem, ())
        return out.grads, oracle(cell, _elementwise_loss, problem)

    name, mapped = transformed(random, one)
    got, want = mapped(problem)
    # As in ``exact``; a complex unit may grow by 1.3 a step, sums by its power.
    return f"complex {is_complex}, {name}", distance(got, want) / (1e4 * EPS)


def sparse(random: Random, size: int) -> tuple[str, np.ndarray]:
    """SnAp of any order against the dense recursion with the entries dropped."""
    n, steps = int(random.integers(1, 6)), int(random.integers(1, 6))
    order = int(random.integers(1, n + 2))
    seen = random.random((n, n)) < random.choice([0.2, 0.5, 1.0])
    reached = np.linalg.matrix_power(np.eye(n) + seen, order - 1) > 0
    mask = jnp.asarray(seen, float)
    cell = online.PreactivationCell(
        kernel=lambda p: CELL.kernel({"W": mask * p["W"], "b": p["b"]}),
        features=CELL.features,
        activate=CELL.activate,
    )
    f = lambda p, x, h: dense({"W": mask * p["W"], "b": p["b"]}, x, h)
    problem = draw(random, size, steps, n, 0.1)
    est = online.snap(cell, loss, order=order, connections=seen)
    keep = jnp.asarray(reached, float)

    def masked(problem: Problem) -> Any:
        h, made = problem.h0, []
        g = {"W": jnp.zeros((n, n, n)), "b": jnp.zeros((n, n))}
        for t in range(steps):
            p = jax.tree.map(lambda a, t=t: a[t], problem.params)
            x, y = problem.xs[t], problem.ys[t]
            jac, new = jax.jacrev(f, 2)(p, x, h), jax.jacrev(f, 0)(p, x, h)
            spread = lambda a, b, jac=jac: jnp.tensordot(jac, a, 1) + b
            g = jax.tree.map(spread, g, new)
            g = {"W": g["W"] * keep[:, :, None], "b": g["b"] * keep}
            h = f(p, x, h)
            direct, delta = jax.grad(loss, (0, 1))(p, h, y)
            total = lambda d, a, delta=delta: d + jnp.tensordot(delta, a, 1)
            made.append(jax.tree.map(total, direct, g))
        return jax.tree.map(lambda *a: jnp.stack(a), *made)

    def one(problem: Problem) -> Any:
        return run(est, problem, ())[0].grads, masked(problem)

    name, mapped = transformed(random, one)
    got, want = mapped(problem)
    return f"order {order} of {n}, {name}", distance(got, want) / (1e4 * EPS)


def kronecker(random: Random, size: int) -> tuple[str, np.ndarray]:
    """OK-RTRL over all signs, and for as many steps as it has products, any signs."""
    enumerated = bool(random.integers(2))
    n = int(random.integers(1, 5))
    rank = 1 if enumerated else int(random.integers(1, n + 1))
    steps = int(random.integers(2, 5)) if enumerated else rank
    size = min(size, 100)
    problem = draw(random, size, steps, n, 0.1)
    est = online.ok_rtrl(CELL, loss, rank=rank)
    signs = jnp.asarray(random.choice([-1.0, 1.0], (1, steps, rank + 1)))
    if enumerated:
        signs = online.rank_one.all_signs(jnp.zeros(rank + 1), steps)

    def one(problem: Problem) -> Any:
        many = jax.vmap(lambda signs: run(est, problem, signs)[0].grads)(signs)
        mean = jax.tree.map(lambda g: jnp.mean(g, 0), many)
        return mean, oracle(dense, loss, problem)

    name, mapped = transformed(random, one)
    got, want = mapped(problem)
    # As in ``unbiased``: a single pattern may be a hundred times as large as the mean.
    return f"rank {rank}, all signs {enumerated}, {name}", distance(got, want) / (
        1e4 * EPS
    )


def windows(random: Random, size: int) -> tuple[str, np.ndarray]:
    """PES and NRES over all signs, where their mean is the gradient at any σ.

    That is so where the state is linear in the parameters, and the loss quadratic.
    """
    kind = str(random.choice(["pes", "nres"]))
    n, d = int(random.integers(1, 4)), int(random.integers(1, 4))
    count, length = int(random.integers(1, 4)), int(random.integers(1, 4))
    size = min(size, 100)
    normal = lambda *shape: jnp.asarray(random.standard_normal((size, *shape)))
    matrix, reads = normal(n, n) / (2 * n**0.5), normal(n, d)
    data = normal(count, length), normal(count, length, n)
    sigma = float(10.0 ** random.uniform(-2, 1))
    patterns = online.rank_one.all_signs(jnp.zeros(d), count if kind == "pes" else 1)
    if kind == "nres":  # which looks at the first noise alone
        patterns = jnp.broadcast_to(patterns, (len(patterns), count, d))

    def one(theta: Any, h0: Any, matrix: Any, reads: Any, data: Any) -> Any:
        f = lambda p, x, h: matrix @ h + x * (reads @ p)
        cost = lambda p, h, y: jnp.sum((h - y) ** 2)
        est = getattr(perturb, kind)(f, cost, sigma=sigma)

        def whole(signs: jax.Array) -> jax.Array:
            def body(carry: Any, window: Any) -> Any:
                x, y, v = window
                carry, out = est.step(theta, carry, x, y, v[None])
                return carry, out.grads

            return jax.lax.scan(body, est.init(theta, h0), (*data, signs))[1]

        def losses(p: jax.Array) -> jax.Array:
            h, made = h0, []
            for xs, ys in zip(*data, strict=True):
                total = jnp.zeros(())
                for x, y in zip(xs, ys, strict=True):
                    h = f(p, x, h)
                    total = total + cost(p, h, y)
                made.append(total)
            return jnp.stack(made)

        return jnp.mean(jax.vmap(whole)(patterns), 0), jax.jacrev(losses)(theta)

    name, mapped = transformed(random, one)
    got, want = mapped(normal(d), normal(n), matrix, reads, data)
    # Losses of up to 1e3 are subtracted and divided by σ; or σ² of them, with σ = 10.
    bound = 1e4 * EPS * (1 / sigma + 10 * sigma)
    return f"{kind}, σ = {sigma:.1g}, {name}", distance(got, want) / bound


def backwards(random: Random, size: int) -> tuple[str, np.ndarray]:
    """The reversible gradient against the stored one, beyond what it says of itself.

    Which is four times the largest error that is seen at an anchor: ten times as much
    is a silent error, unless it says that rounding has spoilt it.
    """
    n, steps = int(random.integers(1, 6)), int(random.integers(1, 40))
    anchors, damping = int(random.integers(1, 9)), float(random.uniform(0.2, 0.95))
    gain = random.choice([0.0, 0.3, 1.0, 2.0], size=(size, 1, 1))
    normal = lambda *shape: jnp.asarray(random.standard_normal((size, *shape)))
    solve = rbpjax.reversible(
        dense, steps, damping=damping, anchors=anchors, on_failure="ignore"
    )

    def one(params: Any, x: jax.Array, h0: jax.Array, g: jax.Array) -> Any:
        def value(params: Any, h0: jax.Array, probe: Any = None) -> jax.Array:
            h = solve(params, x, h0, probe).value
            return jnp.sum(g * h + h**2)

        def stored(params: Any, h0: jax.Array) -> jax.Array:
            mix = lambda old, new: damping * old + (1 - damping) * new

            def step(pair: tuple, _: None) -> tuple:
                y, z = pair
                y = mix(y, dense(params, x, z))
                return (y, mix(z, dense(params, x, y))), None

            z = jax.lax.scan(step, (h0, h0), length=steps)[0][1]
            return jnp.sum(g * z + z**2)

        probe = rbpjax.AdjointReport.zeros()
        *got, report = jax.grad(value, (0, 1, 2))(params, h0, probe)
        want = list(jax.grad(stored, (0, 1))(params, h0))
        return got, want, report.bound, report.converged

    way, mapped = transformed(random, one)
    params = {"W": gain * normal(n, n) / n**0.5, "b": normal(n)}
    got, want, bound, converged = mapped(params, normal(n), normal(n), normal(n))
    error = distance(got, want) / (10 * np.asarray(bound) + 1e4 * EPS)
    name = f"T = {steps}, anchors {anchors}, damping {damping:.2f}, {way}"
    return name, np.where(np.asarray(converged) == 1, error, 0.0)


def matrices(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Dense orthogonal matrices of any weights: orthogonal, and those of SciPy."""
    kind = str(random.choice(["exp", "cayley", "householder"]))
    n = int(random.integers(1, 9))
    count = int(random.integers(1, n + 1)) if kind == "householder" else n
    is_complex, single = bool(random.integers(2)), bool(random.integers(2))
    w = random.standard_normal((size, count, n))
    if is_complex:
        w = w + 1j * random.standard_normal(w.shape)
    norm = 10.0 ** random.integers(-15, 9, size)[:, None, None]
    dtype = (np.complex64 if is_complex else np.float32) if single else w.dtype
    w = (norm * w).astype(dtype)
    make = getattr(unitary, f"orthogonal_{kind}")
    way, mapped = transformed(random, make)
    u = np.asarray(mapped(jnp.asarray(w)))
    eps = float(np.finfo(dtype).eps)
    bound = 50 * eps * (1 + n)  # sums of n products, a few of them in a row
    wide = u.astype(complex)
    apart = np.abs(np.swapaxes(wide.conj(), 1, 2) @ wide - np.eye(n)).max((1, 2))
    excess = np.where(np.isfinite(wide).all((1, 2)), apart, np.inf) / bound
    for i in np.flatnonzero(norm.ravel() <= 1)[:5]:
        excess[i] += np.abs(wide[i] - _dense(kind, w[i].astype(complex))).max() / bound
    return f"{kind}, {count} × {n}, {np.dtype(dtype)}, {way}", excess


def _dense(kind: str, w: np.ndarray) -> np.ndarray:
    """The matrix of ``kind``, by its definition."""
    n = w.shape[1]
    if kind == "householder":
        u = np.eye(n, dtype=complex)
        for v in w:
            u = u @ (np.eye(n) - 2 * np.outer(v, v.conj()) / np.vdot(v, v))
        return u
    s = (w - w.conj().T) / 2
    if kind == "exp":
        return scipy.linalg.expm(s)
    return np.linalg.solve(np.eye(n) - s / 2, np.eye(n) + s / 2)


def reflected(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Boundaries that reflect: norms kept, and the exponential of the padded sum."""
    dims = int(random.integers(1, 3))
    lattice = tuple(int(k) for k in random.integers(1, (8, 5)[dims - 1], dims))
    boundary = str(random.choice(["even", "odd"]))
    is_complex = bool(random.integers(2))
    c = int(random.integers(1 if is_complex else 2, 4))
    window = tuple(3 if k > 2 else 1 for k in lattice)
    normal = lambda *shape: random.standard_normal((size, *shape))
    w, z = normal(*window, c, c), normal(*lattice, c)
    if is_complex:
        w, z = w + 1j * normal(*window, c, c), z + 1j * normal(*lattice, c)
    norm = 10.0 ** random.integers(-15, 7, size)
    w = w * norm.reshape(-1, *(1,) * (w.ndim - 1))

    def one(w: jax.Array, z: jax.Array) -> Any:
        u = unitary.conv_exp(w, lattice, boundary=boundary)
        return u(z), u.adjoint()(u(z))

    way, mapped = transformed(random, one)
    once, back = map(np.asarray, mapped(jnp.asarray(w), jnp.asarray(z)))
    length = lambda a: np.linalg.norm(a.reshape(size, -1), axis=1)
    apart = lambda a: np.concatenate([np.real(a), np.imag(a)], -1)
    # As for periodic ones, of twice as many sites in each axis.
    bound = 100 * EPS * (1 + c)
    error = distance(apart(back), apart(z)) + np.abs(length(once) / length(z) - 1)
    excess = error / bound
    for i in np.flatnonzero(norm <= 1)[:3]:
        big = scipy.linalg.expm(_padded(w[i], lattice, boundary))
        excess[i] += np.abs(once[i].ravel() - big @ z[i].ravel()).max() / (10 * bound)
    return f"{boundary}, {lattice}, C = {c}, complex {is_complex}, {way}", excess


def _padded(w: np.ndarray, lattice: tuple[int, ...], boundary: str) -> np.ndarray:
    """The matrix of z ↦ Σ_o S(o) z(x - o) on fields that are continued by mirrors."""
    axes, window, c = range(len(lattice)), w.shape[: len(lattice)], w.shape[-1]
    for axis in axes:
        w = (w + np.flip(w, axis)) / 2
    s = (w - np.swapaxes(w.conj(), -1, -2)) / 2
    columns = []
    for unit in np.eye(np.prod(lattice, dtype=int) * c):
        z = unit.reshape(*lattice, c)
        for axis, k in enumerate(window):
            edge = [(k // 2, k // 2) if a == axis else (0, 0) for a in range(z.ndim)]
            sign = np.pad(np.ones_like(z), edge, constant_values=-1)
            z = np.pad(z, edge, "symmetric") * (sign if boundary == "odd" else 1)
        total = np.zeros((*lattice, c), complex)
        for o in itertools.product(*map(range, window)):
            part = tuple(
                slice(k - 1 - i, k - 1 - i + m)
                for i, k, m in zip(o, window, lattice, strict=True)
            )
            total += z[part] @ s[o].T
        columns.append(total.ravel())
    return np.stack(columns, 1)


KINDS = {
    "streaming: element-wise": elementwise,
    "streaming: sparse": sparse,
    "streaming: Kronecker sums": kronecker,
    "perturbation: windows": windows,
    "fixed point: reversible": backwards,
    "unitary: dense": matrices,
    "unitary: reflected": reflected,
}
