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

import rbpjax
from benchmarks.harness import guard, manifest
from benchmarks.harness.options import UsageError
from benchmarks.harness.results import plain

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


class Checkpoints:
    """The last complete states of one run, each under a name.

    A run is named by its experiment and all of its options: other options never resume
    from it. A state is a pytree of arrays; a resumed run is the same, bit for bit. What
    is not as it was written is named, and nothing is restored: a flipped bit, a renamed
    folder, another dtype, another version of the code.
    """

    def __init__(self, experiment: str, options: Mapping[str, Any], fresh: bool):
        """Opens the run's folder; ``fresh`` forgets what an earlier one left.

        Raises:
          UsageError: if the folder cannot be written, or the same run is going on.
        """
        self.options = json.loads(
            json.dumps(plain(options), sort_keys=True, default=str)
        )
        text = json.dumps(self.options, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = (CHECKPOINTS / f"{experiment}-{digest}").absolute()
        guard.lock(self.folder, f"this {experiment}")
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        guard.room(self.folder, 2**20)

    def restore(self, name: str, like: Any) -> tuple[int, Any]:
        """``(step, state)``: the last saved under ``name``, or ``(0, like)``.

        Makes sure that there is room for two more of ``like``, too.
        """
        import orbax.checkpoint as ocp

        leaves, treedef = jax.tree.flatten(like)
        guard.room(self.folder, 2**20 + 2 * sum(leaf.nbytes for leaf in leaves))
        kind = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        step = self._last(name)
        if step is None:
            return 0, like
        with self._opened(name, "restore") as manager:
            manifest.check(self.folder / name / str(step), self._about(step, like))
            args = ocp.args.StandardRestore([kind(leaf) for leaf in leaves])
            return step, jax.tree.unflatten(treedef, manager.restore(step, args=args))

    def save(self, name: str, step: int, state: Any) -> None:
        """Saves, then forgets the step before: there is always a complete one."""
        import orbax.checkpoint as ocp

        args = ocp.args.StandardSave(jax.tree.leaves(state))
        self._save(name, step, args, state)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What a run has left under ``name``, or made now and left: any JSON."""
        import orbax.checkpoint as ocp

        if self._last(name) is not None:
            with self._opened(name, "restore") as manager:
                manifest.check(self.folder / name / "0", self._about(0, ()))
                return manager.restore(0, args=ocp.args.JsonRestore())
        result = plain(make())
        self._save(name, 0, ocp.args.JsonSave(result), ())
        return result

    def clear(self) -> None:
        """Forgets the run. Its results have been written before."""
        shutil.rmtree(self.folder, ignore_errors=True)
        guard.unlock(self.folder)

    def _save(self, name: str, step: int, args: Any, state: Any) -> None:
        path = self.folder / name
        if not manifest.is_complete(path / str(step)):  # left by a kill
            shutil.rmtree(path / str(step), ignore_errors=True)
        with self._opened(name, "save") as manager:
            manager.save(step, args=args, force=True)
            manifest.write(path / str(step), self._about(step, state))
            for other in manager.all_steps():
                if other != step:
                    manager.delete(other)

    def _last(self, name: str) -> int | None:
        """The last complete step."""
        folders = (self.folder / name).glob("[0-9]*")
        steps = [int(f.name) for f in folders if f.name.isdigit()]
        complete = lambda step: manifest.is_complete(self.folder / name / str(step))
        return max(filter(complete, steps), default=None)

    def _about(self, step: int, state: Any) -> dict[str, Any]:
        """What a checkpoint of this run must say of itself."""
        ours = Path(rbpjax.__file__).parent, Path(__file__).parent.parent
        return {
            "step": step,
            "code": manifest.sources(*ours),
            "config": self.options,
            "arrays": manifest.arrays(jax.tree.leaves(state)),
        }

    @contextlib.contextmanager
    def _opened(self, name: str, action: str) -> Iterator[Any]:
        """Orbax's manager of one name; what goes wrong in one line."""
        import orbax.checkpoint as ocp  # two seconds to import: only where it is used

        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False, save_root_metadata=False
        )
        path = self.folder / name
        try:
            with ocp.CheckpointManager(path, options=options) as manager:
                yield manager
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if action == "restore":
                raise UsageError(
                    f"damaged checkpoint {_short(path)} ({reason[:160]}): "
                    "delete it, or start over with --fresh"
                ) from None
            if isinstance(error, OSError):
                raise UsageError(f"cannot write {_short(path)}: {reason}") from None
            raise


def _short(path: Path) -> Path:
    """From the project's folder on, where it is in there."""
    root = CHECKPOINTS.parent.parent.absolute()
    return path.relative_to(root) if path.is_relative_to(root) else path
