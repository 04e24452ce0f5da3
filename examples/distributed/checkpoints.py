"""Checkpoints that all processes write, and that are whole or none.

Orbax writes the parts of all processes into one folder; process 0 then seals it with
a manifest: checksums of all files, the code, the options, the arrays. Two are kept, so
that a kill at any time leaves one that is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import rbpjax
from benchmarks.harness import guard, manifest
from benchmarks.harness.options import UsageError


class Checkpoints:
    """Those of one run, in ``folder/steps``, and its result, ``folder/result.json``."""

    CONFIG = ("tiny", "steps", "batch", "units", "learning_rate", "seed")
    """Options that a run must share with the checkpoint that it goes on from."""

    def __init__(self, folder: Path, config: Mapping[str, Any], fresh: bool):
        """Opens it; UsageError if it cannot be written or is another run's."""
        self.folder = folder.absolute()
        self.steps = self.folder / "steps"
        sources = Path(rbpjax.__file__).parent, Path(__file__).parent
        self.about = {"code": manifest.sources(*sources), "config": dict(config)}
        if jax.process_index() == 0:
            guard.lock(self.folder, f"the run in {folder}")
            if fresh:
                shutil.rmtree(self.folder, ignore_errors=True)
            guard.room(self.steps, 2**20)
            for path in self.steps.iterdir():
                if not manifest.is_complete(path):  # a kill left it
                    shutil.rmtree(path, ignore_errors=True)
        multihost_utils.sync_global_devices("opened")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, save_root_metadata=False
        )
        self.manager = ocp.CheckpointManager(self.steps, options=options)

    def restore(self, like: Any) -> tuple[int, Any]:
        """``(step, state)``, the last saved, divided over devices as ``like`` is."""
        leaves, treedef = jax.tree.flatten(like)
        step = self.manager.latest_step()
        if jax.process_index() == 0:
            size = sum(leaf.nbytes for leaf in leaves)
            guard.room(self.steps, 2**20 + 3 * size)
            if step is not None:
                self._check(step, like)
        multihost_utils.sync_global_devices("checked")
        if step is None:
            return 0, like
        kind = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        args = ocp.args.StandardRestore(list(map(kind, leaves)))
        return step, jax.tree.unflatten(treedef, self.manager.restore(step, args=args))

    def save(self, step: int, state: Any) -> None:
        """Saves ``state``, a part of it by each process."""
        args = ocp.args.StandardSave(jax.tree.leaves(state))
        self.manager.save(step, args=args, force=True)
        if jax.process_index() == 0:
            manifest.write(self.steps / str(step), self._about(step, state))
        multihost_utils.sync_global_devices("sealed")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result; the last checkpoints stay."""
        self.manager.close()
        if jax.process_index() == 0:
            partial = self.folder / "result.json.partial"
            partial.write_text(json.dumps(dict(result), indent=1) + "\n")
            os.replace(partial, self.folder / "result.json")
        multihost_utils.sync_global_devices("finished")

    def _check(self, step: int, like: Any) -> None:
        try:
            manifest.check(self.steps / str(step), self._about(step, like))
        except UsageError as error:
            path = self.steps / str(step)
            raise UsageError(
                f"checkpoint {path}: {error}; delete it, or start over with --fresh"
            ) from None

    def _about(self, step: int, state: Any) -> dict[str, Any]:
        return self.about | {"step": step, "arrays": manifest.arrays(state)}
