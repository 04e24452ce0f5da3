"""What an interrupted run has left, kept by orbax until the run is over."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness.options import UsageError
from benchmarks.harness.results import plain

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


class Checkpoints:
    """The last complete states of one run, each under a name.

    A run is named by its experiment and all of its options: other options never resume
    from it. A state is a pytree of arrays; a resumed run is the same, bit for bit.
    """

    def __init__(self, experiment: str, options: Mapping[str, Any], fresh: bool):
        """Opens the run's folder; ``fresh`` forgets what an earlier one left."""
        text = json.dumps(plain(options), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = (CHECKPOINTS / f"{experiment}-{digest}").absolute()
        if fresh:
            self.clear()

    def restore(self, name: str, like: Any) -> tuple[int, Any]:
        """``(step, state)``: the last saved under ``name``, or ``(0, like)``."""
        if not (self.folder / name).is_dir():
            return 0, like
        import orbax.checkpoint as ocp

        leaves, treedef = jax.tree.flatten(like)
        kind = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        with self._opened(name, "restore") as manager:
            step = manager.latest_step()
            if step is None:
                return 0, like
            args = ocp.args.StandardRestore([kind(leaf) for leaf in leaves])
            return step, jax.tree.unflatten(treedef, manager.restore(step, args=args))

    def save(self, name: str, step: int, state: Any) -> None:
        """Saves, then forgets the step before: there is always a complete one."""
        import orbax.checkpoint as ocp

        with self._opened(name, "save") as manager:
            args = ocp.args.StandardSave(jax.tree.leaves(state))
            manager.save(step, args=args, force=True)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What a run has left under ``name``, or made now and left: any JSON."""
        import orbax.checkpoint as ocp

        if (self.folder / name).is_dir():
            with self._opened(name, "restore") as manager:
                if manager.latest_step() is not None:
                    return manager.restore(0, args=ocp.args.JsonRestore())
        result = plain(make())
        with self._opened(name, "save") as manager:
            manager.save(0, args=ocp.args.JsonSave(result), force=True)
        return result

    def clear(self) -> None:
        """Forgets the run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _opened(self, name: str, action: str) -> Iterator[Any]:
        """Orbax's manager of one name; what goes wrong in one line."""
        import orbax.checkpoint as ocp  # two seconds to import: only where it is used

        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, save_root_metadata=False
        )
        path = self.folder / name
        try:
            with ocp.CheckpointManager(path, options=options) as manager:
                yield manager
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if action == "restore":
                raise UsageError(
                    f"damaged checkpoint {_short(path)} ({reason[:80]}): "
                    "delete it, or start over with --fresh"
                ) from None
            if isinstance(error, OSError):
                raise UsageError(f"cannot write {_short(path)}: {reason}") from None
            raise


def _short(path: Path) -> Path:
    """From the project's folder on, where it is in there."""
    root = CHECKPOINTS.parent.parent.absolute()
    return path.relative_to(root) if path.is_relative_to(root) else path
