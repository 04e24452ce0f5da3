"""Processes that work together: how they find each other, and what if one is gone.

Exit codes: 0 done; 2 something to mend first; 75 a peer is gone, start all of them
again and they go on from the last checkpoint (EX_TEMPFAIL, which schedulers requeue).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from benchmarks.harness.options import UsageError

GONE = 75


CHILD = "RBPJAX_DISTRIBUTED_CHILD"
JAXS_OWN = r" (coordination_service|preemption_sync|client|service)\w*\.\w+:\d+\]"
"""Where JAX says, on the standard error of a process, that another one is gone."""


def run(options: argparse.Namespace, work: Callable) -> None:
    """Connects and works; ends in one line where it cannot go on."""
    if several(options) and CHILD not in os.environ:
        sys.exit(watched())
    if CHILD in os.environ:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    with one_line(options):
        connect(options)
        work(options)


def watched() -> int:
    """The same command in a child of this process; its exit code.

    Where the process that coordinates is gone, JAX aborts the others from a thread of
    its own, with a stack trace. Here it becomes our one line.
    """
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {CHILD: "1"},
        stdin=subprocess.PIPE,  # closed when this process ends, even by kill -9
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    assert child.stderr is not None
    fatal, said, skipped = "", False, False
    for line in child.stderr:
        # JAX's own words on the same thing, some with more lines or a stack trace.
        if re.match(r"[IWEF]\d{4} ", line):
            skipped = bool(fatal) or bool(re.search(JAXS_OWN, line))
            if line[0] == "F":
                fatal, skipped = fatal or line.partition("] ")[2].strip(), True
        elif re.match(r"process \d+: |error: ", line):
            skipped = bool(fatal)
        if not skipped:
            said = said or "a peer is gone" in line
            sys.stderr.write(line)
    if child.wait() in (-signal.SIGABRT, GONE) and fatal and not said:
        _end(fatal[:160], GONE)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(GONE)


def several(options: argparse.Namespace) -> bool:
    """Whether this process is one of several."""
    return options.processes > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def connect(options: argparse.Namespace) -> None:
    """Joins the other processes, by hand, or as SLURM says; alone there are none."""
    # We notice sooner than JAX, and say what it is.
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
        reason = f"process {_number()}: a peer is gone ({reason}); start all again"
    print(reason, file=sys.stderr, flush=True)
    os._exit(code)


def _number() -> str:
    """Of this process, also where JAX cannot say it any more."""
    names = ("SLURM_PROCID", "PROCESS_ID", "JOB_COMPLETION_INDEX")
    given = re.search(r"--process[ =](\d+)", " ".join(sys.argv))
    return given[1] if given else next(filter(None, map(os.environ.get, names)), "0")
