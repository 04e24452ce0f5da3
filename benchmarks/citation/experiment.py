"""Node classification by recurrent graph networks, by several gradient methods.

The second experiment of Liao et al. 2018, section 5.2. ``convergent`` is a network that
has what the implicit gradient needs (features in every step, ρ(J) ≤ 0.9); ``paper`` is
the GRU network of their public code, of which the residual and ρ(J) printed beside each
accuracy show that it has no fixed point after 100 steps. All methods of a seed start
from the same weights, and see the same dropout masks.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import numpy as np

import rbpjax
from benchmarks.citation import costs as citation_costs
from benchmarks.citation import figures as citation_figures
from benchmarks.citation.networks import (
    Convergent,
    Paper,
    Solve,
    linear_baselines,
    step,
)
from benchmarks.citation.training import Task, Trainer, random_split, standard_split
from benchmarks.data.planetoid import NPZ, Planetoid, planetoid
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, OneOf, Positive, Seeds, require
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import mean_std, table
from rbpjax import RBP, Adaptive, CGNormal, FixedPointIteration, Neumann

MODELS = {"convergent": Convergent, "paper": Paper}
# Where the committed results leave the paper's configuration: its code takes 2,000
# steps of 1e-3, here are 100 of 1e-2, minutes instead of hours for ten splits.
DEFAULTS: dict[str, dict[str, Any]] = {
    "convergent": {
        "methods": ("adaptive", "neumann", "bptt"),
        "epochs": 200,
        "learning_rate": 5e-3,
    },
    "paper": {
        "methods": ("bptt", "tbptt", "rbp", "cg", "neumann"),
        "epochs": 100,
        "learning_rate": 1e-2,
    },
}
TOLERANCE = 1e-4  # of both solves of the convergent network
EVERY = {"convergent": 2, "paper": 20}

METHODS: dict[str, Callable[[Citation], Solve]] = {
    "adaptive": lambda o: _implicit(o, Adaptive(tol=TOLERANCE)),
    "neumann": lambda o: _implicit(
        o,
        Neumann(tol=TOLERANCE)
        if o.model == "convergent"
        else Neumann(steps=o.truncation),
    ),
    "cg": lambda o: _implicit(
        o,
        CGNormal(tol=TOLERANCE)
        if o.model == "convergent"
        else CGNormal(max_steps=o.truncation),
    ),
    "rbp": lambda o: _implicit(
        o, RBP(FixedPointIteration(steps=o.truncation), seed=1234)
    ),
    "one-step": lambda o: _implicit(o, Neumann(steps=0)),
    "tbptt": lambda o: rbpjax.bptt(step, o.num_steps, truncation=o.truncation),
    "bptt": lambda o: rbpjax.bptt(step, o.num_steps),
}
TITLES = {
    "adaptive": "RBP, default rule",
    "neumann": "Neumann-RBP",
    "cg": "CG-RBP",
    "rbp": "RBP, uniform start",
    "one-step": "one step",
    "tbptt": "TBPTT",
    "bptt": "BPTT",
    "softmax": "softmax, no edges",
    "sgc": "SGC",
}
SPLITS = {"standard": standard_split, "random": random_split}


@dataclasses.dataclass(frozen=True)
class Citation:
    """Train a recurrent graph network on a citation graph."""

    name: ClassVar[str] = "citation"

    dataset: Annotated[str, OneOf(NPZ)] = "cora"
    """cora, citeseer or pubmed (downloaded, or in RBPJAX_DATA)."""
    model: Annotated[str, OneOf(MODELS)] = "convergent"
    """convergent: at a fixed point by construction; paper: the GRU network."""
    methods: Annotated[tuple[str, ...], OneOf(METHODS)] | None = None
    """Any of adaptive, neumann, cg, rbp, one-step, tbptt, bptt."""
    splits: Annotated[tuple[str, ...], OneOf(SPLITS)] | None = None
    """standard, random (1 % / 49 % / 50 %, another one for every seed), or both."""
    epochs: Count | None = None
    """Training steps, each on the whole graph."""
    learning_rate: Positive | None = None
    """Adam's step size, or that of SGD with momentum for the paper's network."""
    num_steps: Count = 100
    """Rounds of messages of BPTT, TBPTT and the paper's network."""
    truncation: Count = 5
    """Steps of TBPTT and RBP; of CG and Neumann too in the paper's network."""
    seeds: Seeds = tuple(range(10))
    """Seeds of weights, dropout and random splits."""
    costs: bool = True
    """Also measure time and memory of one training step against the rounds."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Runs the experiment: JSON, figure, and tables on standard output."""
        options = resolve(self)
        graph = planetoid(options.dataset)
        accuracy = graph.complete
        if not accuracy:
            say(
                "the features of most nodes are missing here: time and memory only; "
                "unset RBPJAX_DATA to download them and train"
            )
            require(options.costs, "nothing to do: no features, and --no-costs")
        kept = dataclasses.asdict(dataclasses.replace(options, fresh=False))
        checkpoints = Checkpoints("citation", kept, options.fresh)
        name = result_name(options)
        task = make_task(options, graph)
        command = f"citation --dataset {options.dataset} --model {options.model}"
        size = {"nodes": len(graph.labels), "edges": len(graph.edges)}
        result = record(name, command, kept, **size, splits={})
        for split in options.splits if accuracy else ():
            result["splits"][split] = run_split(options, task, split, checkpoints)
        if options.costs:
            solves = {m: METHODS[m] for m in options.methods}
            result["costs"] = citation_costs.measure(options, task, solves)
        path = write_json(name, result)
        checkpoints.clear()
        result = read_json(name)
        for split in result["splits"]:
            say(f"{split} split:")
            say(table(rows(result, split)))
        written = [path]
        if options.costs:
            say(table(citation_costs.rows(result, TITLES)))
            written.append(citation_figures.draw(result, TITLES))
        say("Written: " + ", ".join(p.name for p in written))
        return result


