"""``python -m benchmarks readme``: the tables of README and docs, from result files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import rbpjax
from benchmarks import claims
from benchmarks.citation import experiment as citation
from benchmarks.citation import figures as citation_figures
from benchmarks.comparison import families, modes, warm
from benchmarks.comparison import report as rules_report
from benchmarks.comparison.collection import summary as collection
from benchmarks.harness.options import require
from benchmarks.harness.results import read_json
from benchmarks.harness.tables import mean_std, table
from benchmarks.hopfield import report as hopfield
from benchmarks.hyperopt import experiment as hyperopt
from benchmarks.modern import experiment as modern
from benchmarks.online import copying
from benchmarks.online import digits as online_digits
from benchmarks.online import experiment as online
from benchmarks.online import figures as online_figures
from benchmarks.perturb import experiment as perturb
from benchmarks.perturb import unrolls
from benchmarks.scaling import experiment as scaling
from benchmarks.unitary import experiment as unitary
from examples.graphs import report as graphs
from examples.inverse import report as inverse
from examples.mnist import report as mnist
from examples.prefix_sums import report as prefix_sums
from examples.steady_states import report as steady_states

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "results").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
)
"""The files that have generated blocks."""


def headlines() -> str:
    """Three results for README, each with its page."""
    rules, cora = read_json("rules"), read_json("citation-cora")
    target = "0.001"
    best, default = (
        rules_report.overall(rules, target, role) for role in ("ours", "default")
    )
    last = {
        batch: {name: list(sizes.values())[-1] for name, sizes in methods.items()}
        for batch, methods in rules["costs"]["memory"].items()
    }
    one, many = (m["BPTT"] / m["Neumann"] for m in last.values())
    arms = cora["splits"]["standard"]["methods"]
    accuracy = {m: mean_std(arms[m]["test_accuracy"]) for m in ("adaptive", "bptt")}
    sizes = {m: c["temporary_bytes"]["10000"] / 1e6 for m, c in cora["costs"].items()}
    slower = rules_report.untuned(rules, target, rules_report.DEFAULTS[0])
    times = slower.removeprefix(rules_report.DEFAULTS[0]).split()[0]
    return "\n".join(
        [
            "- **Memory** does not grow with the number of steps: at 5,000 steps BPTT "
            f"needs {one:,.0f} times as much as `Neumann` for one example of 256 "
            "units, and "
            f"{many:,.0f} times as much for {list(last)[-1]} examples "
            "([page](docs/results/rules.md)).",
            "- **Time** at an equal gradient error of 1e-3, over "
            f"{best['problems']} problems, relative to the fastest other JAX or "
            f"PyTorch library: our fastest rule is {best['median']:.2f} times as fast, "
            "our default rule, after plain iteration, "
            f"{default['median']:.2f} times as fast, so slower. Against jaxopt's own "
            f"default it is {times} times as fast "
            "([page](docs/results/rules.md)).",
            "- **Accuracy** is that of BPTT where the state settles: "
            f"{accuracy['adaptive']} against {accuracy['bptt']} on Cora (10 seeds), in "
            f"{sizes['adaptive']:.0f} MB against {sizes['bptt']:,.0f} MB for 10,000 "
            "rounds ([page](docs/results/citation.md)).",
            "",
            f"Nothing was measured on a GPU. {_where(rules)}",
        ]
    )


def hopfield_table() -> str:
    """The Hopfield table with where it was measured."""
    result = read_json("hopfield-small")
    options = result["options"]
    return (
        table(hopfield.rows(result))
        + f"\n\n{options['num_images']} images, {len(options['seeds'])} seeds (mean ± "
        "standard deviation; residuals and ρ(J) are the largest), "
        f"{options['epochs'] * options['num_images']} Adam steps; the corrupted images "
        f"themselves are wrong in {result['input_error']:.3g} of their pixels. "
        + _where(result)
    )


def families_table() -> str:
    """Products of every rule on the largest size, and the price of the default."""
    result = read_json("families")
    size, seeds = max(result["options"]["sizes"]), len(result["options"]["seeds"])
    overheads = ", ".join(
        f"{ratio['median']:.2f} [{ratio['q25']:.2f}, {ratio['q75']:.2f}] at {n} units"
        for n, ratio in result["adaptive_over_neumann"].items()
    )
    return (
        table(families.rows(result, "float64", size))
        + f"\n\nn = {size}, float64, tolerance {result['tolerance']['float64']:.0e}, "
        f"mean of {seeds} draws; ! did not converge, and said so. Where ρ(J) = 0.5 the "
        f"default takes {overheads} times as long as Neumann (median and quartiles, "
        f"float32). {_where(result)}"
    )


def fuzz_line() -> str:
    """What the fuzz found."""
    result = read_json("fuzz")
    names = {"default": "by default", "verified": "with the solved estimate on request"}
    lines = []
    for mode, words in names.items():
        if mode not in result:
            continue
        part = result[mode]
        n = dict(zip(part["columns"], part["all"], strict=True))
        lines.append(
            f"- {words}: {n['right']:,} gradients right to their accuracy, "
            f"{n['converged']:,} called converged, {n['silent']:,} of those silently "
            "wrong (error above ten times the accuracy); "
            f"{n['stated']:,} bounds stated, {n['exceeded']:,} exceeded tenfold; "
            f"{n['alarms']:,} false alarms (right, and not called converged)"
        )
    total = result["options"]["num"]
    return "\n".join([f"Of {total:,} random problems,", "", *lines, "", _where(result)])


def modern_tables() -> str:
    """Accuracy, cost and gradient error of each gradient, on both tasks."""
    result = read_json("modern")
    options = result["options"]
    return (
        f"{modern.show(result)}\n\n{options['budget']:,} evaluations of f and products "
        "with its Jacobians for every training, Adam, the best of "
        f"{len(modern.RATES)} rates of another seed; {len(options['seeds'])} seeds "
        "(mean ± standard deviation, accuracy on 597 test images). *Settled*: seeds "
        "whose fixed point was found for all test images after training. The error of "
        "the gradient is relative to that of the fixed point by dense solves in "
        "float64, of one batch, at the start and at the end of the method's own "
        "training (first seed). Memory is the temporary memory of a gradient, core "
        "time its median at the start, of all cores together, on a machine that was "
        f"not idle. {_where(result)}"
    )


def modes_table() -> str:
    """The derivatives by both paths."""
    result = read_json("modes")
    return (
        table(modes.rows(result))
        + f"\n\n{result['options']['size']} units, float64, medians; ratio of "
        f"interleaved runs with quartiles. {_where(result)}"
    )


def perturb_table() -> str:
    """Final scores of every arm on every task."""
    results = {task: read_json(f"perturb-{task}") for task in perturb.TASKS}
    first = results[perturb.TASKS[0]]
    options, setting = first["options"], first["setting"]
    naive = lambda r: ", ".join(f"{k} {v:.3g}" for k, v in r["naive"].items())
    heads = {t: f"{t}: {r['measure']} ({naive(r)})" for t, r in results.items()}
    rows = [
        {"method": perturb.title(arm)}
        | {
            heads[t]: perturb.shown(r["methods"][arm]["final"])
            for t, r in results.items()
        }
        for arm in first["methods"]
    ]
    return (
        table(rows)
        + f"\n\n{setting['units']} units, Adam, {options['budget']:,} forward passes "
        f"of {setting['examples']} examples for every method (an update costs "
        f"{first['samples'] + 1} for a perturbation rule, 2 for the paper's code, 3 "
        "for backpropagation), the best of five step sizes on validation data, "
        f"{len(options['seeds'])} seeds (mean ± standard deviation, test data). In "
        f"parentheses: answers that need no learning. {_where(first)}"
    )


def unrolls_table() -> str:
    """Final losses of every method on both tasks."""
    result = read_json("perturb-unrolls")
    options = result["options"]
    rates = "; ".join(
        f"{unrolls.TITLES[name].lower()}: "
        + ", ".join(
            f"{unrolls.METHODS[m]} {found['rate']:g} ({found['updates']:,} updates)"
            for m, found in at["methods"].items()
        )
        for name, at in result["tasks"].items()
    )
    return (
        table(unrolls.rows(result))
        + f"\n\n{options['budget']:,} steps run for every method, windows of "
        f"{options['window']}, {options['sequences']} sequences with one pair of "
        f"normal noise each, σ = {options['sigma']:g}, "
        f"{len(options['seeds'])} seeds (mean ± standard deviation, the exact expected "
        f"loss without perturbation). Adam rates, the best of "
        f"{len(options['grid'])}: {rates}. {_where(result)}"
    )


def citation_table() -> str:
    """Accuracy on two graphs and two splits, and the cost of a training step."""
    results = {name: read_json(f"citation-{name}") for name in ("cora", "citeseer")}
    first = results["cora"]
    heads = {"standard": "", "random": ", 1 % of the labels"}
    made = []
    for method in citation.TITLES:
        row = {"method": citation.TITLES[method]}
        for dataset, result in results.items():
            for split, head in heads.items():
                found = result["splits"][split]
                arms = {k: m["test_accuracy"] for k, m in found["methods"].items()}
                values = (arms | found["baselines"]).get(method)
                row[f"{dataset.title()}{head}"] = mean_std(values) if values else ""
        cost = first["costs"].get(method)
        worst = first["splits"]["standard"]["methods"].get(method, {})
        residuals = [r for r in worst.get("adjoint_residual", []) if r is not None]
        row["adjoint residual"] = f"{max(residuals):.1g}" if residuals else "–"
        row["step"], row["memory at 100 / 10,000 rounds"] = "–", "–"
        if cost:
            row["step"] = f"{1e3 * cost['step_seconds']['median']:.0f} ms"
            sizes = [cost["temporary_bytes"][n] / 1e6 for n in ("100", "10000")]
            row["memory at 100 / 10,000 rounds"] = (
                f"{sizes[0]:.0f} / {sizes[1]:,.0f} MB"
            )
        if any(row[h] for h in list(row)[1:5]):
            made.append(row)
    differences = []
    for dataset, result in results.items():
        for split, head in heads.items():
            arms = result["splits"][split]["methods"]
            parts = []
            for method in ("adaptive", "neumann"):
                pair = (arms[m]["test_accuracy"] for m in (method, "bptt"))
                mean, error = citation.paired(*pair)
                parts.append(f"{mean:+.4f} ± {error:.4f}")
            differences.append(f"{dataset.title()}{head}: {', '.join(parts)}")
    pubmed = read_json("citation-pubmed")
    steps = (
        f"{1e3 * pubmed['costs'][m]['step_seconds']['median']:.0f} ms"
        for m in ("adaptive", "neumann", "bptt")
    )
    return (
        table(made)
        + f"\n\nTest accuracy of {len(first['options']['seeds'])} seeds (mean ± "
        "standard deviation; without randomness a single number), step, memory and "
        "largest adjoint residual on Cora. The first two rows less BPTT, paired by "
        f"seed, with the standard error: {'; '.join(differences)}. A step on Pubmed "
        f"({pubmed['nodes']:,} nodes), where most features were missing and nothing "
        f"was trained: {', '.join(steps)}. {_where(first)}"
    )


def citation_paper_table() -> str:
    """The paper's network, with the condition that it does not meet."""
    result = read_json("citation-cora-paper")
    options = result["options"]
    return (
        table(citation.rows(result, "random"))
        + f"\n\nCora, {len(options['seeds'])} random splits of 1 % / 49 % / 50 %, "
        f"{options['epochs']} steps of SGD with rate {options['learning_rate']:g} and "
        f"momentum 0.9, {options['num_steps']} rounds, truncation "
        f"{options['truncation']}. Residuals and ρ(J) are the largest. {_where(result)}"
    )


