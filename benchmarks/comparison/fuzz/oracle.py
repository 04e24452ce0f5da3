"""Dense answers in float64 and beyond: the fixed point near a value, and the gradient.

Damped Newton in float64 from the value found, then steps whose residual is in NumPy's
longest float (64 bits of mantissa on x86), since a gradient in float64 is to be judged
where κ² roundings of float64 exceed what it promises.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.comparison.fuzz.maps import CURVES, Inputs, image, jacobian

LONG = np.longdouble
EPS = float(np.finfo(LONG).eps)
LENGTHS = 0.5 ** np.arange(14)  # of a Newton step

Params = tuple[np.ndarray, np.ndarray]


class Answer(NamedTuple):
    """The fixed point near a value, and the gradient there, of a batch of problems.

    Attributes:
      u: the fixed point, without units.
      found: whether it is one.
      grads: of W and x.
      uncertainty: what the rounding of this very answer may come to, relative.
      blur: the relative error of the gradient for each ε in the slopes of curves, as
        far as these are only known absolutely.
      amplification: (1 + ‖J‖) ‖(I - J)⁻¹‖.
    """

    u: np.ndarray
    found: np.ndarray
    grads: Params
    uncertainty: np.ndarray
    blur: np.ndarray
    amplification: np.ndarray


class Loss(NamedTuple):
    """L(h) = ⟨g, h⟩ + ½⟨h, q ∘ h⟩, by its coefficients."""

    g: np.ndarray
    q: np.ndarray


def answer(params: Params, inputs: Inputs, loss: Loss, u: np.ndarray) -> Answer:
    """The dense answers for problems whose values found are ``u``."""
    with np.errstate(all="ignore"):
        return _answer(params, inputs, loss, u)


def _answer(params: Params, inputs: Inputs, loss: Loss, u: np.ndarray) -> Answer:
    long_params = tuple(p.astype(LONG) for p in params)
    long_inputs = Inputs(
        *(v if v.dtype.kind == "i" else v.astype(LONG) for v in inputs)
    )
    u = _newton(params, inputs, np.nan_to_num(u.astype(float), posinf=0, neginf=0))
    u = u.astype(LONG)
    for _ in range(6):
        value, slope = image(long_params, long_inputs, u)
        jac = jacobian(long_params, long_inputs, slope)
        d = _solve(jac, value - u)
        u = np.where(np.isfinite(d).all(1, keepdims=True), u + d, u)
    value, slope = image(long_params, long_inputs, u)
    jac = jacobian(long_params, long_inputs, slope)
    size = np.maximum(np.abs(u), np.abs(value)).max(1)
    left = np.abs(value - u).max(1)
    # Curves and sums may be as large as they like inside of F; 1 is their usual size.
    found = left <= 1e-13 * np.maximum(size, 1)
    unit = inputs.unit.astype(LONG)
    g = unit * (loss.g.astype(LONG) + loss.q.astype(LONG) * unit * u)
    scale = np.abs(g).max(1, keepdims=True)
    scale = np.where(scale > 0, scale, 1)
    z = _solve(np.swapaxes(jac, 1, 2), g / scale)
    x_bar = slope * z
    w_bar = x_bar[:, :, None] * u[:, None, :]
    sigma = _singular_values(np.eye(u.shape[1]) - jac.astype(float))
    norm = _singular_values(jac.astype(float))[:, 0]
    amplification = (1 + norm) / np.where(sigma[:, -1] > 0, sigma[:, -1], 1e-300)
    # An error e of z is one of up to ‖φ'‖ ‖(u, 1)‖ e in the gradient, ‖x_bar‖ ‖(u, 1)‖.
    length = _norm(x_bar)
    relative = lambda e: np.where(e == 0, 0, e / length).astype(float)
    rounding = 10 * EPS * amplification * np.maximum(amplification, 1)
    uncertainty = rounding * relative(np.abs(slope).max(1) * _norm(z))
    blurs = np.array([curve.blur for curve in CURVES.values()])[inputs.code]
    blur = relative(_norm(blurs * z))
    grads = w_bar * scale[:, :, None], x_bar * scale
    return Answer(u, found, grads, uncertainty, blur, amplification)


def _norm(v: np.ndarray) -> np.ndarray:
    return np.sqrt((v * v).sum(1))


def _newton(params: Params, inputs: Inputs, u: np.ndarray) -> np.ndarray:
    """Damped Newton on u - F(u) in float64, each problem until it gains no more."""
    going = np.arange(len(u))
    for _ in range(80):
        if not len(going):
            break
        p = tuple(part[going] for part in params)
        i = Inputs(*(part[going] for part in inputs))
        now = u[going]
        value, slope = image(p, i, now)
        r = value - now
        merit = np.linalg.norm(r, axis=1)
        d = _solve(jacobian(p, i, slope), r, passes=0)
        trial = now + LENGTHS[:, None, None] * d
        after = np.linalg.norm(image(p, i, trial)[0] - trial, axis=2)
        better = after < (1 - 1e-4 * LENGTHS[:, None]) * merit
        first = better.argmax(0)  # the longest step that is better
        some = better.any(0)
        u[going[some]] = trial[first[some], np.flatnonzero(some)]
        # A float64 rounding of zero is left to the steps that follow.
        done = after[first, np.arange(len(first))] <= 1e-15 * np.linalg.norm(
            now, axis=1
        )
        going = going[some & ~done]
    return u


def _solve(jac: np.ndarray, r: np.ndarray, passes: int = 3) -> np.ndarray:
    """(I - J)⁻¹ r by an inverse in float64, refined in the precision of J."""
    matrix = np.eye(jac.shape[-1]) - jac
    wide = matrix.astype(float)
    bad = ~np.isfinite(wide).all((1, 2))
    wide[bad] = np.eye(jac.shape[-1])
    try:
        inverse = np.linalg.inv(wide)
    except np.linalg.LinAlgError:  # exactly singular, one or more
        inverse = np.linalg.pinv(wide)
    apply = lambda m, v: np.einsum("bij,bj->bi", m, v)
    d = apply(inverse, r)
    for _ in range(passes):
        d = d + apply(inverse, r - apply(matrix, d))
    d[bad] = np.nan
    return d


def _singular_values(matrix: np.ndarray) -> np.ndarray:
    bad = ~np.isfinite(matrix).all((1, 2))
    return np.linalg.svd(np.where(bad[:, None, None], 0, matrix), compute_uv=False)
