"""What a solve says while it runs and when it fails, also from compiled code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from rbpjax._core import tree
from rbpjax._core.strategy import function, option, strategy
from rbpjax.fixed_point.backward.rule import apply_rule
from rbpjax.fixed_point.iterate import relative_change
from rbpjax.types import BackwardRule, LinearMap, PyTree, Solution, Status

OnFailure = Literal["ignore", "warn", "nan", "raise"]
CHOICES = ("ignore", "warn", "nan", "raise")


def check_choice(on_failure: object) -> None:
    """Raises ValueError unless it is one of the four."""
    if not (isinstance(on_failure, str) and on_failure in CHOICES):
        raise ValueError(
            f"`on_failure` must be one of {', '.join(map(repr, CHOICES))}; got "
            f"{on_failure!r}."
        )


def heard(
    solution: Solution,
    on_failure: OnFailure,
    solve: str,
    *,
    truncated: bool = False,
    owner: str = "rbp_solve",
) -> Solution:
    """The solution, once its failure, if it is one, was said or put into its value.

    ``solve``: which solve it is of, in the function ``owner``. A ``truncated`` one
    fails where its residual is above 1: worse than that of zero.
    """
    if on_failure == "ignore":
        return solution
    failed = ~solution.converged
    if truncated:
        failed &= ~(solution.residual <= 1)
    if on_failure == "nan":
        # A factor, so that gradients through the value are NaN as well.
        factor = jnp.where(failed, jnp.nan, 1.0)
        return solution._replace(value=tree.scale(factor, solution.value))
    said = (failed, solution.status, solution.residual, solution.num_steps)
    jax.debug.callback(partial(_say, on_failure, f"{owner}, {solve}"), *said)
    return solution


def _say(
    on_failure: OnFailure,
    solve: str,
    failed: jax.Array,
    status: jax.Array,
    residual: jax.Array,
    num_steps: jax.Array,
) -> None:
    """Warns or raises, on the host; under vmap and scan it is called for each solve."""
    if not failed:
        return
    line = f"{solve}: {_summary(status, residual, num_steps)}"
    if on_failure == "raise":
        raise RuntimeError(line)
    warnings.warn(line, RuntimeWarning, stacklevel=2)


def _summary(status: jax.Array, residual: jax.Array, num_steps: jax.Array) -> str:
    words = Status(int(status)).words
    return f"{words} (residual {float(residual):.2g} after {int(num_steps)} steps)"


class Line:
    """A line of the terminal, or of a notebook's cell, that says how a solve goes.

    One a solve; its counter is the host's, and begins anew where a solve has ended.
    """

    def __init__(self, solve: str, what: str) -> None:
        self.head = f"rbp_solve, {solve}: "
        self.what = what
        self.count = 0

    def next(self, residual: jax.Array | None = None) -> None:
        """Called on the host, once an evaluation."""
        self.count += 1
        size = "" if residual is None else f", residual {float(residual):.2e}"
        self.show(f"{self.count} {self.what}{size}", "\r")

    def ended(self, solution: Solution) -> None:
        """Has the compiled program write the last word."""

        def last(status: jax.Array, residual: jax.Array, num_steps: jax.Array) -> None:
            self.count = 0
            self.show(_summary(status, residual, num_steps), "\n")

        jax.debug.callback(last, solution.status, solution.residual, solution.num_steps)

    def show(self, text: str, end: str) -> None:
        """Writes over what stands there."""
        sys.stdout.write(f"\r{self.head + text:<78}{end}")
        sys.stdout.flush()


def noted(f: Callable[[PyTree], PyTree], line: Line | None) -> Callable:
    """``f``, each of whose calls is a step of the line."""
    if line is None:
        return f

    def said(x: PyTree) -> PyTree:
        made = f(x)
        jax.debug.callback(line.next)
        return made

    return said


def watched(step: Callable[[PyTree], PyTree], line: Line | None) -> Callable:
    """``step``, each of whose evaluations the line shows with its residual."""
    if line is None:
        return step

    def said(h: PyTree) -> PyTree:
        image = step(h)
        jax.debug.callback(line.next, relative_change(image, h))
        return image

    return said


@strategy
class Spoken:
    """A rule with a word on how it goes and ends.

    Attributes:
      rule: it; a start is handed on, and refused where the rule takes none.
      on_failure: what happens where it does not converge.
      line: that shows its products, or None.
    """

    rule: BackwardRule = function(meaning="a backward rule", kw_only=False)
    on_failure: OnFailure = option(check=CHOICES.__contains__, meaning=str(CHOICES))
    line: Line | None = option(
        default=None, check=lambda x: isinstance(x, Line), meaning="a Line, or None"
    )

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        rule, line = self.rule, self.line
        solution = apply_rule(rule, noted(vjp, line), cotangent, start)
        if line is not None:
            line.ended(solution)
        truncated = getattr(rule, "steps", None) is not None
        return heard(solution, self.on_failure, "backward", truncated=truncated)


def speaking(
    rule: BackwardRule, on_failure: OnFailure, line: Line | None = None
) -> BackwardRule:
    """The rule, with a word on how it goes and ends."""
    if on_failure == "ignore" and line is None:
        return rule
    return Spoken(rule, on_failure=on_failure, line=line)
