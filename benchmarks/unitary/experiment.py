"""Norm-preserving recurrence: what it costs, what it keeps, what it learns.

Parts: `cost` (is the parametrisation as cheap as one iteration?), `norms` (state and
gradient over 10,000 steps, against plain and orthogonally initialised convolutional
RNNs), `memory` (stored, checkpointed and recomputed histories against T), and the
tasks `copying`, `adding` and `digits` against an LSTM and a dense expRNN; and
`copying-long` and `adding-long`, copying at twice the delay and the adding problem at
four times the length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from benchmarks.data import sequences
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Dataset, OneOf, Seeds, Within
from benchmarks.harness.progress import say
from benchmarks.harness.results import record, write_json
from benchmarks.harness.tables import mean_std, table
from benchmarks.unitary import costs, networks, report
from benchmarks.unitary.learning import Training, learn
from benchmarks.unitary.report import TITLES
from rbpjax.unitary.activation import Activation, identity, modulus, saturate

TASKS = ("copying", "copying-long", "adding", "adding-long", "digits")
PARTS = ("cost", "norms", "memory", *TASKS)


@dataclasses.dataclass(frozen=True)
class Unitary:
    """Cost, norms, memory and sequence tasks of the convolutional unitary RNN."""

    name: ClassVar[str] = "unitary"

    parts: Annotated[tuple[str, ...], OneOf(PARTS)] = PARTS
    """Any of cost, norms, memory and the tasks; one result file each."""
    networks: Annotated[tuple[str, ...], OneOf(TITLES)] = tuple(TITLES)
    """Networks of the tasks, as far as a task has a plan for them."""
    seeds: Seeds = (0, 1)
    """Seeds of weights and data."""
    largest: Annotated[int, Within(16, 4096)] = 512
    """Side of the largest lattice of `cost`."""
    num_steps: Annotated[int, Within(100)] = 10_000
    """Steps of `norms`, and the longest history of `memory`."""
    delay: Annotated[int, Within(2)] = 1000
    """Delay of the copying task."""
    long_delay: Annotated[int, Within(2)] = 2000
    """Its delay in `copying-long`."""
    length: Annotated[int, Within(4)] = 100
    """Length of the adding problem."""
    long: Annotated[int, Within(4)] = 400
    """Its length in `adding-long`."""
    dataset: Dataset = "digits"
    """digits (bundled with scikit-learn) or mnist (downloaded, or in RBPJAX_DATA)."""
    shorten: Annotated[float, Within(0, 1, above=True)] = 1.0
    """Fraction of the training iterations to run."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Runs the parts one by one: JSON, figure and a table of each."""
        same = dataclasses.replace(Unitary(), parts=self.parts, fresh=self.fresh)
        options = dataclasses.asdict(self)
        del options["parts"], options["fresh"]
        for part in self.parts:
            make, rows, draw = MAKERS[part]
            command = f"unitary --parts {part}"
            result = record(f"unitary, {part}", command, options, **make(self))
            # A run with other options does not overwrite the committed results.
            name = f"unitary-{part}" + ("" if self == same else "-custom")
            write_json(name, result)
            if part in TASKS:
                opened(part, self).clear()
            draw(result, name)
            say(f"{name}\n{table(rows(result))}\n")


# --- tasks ---------------------------------------------------------------------------

# The network of a task: (task, gain, scale) -> Network.
NETWORKS: dict[str, Callable] = {
    "linear": lambda *args: _unitary(identity, *args),
    "saturating": lambda *args: _unitary(saturate, *args),
    "modulus": lambda *args: _unitary(modulus, *args),
    "mixed": lambda task, _, scale: networks.mixed(task, 32, 16, scale),
    "exprnn": lambda task, *_: networks.exp_rnn(task, 64),
    "lstm": lambda task, *_: networks.lstm(task, 64),
}

