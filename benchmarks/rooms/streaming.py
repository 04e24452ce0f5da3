"""Cases of the streaming estimators, each against an oracle of another kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rbpjax import online
from rbpjax.online import combine

Random = np.random.Generator
Make = Callable[..., online.Estimator]

EPS = 2.0**-52


class Problem(NamedTuple):
    """One run of T steps, its parameters different at every step.

    Attributes:
      params: leaves ``[T, …]``.
      h0: the state at the start.
      xs: inputs, ``[T, n]``.
      ys: targets, ``[T, n]``.
    """

    params: Any
    h0: Any
    xs: jax.Array
    ys: jax.Array


CELL = online.PreactivationCell(
    kernel=lambda p: jnp.concatenate([p["W"], p["b"][:, None]], 1)[None],
    features=lambda x, h: jnp.concatenate([h + x, jnp.ones(1, h.dtype)]),
    activate=lambda z, h: 0.5 * h + jnp.tanh(z[0]),
)


def dense(p: Any, x: jax.Array, h: jax.Array) -> jax.Array:
    """The cell as a plain function."""
    return 0.5 * h + jnp.tanh(p["W"] @ (h + x) + p["b"])


def nested(p: Any, x: jax.Array, h: Any) -> Any:
    """A state of two leaves, a counter and a key; the key and the counter are used."""
    a = dense(p, x, h["a"]) + 0.01 * h["t"].astype(x.dtype)
    b = jnp.sin(h["b"]) * jnp.sum(a) + 0.1 * jax.random.normal(h["key"], (), x.dtype)
    key = jax.random.fold_in(h["key"], h["t"])
    return {"a": a, "b": b, "t": h["t"] + 1, "key": key}


def loss(p: Any, h: jax.Array, y: jax.Array) -> jax.Array:
    """Sees the state, and the parameters directly."""
    return jnp.sum((h - y) ** 2) + 0.1 * jnp.sum(jnp.sin(p["W"])) * jnp.sum(h)


def nested_loss(p: Any, h: Any, y: jax.Array) -> jax.Array:
    """The same of the first leaf, and the second."""
    return loss(p, h["a"], y) + h["b"] ** 2


def draw(random: Random, size: int, steps: int, n: int, drift: float) -> Problem:
    """``size`` problems, stacked, with gains from dead to beyond the edge of chaos."""
    gain = random.choice([0.0, 0.3, 1.0, 2.0], size=(size, 1, 1, 1))
    normal = lambda *shape: random.standard_normal((size, *shape))
    w = gain * normal(1, n, n) / n**0.5 + drift * normal(steps, n, n)
    b = normal(1, n) + drift * normal(steps, n)
    spread = random.choice([0.0, 0.3, 3.0], size=(size, 1))
    h0 = spread * normal(n)
    make = lambda a: jnp.asarray(a)
    params = {"W": make(w), "b": make(b)}
    return Problem(params, make(h0), make(normal(steps, n)), make(normal(steps, n)))


def as_nested(problem: Problem) -> Problem:
    """With the state that ``nested`` takes."""
    size = len(problem.xs)
    keys = jax.random.split(jax.random.key(0), size)
    h0 = {
        "a": problem.h0,
        "b": 0.3 * jnp.ones(size),
        "t": jnp.zeros(size, int),
        "key": keys,
    }
    return problem._replace(h0=h0)


def run(est: online.Estimator, problem: Problem, noise: Any) -> Any:
    """All outputs and carries of a run."""
    first = jax.tree.map(lambda p: p[0], problem.params)

    def body(carry: online.Carry, data: Any) -> Any:
        params, x, y, signs = data
        carry, out = est.step(params, carry, x, y, signs)
        return carry, (out, carry)

    data = (problem.params, problem.xs, problem.ys, noise)
    return jax.lax.scan(body, est.init(first, problem.h0), data)[1]


def oracle(f: Callable, loss: Callable, problem: Problem) -> Any:
    """The derivative of each loss by a shift of the parameters of all steps."""
    zero = jax.tree.map(lambda p: jnp.zeros(p.shape[1:], p.dtype), problem.params)

    def losses(shift: Any) -> jax.Array:
        h, made = problem.h0, []
        for t in range(len(problem.xs)):
            p = jax.tree.map(lambda a, d, t=t: a[t] + d, problem.params, shift)
            h = f(p, problem.xs[t], h)
            made.append(loss(p, h, problem.ys[t]))
        return jnp.stack(made)

    return jax.jacrev(losses)(zero)


TRANSFORMS: dict[str, Callable[[Callable], Callable]] = {
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "vmap of jit": lambda f: jax.vmap(jax.jit(f)),
    "checkpoint": lambda f: jax.jit(jax.vmap(jax.checkpoint(f))),
    "donated": lambda f: jax.jit(jax.vmap(f), donate_argnums=0),
    "shard_map": lambda f: _sharded(f, check_vma=True),
    "shard_map, unchecked": lambda f: _sharded(f, check_vma=False),
    "map": lambda f: jax.jit(lambda *args: jax.lax.map(lambda a: f(*a), args)),
}


def _sharded(f: Callable, check_vma: bool) -> Callable:
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = dict(mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=check_vma)
    return jax.jit(jax.shard_map(jax.vmap(f), **spec))


def transformed(random: Random, f: Callable) -> tuple[str, Callable]:
    """``f`` mapped over problems in a drawn way."""
    name = list(TRANSFORMS)[random.integers(len(TRANSFORMS))]
    return name, TRANSFORMS[name](f)


def distance(got: Any, want: Any) -> np.ndarray:
    """The error of each problem, relative to the largest entry of the truth (or 1)."""
    rows = lambda t: np.concatenate(
        [np.asarray(a, np.float64).reshape(len(a), -1) for a in jax.tree.leaves(t)], 1
    )
    got, want = rows(got), rows(want)
    scale = np.maximum(np.abs(want).max(1), 1)
    error = np.abs(got - want).max(1) / scale
    return np.where(np.isfinite(got).all(1), error, np.inf)


def relative(got: Any, want: Any) -> np.ndarray:
    """As ``distance``, relative to the largest entry however small."""
    rows = lambda t: np.concatenate(
        [np.asarray(a, np.float64).reshape(len(a), -1) for a in jax.tree.leaves(t)], 1
    )
    size = np.abs(rows(want)).max(1)
    size = np.where(size == 0, 1, size)[:, None]
    return distance(rows(got) / size, rows(want) / size)


def exact(random: Random, size: int) -> tuple[str, np.ndarray]:
    """RTRL at parameters that change, and BPTT at fixed ones, against autodiff."""
    n, steps = int(random.integers(1, 6)), int(random.integers(1, 6))
    kind = random.choice(["rtrl", "rtrl, nested", "bptt", "rtrl, over_batch"])
    fixed = kind == "bptt"
    problem = draw(random, size, steps, n, 0.0 if fixed else 0.1)
    f, cost = (nested, nested_loss) if "nested" in kind else (dense, loss)
    if "nested" in kind:
        problem = as_nested(problem)

    def one(problem: Problem) -> Any:
        want = oracle(f, cost, problem)
        if fixed:
            est = online.bptt(f, cost)
            params = jax.tree.map(lambda p: p[0], problem.params)
            carry = est.init(params, problem.h0)
            _, out = est.step(params, carry, problem.xs, problem.ys, ())
            return out.grads, jax.tree.map(lambda g: jnp.sum(g, 0), want)
        if "over_batch" in kind:
            est = online.rtrl(*combine.over_batch(f, cost))
            twice = lambda a, axis: jnp.stack([a, a], axis)
            problem = problem._replace(
                h0=twice(problem.h0, 0),
                xs=twice(problem.xs, 1),
                ys=twice(problem.ys, 1),
            )
        else:
            est = online.rtrl(f, cost)
        out, _ = run(est, problem, ())
        return out.grads, want

    name, mapped = transformed(random, one)
    got, want = mapped(problem)
    # Sums of some hundred products; ten numbers of order ten may cancel.
    return f"{kind}, {name}", distance(got, want) / (1e4 * EPS)


UNBIASED: dict[str, tuple[Make, int]] = {
    "uoro": (online.uoro, 1),
    "nobacktrack": (online.nobacktrack, 1),
    "nobacktrack, row norms": (
        lambda f, cost: online.nobacktrack(CELL, cost, row_norms=CELL.row_norms),
        1,
    ),
    "kf_rtrl": (lambda f, cost: online.kf_rtrl(CELL, cost), 1),
    "average": (lambda f, cost: combine.average(online.uoro(f, cost), 2), 2),
    "renormalize": (
        lambda f, cost: combine.renormalize(online.nobacktrack(f, cost), 1e9),
        1,
    ),
}


def unbiased(random: Random, size: int) -> tuple[str, np.ndarray]:
    """The mean over all sign patterns, at changing parameters, against autodiff."""
    kind = random.choice(list(UNBIASED))
    make, copies = UNBIASED[kind]
    units = (
        [(2, 3), (3, 2), (5, 2), (1, 5), (1, 8)] if copies == 1 else [(2, 2), (1, 4)]
    )
    n, steps = units[random.integers(len(units))]
    size = min(size, 100)
    problem = draw(random, size, steps, n, 0.1)
    est = make(dense, loss)
    first = jax.tree.map(lambda a: a[0, 0], problem.params)
    carry = jax.eval_shape(est.init, first, problem.h0[0])
    like = jax.eval_shape(est.noise, jax.random.key(0), carry)
    like = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
    patterns = online.rank_one.all_signs(like, steps)

    def one(problem: Problem) -> Any:
        many = jax.vmap(lambda signs: run(est, problem, signs)[0].grads)(patterns)
        return jax.tree.map(lambda g: jnp.mean(g, 0), many), oracle(
            dense, loss, problem
        )

    name, mapped = transformed(random, one)
    got, want = mapped(problem)
    # A single pattern may be some hundred times as large as the mean of all.
    return f"{kind}, {name}", distance(got, want) / (1e4 * EPS)


def kalman(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Kalman NoBackTrack: its pair is an unbiased influence while the metric is fixed.

    At the first two steps the metric does not depend on the noise of the pair.
    """
    n = int(random.integers(1, 4))
    size = min(size, 100)
    problem = draw(random, size, 2, n, 0.0)
    problem = problem._replace(h0=problem.h0 + 0.1)
    est = online.kalman_nobacktrack(dense, loss, decay=0.1, include_current=False)
    exact_est = online.rtrl(dense, loss)
    patterns = online.rank_one.all_signs(jnp.ones(n), 2)

    def one(problem: Problem) -> Any:
        many = jax.vmap(lambda signs: run(est, problem, signs)[1].influence)(patterns)
        outer = lambda w: jnp.mean(jnp.einsum("kti,kt...->kti...", many.v, w), 0)
        return jax.tree.map(outer, many.w), run(exact_est, problem, ())[1].influence

    name, mapped = transformed(random, one)
    got, want = mapped(problem)
    return f"kalman, {name}", distance(got, want) / (1e4 * EPS)


