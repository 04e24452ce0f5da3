"""Random settings (what is compiled) and random problems (what is mapped over)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax
from benchmarks.comparison.fuzz.maps import (
    CODES,
    CURVES,
    PRECISIONS,
    Inputs,
    Layout,
    Precision,
    image,
)
from benchmarks.comparison.fuzz.oracle import Loss
from benchmarks.comparison.jacobians import FAMILIES

Random = np.random.Generator
Forward = rbpjax.ForwardSolver
Backward = rbpjax.BackwardRule


def given(step: Callable, h0: object) -> rbpjax.Solution:
    """A solver of the user's own, which says that h0 is a fixed point."""
    return rbpjax.Solution(
        h0, num_steps=0, num_products=0, residual=0.0, status=0, converged=True
    )


# None is what the library does by itself. Budgets are small, so that some problems are
# out of reach, and must be reported so.
FORWARD: dict[str, Callable[[Random, float | None], Forward | None]] = {
    "default": lambda random, tol: None,
    "FixedPointIteration": lambda _, tol: rbpjax.FixedPointIteration(tol=tol),
    "FixedPointIteration, damped": lambda random, tol: rbpjax.FixedPointIteration(
        tol=tol,
        max_steps=300,
        damping=float(random.uniform(0.1, 0.8)),
        check_every=int(random.integers(1, 5)),
    ),
    "FixedPointIteration(K)": lambda random, _: rbpjax.FixedPointIteration(
        steps=int(random.integers(0, 100))
    ),
    "Anderson": lambda random, tol: rbpjax.Anderson(
        tol=tol, max_steps=300, memory=int(random.integers(1, 8))
    ),
    "RRE": lambda random, tol: rbpjax.RRE(
        tol=tol, max_steps=300, memory=int(random.integers(1, 8))
    ),
    "Newton": lambda random, tol: rbpjax.Newton(
        backward=rbpjax.BiCGSTAB(tol=1e-2, max_steps=50),
        tol=tol,
        max_steps=40,
        warmup=int(random.integers(0, 10)),
    ),
    "given": lambda random, tol: given,
}

# Newer than some versions that may be compared.
if hasattr(rbpjax, "Hybrid"):
    FORWARD["Hybrid"] = lambda _, tol: rbpjax.Hybrid(tol=tol, max_steps=300)
if hasattr(rbpjax, "Broyden"):
    for share in (False, True):
        FORWARD["Broyden" + ", shared" * share] = lambda random, tol, share=share: (
            rbpjax.Broyden(
                tol=tol, max_steps=300, memory=int(random.integers(1, 13)), share=share
            )
        )

BACKWARD: dict[str, Callable[[Random, float | None], Backward | None]] = {
    "default": lambda random, tol: None,
    "Adaptive": lambda _, tol: rbpjax.Adaptive(tol=tol, max_steps=400),
    "Neumann": lambda _, tol: rbpjax.Neumann(tol=tol, max_steps=300),
    "Neumann, damped": lambda random, tol: rbpjax.Neumann(
        tol=tol,
        max_steps=300,
        damping=float(random.uniform(0.1, 0.8)),
        check_every=int(random.integers(1, 5)),
    ),
    "Neumann(K)": lambda random, _: rbpjax.Neumann(steps=int(random.integers(0, 200))),
    "CG": lambda _, tol: rbpjax.CG(tol=tol, max_steps=200),
    "CGNormal": lambda _, tol: rbpjax.CGNormal(tol=tol, max_steps=200),
    "BiCGSTAB": lambda _, tol: rbpjax.BiCGSTAB(tol=tol, max_steps=200),
    "GMRES": lambda random, tol: rbpjax.GMRES(
        tol=tol, max_steps=200, restart=int(random.integers(1, 20))
    ),
    "RBP": lambda random, tol: rbpjax.RBP(
        rbpjax.FixedPointIteration(tol=tol, max_steps=300),
        seed=[None, 0][random.integers(2)],
    ),
    "RBP(Anderson)": lambda random, tol: rbpjax.RBP(
        rbpjax.Anderson(tol=tol, max_steps=200, memory=int(random.integers(1, 8)))
    ),
    "RBP(RRE)": lambda random, tol: rbpjax.RBP(
        rbpjax.RRE(tol=tol, max_steps=200, memory=int(random.integers(1, 8)))
    ),
    "Direct": lambda _, tol: rbpjax.Direct(tol=tol),
}

