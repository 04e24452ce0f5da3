"""Processes that work together: how they find each other, and what if one is gone.

Exit codes: 0 done; 2 something to mend first; 75 a peer is gone, start all of them
again and they go on from the last checkpoint (EX_TEMPFAIL, which schedulers requeue).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import jax

from benchmarks.harness.options import UsageError

GONE = 75
_number = ["0"]  # of this process, also where JAX cannot say it any more


def several(options: argparse.Namespace) -> bool:
    """Whether this process is one of several."""
    return options.processes > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def connect(options: argparse.Namespace) -> None:
    """Joins the other processes, by hand, or as SLURM says; alone there are none."""
    # We notice sooner, and say so in one line; JAX's own end is a stack trace.
    _number[0] = os.environ.get("SLURM_PROCID", str(options.process))
    patience = round(options.patience)
    limits = {
        "initialization_timeout": 2 * patience,
        "heartbeat_timeout_seconds": 2 * patience,
        "shutdown_timeout_seconds": patience,
    }
    with deadline(options.patience, "connecting"):
        if options.processes > 1:
            jax.distributed.initialize(
                options.coordinator, options.processes, options.process, **limits
            )
        elif several(options):  # SLURM's variables say the rest
            jax.distributed.initialize(**limits)


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Ends the process, in one line, where ``what`` takes longer than ``seconds``.

    A peer whose machine is gone closes no connection: one waits for it in vain.
    """
    reason = f"{what} took more than {seconds:g} s"
    timer = threading.Timer(seconds, _end, [reason, GONE])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def one_line(options: argparse.Namespace) -> Iterator[None]:
    """What goes wrong in one line, at once, and without waiting for the peers."""
    try:
        yield
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
    except UsageError as error:
        _end(f"error: {error}", 2)
    except Exception as error:
        if not several(options):
            raise
        text = str(error) or type(error).__name__
        _end(text.splitlines()[0][:160], GONE)


def _end(reason: str, code: int) -> None:
    if code == GONE:
        reason = f"process {_number[0]}: a peer is gone ({reason}); start all again"
    print(reason, file=sys.stderr, flush=True)
    os._exit(code)