def local(random: Random, size: int) -> tuple[str, np.ndarray]:
    """SnAp-1 and RFLO against the dense recursion with the entries dropped."""
    kind = random.choice(["snap1", "rflo"])
    n, steps = int(random.integers(1, 6)), int(random.integers(1, 6))
    problem = draw(random, size, steps, n, 0.1)
    est = getattr(online, kind)(CELL, loss)

    def masked(problem: Problem) -> Any:
        h, g, made = problem.h0, None, []
        for t in range(steps):
            p = jax.tree.map(lambda a, t=t: a[t], problem.params)
            x, y = problem.xs[t], problem.ys[t]
            jac = jax.jacrev(dense, 2)(p, x, h)
            keep = jnp.diag(jnp.diag(jac)) if kind == "snap1" else 0.5 * jnp.eye(n)
            new = jax.jacrev(dense, 0)(p, x, h)
            spread = lambda a, b, keep=keep: jnp.tensordot(keep, a, 1) + b
            g = new if g is None else jax.tree.map(spread, g, new)
            h = dense(p, x, h)
            direct, delta = jax.grad(loss, (0, 1))(p, h, y)
            total = lambda d, a, delta=delta: d + jnp.tensordot(delta, a, 1)
            made.append(jax.tree.map(total, direct, g))
        return jax.tree.map(lambda *a: jnp.stack(a), *made)

    def one(problem: Problem) -> Any:
        return run(est, problem, ())[0].grads, masked(problem)

    name, mapped = transformed(random, one)
    got, want = mapped(problem)
    return f"{kind}, {name}", distance(got, want) / (1e4 * EPS)