def hyperopt_tables() -> str:
    """A table for each part, and what the other rules lose against the default."""
    made = []
    for part, room in hyperopt.PARTS.items():
        result = read_json(f"hyperopt-{part}")
        sizes = result.get("sizes", [])
        facts = f"{len(result['options']['seeds'])} seeds"
        if sizes:
            uses = ("training", "validation", "test")[:: 4 - len(sizes)]
            if part == "paper":  # its file lists the larger set, the test set, first
                sizes = sizes[::-1]
            parts = (f"{n} {use}" for n, use in zip(sizes, uses, strict=True))
            facts += f" (mean ± standard deviation), {', '.join(parts)} digits"
        ends = [] if room.differences is None else [room.differences(result)]
        note = " ".join([room.note, f"{facts}.", *ends, _where(result)])
        made.append(f"{room.title}:\n\n{table(room.rows(result))}\n\n{note}")
    return "\n\n".join(made)


def rules_table() -> str:
    """Time against the fastest other library, and the costs on our own."""
    result = read_json("rules")
    return rules_report.summary(result) + "\n\n" + _where(result)


def rules_tables() -> str:
    """All times, with compile times, memory and the costs of each rule."""
    return rules_report.tables(read_json("rules"))


def online_tables() -> str:
    """A table for each part of ``online``."""
    titles = {
        "anbn": "aⁿbⁿ, bits a character",
        "brackets": "Distant brackets, bits a character",
        "text": "WikiText-2, bits a character",
        "balance": "Influence balancing, where θ* = -1/6",
        "quality": "Gradients of a GRU against RTRL (mean ± standard deviation)",
        "cost": "Time a step by units n, temporary memory by length T",
    }
    made = []
    for part, heading in titles.items():
        result = read_json(f"online-{part}")
        seeds = len(result["options"]["seeds"])
        facts = [f"{seeds} seeds."]
        if result.get("entropy"):
            facts.append(f"The source's entropy is {result['entropy']:.4f} bits.")
        note = " ".join([*facts, _where(result)])
        made.append(f"{heading}:\n\n{online.show(part, result)}\n\n{note}")
    return "\n\n".join(made)


