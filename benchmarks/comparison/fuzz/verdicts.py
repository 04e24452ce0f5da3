"""What is counted: each verdict beside the true error of its gradient.

With the error of the whole gradient, relative to its norm, and the accuracy √ε_f that a
verdict of converged stands for, a problem is

* *silent* if it is called converged with an error above 10 × accuracy,
* *exceeded* if a bound is stated and the error is above 10 × the bound, the rounding of
  f's own slopes left aside,
* a *false alarm* if it is not called converged and its error is below the accuracy.

A problem without any fixed point near the value found has an infinite error, unless its
loss is constant. A problem is not judged if its dense answer is itself too uncertain,
or if the derivatives of its curves are lost in rounding (a saturated tanh), which no
evaluation of f shows; nor where the loss's cotangent is exactly zero at the value
found: a backward rule sees nothing else of a loss. *Forward wrong* is a solution called
converged that is further from a fixed point than 10 ε^(2/5) in some leaf, relative to
its size or to 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax
from benchmarks.comparison.fuzz.draws import JACOBIANS, Problem, Setting
from benchmarks.comparison.fuzz.maps import PRECISIONS, Inputs
from benchmarks.comparison.fuzz.oracle import Answer, Loss, answer
from benchmarks.comparison.fuzz.solving import Found

MARGIN = 10.0
"""What an error may exceed its bound or its accuracy by."""
CERTAIN = 0.1
"""Of the accuracy: what the uncertainty of a dense answer may be."""
COLUMNS = (
    "problems",
    "judged",
    "right",
    "converged",
    "silent",
    "stated",
    "exceeded",
    "alarms",
    "alarms, error < accuracy / 10",
    "forward converged",
    "forward wrong",
)


class Outcome(NamedTuple):
    """The verdict and the truth of the problems of a group, one entry a problem.

    Attributes:
      error: of the gradient, relative to its norm.
      bound: what was stated; infinite if nothing was.
      converged: the verdict.
      status: its reason, a ``Status``.
      forward: whether the solution alone says converged.
      moved: how far the fixed point is from the value found, in the worst leaf.
      judged: whether the dense answer is good enough.
      lost: the part of the error that may be the answer's, or that of f's own slopes.
      family, nonlinear, nowhere, scaled: as in ``Problem``.
    """

    error: np.ndarray
    bound: np.ndarray
    converged: np.ndarray
    status: np.ndarray
    forward: np.ndarray
    moved: np.ndarray
    judged: np.ndarray
    lost: np.ndarray
    family: np.ndarray
    nonlinear: np.ndarray
    nowhere: np.ndarray
    scaled: np.ndarray


def dense(setting: Setting, problems: Problem, found: Found) -> Answer:
    """The dense answers, for the numbers that f was given."""
    wide = lambda v: v if v.dtype.kind == "i" else np.asarray(v, np.float64)
    w, x = problems.params
    mantissa = PRECISIONS[setting.precision].mantissa
    if mantissa is not None and not setting.weights_count:
        w = np.asarray(jax.lax.reduce_precision(w, 8, mantissa))
    inputs = Inputs(*map(wide, problems.inputs))
    with np.errstate(all="ignore"):
        u = found.h / inputs.unit
    return answer((wide(w), wide(x)), inputs, Loss(*map(wide, problems.loss)), u)


def judge(setting: Setting, problems: Problem, found: Found) -> Outcome:
    """Compares what was found with the dense answers."""
    right = dense(setting, problems, found)
    with np.errstate(all="ignore"):
        error = _error(found.grads, right.grads)
        moved = _moved(setting, problems, found, right)
    known = right.found & ~problems.nowhere
    # Where the loss is constant, zero is right, with or without a fixed point.
    constant = ~np.any([np.asarray(part, bool).any(1) for part in problems.loss], 0)
    zero = np.all([(p.reshape(len(p), -1) == 0).all(1) for p in found.grads], 0)
    otherwise = np.where(constant & zero, 0.0, np.inf)
    g, q = (np.asarray(part, np.float64) for part in problems.loss)
    unseen = ~constant & zero & (g + q * found.h == 0).all(1)
    precision = PRECISIONS[setting.precision]
    blur = right.blur * float(jnp.finfo(precision.real).eps)
    certain = right.uncertainty <= CERTAIN * precision.accuracy
    certain &= blur <= precision.accuracy
    return Outcome(
        error=np.where(known, error, otherwise),
        bound=found.bound,
        converged=found.converged,
        status=found.status,
        forward=found.forward,
        moved=np.where(known, moved, np.inf),
        judged=(certain | ~known) & ~unseen,
        lost=np.where(known, right.uncertainty + blur, 0),
        family=problems.family,
        nonlinear=problems.nonlinear,
        nowhere=problems.nowhere,
        scaled=problems.scaled,
    )


def _error(found: tuple, right: tuple) -> np.ndarray:
    """Of the whole gradient; infinite where it is not finite."""
    flat = lambda parts: np.concatenate([p.reshape(len(p), -1) for p in parts], 1)
    a, b = flat(found), flat(right)
    top = np.abs(b).max(1, keepdims=True)
    top = np.where(top > 0, top, 1)
    off = np.linalg.norm(((a - b) / top).astype(float), axis=1)
    length = np.linalg.norm((b / top).astype(float), axis=1)
    error = np.where(off == 0, 0.0, off / length)  # 0 for 0 is right
    return np.where(np.isnan(error), np.inf, error)


def _moved(
    setting: Setting, problems: Problem, found: Found, right: Answer
) -> np.ndarray:
    """Largest over leaves of the distance, relative to the leaf's norm or to 1."""
    u = found.h / np.asarray(problems.inputs.unit, np.float64)
    worst = np.zeros(len(u))
    for leaf in range(setting.layout.leaf.max() + 1):
        mine = setting.layout.leaf == leaf
        far = np.linalg.norm((u - right.u)[:, mine].astype(float), axis=1)
        size = np.linalg.norm(right.u[:, mine].astype(float), axis=1)
        worst = np.maximum(worst, far / np.maximum(size, 1))
    return np.where(np.isnan(worst), np.inf, worst)