def resolve(options: Citation) -> Citation:
    """The options with the model's defaults; UsageError if two of them do not fit."""
    default = DEFAULTS[options.model] | {
        "splits": ("standard", "random")
        if options.model == "convergent"
        else ("random",)
    }
    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    options = dataclasses.replace(options, **(default | given))
    every = EVERY[options.model]
    require(
        options.epochs % every == 0,
        f"--epochs: a multiple of {every}, the steps between two looks at the "
        f"validation nodes; got {options.epochs}",
    )
    require(
        options.truncation <= options.num_steps,
        f"--truncation: {options.truncation} is beyond the {options.num_steps} rounds; "
        "lower --truncation or raise --num-steps",
    )
    return options


def result_name(options: Citation) -> str:
    """The name of the result file: a run with other options has another name."""
    default = resolve(Citation(dataset=options.dataset, model=options.model))
    same = dataclasses.replace(options, fresh=False) == default
    name = f"citation-{options.dataset}"
    name += "" if options.model == "convergent" else f"-{options.model}"
    return name + ("" if same else "-custom")


def make_task(options: Citation, graph: Planetoid) -> Task:
    """The network, its inputs and its optimizer."""
    network = MODELS[options.model]
    return Task(
        graph,
        network,
        network.inputs(graph),
        network.optimizer(options.learning_rate),
        options.epochs,
        EVERY[options.model],
    )


def _implicit(options: Citation, rule: rbpjax.BackwardRule) -> Solve:
    forward = (
        FixedPointIteration(tol=TOLERANCE)
        if options.model == "convergent"
        else FixedPointIteration(steps=options.num_steps)
    )
    return rbpjax.rbp_solve(step, forward=forward, backward=rule)


def run_split(
    options: Citation, task: Task, split: str, checkpoints: Checkpoints
) -> dict[str, Any]:
    """All methods and baselines on one kind of split."""
    parts = {seed: SPLITS[split](task.graph, seed) for seed in options.seeds}
    result: dict[str, Any] = {"methods": {}, "baselines": {}}
    for name in options.methods:
        trainer = Trainer(task, METHODS[name](options))
        runs = []
        for seed in options.seeds:
            label = f"{split}-{name}-{seed}"
            runs.append(trainer.train(parts[seed], seed, checkpoints, label))
        result["methods"][name] = {k: [r[k] for r in runs] for k in runs[0]}
        accuracy = mean_std(result["methods"][name]["test_accuracy"])
        say(f"{split} split, {TITLES[name]}: test accuracy {accuracy}")
    # Without randomness, one split is one number.
    seeds = options.seeds if split == "random" else options.seeds[:1]
    found = [linear_baselines(task.graph, parts[seed]) for seed in seeds]
    result["baselines"] = {k: [f[k] for f in found] for k in found[0]}
    return result


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean difference of pairs, and its standard error (NaN for one pair)."""
    difference = np.subtract(a, b)
    if len(difference) < 2:
        return float(difference.mean()), float("nan")
    error = statistics.stdev(difference) / len(difference) ** 0.5
    return float(difference.mean()), error


def rows(result: dict[str, Any], split: str) -> list[dict[str, str]]:
    """The table of one split: a row a method, then the baselines."""
    found = result["splits"][split]
    base = found["methods"].get("bptt")
    made = []
    for name, m in found["methods"].items():
        difference = "–"
        if base is not None and name != "bptt":
            mean, error = paired(m["test_accuracy"], base["test_accuracy"])
            difference = f"{mean:+.4f} ± {error:.4f}"
        exists = [r for r in m["adjoint_residual"] if r is not None]
        made.append(
            {
                "method": TITLES[name],
                "test accuracy": mean_std(m["test_accuracy"]),
                "less BPTT (± s.e.)": difference,
                "forward residual": f"{max(m['forward_residual']):.1g}",
                "ρ(J)": f"{max(m['spectral_radius']):.2f}",
                "adjoint residual": f"{max(exists):.1g}" if exists else "–",
                "training": f"{statistics.median(m['seconds']):.1f} s",
            }
        )
    blank = dict.fromkeys(made[0], "–")
    for name, values in found["baselines"].items():
        shown = mean_std(values) if len(values) > 1 else f"{values[0]:.3f}"
        made.append(blank | {"method": TITLES[name], "test accuracy": shown})
    return made