def copying_table() -> str:
    """Copying over a long delay, online."""
    result = read_json("online-copying")
    options = result["options"]
    return (
        f"{copying.show(result)}\n\n{len(options['seeds'])} seeds, mean ± standard "
        f"deviation, {options['updates']} updates of {copying.EPISODES} episodes; bits "
        "a symbol over the last tenth; chance is 3. " + _where(result)
    )


def digits_table() -> str:
    """Digits pixel by pixel, online."""
    result = read_json("online-digits")
    options = result["options"]
    return (
        f"{online_digits.show(result)}\n\n{len(options['seeds'])} seeds, mean ± "
        f"standard deviation, {options['updates']} updates of {online_digits.EPISODES} "
        f"images, {options['units']} units a layer; accuracy on test images after the "
        "last update; chance is 10. " + _where(result)
    )


def unitary_tables() -> str:
    """A table for each part of ``unitary``."""
    titles = {
        "copying": "Copying memory",
        "copying-long": "Copying memory, twice the delay",
        "adding": "The adding problem",
        "adding-long": "The adding problem, four times as long",
        "digits": "Digits, pixel by pixel",
        "norms": "What is left of a state and of a gradient after the last step",
        "memory": "Memory, time and error of the gradient by history",
        "cost": "Time of the kernel against one iteration, by lattice",
    }
    made = []
    for part, heading in titles.items():
        result = read_json(f"unitary-{part}")
        rows = unitary.MAKERS[part][1](result)
        options, facts = result["options"], ""
        if part == "copying":
            facts = f"Delay {options['delay']:,}. "
        if part == "copying-long":
            facts = f"Delay {options['long_delay']:,}; time in core-seconds. "
        if part == "adding-long":
            facts = f"Length {options['long']}. "
        if "memoryless" in result:
            facts += (
                f"{len(options['seeds'])} seeds; without memory the loss is "
                f"{result['memoryless']:.4f}. "
            )
        made.append(f"{heading}:\n\n{table(rows)}\n\n{facts}{_where(result)}")
    return "\n\n".join(made)