# (task, network): gain and scale (see `networks.unitary`), and how to train. Found by
# a few short runs with seed 0, more of them for the unitary cells than for the others.
PLANS: dict[tuple[str, str], tuple[float, float, Training]] = {
    ("copying", "linear"): (1.0, 1.8, Training(1000, 16, 3e-2, 1e-5)),
    ("copying", "saturating"): (0.03, 1.8, Training(700, 16, 3e-2, 1e-5)),
    ("copying", "modulus"): (1.0, 0.1, Training(600, 16, 1e-2, 1e-4)),
    ("copying", "exprnn"): (1.0, 1.8, Training(300, 16, 3e-3, 1e-4)),
    ("copying", "lstm"): (1.0, 1.8, Training(300, 16, 3e-3, 3e-3)),
    ("copying-long", "linear"): (1.0, 1.8, Training(600, 16, 3e-2, 1e-5)),
    ("copying-long", "lstm"): (1.0, 1.8, Training(600, 16, 3e-3, 3e-3)),
    ("adding", "linear"): (1.0, 1.8, Training(2000, 32, 1e-2, 1e-3)),
    ("adding", "saturating"): (1.0, 0.1, Training(5000, 32, 3e-3, 3e-4)),
    ("adding", "modulus"): (1.0, 1.8, Training(8000, 32, 1e-2, 1e-3)),
    ("adding", "exprnn"): (1.0, 1.8, Training(3000, 32, 3e-3, 3e-4)),
    ("adding", "lstm"): (1.0, 1.8, Training(3000, 32, 3e-3, 3e-3)),
    ("adding-long", "linear"): (1.0, 1.8, Training(2000, 32, 1e-2, 1e-3)),
    ("adding-long", "modulus"): (1.0, 1.8, Training(2000, 32, 1e-2, 1e-3)),
    ("adding-long", "mixed"): (1.0, 0.05, Training(600, 32, 1e-2, 1e-3)),
    ("adding-long", "lstm"): (1.0, 1.8, Training(2000, 32, 3e-3, 3e-3)),
    ("digits", "linear"): (1.0, 1.8, Training(2000, 64, 3e-3, 3e-4)),
    ("digits", "saturating"): (1.0, 1.8, Training(2000, 64, 3e-3, 3e-4)),
    ("digits", "modulus"): (1.0, 1.8, Training(2000, 64, 3e-3, 3e-4)),
    ("digits", "exprnn"): (1.0, 1.8, Training(600, 64, 3e-3, 3e-4)),
    ("digits", "lstm"): (1.0, 1.8, Training(2000, 64, 3e-3, 3e-3)),
}


def _unitary(activation: Activation, task: Any, gain: float, scale: float) -> Any:
    return networks.unitary(task, 128, activation, gain, scale)


def opened(name: str, options: Unitary, fresh: bool = False) -> Checkpoints:
    """The checkpoints of a task.

    Kept by task and plan, so that other networks or seeds may join them.
    """
    names = ("delay", "long_delay", "length", "long", "dataset", "shorten")
    kept = {k: getattr(options, k) for k in names}
    kept["plans"] = {n: p for (task, n), p in PLANS.items() if task == name}
    return Checkpoints(f"unitary-{name}", kept, fresh)


def train(name: str, make: Callable, options: Unitary) -> dict[str, Any]:
    """Trains the chosen networks on one task; stacks the curves of the seeds."""
    checkpoints = opened(name, options, options.fresh)
    result: dict[str, Any] = {}
    for network in options.networks:
        if (name, network) not in PLANS:
            continue
        gain, scale, plan = PLANS[name, network]
        short = max(plan.blocks, round(plan.iterations * options.shorten))
        plan = dataclasses.replace(plan, iterations=short)
        logs = []
        for seed in options.seeds:
            task = make(seed)
            run = f"{network}-{seed}"
            logs.append(
                learn(
                    task,
                    NETWORKS[network](task, gain, scale),
                    plan,
                    seed,
                    run,
                    checkpoints,
                )
            )
        curves = {k: [log[k] for log in logs] for k in logs[0] if k != "iterations"}
        iterations = logs[0]["iterations"]
        result[network] = {
            "gain": gain,
            "scale": scale,
            "training": dataclasses.asdict(plan),
            "iterations": iterations,
            **curves,
        }
        losses = mean_std([c[-1] for c in curves["loss"]])
        say(f"{name}: {TITLES[network]}: loss {losses}")
    return {"memoryless": task.memoryless, "networks": result}


MAKERS: dict[str, tuple[Callable, Callable, Callable]] = {
    "cost": (lambda o: costs.cost(o.largest), report.cost_rows, report.draw_cost),
    "norms": (
        lambda o: costs.norms(o.num_steps, o.seeds),
        report.norm_rows,
        report.draw_norms,
    ),
    "memory": (
        lambda o: costs.memory(o.num_steps),
        report.memory_rows,
        report.draw_memory,
    ),
    "copying": (
        lambda o: train("copying", lambda s: sequences.copying(o.delay, s), o),
        report.task_rows,
        report.draw_task,
    ),
    "copying-long": (
        lambda o: train(
            "copying-long", lambda s: sequences.copying(o.long_delay, s), o
        ),
        report.task_rows,
        report.draw_task,
    ),
    "adding": (
        lambda o: train("adding", lambda s: sequences.adding(o.length, s), o),
        report.task_rows,
        report.draw_task,
    ),
    "adding-long": (
        lambda o: train("adding-long", lambda s: sequences.adding(o.long, s), o),
        report.task_rows,
        report.draw_task,
    ),
    "digits": (
        lambda o: train("digits", lambda s: sequences.digits(o.dataset, s), o),
        report.task_rows,
        report.draw_task,
    ),
}
