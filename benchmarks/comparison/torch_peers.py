"""torchdeq on PyTorch: the networks of ``rules`` once more, and the same call."""

from __future__ import annotations

import os
import time
from typing import Any

import jax
import numpy as np

from benchmarks.comparison.method import Program, Refused, Setting
from benchmarks.comparison.problems import Problem

# Threads that wait for work give their core to others, JAX's among them. Read when
# PyTorch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


def _step(problem: Problem) -> Any:
    """``f(leaves, inputs, h)`` in PyTorch; leaves in JAX's order."""
    import torch

    known = {k: torch.tensor(v) for k, v in problem.constants.items()}

    def rnn(p: list, x: Any, h: Any) -> Any:
        bias, w = p
        return torch.tanh(h @ w + bias + 0.3 * x)

    def hopfield(p: list, clamp: Any, h: Any) -> Any:
        (w,) = p
        symmetric = (w + w.T) * (1 - torch.eye(len(w)))
        return torch.where(known["free"], torch.sigmoid(0.5 * h) @ symmetric, clamp)

    def graph(p: list, x: Any, h: Any) -> Any:
        messages = h[known["send"]] * known["weight"][:, None]
        sums = torch.zeros_like(h).index_add(0, known["receive"], messages)
        return sums @ p[0] + x

    def layer(kernel: Any, h: Any) -> Any:
        kernel = known["gain"] * kernel / (kernel**2).sum((0, 1, 2)).sqrt()
        return torch.conv2d(h, kernel.permute(3, 2, 0, 1), padding="same")

    def conv(p: list, x: Any, h: Any) -> Any:
        # The state stays as JAX has it, channels last, which is PyTorch's memory
        # format of that name seen through a transposed view.
        h = h.permute(0, 3, 1, 2)
        h = layer(p[1], torch.tanh(layer(p[0], h)))
        return torch.tanh(x + h.permute(0, 2, 3, 1))

    def bilevel(p: list, b: Any, h: Any) -> Any:
        return h - known["rate"] * (h @ known["hessian"] + p[0] * h - b)

    def linear(p: list, x: Any, h: Any) -> Any:
        return h @ p[0].T + x

    kinds = (rnn, hopfield, graph, conv, bilevel, linear)
    return {kind.__name__: kind for kind in kinds}[problem.kind]


def program(solver: str, problem: Problem, setting: Setting) -> Program:
    """A call of value and gradient by torchdeq, both passes by ``solver``.

    Its solvers take time for every step that they were allowed and did not use, so that
    each is allowed as many as a first run took.
    """
    import torch
    import torchdeq

    step = _step(problem)
    tensor = lambda u: torch.tensor(np.asarray(u))
    leaves = [tensor(u) for u in jax.tree.leaves(problem.params)]
    inputs, h0, target = map(tensor, (problem.inputs, problem.h0, problem.target))
    wanted = [*leaves, inputs]
    for leaf in wanted:
        leaf.requires_grad_()
    # A vector is a batch of one.
    first = h0 if h0.dim() > 1 else h0[None]

    def run(forward_steps: int, backward_steps: int, taken: dict | None = None) -> Any:
        deq = torchdeq.get_deq(
            ift=True,
            f_solver=solver,
            b_solver=solver,
            f_max_iter=forward_steps,
            b_max_iter=backward_steps,
            f_tol=setting.forward,
            b_tol=setting.backward,
            f_stop_mode="rel",
            b_stop_mode="rel",
        )
        deq.train()
        write = lambda info: taken.update(backward=info["nstep"])
        found, info = deq(
            lambda h: step(leaves, inputs, h),
            first,
            backward_writer=None if taken is None else write,
        )
        if taken is not None:
            taken["forward"] = info["nstep"]
        loss = 0.5 * ((found[-1].reshape(h0.shape) - target) ** 2).sum()
        gradients = torch.autograd.grad(loss, wanted)
        return loss.item(), [u.numpy() for u in gradients]

    taken: dict[str, Any] = {}
    budget = min(problem.budget, 200)  # five times its default
    try:
        run(budget, budget, taken)
    except (RuntimeError, ValueError) as problem_:
        raise Refused(f"{type(problem_).__name__}: {str(problem_)[:100]}") from None
    counts = [int(taken[k].max()) + 1 for k in ("forward", "backward")]
    threads = min((1, _THREADS), key=lambda n: _seconds(run, counts, n))

    def call() -> Any:
        torch.set_num_threads(threads)
        return run(*counts)

    return Program(call, None, None)


def _seconds(run: Any, counts: list[int], threads: int) -> float:
    """Of one run: small problems, and busy machines, do better with one thread."""
    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    run(*counts)
    return time.perf_counter() - start
