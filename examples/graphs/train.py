"""Trains graph networks at a fixed point, and explicit ones beside them.

    python -m examples.graphs.train                # RBPJAX_DATA, else a download
    python -m examples.graphs.train --tiny         # generated graphs: no download

The state of each node solves h* = tanh(Â h* W + drive), ‖W‖ below 1: as many rounds of
messages as it takes. Cora: the field of a paper, from its words and those it cites.
Chains: the class of a node, from what the first node of its chain shows, 50 to 200
edges away.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rbpjax
from benchmarks.harness.options import Count, OneOf, Seeds
from examples.common import results
from examples.common.command import main
from examples.common.training import fit
from examples.graphs import report
from examples.graphs.data import Nodes, chains, cora, planted
from examples.graphs.networks import KINDS, NAMES, RECIPES, Network
from rbpjax.nn import report_metrics, value_and_grad_with_report

LENGTH, LONG = 100, 201  # of chains, in training and in tests


def update(
    model: Network, optimizer: nnx.Optimizer, _: jax.Array, *data: Any
) -> dict[str, jax.Array]:
    """One step of training, and what to watch."""
    graph, features, labels, nodes = data

    def loss(model: Network, probe: rbpjax.AdjointReport) -> jax.Array:
        scores = model(graph, features, probe)[0][nodes]
        picked = optax.softmax_cross_entropy_with_integer_labels(scores, labels[nodes])
        return picked.mean() + model.penalty()

    value, grads, found = value_and_grad_with_report(loss)(model)
    optimizer.update(model, grads)
    return {"loss": value, **report_metrics(found)}


def look(data: Nodes, model: Network) -> dict[str, jax.Array]:
    """Accuracies on nodes to choose by and on those of the test, in %."""
    scores, solution = model(data.graph, jnp.asarray(data.features), test=True)
    right = 100.0 * (scores.argmax(-1) == jnp.asarray(data.labels))
    found = {"validation": right[data.validation].mean()}
    found |= {"test": right[data.test].mean()}
    solves = ("num_steps", "residual", "converged")
    solved = {k: getattr(solution, k) for k in solves}
    return found | {k: jnp.float32(v) for k, v in solved.items() if v is not None}


@nnx.jit
def by_distance(model: Network, graph: Any, features: Any, labels: Any) -> jax.Array:
    """Accuracy in % at each distance from the first node."""
    right = model(graph, features, test=True)[0].argmax(-1) == labels
    return 100.0 * right.reshape(-1, LONG).mean(0)


@dataclasses.dataclass(frozen=True)
class Graphs:
    """Train graph networks at a fixed point."""

    tasks: Annotated[tuple[str, ...], OneOf(KINDS)] = ("cora", "chains")
    """cora, chains, or planted: a small graph that is generated."""
    kinds: Annotated[tuple[str, ...], OneOf(NAMES)] = NAMES
    """Which networks, where they suit the task."""
    blocks: Count = 12
    """Training, in blocks of 20 steps; half as many of chains."""
    seeds: Seeds = (0, 1, 2)
    """Of weights, dropout and chains."""
    tiny: bool = False
    """Generated graphs, two networks, one seed."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Trains every network with every seed: JSON, figure, table."""
        if self.tiny:
            less: dict[str, Any] = {"tasks": ("planted", "chains"), "seeds": (0,)}
            less |= {"kinds": (NAMES[0], "explicit, 8 layers"), "blocks": 4}
            return dataclasses.replace(self, tiny=False, **less).run()
        checkpoints = results.opened("graphs", self)
        suited = {t: [k for k in KINDS[t] if k in self.kinds] for t in self.tasks}
        networks: dict[str, Any] = {t: {k: [] for k in suited[t]} for t in suited}
        pairs = [(task, kind) for task in suited for kind in suited[task]]
        for seed, (task, kind) in itertools.product(self.seeds, pairs):
            name = f"{task}-{kind}-{seed}".replace(", ", "-").replace(" ", "-")
            made = partial(self.train, checkpoints, name, task, kind, seed)
            networks[task][kind] += [checkpoints.once(f"{name}-done", made)]
        path = results.write("graphs", self, networks=networks)
        checkpoints.clear()
        return results.show(report, path.stem)

    def train(
        self, checkpoints: Any, name: str, task: str, kind: str, seed: int
    ) -> dict[str, Any]:
        """One network, from one seed."""
        recipe = RECIPES[task]
        if task == "chains":
            draw = lambda k: chains(16, LENGTH, (seed, k))
            data, seen = draw(0), chains(64, LONG, (seed, 10**6))
        else:
            data = seen = cora() if task == "cora" else planted(seed)
            draw = lambda k: data
        arrays = lambda n: (n.graph, n.features, n.labels, n.train)
        model = Network(kind, recipe, data.sizes, seed)
        adam = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(recipe.learning_rate)
        )
        history = fit(
            checkpoints,
            name,
            model,
            nnx.Optimizer(model, adam, wrt=nnx.Param),
            update,
            lambda k: arrays(draw(k)),
            seed=seed,
            num_blocks=self.blocks // (2 if task == "chains" else 1),
            steps=20,
            watch=partial(look, seen),
        )
        found: dict[str, Any] = {"history": history}
        best = int(np.argmax(history["watched"]["validation"]))
        found["test"] = history["watched"]["test"][best if task != "chains" else -1]
        if task == "chains":
            args = seen.graph, jnp.asarray(seen.features), jnp.asarray(seen.labels)
            found["by_distance"] = by_distance(model, *args)
        report.say_run(task, kind, seed, found)
        return found


if __name__ == "__main__":
    sys.exit(main(Graphs))