if hasattr(rbpjax, "Phantom"):
    BACKWARD["Phantom"] = lambda random, _: rbpjax.Phantom(
        steps=int(random.integers(1, 100)), damping=float(random.uniform(0, 0.9))
    )
    BACKWARD["JFB"] = lambda *_: rbpjax.JFB()


class Setting(NamedTuple):
    """What the problems of a group share, which is all that the compiler sees.

    Attributes:
      precision: name in PRECISIONS.
      forward, backward: names in FORWARD and BACKWARD.
      solver, rule: what they made; None for the library's default.
      layout: of the state.
      curves: that the problems may have.
      weights_count: whether the rounding of W inside f counts as error of the gradient.
      warm: whether the rule starts from garbage.
      together: ``vmap`` over the problems, or one after the other.
    """

    precision: str
    forward: str
    backward: str
    solver: Forward | None
    rule: Backward | None
    layout: Layout
    curves: tuple[str, ...]
    weights_count: bool
    warm: bool
    together: bool


def draw_setting(random: Random, number: int, seed: int) -> Setting:
    """The setting of group ``number``: every fourth has both defaults.

    The others go through all pairs of a solver and a rule, in an order of the seed's,
    and both go through all precisions.
    """
    pairs = [(f, b) for f in FORWARD for b in BACKWARD]
    order = np.random.default_rng(seed).permutation(len(pairs))
    count, default = number // 4, number % 4 == 0
    if not default:
        count = number - count - 1
    forward, backward = pairs[order[count % len(pairs)]]
    if default:
        forward = backward = "default"
    name = list(PRECISIONS)[count % len(PRECISIONS)]
    precision = PRECISIONS[name]
    tol = _pick(random, [None] * 7 + [precision.eps**0.5] * 2 + [0.1])
    kind = _pick(random, ["array", "matrix", "leaves", "leaves", "nest", "nest"])
    n = _pick(random, [1, 2, 3, 5, 8, 12, 16, 24])
    if precision.dtype.startswith("complex"):
        n = 2 * max(n // 2, 1)
    length = n // 2 if precision.dtype.startswith("complex") else n
    cuts: tuple[int, ...] = ()
    if kind in ("leaves", "nest") and length > 1:
        many = random.integers(1, min(3, length - 1) + 1)
        inner = random.permutation(np.arange(1, length))[:many]
        cuts = tuple(sorted(int(cut) for cut in inner))
    others = random.permutation([c for c in CURVES if c not in ("affine", "tanh")])
    return Setting(
        precision=name,
        forward=forward,
        backward=backward,
        solver=FORWARD[forward](random, tol),
        rule=BACKWARD[backward](random, tol),
        layout=Layout(n, kind, cuts, precision.dtype),
        curves=("affine", "tanh", str(others[0])),
        weights_count=bool(precision.mantissa and random.integers(2)),
        warm=bool(random.random() < 0.2),
        together=bool(random.random() < 0.9),
    )


class Problem(NamedTuple):
    """A problem, or a batch of them along a first axis: arrays of the state's dtype.

    Attributes:
      params: (W, x).
      inputs: units, curves, b, c.
      loss: coefficients of the loss.
      h0: the start, in units.
      garbage: where the adjoint starts, if it does not start cold.
      family: number of the Jacobian's family in JACOBIANS.
      nonlinear: whether any curve is none of "affine".
      nowhere: whether it is known to have no fixed point.
      scaled: whether leaves have units.
    """

    params: tuple[np.ndarray, np.ndarray]
    inputs: Inputs
    loss: Loss
    h0: np.ndarray
    garbage: np.ndarray
    family: np.ndarray
    nonlinear: np.ndarray
    nowhere: np.ndarray
    scaled: np.ndarray


def _basis(random: Random, n: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(n, n)))[0]


def _given_values(random: Random, n: int) -> np.ndarray:
    """I - J has given singular values, up to a condition of 1e8."""
    sigma = 10.0 ** -np.linspace(0, random.uniform(0, 8), n)
    return np.eye(n) - (_basis(random, n) * sigma) @ _basis(random, n)


def _nearly_singular(random: Random, n: int) -> np.ndarray:
    """Eigenvalues within ±0.9, and one that is nearly 1."""
    values = random.uniform(-0.9, 0.9, n)
    values[0] = 1 - 10.0 ** random.uniform(-8, -1)
    q = np.eye(n) + 0.3 * random.normal(size=(n, n)) / n**0.5
    return q @ np.diag(values) @ np.linalg.inv(q)


