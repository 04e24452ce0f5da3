"""One side of ``before-after``: gradients by the library that this process has loaded.

A process of its own for each checkout. It reads a line of JSON, does what it says, and
answers with a line of JSON, so that it is still while the other side is on the clock.
Only what version 0.1.0 has too may be used here, and in ``peers`` and ``problems``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import rbpjax
from benchmarks.comparison.method import Program, Refused, Setting, gradient
from benchmarks.comparison.peers import methods, steps
from benchmarks.comparison.problems import PROBLEMS, Problem, error, reference


class Side:
    """The programs of one problem, compiled as they are asked for."""

    def __init__(self, name: str) -> None:
        self.problem: Problem = PROBLEMS[name][1]()
        self.exact = reference(self.problem)[0]
        self.made = {m.name: m for m in methods() if m.library == "rbpjax"}
        self.programs: dict[str, Program] = {}

    def prepare(self, method: str, setting: list[float]) -> dict[str, Any]:
        """Compiles; the error, the steps and the seconds of a warm call."""
        at = Setting(*setting)
        try:
            program = self.made[method].program(self.problem, at)
            found = error(gradient(program.call()), self.exact)
            counts = steps(method, self.problem, at)
        except Refused as why:
            return {"refused": str(why)}
        self.programs[method] = program
        seconds = min(self.time(method, 1)["seconds"] for _ in range(3))
        return {"error": found, "steps": counts, "seconds": seconds}

    def time(self, method: str, times: int) -> dict[str, Any]:
        """Seconds of a call, of so many one after the other."""
        call = self.programs[method].call
        start = time.perf_counter()
        for _ in range(times):
            jax.block_until_ready(call())
        return {"seconds": (time.perf_counter() - start) / times}


def serve() -> None:
    """Answers until there is nothing more to read."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else writes between them
    say = lambda answer: print(json.dumps(answer), file=answers, flush=True)
    side: Side | None = None
    for line in sys.stdin:
        action, *arguments = json.loads(line)
        if action == "library":
            folder = str(Path(rbpjax.__file__).parent)
            say({"folder": folder, "version": rbpjax.__version__})
        elif action == "problem":
            side = Side(*arguments)
            say({})
        else:
            asked: Callable = getattr(side, action)
            say(asked(*arguments))
