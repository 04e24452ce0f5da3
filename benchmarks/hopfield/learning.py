"""The gradient methods, and training by one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rbpjax
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.progress import say
from benchmarks.harness.tables import mean_std
from benchmarks.harness.training import train
from benchmarks.hopfield.images import pack
from benchmarks.hopfield.network import Network, symmetric
from benchmarks.hopfield.report import TITLES
from rbpjax import RBP, CGNormal, FixedPointIteration, Neumann


class Settings(Protocol):
    """What training needs to know of the options."""

    num_steps: int
    truncation: int
    epochs: int
    learning_rate: float
    seeds: tuple[int, ...]


# In the order of the tables: (options, step function) -> the differentiable solve.
METHODS: dict[str, Callable[[Settings, Callable], Callable]] = {
    "bptt": lambda o, f: rbpjax.bptt(f, o.num_steps),
    "tbptt": lambda o, f: rbpjax.bptt(f, o.num_steps, truncation=o.truncation),
    "rbp": lambda o, f: _implicit(
        o, f, RBP(FixedPointIteration(steps=o.truncation), seed=1234)
    ),
    "cg": lambda o, f: _implicit(o, f, CGNormal(max_steps=o.truncation)),
    "neumann": lambda o, f: _implicit(o, f, Neumann(steps=o.truncation)),
}
BLOCKS = 20  # evaluations, and checkpoints, of one training run


def _implicit(options: Settings, f: Callable, rule: rbpjax.BackwardRule) -> Callable:
    forward = FixedPointIteration(steps=options.num_steps)
    return rbpjax.rbp_solve(f, forward=forward, backward=rule)


def loss(
    network: Network, solve: Callable, w: jax.Array, image: jax.Array, probe: Any = None
) -> tuple[jax.Array, rbpjax.Solution]:
    """Mean absolute error of the output units, and the solution."""
    clamp = network.clamp(image)
    solution = solve(symmetric(w), clamp, clamp, probe=probe)
    return jnp.mean(jnp.abs(network.output(solution.value) - image)), solution


def make_update(options: Settings, network: Network, solve: Callable) -> Callable:
    """``(w, adam, image) -> (w, adam)``: one training step."""
    adam = optax.adam(options.learning_rate)
    grad = jax.grad(partial(loss, network, solve), has_aux=True)

    def update(w: jax.Array, state: Any, image: jax.Array) -> tuple[jax.Array, Any]:
        updates, state = adam.update(grad(w, image)[0], state)
        return optax.apply_updates(w, updates), state

    return update


def learn(
    options: Settings,
    name: str,
    network: Network,
    images: np.ndarray,
    corrupted: np.ndarray,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Trains by one method, all seeds at once; returns curves and final images."""
    solve = METHODS[name](options, network.step)
    update = make_update(options, network, solve)
    measure = jax.jit(jax.vmap(partial(evaluate, network, solve, images, corrupted)))
    ends = np.unique(np.linspace(0, options.epochs, BLOCKS + 1).astype(int))

    def epoch(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        seed, w, state = carry
        key = jax.random.fold_in(jax.random.key(seed), number)
        order = jax.random.permutation(key, len(images))
        visit = lambda c, i: (update(*c, jnp.asarray(images)[i]), None)
        return (seed, *jax.lax.scan(visit, (w, state), order)[0]), None

    @partial(jax.jit, static_argnums=3)
    def block(w: jax.Array, state: Any, first: jax.Array, length: int) -> tuple:
        numbers = first + jnp.arange(length)
        one = lambda s, w, a: jax.lax.scan(epoch, (s, w, a), numbers)[0][1:]
        return jax.vmap(one)(seeds, w, state)

    seeds = jnp.array(options.seeds, jnp.uint32)
    w = jax.vmap(lambda s: network.init(jax.random.key(s)))(seeds)
    state = jax.vmap(optax.adam(options.learning_rate).init)(w)
    first = measure(w)
    empty = {k: jnp.zeros((len(ends), *v.shape), v.dtype) for k, v in first.items()}
    history = jax.tree.map(lambda h, v: h.at[0].set(v), empty, first)
    start = time.perf_counter()

    def advance(saved: tuple, i: int) -> tuple:
        w, state, history = saved
        begin, end = int(ends[i]), int(ends[i + 1])
        w, state = block(w, state, jnp.int32(begin), end - begin)
        set_row = lambda h, v: h.at[i + 1].set(v)
        return w, state, jax.tree.map(set_row, history, measure(w))

    saved = (w, state, history)
    label, blocks = TITLES[name], len(ends) - 1
    saved = train(checkpoints, name, saved, advance, blocks, label=label)
    w, _, history = saved
    final = jax.tree.map(lambda h: h[-1], history)
    say(
        f"{TITLES[name]:<19} loss {mean_std(final['loss'])}, retrieval error "
        f"{mean_std(final['retrieval_error'])}, {time.perf_counter() - start:.1f} s"
    )
    output = jax.jit(partial(retrieve, network, solve))(w[0], corrupted[0])
    return {
        "steps": ends * len(images),
        "history": {k: np.asarray(v) for k, v in history.items()},
        "retrieved": pack(np.asarray(output)),
    }


def retrieve(
    network: Network, solve: Callable, w: jax.Array, inputs: jax.Array
) -> jax.Array:
    """The thresholded output for each of ``inputs [image, pixel]``."""
    weights = symmetric(w)
    clamp = jax.vmap(network.clamp)(inputs)
    h = jax.vmap(lambda c: solve(weights, c, c).value)(clamp)
    return (jax.vmap(network.output)(h) > 0.5).astype(jnp.float32)


def evaluate(
    network: Network,
    solve: Callable,
    images: np.ndarray,
    corrupted: np.ndarray,
    w: jax.Array,
) -> dict[str, jax.Array]:
    """All measures of one set of weights; means over the images."""
    probed = rbpjax.value_and_grad_with_report(
        partial(loss, network, solve), has_aux=True
    )
    (losses, solution), _, report = jax.vmap(probed, (None, 0))(w, images)
    rho = jax.vmap(
        lambda clamp, h: rbpjax.diagnostics.spectral_radius(
            jax.random.key(0), network.step, symmetric(w), clamp, h, num_steps=60
        )
    )(jax.vmap(network.clamp)(images), solution.value)
    wrong = lambda inputs: jnp.mean(retrieve(network, solve, w, inputs) != images)
    solved = report.cotangent_norm > 0  # BPTT and TBPTT solve no adjoint
    return {
        "loss": losses.mean(),
        "retrieval_error": jax.lax.map(wrong, corrupted).mean(),
        "forward_residual": solution.residual.max(),
        "spectral_radius": rho.max(),
        "adjoint_residual": jnp.where(solved, report.residual, jnp.nan).max(),
        "adjoint_steps": jnp.where(solved, report.num_steps, jnp.nan).mean(),
    }
