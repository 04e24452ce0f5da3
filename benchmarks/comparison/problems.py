"""The problems of ``rules``: a step, a squared-error loss, and a float64 reference.

Every network is a plain function, so that each library is handed the same one. What it
computes from its weights alone (symmetric, normalized) stands inside the step, as in
the code that a user would write; the libraries may hoist it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from benchmarks.comparison.jacobians import FAMILIES
from benchmarks.data.planetoid import planetoid
from benchmarks.harness.options import require
from rbpjax.nn import normalized_adjacency

Step = Callable[[Any, Any, jax.Array], jax.Array]


class Problem(NamedTuple):
    """``f(params, inputs, h)``, the loss ½‖h* - target‖², and how to start."""

    kind: str
    """The network, by which other frameworks find their own version of it."""
    f: Step
    params: Any
    inputs: Any
    h0: jax.Array
    target: jax.Array
    budget: int
    """Steps that a solver is allowed."""
    dense: bool
    """Whether the reference is by LU of a dense I - J, not by a long iteration."""
    constants: dict[str, np.ndarray]
    """What the step closes over."""

    def loss(self, h: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((h - self.target) ** 2)


def _float32(x: Any) -> Any:
    return jax.tree.map(lambda u: jnp.asarray(u, jnp.float32), x)


def rnn(norm: float, batch: int = 128, units: int = 256) -> Problem:
    """tanh(h W + b + x), W an orthogonal matrix times its norm."""
    random = np.random.default_rng(0)
    w = norm * np.linalg.qr(random.normal(size=(units, units)))[0]
    x, target = random.normal(size=(2, batch, units))
    f = lambda p, x, h: jnp.tanh(h @ p["w"] + p["b"] + 0.3 * x)
    params = _float32({"b": np.zeros(units), "w": w})
    return _problem("rnn", f, params, x, target, 3000)


def hopfield(gain: float, batch: int = 10, visible: int = 784) -> Problem:
    """The network of Liao et al. 2018, 5.1, W made symmetric in every step."""
    random = np.random.default_rng(0)
    n = 2 * visible + 1024 * visible // 784
    w = gain * random.normal(size=(n, n)) / np.sqrt(n)
    clamp = np.zeros((batch, n))
    clamp[:, :visible] = random.uniform(size=(batch, visible)) < 0.2
    free = np.arange(n) >= visible

    def f(w: jax.Array, clamp: jax.Array, h: jax.Array) -> jax.Array:
        symmetric = (w + w.T) * (1 - jnp.eye(n, dtype=w.dtype))
        return jnp.where(free, jax.nn.sigmoid(0.5 * h) @ symmetric, clamp)

    target = random.normal(size=(batch, n))
    return _problem("hopfield", f, _float32(w), clamp, target, 500, free=free)


def cora(units: int = 32) -> Problem:
    """Â h W + drive on Cora's graph, as ``rbpjax.nn.GraphCell``, ‖W‖₂ = 0.9."""
    data = planetoid("cora")
    nodes = len(data.labels)
    graph = normalized_adjacency(data.edges, nodes)
    random = np.random.default_rng(0)
    features = data.features.toarray()
    features /= np.maximum(features.sum(1, keepdims=True), 1)
    encoder = random.normal(size=(features.shape[1], units))
    w = np.eye(units) + 0.3 * random.normal(size=(units, units)) / units**0.5
    w *= 0.9 / np.linalg.norm(w, 2)
    of_edges = graph.senders, graph.receivers, graph.weights
    send, receive, weight = map(np.asarray, of_edges)

    def f(w: jax.Array, drive: jax.Array, h: jax.Array) -> jax.Array:
        messages = h[send] * weight[:, None]
        sums = jax.ops.segment_sum(messages, receive, nodes, indices_are_sorted=True)
        return sums @ w + drive

    target = random.normal(size=(nodes, units))
    edges = {"send": send, "receive": receive, "weight": weight}
    return _problem("graph", f, _float32(w), features @ encoder, target, 1000, **edges)