def collection_table() -> str:
    """The classic fixed points, by solver."""
    result = read_json("collection")
    short = lambda row: {k: v for k, v in row.items() if k != "flagged"}
    rows = map(short, collection.rows(result["solvers"]))
    peers = ", ".join(f"{name} {n}" for name, n in result["peers"].items())
    return f"{table([*rows])}\n\n{_where(result)} Other libraries: {peers}."


def collection_random_table() -> str:
    """The random fixed points by the defaults, and what was silent."""
    result = read_json("collection-random")
    found = result["solvers"]["default"]
    silent = [
        f"{precision}, `{name}`: {said}"
        for precision, part in found.items()
        for name, said in part["silent"].items()
    ]
    counts = []
    for precision, part in found.items():
        n = part["all"]
        counts.append(
            f"{precision}: {n['solved']:,} of {n['problems']:,} solved, {n['silent']} "
            f"silent, {n['gradients'].get('silent', 0)} gradients silent"
        )
    return (
        f"Random ones, defaults only. {'; '.join(counts)}. "
        + (f"Silent: {'; '.join(silent)}. " if silent else "")
        + _where(result)
    )


def fuzz_rooms_table() -> str:
    """What the second fuzz found, by kind."""
    result = read_json("fuzz-rooms")
    rows = [
        {
            "kind": kind,
            "cases": f"{found['cases']:,}",
            "silently wrong": str(found["silently_wrong"]),
            "crashed groups": str(found["crashed_groups"]),
            "largest error ÷ bound": f"{found['worst']['error ÷ bound']:.1g}",
        }
        for kind, found in result["kinds"].items()
    ]
    return f"{table(rows)}\n\n{_where(result)}"


