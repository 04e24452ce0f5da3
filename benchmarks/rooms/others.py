"""Cases of perturbation, unitary cells, recomputed histories, penalties and graphs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from benchmarks.rooms.streaming import EPS, Random, distance, relative, transformed
from rbpjax import perturb, regularizers, unitary
from rbpjax.nn import normalized_adjacency
from rbpjax.unitary import activation, history


def plain(p: Any, x: jax.Array, h: jax.Array, noise: Any) -> tuple[Any, Any, Any]:
    """A cell of two leaves of nodes, the second of which hangs on the first."""
    a = h @ p["R"].T + x + noise["a"]
    h = jnp.tanh(a)
    b = h @ p["B"].T + noise["b"]
    return h, b, {"a": a, "b": b}


def _network(random: Random, size: int, batch: tuple[int, ...]) -> tuple[Any, ...]:
    """Parameters, inputs, start and targets of small networks, stacked."""
    n, outputs, steps = int(random.integers(1, 4)), 2, int(random.integers(1, 4))
    normal = lambda *shape: jnp.asarray(random.standard_normal((size, *shape)))
    params = {"R": normal(n, n), "B": normal(outputs, n)}
    inputs, h0 = normal(steps, *batch, n), 0.3 * normal(*batch, n)
    return params, inputs, h0, normal(steps, *batch, outputs)


def through_time(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Perturbation over a whole frame of directions, against BPTT."""
    batch = () if random.integers(2) else (int(random.integers(1, 4)),)
    apart = bool(batch) and bool(random.integers(2))
    name = str(random.choice(["node", "weight", "node, one-sided", "node, central"]))
    params, inputs, h0, targets = _network(random, size, batch)
    mean = None if not apart else -1
    cost = lambda o, y: jnp.mean((o - y) ** 2, mean)
    taps = sum(inputs.shape[1] * math.prod(batch) * p.shape[1] for p in params.values())
    weights = sum(p[0].size for p in jax.tree.leaves(params))
    make = perturb.WeightPerturbation if name == "weight" else perturb.NodePerturbation
    difference = {
        "node, one-sided": perturb.difference.OneSided(),
        "node, central": perturb.difference.Central(),
    }.get(name, perturb.difference.Exact())
    rule = make(
        num_samples=weights if name == "weight" else taps,
        difference=difference,
        noise=perturb.noise.orthonormal,
    )
    estimate = perturb.recurrent_value_and_grad(plain, cost, rule)

    def one(params: Any, inputs: Any, h0: Any, targets: Any) -> Any:
        def total(p: Any) -> jax.Array:
            outputs = perturb.unroll(plain, p, inputs, h0).outputs
            return jnp.sum(
                jax.vmap(lambda o, y: jnp.mean(cost(o, y)))(outputs, targets)
            )

        made = estimate(jax.random.key(0), params, inputs, h0, targets)[1]
        return made, jax.grad(total)(params)

    way, mapped = transformed(random, one)
    got, want = mapped(params, inputs, h0, targets)
    # Rounding grows as 1/σ, curvature as σ (one-sided) or σ²: σ is 5e-9 and 1e-6.
    bound = {"node, one-sided": 1e-5, "node, central": 1e-7}.get(name, 1e5 * EPS)
    return f"{name}{', examples' if apart else ''}, {way}", distance(got, want) / bound


def sizes_and_dtypes(random: Random, size: int) -> tuple[str, np.ndarray]:
    """The default σ in every dtype and for parameters of every size: told or right."""
    dtype = str(random.choice(["bfloat16", "float16", "float32", "float64"]))
    make = (perturb.difference.OneSided, perturb.difference.Central)[random.integers(2)]
    rule = perturb.WeightPerturbation(
        num_samples=4, difference=make(), noise=perturb.noise.coordinate
    )
    exponents = (
        random.integers(-4, 5, size)
        if dtype == "float16"
        else (random.integers(-20, 21, size))
    )
    scale = jnp.asarray(4.0**exponents)
    values = jnp.asarray(1 + random.random((size, 4)))

    def one(v: jax.Array, s: jax.Array) -> Any:
        low = (v * s).astype(dtype)
        wide = lambda p: jnp.sum(jnp.sin(p.astype(jnp.float64) / s))
        made = perturb.value_and_grad(wide, rule)(jax.random.key(0), low)[1]
        exact = jnp.cos(low.astype(jnp.float64) / s)
        return made.astype(jnp.float64) * s, exact

    way, mapped = transformed(random, one)
    got, want = mapped(values, scale)
    eps = float(jnp.finfo(dtype).eps)
    # √ε-sized differences of numbers known to ε; coordinates are moved twice σ.
    return f"{make.__name__}, {dtype}, {way}", distance(got, want) / (20 * eps**0.5)