def _low_rank(random: Random, n: int) -> np.ndarray:
    rank = random.integers(1, max(n // 4, 1) + 1)
    a = random.normal(size=(n, rank)) @ random.normal(size=(rank, n))
    return a * random.uniform(0.1, 5) / max(np.linalg.norm(a, 2), 1e-3)


JACOBIANS: dict[str, Callable[[Random, int], np.ndarray]] = FAMILIES | {
    "given singular values of I - J": _given_values,
    "one eigenvalue near 1": _nearly_singular,
    "multiple of I": lambda random, n: (
        np.eye(n) * (1 - random.choice([-1, 1]) * 10.0 ** random.uniform(-6, 1))
    ),
    "orthogonal, 1 - 1e-6 to 0.5": lambda random, n: (
        _basis(random, n) * (1 - 10.0 ** random.uniform(-6, -0.3))
    ),
    "low rank": _low_rank,
    "Gaussian, gain to 3": lambda random, n: (
        random.normal(size=(n, n)) / n**0.5 * random.uniform(0, 3)
    ),
    "zero": lambda random, n: np.zeros((n, n)),
    "× 30": lambda random, n: random.normal(size=(n, n)) / n**0.5 * 30,
    "descent, condition to 1e6": lambda random, n: (
        np.eye(n) - _definite(random, n, random.uniform(0, 6))
    ),
}


def _definite(random: Random, n: int, decades: float) -> np.ndarray:
    q = _basis(random, n)
    return (q * 10.0 ** -np.linspace(0, decades, n)) @ q.T


def draw_problems(random: Random, setting: Setting, size: int) -> Problem:
    """``size`` problems of a setting, stacked."""
    drawn = [_draw(random, setting) for _ in range(size)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
    real = PRECISIONS[setting.precision].real
    cast = lambda v: np.asarray(jnp.asarray(v, real)) if v.dtype == np.float64 else v
    return jax.tree.map(cast, stacked)


def _draw(random: Random, setting: Setting) -> Problem:
    precision, n = PRECISIONS[setting.precision], setting.layout.n
    leaf = setting.layout.leaf
    family = random.integers(len(JACOBIANS))
    # Not all of the families have a member of one number.
    jac = list(JACOBIANS.values())[family](random, max(n, 2))[:n, :n]
    if precision.dtype.startswith("complex") and random.random() < 0.3:
        jac = _complex_linear(random, jac)
    jac = _coupled(random, jac, leaf)
    unit = np.ones(n)
    scaled = bool(leaf[-1] > 0 and random.random() < 0.7)
    if scaled:
        d = precision.decades
        unit = 10.0 ** random.uniform(-d, d, leaf[-1] + 1)[leaf]
    curves = _curves(random, setting.curves, n)
    code = np.array([CODES[c] for c in curves])
    nonlinear = bool((code != CODES["affine"]).any())
    planned = setting.forward == "given" or random.random() < 0.6
    u = random.uniform(-2, 2, n)
    zero = random.integers(0, leaf[-1] + 1)
    if random.random() < 0.1:
        u[leaf == zero] = 0  # a leaf that tends to zero
    b, c = np.zeros(n), np.zeros(n)
    if planned:
        a, slope = _anchors(random, curves)
        w = jac / np.where(np.abs(slope) > 1e-3, slope, 1)[:, None]
        x = a - w @ u
        inputs = Inputs(unit, code, b, c)
        c = u - image((w[None], x[None]), _batch(inputs), u[None])[0][0]
    else:
        w, x = jac, random.normal(size=n) * random.choice([0.3, 1, 3])
        a = w @ u + x
    nowhere = False
    if setting.forward != "given" and random.random() < 0.04:
        code, w, x, b, c = _without_fixed_point(random, setting.curves, n)
        nowhere, nonlinear = True, bool((code != CODES["affine"]).any())
    start = _start(random, u, unit, setting.forward == "given", precision)
    loss, size = _loss(random, unit, leaf, precision)
    garbage = random.normal(size=n) * 10.0 ** random.uniform(-6, 6) * size
    garbage *= random.choice([0.0, 1.0, 1.0, 1.0])
    if precision.dtype == "float16":
        garbage = np.clip(garbage, -6e4, 6e4)
    return Problem(
        (w, x),
        Inputs(unit, code, b, c),
        loss,
        start * unit,
        garbage,
        *map(np.asarray, (family, nonlinear, nowhere, scaled)),
    )


def _batch(inputs: Inputs) -> Inputs:
    return Inputs(*(v[None] for v in inputs))


def _complex_linear(random: Random, jac: np.ndarray) -> np.ndarray:
    """A complex matrix as one of pairs: a quarter of ``jac``, times a phase."""
    m = len(jac) // 2
    angle = random.uniform(0, 2 * np.pi)
    re, im = np.cos(angle) * jac[:m, :m], np.sin(angle) * jac[:m, :m]
    return np.block([[re, -im], [im, re]])


def _coupled(random: Random, jac: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    """All leaves with each other, not at all, or in a chain; or examples of a batch."""
    how = random.integers(5)
    if how == 0:
        leaf = np.cumsum(random.random(len(leaf)) < 0.3)  # examples of several lengths
    to, of = leaf[:, None], leaf[None, :]
    if how <= 1:
        return np.where(to == of, jac, 0)
    if how == 2:
        return np.where((to == of) | (to == of + 1), jac, 0)
    return jac


def _curves(random: Random, names: tuple[str, ...], n: int) -> list[str]:
    """One curve for all entries, or one for each."""
    how = random.random()
    if how < 0.2:
        return ["affine"] * n
    if how < 0.75:
        return [_pick(random, names[1:])] * n
    return [_pick(random, names) for _ in range(n)]


def _anchors(random: Random, curves: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where the curves of a planned fixed point are, and their slopes there."""
    a, slope = [], []
    for name in curves:
        curve = CURVES[name]
        value = random.uniform(curve.low, curve.high)
        value *= random.choice([-1, 1]) if curve.signed else 1
        a.append(value)
        slope.append(float(curve.slope(np.array([value]))[0]))
    return np.array(a), np.array(slope)


def _without_fixed_point(
    random: Random, names: tuple[str, ...], n: int
) -> tuple[np.ndarray, ...]:
    """A map that has none, because its first entry has none by itself.

    That one is u + exp(-u), softplus(u), √(1 + u²), u² + 1 or u + something.
    """
    # Of W, b and c, for that entry.
    known = {
        "affine": (1, 0, 10.0 ** random.uniform(-3, 0)),
        "decay": (1, 1, 0),
        "softplus": (1, 0, 0),
        "hyperbola": (1, 0, 0),
        "square": (1, 0, 1),
    }
    name = _pick(random, [c for c in names if c in known])
    w, x = 0.3 * random.normal(size=(n, n)) / n**0.5, np.zeros(n)
    b, c = np.zeros(n), np.zeros(n)
    w[0] = 0
    w[0, 0], b[0], c[0] = known[name]
    return np.full(n, CODES[name]), w, x, b, c


def _start(
    random: Random, u: np.ndarray, unit: np.ndarray, given: bool, precision: Precision
) -> np.ndarray:
    """Where the solver starts, without units."""
    noise = random.normal(size=len(u))
    if given:  # mostly true
        off = [0, 0, 0, 10.0 ** random.uniform(-6, 0)][random.integers(4)]
        return u + off * noise
    how = random.integers(6)
    if how == 0:
        return u + 10.0 ** random.uniform(-6, 0) * noise
    if how == 1:
        return noise
    if how == 2:  # much too large
        return noise * 10.0 ** random.uniform(0, 2 if precision.decades < 8 else 6)
    if how == 3:  # 1 in every unit
        return 1 / unit
    return np.zeros(len(u))


def _loss(
    random: Random, unit: np.ndarray, leaf: np.ndarray, precision: Precision
) -> tuple[Loss, np.ndarray]:
    """A loss, and about the size of its cotangent.

    Leaves have weights 1e±4 for one another in some, and units count or do not.
    """
    n = len(unit)
    dual = 1 / unit if random.random() < 0.7 else np.ones(n)
    half = precision.decades < 8
    if random.random() < 0.3 and not half:
        dual = dual * 10.0 ** random.uniform(-4, 4, leaf[-1] + 1)[leaf]
    quadratic = random.random() < 0.4
    most = 1 if half else 5 if quadratic else 15
    size = dual * 10.0 ** (random.uniform(-most, most) * random.choice([0, 0, 1]))
    g = size * random.normal(size=n) * random.choice([1, 1, 1, 0], size=n)
    q = size / unit * random.uniform(0, 1, n) if quadratic else np.zeros(n)
    return Loss(g, q), size


def _pick(random: Random, choices: Any) -> Any:
    return choices[random.integers(len(choices))]
