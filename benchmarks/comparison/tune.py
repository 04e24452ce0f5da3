"""Each method's loosest setting that meets an error: a search by the error it gives.

The error of a gradient is nearly proportional to the tolerance, and decays
geometrically with the number of unrolled steps, so that a few trials bracket a target.
What is looser is never slower: choosing needs no clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.comparison.method import Method, Program, Refused, Setting, gradient
from benchmarks.comparison.peers import DEFAULT
from benchmarks.comparison.problems import Problem, error

TARGETS = (1e-3, 1e-5)
"""Relative gradient errors."""
HOPELESS = 8.0
"""A method that takes so many times the best time so far is tried no further."""
TRIALS = 3
LOOSEST = 0.3
FINEST = 1e-7
"""The last tolerance to try where tighter ones change nothing: about 1 ε."""


class Sweep:
    """The trials of one method on one problem: settings, errors, times, programs."""

    def __init__(self, method: Method, problem: Problem, exact: np.ndarray):
        """Nothing is run yet."""
        self.method, self.problem, self.exact = method, problem, exact
        self.points: dict[Setting, dict[str, float]] = {}
        self.programs: dict[Setting, Program] = {}
        self.failure: str | None = None

    def search(self, best: float) -> None:
        """Tries settings for each target, unless one run takes far above ``best``."""
        look = self._steps if self.method.unrolled else self._tolerances
        try:
            for target in TARGETS:
                look(target, best)
        except Refused as why:
            self.failure = str(why)

    def polish(self) -> None:
        """Loosens the two tolerances one by one as far as each target allows.

        As often as it goes: a method that leaps passes a target by far or not at all.
        """
        if self.method.unrolled:
            return
        for target in TARGETS:
            for looser in (Setting(4, 1), Setting(1, 4), Setting(2, 1), Setting(1, 2)):
                while self._loosened(target, looser):
                    pass

    def _loosened(self, target: float, factors: Setting) -> bool:
        """Tries the chosen tolerances times these; whether the error allows it."""
        now = self.chosen(target)
        if now is None:
            return False
        pair = zip(now, factors, strict=True)
        setting = Setting(*(_round(a * b) for a, b in pair))
        try:
            return max(setting) <= LOOSEST and self.trial(setting)["error"] <= target
        except Refused:  # too loose for the library, which has met the error before
            return False

    def chosen(self, target: float) -> Setting | None:
        """The loosest setting tried whose error is at most ``target``."""
        good = [s for s, p in self.points.items() if p["error"] <= target]
        loosest = lambda s: s.forward * s.backward
        if not good:
            return None
        return (
            min(good, key=loosest) if self.method.unrolled else max(good, key=loosest)
        )

    def trial(self, setting: Setting) -> dict[str, float]:
        """Compiles and runs a setting, up to three times if it is quick."""
        if setting not in self.points:
            program = self.method.program(self.problem, setting)
            try:
                result = program.call()
                jax.block_until_ready(result)
            except Exception as failure:  # what a library raises is its own affair
                raise Refused(f"{type(failure).__name__}: {_line(failure)}") from None
            seconds: list[float] = []
            while len(seconds) < 3 and sum(seconds) < 0.3:
                start = time.perf_counter()
                jax.block_until_ready(program.call())
                seconds.append(time.perf_counter() - start)
            found = error(gradient(result), self.exact)
            self.points[setting] = {
                "error": found if math.isfinite(found) else math.inf,
                "seconds": min(seconds),
                "compile_s": program.compile_s,
                "bytes": program.bytes,
            }
            self.programs[setting] = program
        return self.points[setting]

    def _tolerances(self, target: float, best: float) -> None:
        """Follows the error, in proportion to the tolerance, to just below target."""
        known = [(s.forward, p["error"]) for s, p in self.points.items()]
        tol, before = 0.2 * target, math.inf
        if known and math.isfinite(known[-1][1]):
            tol = known[-1][0] * target / known[-1][1]
        for trial in range(TRIALS):
            tol = _round(min(max(tol, 1e-9), LOOSEST))
            now = self.trial(Setting(tol, tol))
            if now["seconds"] > HOPELESS * best:
                return
            found = now["error"]
            if found <= target and (found > 0.15 * target or trial > 0):
                return
            if found > max(target, 0.8 * before):  # tighter, but no better
                if tol > FINEST:  # methods that leap do not follow the proportion
                    self.trial(Setting(FINEST, FINEST))
                return
            before = found if found > target else math.inf
            # From nothing at all, a hundredth; else a little beyond the target.
            tol *= 0.6 * target / found if found < 1 else 0.01

    def _steps(self, target: float, best: float) -> None:
        """Doubles the steps to the target; then once by interpolation of log error."""
        count, last = 10, None
        while count <= self.problem.budget:
            now = self.trial(_unrolled(count))
            if now["seconds"] > HOPELESS * best or not now["error"] < 1e3:
                return
            if now["error"] <= target:
                break
            last, count = (count, now["error"]), 2 * count
        if last is not None and now["error"] <= target:
            slope = math.log(last[1] / max(now["error"], 1e-7)) / (count - last[0])
            count = math.ceil(last[0] + 1.05 * math.log(last[1] / target) / slope)
            self.trial(_unrolled(count))


def _unrolled(count: int) -> Setting:
    """So many steps, of which TBPTT keeps three in four."""
    return Setting(count, math.ceil(0.75 * count))


def _round(tol: float) -> float:
    return float(f"{tol:.1e}")


def _line(failure: Exception) -> str:
    """The last line that says something of a library's own error."""
    lines = [line.strip() for line in str(failure).splitlines()]
    told = [line for line in lines if "Error: " in line] or lines or [""]
    return told[-1].split("Error: ")[-1][:120]


def sweep_all(
    methods: list[Method],
    problem: Problem,
    exact: np.ndarray,
    watch: Callable[[list[Method]], Any],
) -> dict[str, Sweep]:
    """Searches with every method, and polishes those that may be the fastest."""
    sweeps: dict[str, Sweep] = {}
    best = math.inf
    for method in watch(methods):
        sweep = sweeps[method.name] = Sweep(method, problem, exact)
        sweep.search(best)
        chosen = sweep.chosen(TARGETS[0])
        if chosen is not None:
            best = min(best, sweep.points[chosen]["seconds"])
    for name in contenders(sweeps):
        sweeps[name].polish()
    return sweeps


def contenders(sweeps: dict[str, Sweep]) -> list[str]:
    """The default, and the fastest two methods of each library at each target."""
    found = {DEFAULT} & set(sweeps)
    for library in {sweep.method.library for sweep in sweeps.values()}:
        for target in TARGETS:
            chosen = {
                name: sweep.points[setting]["seconds"]
                for name, sweep in sweeps.items()
                if sweep.method.library == library
                and (setting := sweep.chosen(target)) is not None
            }
            found |= set(sorted(chosen, key=chosen.__getitem__)[:2])
    return sorted(found)