STREAMING: dict[str, Make] = {
    "rtrl": online.rtrl,
    "uoro": online.uoro,
    "nobacktrack": online.nobacktrack,
    "kalman": partial(online.kalman_nobacktrack, decay=0.1, damping=2.0**-10),
    "average": lambda f, cost: combine.average(online.uoro(f, cost), 2),
    "renormalize": lambda f, cost: combine.renormalize(online.uoro(f, cost), 2.0**10),
}


UNITS = ["rtrl", "uoro", "nobacktrack", "average"]


def units(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Other units of parameters, states and losses: the same bits, scaled.

    In float32, from 4⁻³³ to 4³³, which is 1e-20 to 1e20; half of the cases in small
    units of everything that the network makes.
    """
    kind = str(random.choice(UNITS))
    n, steps = int(random.integers(1, 5)), int(random.integers(2, 6))
    problem = draw(random, size, steps, n, 0.0)
    single = lambda a: a.astype(jnp.float32)
    problem = jax.tree.map(single, problem)
    powers = random.integers(-33, 34, (size, 3))
    powers[:, 1] = np.clip(powers[:, 1], powers[:, 0] - 30, powers[:, 0] + 30)
    powers[:, 2] = np.clip(
        powers[:, 2], powers[:, :2].max(1) - 30, powers[:, :2].min(1) + 30
    )
    scales = jnp.asarray(4.0**powers, jnp.float32)

    def one(problem: Problem, scales: jax.Array) -> Any:
        a, b, c = scales
        f = lambda p, x, h: b * dense(jax.tree.map(lambda q: q / a, p), x, h / b)
        cost = lambda p, h, y: c * jnp.sum((h / b - y) ** 2)
        moved = problem._replace(
            params=jax.tree.map(lambda q: a * q, problem.params), h0=b * problem.h0
        )
        est = STREAMING[kind](f, cost)
        first = jax.tree.map(lambda q: q[0], problem.params)
        keys = jax.random.split(jax.random.key(1), steps)
        carry = est.init(first, problem.h0)
        signs = jax.vmap(lambda k: est.noise(k, carry))(keys)
        out, _ = run(est, moved, signs)
        return jax.tree.map(lambda g: g * (a / c), out.grads)

    _, mapped = transformed(np.random.default_rng(0), one)
    base = mapped(problem, jnp.ones((size, 3), jnp.float32))
    got = mapped(problem, scales)
    # The same bits but for the order of sums, of ten numbers at most and 5 steps.
    bound = 100 * float(jnp.finfo(jnp.float32).eps)
    return kind, relative(got, base) / bound


def bad_sequence(random: Random, size: int) -> tuple[str, np.ndarray]:
    """One sequence of three is not finite: the carries of the others are the same."""
    kind = random.choice(
        [
            "renormalize(per_sequence)",
            "per_sequence(renormalize)",
            "average(per_sequence)",
            "per_sequence(average)",
            "renormalize(average(per_sequence))",
        ]
    )
    each, all_, few = combine.per_sequence, combine.renormalize, combine.average
    make = {
        "renormalize(per_sequence)": lambda e: all_(each(e), 2.0),
        "per_sequence(renormalize)": lambda e: each(all_(e, 2.0)),
        "average(per_sequence)": lambda e: few(each(e), 2),
        "per_sequence(average)": lambda e: each(few(e, 2)),
        "renormalize(average(per_sequence))": lambda e: all_(few(each(e), 2), 2.0),
    }[kind]
    inner = random.choice(["uoro", "rtrl", "nobacktrack", "kalman"])
    est = make(STREAMING[inner](dense, loss))
    n, steps = int(random.integers(1, 4)), 3
    problem = draw(random, size, steps, n, 0.0)
    value = random.choice([np.nan, np.inf, 1e300])
    lead = 1 if kind.startswith("average") or "(average(per" in kind else 0

    def one(problem: Problem, bad: jax.Array) -> Any:
        batch = lambda a, axis: jnp.stack([a, 0.5 * a, -a], axis)
        xs = batch(problem.xs, 1).at[1, 1].add(bad)
        many = problem._replace(h0=batch(problem.h0, 0), xs=xs, ys=batch(problem.ys, 1))
        first = jax.tree.map(lambda q: q[0], problem.params)
        carry = est.init(first, many.h0)
        keys = jax.random.split(jax.random.key(1), steps)
        signs = jax.vmap(lambda k: est.noise(k, carry))(keys)
        _, carries = run(est, many, signs)
        end = jax.tree.map(lambda a: a[-1], carries)
        good = jnp.array([0, 2])
        rest = jax.tree.map(
            lambda a: jnp.take(a, good, lead), (end.influence, end.metric)
        )
        return jax.tree.map(lambda a: a[good], end.h), rest

    _, mapped = transformed(np.random.default_rng(0), one)
    got = mapped(problem, jnp.full(size, value))
    want = mapped(problem, jnp.zeros(size))
    return f"{kind}, {inner}", distance(got, want) / (1e3 * EPS)


def mixed(random: Random, size: int) -> tuple[str, np.ndarray]:
    """States and parameters of different dtypes: scanned, dtypes kept, RTRL right."""
    kind = random.choice([*STREAMING, "bptt", "kf_rtrl", "snap1", "rflo"])
    dtypes = ["bfloat16", "float16", "float32", "float64"]
    of_h, of_p = map(str, random.choice(dtypes, 2, replace=False))
    n, steps = int(random.integers(1, 5)), 3
    problem = draw(random, size, steps, n, 0.0)
    with jax.numpy_dtype_promotion("standard"):
        low = Problem(
            jax.tree.map(lambda a: (0.3 * a).astype(of_p), problem.params),
            problem.h0.astype(of_h) * 0,
            problem.xs.astype(of_h),
            problem.ys.astype(of_h),
        )
        cast = lambda p: jax.tree.map(lambda a: a.astype(of_h), p)
        f = lambda p, x, h: dense(cast(p), x, h)
        cost = lambda p, h, y: jnp.sum((h - y).astype(jnp.float32) ** 2)
        cell = online.PreactivationCell(
            kernel=lambda p: CELL.kernel(cast(p)),
            features=CELL.features,
            activate=CELL.activate,
        )
        on_cell = kind in ("kf_rtrl", "snap1", "rflo")
        make = getattr(online, kind) if kind not in STREAMING else STREAMING[kind]
        est = make(cell if on_cell else f, cost)

        def one(problem: Problem) -> Any:
            first = jax.tree.map(lambda q: q[0], problem.params)
            carry = est.init(first, problem.h0)
            if kind == "bptt":
                _, out = est.step(first, carry, problem.xs, problem.ys, ())
                return out.grads
            keys = jax.random.split(jax.random.key(1), steps)
            signs = jax.vmap(lambda k: est.noise(k, carry))(keys)
            return jax.tree.map(
                lambda g: jnp.sum(g, 0), run(est, problem, signs)[0].grads
            )

        name, mapped = transformed(random, one)
        got = mapped(low)
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), low)
        if kind in ("rtrl", "bptt"):
            plain = lambda p, h, y: jnp.sum((h - y) ** 2)
            want = jax.jit(jax.vmap(partial(oracle, dense, plain)))(wide)
            want = jax.tree.map(lambda g: jnp.sum(g, 1), want)
        else:
            want = got
    eps = max(float(jnp.finfo(of_h).eps), float(jnp.finfo(of_p).eps))
    finite = np.where(np.isfinite(distance(got, got)), 0.0, np.inf)
    if kind == "kalman" and "float16" in (of_h, of_p):
        finite = 0 * finite  # squares of gradients above 256 are not representable
        return f"{kind}, {of_h} {of_p}, {name}", finite
    return f"{kind}, {of_h} {of_p}, {name}", distance(got, want) / (100 * eps) + finite


KINDS = {
    "streaming: exact": exact,
    "streaming: unbiased": unbiased,
    "streaming: kalman": kalman,
    "streaming: local": local,
    "streaming: units": units,
    "streaming: one bad sequence": bad_sequence,
    "streaming: mixed precision": mixed,
}
