"""The claims of the four papers' abstracts, each beside what was measured here.

A row is a claim and a function of the result files that returns what was found and a
verdict by the numbers. Nothing is stated without a result file, and a claim without an
experiment is said to be untested. Set-ups of the papers are those of their public code,
where there is any.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from benchmarks.harness.options import UsageError
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import mean_std

HOLDS, IN_PART, FAILS, UNTESTED = VERDICTS = (
    "holds",
    "holds in part",
    "does not hold",
    "not tested",
)

Result = dict[str, Any]


class Found(NamedTuple):
    """What was measured, in words, the verdict, and one sentence why."""

    ours: str
    verdict: str
    why: str


class Claim(NamedTuple):
    """A claim of a paper.

    Attributes:
      claim: in our words.
      setup: the paper's own.
      results: names of the result files, in the order of ``answer``'s arguments.
      answer: what they say.
    """

    claim: str
    setup: str
    results: tuple[str, ...]
    answer: Callable[..., Found]


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The mean of a - b, seed by seed, and its standard error."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.fmean(differences), error


def level(difference: tuple[float, float]) -> bool:
    """Whether a paired difference is within two standard errors of zero."""
    return abs(difference[0]) <= 2 * difference[1]


def _shown(difference: tuple[float, float]) -> str:
    return f"{difference[0]:+.2g} ± {difference[1]:.1g}"


def _verdict(*parts: bool) -> str:
    """All, some or none of the parts of a claim."""
    return HOLDS if all(parts) else IN_PART if any(parts) else FAILS


# --- Liao et al. 2018 -----------------------------------------------------------------


def _instability(hopfield: Result, paper: Result) -> Found:
    end = lambda name: hopfield["methods"][name]["history"]["retrieval_error"][-1]
    arms = paper["splits"]["random"]["methods"]
    left = lambda name: statistics.median(arms[name]["adjoint_residual"])
    accuracy = {name: arms[name]["test_accuracy"] for name in ("rbp", "neumann")}
    gap = paired(accuracy["rbp"], accuracy["neumann"])
    return Found(
        f"Hopfield, 320 units, {hopfield['options']['truncation']} adjoint steps: "
        f"wrong pixels {mean_std(end('rbp'))} by naive RBP, {mean_std(end('neumann'))} "
        f"by Neumann ({len(end('rbp'))} seeds). GRU network on Cora: adjoint residual "
        f"{left('rbp'):.0e} and {left('neumann'):.1g} (medians), accuracy "
        f"{mean_std(accuracy['rbp'])} and {mean_std(accuracy['neumann'])}",
        _verdict(
            left("rbp") > 10 * left("neumann") and gap[0] < 0 and not level(gap),
            statistics.fmean(end("rbp")) > 1.5 * statistics.fmean(end("neumann")),
        ),
        "Where the state does not settle, naive RBP blows up. On the small memory "
        "twenty steps forget its random start; the paper's size was not run.",
    )


def _same_gradient(families: Result) -> Found:
    entries = [e for e in families["entries"] if e["dtype"] == "float64"]
    right = {"Neumann": 0, "CGNormal": 0}
    silent, total = 0, 0
    for entry in entries:
        for rule in right:
            found = entry["rules"][rule]
            good = [e <= 1e-3 for e in found["error"]]
            right[rule] += sum(good)
            said = [bool(c) for c in found["converged"]]
            silent += sum(s and not g for s, g in zip(said, good, strict=True))
        total += len(entries[0]["rules"]["Neumann"]["error"])
    return Found(
        f"{len(entries)} families of Jacobians in float64, {total} draws: right to "
        f"1e-3 against a dense solve in {right['Neumann']} (Neumann) and "
        f"{right['CGNormal']} (CG); {silent} called converged and wrong",
        HOLDS if silent == 0 and right["CGNormal"] > right["Neumann"] else IN_PART,
        "Neumann needs ρ(J) < 1; CG on the normal equations needs I - J invertible and "
        "well enough conditioned.",
    )


def _time(rules: Result) -> Found:
    costs = rules["costs"]["truncation"]
    ratios = ", ".join(
        f"{c['ratio']['median']:.2f} [{c['ratio']['q25']:.2f}, {c['ratio']['q75']:.2f}]"
        f" at K = {k}"
        for k, c in costs.items()
    )
    return Found(
        f"time of Neumann(K) ÷ TBPTT(K + 1), 128 × 256 tanh network: {ratios}",
        _verdict(*(c["ratio"]["median"] <= 1.1 for c in costs.values())),
        "The same number of products with J, and no history to write.",
    )


def _memory(hopfield: Result, cora: Result) -> Found:
    sizes = lambda result, name: [
        cost["temporary_bytes"] for cost in result["sweep"][name].values()
    ]
    ours, history = sizes(hopfield, "neumann"), sizes(hopfield, "tbptt")
    steps = list(hopfield["sweep"]["neumann"])
    bytes_of = lambda name: cora["costs"][name]["temporary_bytes"]
    return Found(
        f"Hopfield, {steps[0]} to {steps[-1]} adjoint steps: {ours[0]:,} to "
        f"{ours[-1]:,} bytes, TBPTT {history[0]:,} to {history[-1]:,}; Cora, 10,000 "
        f"rounds: {bytes_of('neumann')['10000'] / 1e6:.0f} MB, BPTT "
        f"{bytes_of('bptt')['10000'] / 1e6:,.0f} MB",
        _verdict(ours[0] == ours[-1], history[-1] > 2 * history[0]),
        "Only the fixed point is kept.",
    )


def _associative(hopfield: Result) -> Found:
    names = {"bptt": "BPTT", "tbptt": "TBPTT", "cg": "CG", "neumann": "Neumann"}
    end = {
        name: hopfield["methods"][name]["history"]["retrieval_error"][-1]
        for name in names
    }
    corrupted = hopfield["input_error"]
    gap = paired(end["neumann"], end["bptt"])
    shown = ", ".join(f"{names[n]} {mean_std(v)}" for n, v in end.items())
    retrieves = all(max(v) < corrupted for v in end.values())
    return Found(
        f"{hopfield['options']['num_images']} digits of 8 × 8, 320 units, "
        f"{len(end['bptt'])} seeds: wrong pixels {shown}; of the corrupted input "
        f"{corrupted:.3g}",
        IN_PART if retrieves and level(gap) else FAILS,
        "Holds on the small digits; the size of the paper was not run to its end.",
    )


def _citation(cora: Result, citeseer: Result, paper: Result) -> Found:
    gaps, shown = [], []
    for title, result in (("Cora", cora), ("Citeseer", citeseer)):
        arms = result["splits"]["standard"]["methods"]
        accuracy = {m: arms[m]["test_accuracy"] for m in ("neumann", "bptt")}
        gaps.append(paired(accuracy["neumann"], accuracy["bptt"]))
        shown.append(
            f"{title} {mean_std(accuracy['neumann'])} by Neumann, "
            f"{mean_std(accuracy['bptt'])} by BPTT"
        )
    arms = paper["splits"]["random"]["methods"]
    return Found(
        f"{'; '.join(shown)} (10 seeds, standard split). The paper's GRU network, 100 "
        f"of its 2,000 steps: {mean_std(arms['neumann']['test_accuracy'])} and "
        f"{mean_std(arms['bptt']['test_accuracy'])}",
        IN_PART if all(gap[0] > -0.01 for gap in gaps) else FAILS,
        "With a network that settles the two are alike; the paper's own network does "
        "not settle in 100 rounds, and was not trained to its end. Pubmed's accuracy "
        "is not measured.",
    )


def _hyperparameters(paper: Result) -> Found:
    end = lambda name: paper["methods"][name]["end"]["test_accuracy"]
    loss = lambda name: paper["methods"][name]["end"]["outer_loss"]
    names = ("BPTT", "TBPTT", "CG-RBP", "Neumann-RBP")
    gap = paired(loss("Neumann-RBP"), loss("TBPTT"))
    return Found(
        f"200 training digits of 8 × 8, {paper['num_steps']} inner steps, "
        f"{paper['options']['steps']} meta-steps, {len(end('BPTT'))} seeds: loss "
        + ", ".join(f"{n} {mean_std(loss(n))}" for n in names)
        + f"; Neumann less TBPTT {_shown(gap)}",
        IN_PART if gap[0] <= 2 * gap[1] else FAILS,
        "At a fixed point the hypergradient of step sizes is exactly zero; what is "
        "followed is that of training cut off. MNIST was not run.",
    )


# --- García Fernández et al. 2024 -----------------------------------------------------

_TASKS = ("perturb-copying", "perturb-recall", "perturb-forecast", "perturb-weather")


def _finals(results: Sequence[Result], arm: str) -> list[list[float]]:
    return [result["methods"][arm]["final"] for result in results]


def _scores(results: Sequence[Result], arms: dict[str, str]) -> str:
    rows = []
    for result in results:
        scores = ", ".join(
            f"{title} {mean_std(result['methods'][arm]['final'])}"
            for arm, title in arms.items()
        )
        rows.append(f"{result['setting']['task']} ({result['measure']}): {scores}")
    return "; ".join(rows)


def _like_bptt(*results: Result) -> Found:
    pairs = zip(_finals(results, "anp"), _finals(results, "bptt"), strict=True)
    gaps = [paired(a, b) for a, b in pairs]
    return Found(
        _scores(results, {"bptt": "BPTT", "anp": "ANP", "anp+d": "ANP, decorrelated"}),
        _verdict(*(gap[0] <= 2 * gap[1] for gap in gaps)),
        "At equal numbers of forward passes, with "
        f"{results[0]['setting']['units']} units and up to 60 steps, step sizes tuned "
        f"alike: BPTT, at three passes, makes {(1 + results[0]['samples']) / 3:.0f} "
        "times as many updates.",
    )


def _beats_others(*results: Result) -> Found:
    anp, wp, np_ = (_finals(results, arm) for arm in ("anp", "wp", "np"))
    better = lambda a, b: paired(a, b)[0] < 0 and not level(paired(a, b))
    over_wp = [better(a, b) for a, b in zip(anp, wp, strict=True)]
    over_np = [better(a, b) for a, b in zip(anp, np_, strict=True)]
    return Found(
        _scores(results, {"anp": "ANP", "np": "NP", "wp": "WP"}),
        _verdict(*over_wp, *over_np),
        f"Better than WP on {sum(over_wp)} of {len(results)} tasks by more than two "
        f"standard errors, than NP on {sum(over_np)}.",
    )


def _scalable(scaling: Result) -> Found:
    last = {
        n: {m: mean_std(arm["final"]) for m, arm in size["methods"].items()}
        for n, size in scaling["sizes"].items()
    }
    names = list(last)
    shown = "; ".join(
        f"{n} units: BPTT {last[n]['bptt']}, ANP {last[n]['anp']}, NP {last[n]['np']}"
        for n in (names[0], names[-1])
    )
    return Found(
        f"NMSE of the forecast after 1,000 forward passes, {shown}",
        UNTESTED,
        "60 updates of the perturbation rules say nothing of scalability.",
    )


def _time_domain(*results: Result) -> Found:
    learnt = [
        max(result["methods"]["np"]["final"]) < min(result["naive"].values())
        for result in results
    ]
    return Found(
        _scores(results, {"np": "NP", "wp": "WP"}),
        _verdict(*learnt),
        "Perturbation rules for sequences learn more than the naive answer on "
        f"{sum(learnt)} of {len(results)} tasks. The online mode of the paper is "
        "not built.",
    )


# --- Ollivier et al. 2015 -------------------------------------------------------------


def _unbiased(quality: Result) -> Found:
    rows = quality["methods"]["nobacktrack"]["start"]
    bias = statistics.fmean(row["bias"] for row in rows)
    noise = statistics.fmean(row["bias_noise"] for row in rows)
    truncated = statistics.fmean(
        row["bias"] for row in quality["methods"]["tbptt1"]["start"]
    )
    return Found(
        f"mean of {quality['draws']} draws less RTRL, relative: {bias:.3f}, of which "
        f"noise explains {noise:.3f}; TBPTT(1) {truncated:.2f}. Tests enumerate all "
        "signs",
        HOLDS if abs(bias - noise) < 0.1 * noise else FAILS,
        "Fixed parameters; where they move the influence is stale, as RTRL's is.",
    )


def _linear_cost(cost: Result) -> Found:
    seconds = cost["methods"]["nobacktrack"]["seconds"]
    plain = cost["methods"]["one_step"]["seconds"]
    n = list(seconds)[-1]
    ratio = seconds[n]["median"] / plain[n]["median"]
    sizes = cost["methods"]["nobacktrack"]["bytes"]
    flat = len(set(sizes.values())) == 1
    return Found(
        f"{n} units: {ratio:.1f} times a one-step gradient; the same "
        f"{next(iter(sizes.values())):,} bytes for 100 to 100,000 steps",
        HOLDS if flat and ratio < 10 else IN_PART,
        "Linear where units own their rows, and the norms come by one product.",
    )


def _over_truncation(anbn: Result, brackets: Result, balance: Result) -> Found:
    bits = lambda result, name: result["methods"][name]["last_quarter"]
    names = {"nobacktrack": "NoBackTrack", "uoro": "UORO", "tbptt16": "TBPTT(16)"}
    shown = "; ".join(
        f"{title}: "
        + ", ".join(f"{label} {mean_std(bits(r, n))}" for n, label in names.items())
        + f" bits (entropy {r['entropy']:.3f})"
        for title, r in (("aⁿbⁿ", anbn), ("brackets", brackets))
    )
    solved = abs(balance["methods"]["NoBackTrack"]["final"][0] - balance["optimum"])
    ahead = [
        paired(bits(r, "nobacktrack"), bits(r, "tbptt16"))[0] < 0
        for r in (anbn, brackets)
    ]
    diverged = [
        n
        for n, m in balance["methods"].items()
        if n.startswith("TBPTT") and m["final"][0] is None
    ]
    return Found(
        f"influence balancing: NoBackTrack {solved:.0e} from the optimum, "
        f"{len(diverged)} of 8 truncations diverge; {shown}",
        _verdict(solved < 1e-3, *ahead),
        "Decided by construction in influence balancing; on streams of 0.2 to 0.4 "
        "million characters the noise still costs more than truncation.",
    )


def _kalman(anbn: Result) -> Found:
    pilots = lambda name: min(anbn["methods"][name]["pilot_bits"].values())
    return Found(
        f"one pilot of 80,000 characters of aⁿbⁿ: {pilots('kalman'):.3f} bits, "
        f"NoBackTrack {pilots('nobacktrack'):.3f}",
        UNTESTED,
        "One seed is no experiment.",
    )


# --- Magnasco 2023 --------------------------------------------------------------------


def _norms(norms: Result) -> Found:
    linear = norms["networks"]["unitary, linear"]["gradient_deviation"]
    phi = norms["networks"]["unitary, φ at amplitude 1"]["gradient"]
    plain = norms["networks"]["ConvRNN, tanh, plain start"]["gradient"]
    last = lambda rows: " and ".join(f"{row[-1]:.1g}" for row in rows)
    return Found(
        f"norm of the gradient after {norms['steps'][-1]:,} steps, {len(phi)} seeds: "
        f"linear cell 1 ± {max(linear):.0e}; with φ at amplitude 1 {last(phi)}; tanh "
        f"network {last(plain)}",
        _verdict(max(linear) < 1e-6, min(row[-1] for row in phi) > 0.1),
        "Kept exactly by the linear dynamics; the non-linearity of the paper's cell "
        "shrinks states, and gradients with them.",
    )


def _kernel_cost(cost: Result) -> Found:
    ratio = lambda name: {
        n: c["ratio"]["median"] for n, c in cost["cases"][name].items()
    }
    one, four = ratio("real, 1 channel"), ratio("real, 4 channels")
    span = lambda values: f"{min(values):.1f} to {max(values):.1f}"
    return Found(
        f"time of the kernel ÷ that of an iteration, lattices of {min(map(int, one))}² "
        f"to {max(map(int, one))}²: {span(one.values())} with one channel, "
        f"{span(four.values())} with four",
        _verdict(max(one.values()) < 2, max(four.values()) < 2),
        "One channel is a complex exponential at each frequency; several take that of "
        "a matrix.",
    )


def _tasks(copying: Result, adding: Result) -> Found:
    end = lambda network, key: [row[-1] for row in network[key]]
    networks = copying["networks"]
    loss = {name: mean_std(end(networks[name], "loss")) for name in networks}
    recalled = {name: end(networks[name], "accuracy") for name in networks}
    mixed = end(adding["networks"]["mixed"], "loss")
    return Found(
        f"copying at delay {copying['options']['long_delay']:,}: "
        f"{min(recalled['linear']):.0%} of the symbols, loss {loss['linear']}; LSTM "
        f"{max(recalled['lstm']):.0%}, {loss['lstm']}; memoryless loss "
        f"{copying['memoryless']:.3f}. Adding at T = {adding['options']['long']}: loss "
        f"{mean_std(mixed)} with forgetting units beside, memoryless "
        f"{adding['memoryless']:.3f}",
        _verdict(min(recalled["linear"]) > 0.99, max(mixed) < 0.01),
        "Two seeds. Budgets of the networks differ: see the page.",
    )


PAPERS: dict[str, tuple[Claim, ...]] = {
    "Liao et al. 2018, recurrent back-propagation": (
        Claim(
            "Original RBP can be unstable",
            "MNIST, 2,592 units; GRU graph networks, 2,000 steps",
            ("hopfield-small", "citation-cora-paper"),
            _instability,
        ),
        Claim(
            "CG and Neumann variants give the gradient of the fixed point",
            "theory",
            ("families",),
            _same_gradient,
        ),
        Claim(
            "Neumann-RBP takes the time of truncated BPTT",
            "associative memory, hyperparameters",
            ("rules",),
            _time,
        ),
        Claim(
            "Memory is constant, that of truncated BPTT linear",
            "associative memory, hyperparameters",
            ("hopfield-small", "citation-cora"),
            _memory,
        ),
        Claim(
            "It is efficient and effective for associative memories",
            "10 MNIST images, 784 + 1024 + 784 units, 10,000 updates",
            ("hopfield-small",),
            _associative,
        ),
        Claim(
            "It is efficient and effective for semi-supervised citation networks",
            "Cora and Pubmed, GRU network, 2,000 updates",
            ("citation-cora", "citation-citeseer", "citation-cora-paper"),
            _citation,
        ),
        Claim(
            "It is efficient and effective for hyperparameters of networks",
            "10,000 MNIST images, 100 to 1,500 inner steps",
            ("hyperopt-paper",),
            _hyperparameters,
        ),
    ),
    "García Fernández et al. 2024, perturbations": (
        Claim(
            "Perturbation learning extends to the time domain",
            "copying, Mackey-Glass, weather; sequences and online",
            _TASKS,
            _time_domain,
        ),
        Claim(
            "ANP performs like BPTT",
            "500 to 1,000 units, T = 210 and 5,000",
            _TASKS,
            _like_bptt,
        ),
        Claim(
            "ANP scales like BPTT",
            "500 units and more",
            ("perturb-scaling",),
            _scalable,
        ),
        Claim(
            "ANP strongly outperforms node and weight perturbation",
            "as above",
            _TASKS,
            _beats_others,
        ),
    ),
    "Ollivier et al. 2015, NoBackTrack": (
        Claim(
            "The rank-one estimate is unbiased",
            "theory",
            ("online-quality",),
            _unbiased,
        ),
        Claim(
            "Cost and memory are linear in the parameters, without a history",
            "theory",
            ("online-cost",),
            _linear_cost,
        ),
        Claim(
            "Better than truncation where dependencies are longer",
            "aⁿbⁿ, distant brackets, text",
            ("online-anbn", "online-brackets", "online-balance"),
            _over_truncation,
        ),
        Claim(
            "A light Kalman-like filter improves it",
            "aⁿbⁿ, distant brackets",
            ("online-anbn",),
            _kalman,
        ),
    ),
    "Magnasco 2023, convolutional unitary networks": (
        Claim(
            "Gradients neither vanish nor explode",
            "theory",
            ("unitary-norms",),
            _norms,
        ),
        Claim(
            "The parametrization costs as much as an iteration",
            "theory",
            ("unitary-cost",),
            _kernel_cost,
        ),
        Claim(
            "Long dependencies are learnt",
            "none known to us",
            ("unitary-copying-long", "unitary-adding-long"),
            _tasks,
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Claims:
    """The claims of the papers, beside the committed results."""

    name: ClassVar[str] = "claims"

    def run(self) -> dict[str, Any]:
        """Writes ``results/claims.json`` and prints them."""
        papers = {
            paper: [answered(claim) for claim in claims]
            for paper, claims in PAPERS.items()
        }
        result = record("claims", "claims", {}, papers=papers)
        path = write_json("claims", result)
        say(answers(result))
        say(f"\nWritten: {path.name}")
        return result


def answered(claim: Claim) -> dict[str, Any]:
    """A claim with what its results say, and of which code they are."""
    results = [read_json(name) for name in claim.results]
    found = claim.answer(*results)
    if found.verdict not in VERDICTS:
        raise UsageError(f"no verdict: {found.verdict}")
    dates = {
        name: result["environment"]["date"]
        for name, result in zip(claim.results, results, strict=True)
    }
    return {
        "claim": claim.claim,
        "setup": claim.setup,
        "results": dates,
        **found._asdict(),
    }


def answers(result: Result) -> str:
    """All claims with their verdicts, one paper after the other, as Markdown."""
    made = []
    for paper, rows in result["papers"].items():
        made.append(f"## {paper}")
        for row in rows:
            made.append(
                f"**{row['claim']}: {row['verdict']}.** {row['why']}\n\n"
                f"- The paper's set-up: {row['setup']}.\n"
                f"- Ours: {row['ours']} ({_dated(row['results'])})."
            )
    return "\n\n".join(made)


def _dated(results: dict[str, str]) -> str:
    """Names of result files, with the dates that they are of."""
    by_date: dict[str, list[str]] = {}
    for name, date in results.items():
        by_date.setdefault(date, []).append(f"`{name}`")
    return "; ".join(f"{', '.join(names)}, {date}" for date, names in by_date.items())