def warm_table() -> str:
    """Adjoints that start from the last training step's."""
    result = read_json("warm")
    return (
        f"{table(warm.rows(result))}\n\n{result['options']['steps']} training steps "
        f"each; `{warm.RULES['Adaptive']}`, whose steps are one product (Neumann) or "
        "two (BiCGSTAB), and the series cut off after five more terms; ! some did not "
        "converge, and said so, cold or warm. Time is that of the gradient, the "
        "forward solve included, median and quartiles; errors are relative to a "
        f"gradient with a tolerance of {warm.EXACT.tol:g}. {_where(result)}"
    )


def _where(result: dict[str, Any]) -> str:
    """Where a result was measured, of which code, and whether an earlier version."""
    where = result["environment"]
    version = where["packages"]["rbpjax"]
    earlier = version != rbpjax.__version__
    commit = where.get("commit")
    code = f", commit {commit[:7]}{'+' * ('+' in commit)}" if commit else ""
    return (
        f"JAX {where['packages']['jax']}, {where['device']}, {where['cores']} cores, "
        f"{where['date']}{code}."
        + f" Measured with version {version}, not with this one."
        * earlier
    )


def draw_all() -> None:
    """Every figure from its result file."""
    for name in ("cora", "citeseer", "pubmed", "cora-paper"):
        citation_figures.draw(read_json(f"citation-{name}"), citation.TITLES)
    for draw in (hopfield.draw_curves, hopfield.draw_images, hopfield.draw_costs):
        draw(read_json("hopfield-small"), "hopfield-small")
    for name, part in hyperopt.PARTS.items():
        part.draw(read_json(f"hyperopt-{name}"), f"hyperopt-{name}")
    modern.draw(read_json("modern"), "modern")
    for part in ("anbn", "balance", "brackets", "cost", "quality", "text"):
        online_figures.draw(part, f"online-{part}")
    copying.draw(read_json("online-copying"), "online-copying")
    online_digits.draw(read_json("online-digits"), "online-digits")
    for part in (*perturb.TASKS, "scaling", "cost"):
        perturb.draw(part, read_json(f"perturb-{part}"), f"perturb-{part}")
    unrolls.draw(read_json("perturb-unrolls"), "perturb-unrolls")
    rules_report.draw_all(read_json("rules"))
    for name, example in EXAMPLES.items():
        example.draw(read_json(f"example-{name}"), f"example-{name}")
    for part, (_, _, draw) in unitary.MAKERS.items():
        draw(read_json(f"unitary-{part}"), f"unitary-{part}")


