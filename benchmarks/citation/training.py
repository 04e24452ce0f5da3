"""Training of one citation network with one gradient method and one seed."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rbpjax
from benchmarks.citation.networks import Solve, step
from benchmarks.data.planetoid import Planetoid
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.training import train

SAVES = 5  # checkpoints of one run


@dataclasses.dataclass(frozen=True)
class Task:
    """What is the same for all methods and seeds.

    Attributes:
      graph: the data.
      network: the class of the network.
      inputs: what the network makes of the data.
      optimizer: optax transformation of the network's state.
      epochs: full-graph steps.
      every: steps between two looks at the validation nodes.
    """

    graph: Planetoid
    network: type
    inputs: Any
    optimizer: optax.GradientTransformation
    epochs: int
    every: int


def random_split(graph: Planetoid, seed: int) -> tuple[np.ndarray, ...]:
    """1 % of the labeled nodes to train, 49 % to validate, 50 % to test."""
    nodes = np.flatnonzero(graph.labels >= 0)
    nodes = np.random.default_rng(seed).permutation(nodes)
    first, second = len(nodes) // 100, len(nodes) // 2
    return tuple(np.sort(part) for part in np.split(nodes, [first, second]))


def standard_split(graph: Planetoid, seed: int) -> tuple[np.ndarray, ...]:
    """The split of the data set, whatever the seed."""
    return graph.train, graph.validation, graph.test


class Trainer:
    """Training by one gradient method; compiled once for all seeds."""

    def __init__(self, task: Task, solve: Solve) -> None:
        self.task, self.solve = task, solve
        self.labels = jnp.asarray(np.maximum(task.graph.labels, 0))
        self.block = jax.jit(self._block, static_argnums=3)
        self.measure = jax.jit(self._measure)
        self.structure, _ = nnx.split(self._network(0))

    def _network(self, seed: int) -> nnx.Module:
        sizes = self.task.graph.features.shape[1], self.task.graph.num_classes
        return self.task.network(*sizes, nnx.Rngs(seed))

    def init(self, seed: int) -> tuple:
        """``(params, optimizer state, best so far)``."""
        params = nnx.state(self._network(seed))
        seen = {
            "validation_accuracy": jnp.float32(-1),
            "validation_loss": jnp.float32(jnp.inf),
            "test_accuracy": jnp.float32(0),
        }
        best = {"seen": seen, "params": params}
        return params, self.task.optimizer.init(params), best

    def _forward(self, params: Any, key: Any = None, probe: Any = None) -> tuple:
        network = nnx.merge(self.structure, params)
        first, second = (None, None) if key is None else jax.random.split(key)
        problem = network.problem(self.task.inputs, first)
        solution = self.solve(*problem, probe=probe)
        logits = network.logits(solution.value, second)
        return logits, (network.penalty(), problem, solution)

    def _entropy(self, logits: jax.Array, nodes: jax.Array) -> jax.Array:
        picked = logits[nodes], self.labels[nodes]
        return optax.softmax_cross_entropy_with_integer_labels(*picked).mean()

    def loss(
        self, params: Any, train: jax.Array, key: Any = None, probe: Any = None
    ) -> tuple[jax.Array, Any]:
        """The training loss, and ``(problem, solution)``."""
        logits, (penalty, *rest) = self._forward(params, key, probe)
        return self._entropy(logits, train) + penalty, tuple(rest)

    def update(self, carry: tuple, train: jax.Array, key: jax.Array) -> tuple:
        """One training step."""
        params, state, *rest = carry
        grads, _ = jax.grad(self.loss, has_aux=True)(params, train, key)
        updates, state = self.task.optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, *rest)

    def _look(self, carry: tuple, split: tuple) -> tuple:
        """Keeps the network if it is the best one yet on the validation nodes."""
        params, state, best = carry
        _, validation, test = split
        logits, _ = self._forward(params)
        right = jnp.argmax(logits, axis=1) == self.labels
        seen = {
            "validation_accuracy": right[validation].mean(),
            "validation_loss": self._entropy(logits, validation),
            "test_accuracy": right[test].mean(),
        }
        rank = lambda s: (s["validation_accuracy"], -s["validation_loss"])
        (a, b), (c, d) = rank(seen), rank(best["seen"])
        better = (a > c) | ((a == c) & (b > d))
        new = {"seen": seen, "params": params}
        return params, state, jax.tree.map(partial(jnp.where, better), new, best)

    def _block(self, carry: tuple, first: jax.Array, given: tuple, looks: int) -> tuple:
        """``looks`` times ``every`` steps and a look, from step ``first`` on."""
        split, base = given

        def one(carry: tuple, start: jax.Array) -> tuple[tuple, None]:
            numbers = start + jnp.arange(self.task.every)
            keys = jax.vmap(partial(jax.random.fold_in, base))(numbers)
            step_ = lambda c, k: (self.update(c, split[0], k), None)
            return self._look(jax.lax.scan(step_, carry, keys)[0], split), None

        starts = first + self.task.every * jnp.arange(looks)
        return jax.lax.scan(one, carry, starts)[0]

    def _measure(self, params: Any, train: jax.Array) -> dict[str, jax.Array]:
        """Residuals and ρ(J) of one network."""
        probed = rbpjax.value_and_grad_with_report(self.loss, has_aux=True)
        (_, (problem, solution)), _, report = probed(params, train)
        cell, inputs, _ = problem
        radius = rbpjax.diagnostics.spectral_radius(
            jax.random.key(0), step, cell, inputs, solution.value
        )
        # BPTT and TBPTT solve no adjoint.
        adjoint = lambda x: jnp.where(report.cotangent_norm > 0, x, jnp.nan)
        return {
            "forward_residual": solution.residual,
            "forward_steps": solution.num_steps,
            "spectral_radius": radius,
            "adjoint_residual": adjoint(report.residual),
            "adjoint_converged": adjoint(report.converged),
            "adjoint_steps": adjoint(report.num_steps),
        }

    def train(
        self, split: tuple, seed: int, checkpoints: Checkpoints, name: str
    ) -> dict[str, float]:
        """Trains from where ``name`` was saved last, and measures at the end.

        Accuracies and residuals are those of the best network on the validation nodes
        (ties by their loss).
        """
        split = tuple(map(jnp.asarray, split))
        given = split, jax.random.key(seed + 1)
        looks = self.task.epochs // self.task.every
        size = -(-looks // SAVES)  # all blocks but the last alike: one compilation

        def block(state: tuple, i: int) -> tuple:
            carry, seconds = state
            start = time.perf_counter()
            first = jnp.int32(i * size * self.task.every)
            carry = self.block(carry, first, given, min(size, looks - i * size))
            jax.block_until_ready(carry)
            return carry, seconds + time.perf_counter() - start

        fresh = self.init(seed), jnp.zeros(())
        carry, seconds = train(checkpoints, name, fresh, block, -(-looks // size))
        best = carry[2]
        result = best["seen"] | self.measure(best["params"], split[0])
        return {k: float(v) for k, v in (result | {"seconds": seconds}).items()}