def summary(outcome: Outcome, settings: list[Setting]) -> dict[str, Any]:
    """Counts by kind, precision, solver, rule and family, and the worst problems.

    ``outcome`` has a row a group. What can be replayed is named ``group:problem``.
    """
    shape = outcome.error.shape
    spread = lambda values: np.broadcast_to(np.array(values)[:, None], shape)
    accuracy = spread([PRECISIONS[s.precision].accuracy for s in settings])
    family = np.array(list(JACOBIANS))[outcome.family.astype(int)]
    solved = spread([s.forward != "given" for s in settings])
    given = np.where(solved, "", ", h* given")
    kind = np.char.add(np.where(outcome.nonlinear == 1, "nonlinear", "affine"), given)
    kind = np.where(np.isinf(outcome.moved), "no fixed point near the value", kind)
    kind = np.where(outcome.nowhere == 1, "no fixed point", kind)
    axes = {
        "kind": kind,
        "precision": spread(
            [s.precision + ", W counts" * s.weights_count for s in settings]
        ),
        "units": np.where(outcome.scaled == 1, "by leaf", "one"),
        "forward": spread([s.forward for s in settings]),
        "backward": spread([s.backward for s in settings]),
        "both": spread([f"{s.forward} / {s.backward}" for s in settings]),
        "adjoint's start": spread(["garbage" if s.warm else "g" for s in settings]),
        "run": spread(["vmap" if s.together else "one by one" for s in settings]),
        "Jacobian": family,
        "status": _names(outcome.status),
    }
    masks = faults(outcome, accuracy)
    every = np.ones(shape, bool)
    return {
        "columns": list(COLUMNS),
        "all": _counts(masks, every),
        **{
            f"by {axis}": {
                str(name): _counts(masks, labels == name) for name in np.unique(labels)
            }
            for axis, labels in axes.items()
        },
        "error / bound, where stated": _quantiles(outcome, masks),
        "worst": {
            fault: {
                axis: _worst(fault, outcome, accuracy, masks, axes, axis)
                for axis in ("precision", "kind")
            }
            for fault in ("silent", "exceeded", "alarms")
        },
    }


def faults(outcome: Outcome, accuracy: np.ndarray) -> dict[str, np.ndarray]:
    """Which problem belongs into which column."""
    judged, said = outcome.judged == 1, outcome.converged == 1
    stated = np.isfinite(outcome.bound) & judged
    error, solved = outcome.error, outcome.forward == 1
    near = accuracy**0.8  # ε^(2/5), above √ε
    return {
        "problems": np.ones(error.shape, bool),
        "judged": judged,
        "right": judged & (error <= accuracy),
        "converged": judged & said,
        "silent": judged & said & ~(error <= MARGIN * accuracy),
        "stated": stated,
        "exceeded": stated & ~(error <= MARGIN * outcome.bound + outcome.lost),
        "alarms": judged & ~said & (error <= accuracy),
        "alarms, error < accuracy / 10": judged & ~said & (error <= accuracy / 10),
        "forward converged": judged & solved,
        "forward wrong": judged & solved & ~(outcome.moved <= MARGIN * near),
    }


def _names(status: np.ndarray) -> np.ndarray:
    """Words for a report's status, which is a float; of several, none."""
    words = {float(s): s.name.lower().replace("_", " ") for s in rbpjax.Status}
    return np.vectorize(lambda s: words.get(s, "unknown"), otypes=[object])(status)


def _counts(masks: dict[str, np.ndarray], mine: np.ndarray) -> list[int]:
    return [int((masks[column] & mine).sum()) for column in COLUMNS]


def _quantiles(outcome: Outcome, masks: dict[str, np.ndarray]) -> dict[str, float]:
    stated = masks["stated"]
    if not stated.any():
        return {}
    with np.errstate(all="ignore"):
        ratio = outcome.error[stated] / np.maximum(outcome.bound[stated], 1e-300)
    marks = {"1 %": 0.01, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99}
    return {name: float(np.quantile(ratio, q)) for name, q in marks.items()} | {
        "largest": float(ratio.max())
    }


def _worst(
    fault: str,
    outcome: Outcome,
    accuracy: np.ndarray,
    masks: dict[str, np.ndarray],
    axes: dict[str, np.ndarray],
    axis: str,
) -> dict[str, dict[str, Any]]:
    """The worst problem of a fault for each label, where there is any.

    That of false alarms has the least error.
    """
    with np.errstate(all="ignore"):
        badness = outcome.error / (outcome.bound if fault == "exceeded" else accuracy)
    if fault == "alarms":
        badness = 1 / np.maximum(badness, 1e-30)
    badness = np.where(np.isnan(badness), np.inf, badness)
    worst = {}
    for name in np.unique(axes[axis]):
        mine = masks[fault] & (axes[axis] == name)
        if mine.any():
            i, j = np.unravel_index(np.argmax(np.where(mine, badness, -1)), mine.shape)
            worst[str(name)] = {
                "replay": f"{i}:{j}",
                "error": float(outcome.error[i, j]),
                "bound": float(outcome.bound[i, j]),
                "accuracy": float(accuracy[i, j]),
                "solver / rule": str(axes["both"][i, j]),
                "Jacobian": str(axes["Jacobian"][i, j]),
            }
    return worst