def scaling_tables() -> str:
    """What was measured here, and what is predicted for accelerators."""
    result, machine = read_json("scaling"), read_json("scaling")["options"]
    return (
        "Measured, on virtual devices that share the cores of one machine:\n\n"
        + table([scaling.measured_row(row) for row in result["measured"]])
        + "\n\nPredicted, not measured, for accelerators of "
        f"{machine['flops']:.0e} floating-point operations and {machine['memory']:.1e} "
        f"bytes of memory a second, links of {machine['link']:.0e} bytes a second and "
        f"a latency of {machine['latency']:.0e} s, and a network of "
        f"{machine['accelerator_units']:,} units:\n\n"
        + table([scaling.predicted_row(row) for row in result["predicted"]])
        + f"\n\n{_where(result)}"
    )


# What `python -m examples.NAME.train` has found, on its page and on that of the site.
EXAMPLES: dict[str, Any] = {
    "graphs": graphs,
    "inverse": inverse,
    "mnist": mnist,
    "prefix_sums": prefix_sums,
    "steady_states": steady_states,
}


def example_table(name: str) -> str:
    """The networks of an example."""
    result, report = read_json(f"example-{name}"), EXAMPLES[name]
    seeds = len(result["options"]["seeds"])
    counted = "excluded" if report is steady_states else "included"
    return (
        f"{table(report.rows(result))}\n\n{report.NOTE} {seeds} seeds, in their order "
        "where several numbers stand together. Times are processor time of training on "
        f"one loaded core, compilation {counted}. {_where(result)}"
    )


# A block between <!-- name:begin --> and <!-- name:end --> on a page, and its maker.
BLOCKS: dict[str, Callable[[], str]] = {
    "citation": citation_table,
    "citation-paper": citation_paper_table,
    "claims": lambda: claims.answers(read_json("claims")),
    "collection": collection_table,
    "collection-random": collection_random_table,
    "families": families_table,
    "fuzz": fuzz_line,
    "fuzz-rooms": fuzz_rooms_table,
    "headlines": headlines,
    "hopfield": hopfield_table,
    "hyperopt": hyperopt_tables,
    "modern": modern_tables,
    "modes": modes_table,
    "online": online_tables,
    "online-copying": copying_table,
    "online-digits": digits_table,
    "perturb": perturb_table,
    "perturb-unrolls": unrolls_table,
    "rules": rules_table,
    "rules-all": rules_tables,
    "scaling": scaling_tables,
    "unitary": unitary_tables,
    "warm": warm_table,
    **{f"example-{name}": partial(example_table, name) for name in EXAMPLES},
    **{f"models-{name}": partial(example_table, name) for name in EXAMPLES},
}


def names(text: str) -> list[str]:
    """The blocks of a page."""
    return re.findall(r"^<!-- ([\w-]+):begin -->$", text, re.M)


def render(text: str) -> str:
    """``text`` with every generated block made anew."""
    for name in names(text):
        require(name in BLOCKS, f"no result is called {name}")
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        require(end in text, f"the block {name} has no end")
        block = f"{begin}\n{BLOCKS[name]()}\n{end}"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


@dataclasses.dataclass(frozen=True)
class Readme:
    """Make the tables of README.md, docs/results/ and examples/ from the results."""

    name: ClassVar[str] = "readme"

    figures: bool = False
    """Draw all figures anew, too."""

    def run(self) -> None:
        """Rewrites each page whole or not at all."""
        if self.figures:
            draw_all()
        for page in PAGES:
            partial = page.with_suffix(".md.partial")
            partial.write_text(render(page.read_text()))
            os.replace(partial, page)