def decorrelated(random: Random, size: int) -> tuple[str, np.ndarray]:
    """The update of D against its formula in NumPy."""
    n, rows = int(random.integers(1, 5)), int(random.integers(1, 6))
    multiply, center = bool(random.integers(2)), bool(random.integers(2))
    keep = bool(random.integers(2))
    rule = perturb.decorrelate(0.1, multiply=multiply, center=center, keep_norm=keep)
    d, x = random.standard_normal((size, n, n)), random.standard_normal((size, rows, n))
    way, mapped = transformed(random, rule.update)
    got = mapped(jnp.asarray(d), jnp.asarray(x))
    want = []
    for matrix, data in zip(d, x, strict=True):
        seen = data @ matrix.T
        used = seen - seen.mean(0) * center
        c = used.T @ used / rows
        np.fill_diagonal(c, 0)
        new = matrix - 0.1 * (c @ matrix if multiply else c)
        if keep:
            length = lambda a: np.linalg.norm(a, axis=1).mean()
            new = new * length(data) / length(data @ new.T)
        want.append(new)
    return f"decorrelate, {way}", distance(got, np.stack(want)) / (1e3 * EPS)


def kernels(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Unitarity for weights of any norm, and the dense exponential for small ones."""
    dims = int(random.integers(1, 4))
    most = (12, 6, 4)[dims - 1]
    lattice = tuple(int(n) for n in random.integers(1, most, dims))
    channels = random.choice([0, 1, 2, 3, 4])
    is_complex = bool(random.integers(2))
    single = bool(random.integers(2))
    square = (channels, channels) if channels else ()
    window = tuple(min(3, n) for n in lattice)
    shape = (size, *window, *square)
    weights = random.standard_normal(shape)
    field = random.standard_normal((size, *lattice, *square[:1]))
    if is_complex:
        weights = weights + 1j * random.standard_normal(shape)
        field = field + 1j * random.standard_normal(field.shape)
    norm = 10.0 ** random.integers(-20, 9, size).reshape(-1, *(1,) * (weights.ndim - 1))
    kind = (np.complex64 if is_complex else np.float32) if single else weights.dtype
    weights, field = (norm * weights).astype(kind), field.astype(kind)

    def one(w: jax.Array, z: jax.Array) -> Any:
        u = unitary.conv_exp(w, lattice)
        once = u(z)
        length = lambda a: jnp.linalg.norm(jnp.ravel(a))
        return length(once) / length(z), u.adjoint()(once), u.kernel()

    way, mapped = transformed(random, one)
    ratio, back, kernel = mapped(jnp.asarray(weights), jnp.asarray(field))
    eps = float(jnp.finfo(kind).eps)
    # FFTs lose log N roundings, products of C × C matrices C of them.
    bound = 50 * eps * (1 + channels)
    apart = lambda a: np.concatenate([np.real(a), np.imag(a)], -1)
    error = distance(apart(np.asarray(back)), apart(field)) + abs(np.asarray(ratio) - 1)
    excess = error / bound
    sites = math.prod(lattice)
    if not single and sites * max(channels, 1) <= 24:
        for i in np.flatnonzero(norm.ravel() <= 1)[:3]:
            excess[i] += (
                _dense_error(weights[i], np.asarray(kernel[i]), lattice) / bound
            )
    name = f"C = {channels}, {np.dtype(kind)}, {way}"
    return name, excess


def _dense_error(
    weights: np.ndarray, kernel: np.ndarray, lattice: tuple[int, ...]
) -> float:
    """‖U - expm(A)‖ with the block-circulant matrix A of the skew weights."""
    c = weights.shape[-1] if weights.ndim > len(lattice) else 1
    blocks = weights.reshape(*weights.shape[: len(lattice)], c, c)
    sites = list(np.ndindex(*lattice))
    place = {site: i for i, site in enumerate(sites)}
    big = np.zeros((len(sites), c, len(sites), c), weights.dtype)
    middle = [n // 2 for n in blocks.shape[: len(lattice)]]
    for site in sites:
        for offset in np.ndindex(*blocks.shape[: len(lattice)]):
            there = tuple(
                (s - (o - m)) % n
                for s, o, m, n in zip(site, offset, middle, lattice, strict=True)
            )
            big[place[site], :, place[there], :] += blocks[offset]
    a = big.reshape(len(sites) * c, -1)
    exact = scipy.linalg.expm((a - a.conj().T) / 2)[:, :c]
    return float(np.abs(kernel.reshape(-1, c) - exact).max())


def saturated(random: Random, size: int) -> tuple[str, np.ndarray]:
    """The saturating activation of numbers of every magnitude, and its derivative."""
    dtype = str(random.choice(["float16", "float32", "float64"]))
    most = {"float16": 4, "float32": 38, "float64": 300}[dtype]
    z = random.choice([-1, 1], size) * 10.0 ** random.uniform(-most, most, size)
    z = np.asarray(z, dtype)

    def one(z: jax.Array) -> Any:
        return activation.saturate(z), jax.grad(activation.saturate)(z)

    way, mapped = transformed(random, one)
    got = jax.tree.map(lambda a: np.asarray(a, float), mapped(jnp.asarray(z)))
    wide = np.asarray(z, np.longdouble)
    want = wide / np.sqrt(1 + wide**2), (1 + wide**2) ** -1.5
    eps = float(jnp.finfo(dtype).eps)
    return f"saturate, {dtype}, {way}", distance(got, want) / (10 * eps)


def recomputed(random: Random, size: int) -> tuple[str, np.ndarray]:
    """The gradient without a history against the stored one; false inverses told."""
    steps, n = int(random.integers(1, 20)), int(random.integers(1, 4))
    replay = bool(random.integers(2))
    anchors = int(random.integers(1, steps + 1))
    false = not replay and anchors < steps and bool(random.integers(2))
    scale = 10.0 ** random.integers(-20, 21)
    q = np.linalg.qr(random.standard_normal((size, n, n)))[0]
    xs = scale * random.standard_normal((size, steps, n))
    h0 = scale * random.standard_normal((size, n))
    f = lambda p, x, h: {"a": p @ h["a"] + x, "b": h["b"]}
    back = lambda p, x, h: {"a": p.T @ (h["a"] - (0 if false else 1) * x), "b": h["b"]}
    way_back = (
        history.Replay(slots=anchors)
        if replay
        else history.Inverse(inverse=back, anchors=anchors)
    )

    def one(q: jax.Array, xs: jax.Array, h0: jax.Array, probe: jax.Array) -> Any:
        def loss(scan: Any, q: jax.Array, xs: jax.Array, probe: Any) -> jax.Array:
            start = {"a": h0, "b": jnp.array(1e6)}
            h, ys = scan(q, xs, start, probe)
            return jnp.sum((h["a"] / scale) ** 3) + jnp.sum(ys / scale)

        emit = lambda p, x, h: jnp.sum(h["a"]) * p[0, 0]

        def stored(q: Any, xs: Any, h: Any, probe: Any) -> Any:
            def body(h: Any, x: Any) -> Any:
                h = f(q, x, h)
                return h, emit(q, x, h)

            return jax.lax.scan(body, h, xs)

        def forgotten(q: Any, xs: Any, h: Any, probe: Any) -> Any:
            options = dict(history=way_back, emit=emit, probe=probe)
            return unitary.recomputed_scan(f, q, xs, h, **options)

        probe = history.HistoryReport(probe)
        both = lambda scan: jax.grad(partial(loss, scan), (0, 1, 2))(q, xs, probe)
        got, want = both(forgotten), both(stored)
        return got[:2], want[:2], got[2].drift

    way, mapped = transformed(random, one)
    arrays = map(jnp.asarray, (q, xs, h0, np.zeros(size)))
    got, want, drift = mapped(*arrays)
    error = sum(relative([a], [b]) for a, b in zip(got, want, strict=True))
    drift = np.asarray(drift)
    # Orthogonal steps, forth and back, T roundings each; terms of a cube may cancel.
    name = f"{'replay' if replay else 'inverse'}{', false' if false else ''}, {way}"
    return name, np.where(drift > 1e-8, 0.0, error / (1e5 * EPS))


def penalties(random: Random, size: int) -> tuple[str, np.ndarray]:
    """The three regularizers against dense matrices, at every scale."""
    kind = str(random.choice(["jacobian", "contraction", "exact σ", "power method"]))
    n, m = int(random.integers(1, 6)), int(random.integers(1, 6))
    w = random.standard_normal(
        (size, n, n if kind in ("jacobian", "contraction") else m)
    )
    h = random.standard_normal((size, n))
    f = lambda w, x, h: jnp.tanh(w @ h + x)
    if kind == "jacobian":
        basis = n**0.5 * jnp.eye(n)
        one = lambda w, h: (
            regularizers.jacobian_penalty(None, f, w, 0.0, h, probes=basis),
            jnp.sum(jax.jacrev(f, 2)(w, 0.0, h) ** 2) / n,
        )
        arrays = w, h
    elif kind == "contraction":
        one = lambda w, h: (
            regularizers.contraction_penalty(f, w, 0.0, h),
            jnp.mean(jnp.maximum(jax.jacrev(f, 2)(w, 0.0, h).sum(0) - 0.9, 0) ** 2),
        )
        arrays = w, h
    else:
        single = (10.0 ** random.integers(-20, 21, (size, 1, 1)) * w).astype(np.float32)
        steps = None if kind == "exact σ" else 200
        cut = partial(regularizers.spectral_normalize, num_steps=steps)
        target = 0.5 * np.linalg.norm(single.astype(float), 2, (1, 2))
        one = lambda k, t: (cut(k, t) / t.astype(k.dtype), k / (2 * t.astype(k.dtype)))
        arrays = single, target
    way, mapped = transformed(random, one)
    got, want = mapped(*map(jnp.asarray, arrays))
    # 200 steps of the power method leave (σ₂/σ₁)⁴⁰⁰ of the gap.
    s = np.linalg.svd(w, compute_uv=False)
    gap = (s[:, 1] / s[:, 0]) ** 400 if min(w.shape[1:]) > 1 else 0
    bound = 1e4 * EPS if kind in ("jacobian", "contraction") else 1e-5
    loose = bound + (4 * gap if kind == "power method" else 0)
    return f"{kind}, {way}", distance(got, want) / loose


def graphs(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Sparse propagation against the dense matrix."""
    nodes, edges = int(random.integers(1, 8)), int(random.integers(0, 20))
    pairs = random.integers(0, nodes, (edges, 2))
    graph = normalized_adjacency(pairs, nodes)
    h = random.standard_normal((size, nodes, 3)).astype(np.float32)
    way, mapped = transformed(random, graph.propagate)
    a = np.eye(nodes)
    a[pairs[:, 0], pairs[:, 1]] = 1
    root = np.diag(a.sum(1) ** -0.5)
    want = np.einsum("ij,bjk->bik", root @ a @ root, h)
    return f"graph, {way}", distance(mapped(jnp.asarray(h)), want) / 1e-5


KINDS = {
    "perturbation: through time": through_time,
    "perturbation: sizes and dtypes": sizes_and_dtypes,
    "perturbation: decorrelation": decorrelated,
    "unitary: kernels": kernels,
    "unitary: saturation": saturated,
    "unitary: recomputed": recomputed,
    "regularizers": penalties,
    "graphs": graphs,
}