def conv(
    gain: float = 1.0, batch: int = 16, side: int = 32, width: int = 16
) -> Problem:
    """Two 3 × 3 convolutions whose kernels are normalized in every step."""
    random = np.random.default_rng(0)
    layout = ("NHWC", "HWIO", "NHWC")

    def layer(kernel: jax.Array, h: jax.Array) -> jax.Array:
        size = jnp.sqrt(jnp.sum(kernel**2, (0, 1, 2)))
        kernel = gain * kernel / size
        return lax.conv_general_dilated(h, kernel, (1, 1), "SAME", None, None, layout)

    def f(p: list, x: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.tanh(x + layer(p[1], jnp.tanh(layer(p[0], h))))

    params = _float32(list(random.normal(size=(2, 3, 3, width, width))))
    x, target = random.normal(size=(2, batch, side, side, width))
    return _problem("conv", f, params, x, target, 500, gain=np.float32(gain))


def bilevel(condition: float, size: int = 100) -> Problem:
    """A gradient step on ½hᵀ(H + diag r)h - bᵀh; the outer loss is ½‖h - target‖²."""
    random = np.random.default_rng(0)
    q = np.linalg.qr(random.normal(size=(size, size)))[0]
    low = 1 / condition
    hessian = ((q * np.geomspace(low, 1, size)) @ q.T).astype(np.float32)
    hessian -= 0.5 * low * np.eye(size, dtype=np.float32)
    rate = 2 / (1 + low)

    def f(r: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
        return h - rate * (hessian.astype(h.dtype) @ h + r * h - b)

    b, target = random.normal(size=(2, size))
    r = _float32(np.full(size, 0.5 * low))
    constants = {"hessian": hessian, "rate": np.float32(rate)}
    return _problem("bilevel", f, r, b, target, 20_000, True, **constants)


def family(name: str, size: int = 500) -> Problem:
    """J h + x, started at its fixed point: what is timed is the backward solve."""
    random = np.random.default_rng(0)
    jac = FAMILIES[name](random, size)
    x, target = random.normal(size=(2, size))
    problem = _problem(
        "linear", lambda j, x, h: j @ h + x, _float32(jac), x, target, 4000, True
    )
    with jax.enable_x64(True):
        h = np.linalg.solve(np.eye(size) - _wide(problem.params), _wide(problem.inputs))
    return problem._replace(h0=_float32(h))


def _problem(
    kind: str,
    f: Step,
    params: Any,
    inputs: Any,
    target: np.ndarray,
    budget: int,
    dense: bool = False,
    **constants: Any,
) -> Problem:
    inputs, target = _float32(inputs), _float32(target)
    h0 = inputs if kind == "hopfield" else jnp.zeros_like(target)
    return Problem(kind, f, params, inputs, h0, target, budget, dense, constants)


def slug(name: str) -> str:
    """A family's name as an option can be written."""
    kept = "".join(c if c.isalnum() or c in ".-" else " " for c in name)
    return "family-" + "-".join(kept.split()).lower()


PROBLEMS: dict[str, tuple[str, Callable[[], Problem]]] = {
    **{
        f"rnn-{s}": (f"tanh RNN, ‖W‖₂ = {s}", partial(rnn, s)) for s in (0.5, 0.9, 0.99)
    },
    **{
        f"hopfield-{rho}": (f"Hopfield, ρ(J) ≈ {rho}", partial(hopfield, gain))
        for rho, gain in ((0.37, 1.32), (0.86, 4.5), (0.95, 5.75))
    },
    "cora": ("graph network on Cora", cora),
    "conv": ("convolutional", conv),
    "bilevel-10": ("bilevel, κ = 10", partial(bilevel, 10.0)),
    "bilevel-1000": ("bilevel, κ = 1,000", partial(bilevel, 1000.0)),
    **{slug(name): (name, partial(family, name)) for name in FAMILIES},
}


def resolve(asked: tuple[str, ...]) -> list[str]:
    """The problems of these names, or whose names begin so; UsageError if none.

    bilevel-10 is that one alone, though the name of another begins so.
    """
    for prefix in asked:
        require(
            any(name.startswith(prefix) for name in PROBLEMS),
            f"--problems: no {prefix!r}; known are {', '.join(PROBLEMS)}",
        )
    exact = [p for p in asked if p in PROBLEMS]
    starts = tuple(p for p in asked if p not in PROBLEMS)
    return [n for n in PROBLEMS if n in exact or n.startswith(starts)]


# --- reference -----------------------------------------------------------------------


def _wide(x: Any) -> Any:
    return jax.tree.map(lambda u: np.asarray(u, np.float64), x)


def flat(gradient: Any) -> np.ndarray:
    """All leaves in one float64 vector."""
    leaves = jax.tree.leaves(gradient)
    return np.concatenate([np.asarray(u, np.float64).ravel() for u in leaves])


def reference(problem: Problem) -> tuple[np.ndarray, float | None]:
    """The gradient for params and inputs in float64, and ρ(J) if it was iterated."""
    with jax.enable_x64(True):
        make = lambda x: jax.tree.map(jnp.asarray, _wide(x))
        wide = problem._replace(target=make(problem.target))
        args = make((problem.params, problem.inputs))
        solve = _by_lu if problem.dense else _by_iteration
        gradient, rho = jax.jit(partial(solve, wide))(args, make(problem.h0))
        return flat(gradient), None if rho is None else float(rho)


def _by_lu(problem: Problem, args: Any, h: jax.Array) -> tuple[Any, None]:
    """Newton's method, and the adjoint equation, by LU: the steps are affine."""
    step = lambda h: problem.f(*args, h)
    jac = jax.jacobian(step)(h)
    matrix = jnp.eye(len(h)) - jac
    for _ in range(3):  # one, and two to polish
        h = h + jnp.linalg.solve(matrix, step(h) - h)
    z = jnp.linalg.solve(matrix.T, jax.grad(problem.loss)(h))
    return jax.vjp(lambda *args: problem.f(*args, h), *args)[1](z), None


def _by_iteration(problem: Problem, args: Any, h: jax.Array) -> tuple[Any, jax.Array]:
    """Until the iterates stand still to 1e-14, forward and backward.

    ρ(J) is the growth of a random cotangent over the last half of 200 products.
    """
    h = _still(lambda h: problem.f(*args, h), h)
    g = jax.grad(problem.loss)(h)
    _, vjp = jax.vjp(lambda h: problem.f(*args, h), h)
    z = _still(lambda z: g + vjp(z)[0], g)
    gradient = jax.vjp(lambda *args: problem.f(*args, h), *args)[1](z)

    def grow(_: Any, carry: tuple) -> tuple:
        v, growth = carry
        v = vjp(v)[0]
        size = jnp.linalg.norm(v)
        return v / size, growth + jnp.log(size)

    start = (jax.random.normal(jax.random.key(0), h.shape, h.dtype), jnp.zeros(()))
    v, _ = lax.fori_loop(0, 100, grow, start)
    _, growth = lax.fori_loop(0, 100, grow, (v, jnp.zeros(())))
    return gradient, jnp.exp(growth / 100)


def _still(step: Callable[[jax.Array], jax.Array], h: jax.Array) -> jax.Array:
    def moving(carry: tuple) -> jax.Array:
        h, last, k = carry
        return (jnp.linalg.norm(h - last) > 1e-14 * jnp.linalg.norm(h)) & (k < 10_000)

    start = (step(h), h, 0)
    return lax.while_loop(moving, lambda c: (step(c[0]), c[0], c[2] + 1), start)[0]


def error(gradient: Any, exact: np.ndarray) -> float:
    """‖gradient - exact‖ / ‖exact‖, over params and inputs together."""
    return float(np.linalg.norm(flat(gradient) - exact) / np.linalg.norm(exact))


def num_states(problem: Problem) -> int:
    """Entries of the state."""
    return ravel_pytree(problem.h0)[0].size
