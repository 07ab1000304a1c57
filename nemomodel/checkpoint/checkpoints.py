"""Save, resume and retire the checkpoints of a run.

Saving copies the state to host memory, and then writes it in a background thread while training
goes on. A thread and not the forked process of megatron-core's own queue: forking a process that
holds CUDA or gloo threads is not safe, and file writes and SHA-256 run outside Python's lock.
A checkpoint is published in two phases: all files go into `.step_N.partial`, the manifest last;
only when every rank has written is the folder renamed, and then the `latest` pointer replaced.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from nemomodel.checkpoint.files import (
    FOLDER,
    FORMAT,
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    damage,
    describe_file,
    read_state,
    replace_text,
    step_folders,
    step_name,
    step_of,
    sync_folder,
    write_json,
)
from nemomodel.checkpoint.state import Engine, copy_shards, random_states, restore, rng_name
from nemomodel.checkpoint.weights import SAME_MODEL
from nemomodel.config.load import config_to_dict
from nemomodel.config.pattern import CUT
from nemomodel.config.schema import Config
from nemomodel.parallel.mcore import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    tokens: int


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    partial: Path
    state: dict[str, Any]
    writer: FileSystemWriter
    metadata: Metadata
    done: Future


class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks at the same point."""

    def __init__(self, config: Config, ranks: Ranks, engine: Engine) -> None:
        self._config, self._ranks, self._engine = config, ranks, engine
        self._root = Path(config.run.dir) / FOLDER
        self._pending: _Pending | None = None
        self._damaged: set[Path] = set()
        self._rank_0(self._remove_partial_folders)

    def latest(self) -> Path | None:
        """The newest published checkpoint that `load` has not found damaged."""
        return next(iter(self._intact()), None)

    def _intact(self) -> list[Path]:
        return [folder for folder in step_folders(self._root) if folder not in self._damaged]

    def save(self, step: int, *, tokens: int) -> None:
        """Write the state after update `step`; with async_save only start to.

        Raises:
            CheckpointError: this or the previous checkpoint could not be written. The published
                ones are untouched.
        """
        self.finish()
        partial = self._root / f".{step_name(step)}.partial"
        copies, num_bytes = copy_shards(self._engine, self._ranks)
        self._rank_0(lambda: _make_room(partial, num_bytes))
        writer = FileSystemWriter(partial, sync_files=True)
        writer.set_up_storage_writer(self._ranks.rank == 0)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(copies, is_coordinator=self._ranks.rank == 0)
        # Every rank computes the same global plan from all local ones, and takes its part.
        plans = _all_gather(writer.prepare_local_plan(planner.create_local_plan()))
        plans, metadata = planner.create_global_plan(plans)
        plan = planner.finish_plan(writer.prepare_global_plan(plans)[self._ranks.rank])
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = _Pending(
            step=step,
            partial=partial,
            state={
                "format": FORMAT,
                "step": step,
                "tokens": tokens,
                "world_size": self._ranks.world_size,
                **self._engine.counters(),
                "config": config_to_dict(self._config),
            },
            writer=writer,
            metadata=metadata,
            done=thread.submit(
                _write, writer, planner, plan, partial, self._ranks.rank, random_states()
            ),
        )
        thread.shutdown(wait=False)  # it ends with its one task; no thread stays between saves
        if not self._config.checkpoint.async_save:
            self.finish()

    def poll(self) -> None:
        """Publish a checkpoint that all ranks have written; does not wait for one.

        Raises:
            CheckpointError: as `save`.
        """
        if self._pending is None:
            return
        done = torch.tensor(int(self._pending.done.done()))
        # Minimum: ranks must agree, or one would publish while another trains on.
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if done:
            self._publish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and publish it.

        Raises:
            CheckpointError: as `save`.
        """
        if self._pending is not None:
            self._publish()

    def load(self) -> Progress | None:
        """Restore the newest intact checkpoint; None when the run has none.

        Raises:
            CheckpointError: checkpoints are there, but none is intact; or it is of another model.
        """
        self.finish()
        # The list of rank 0 counts: a shared file system may show ranks different folders.
        folders = _all_gather(step_folders(self._root))[0]
        found = []
        for folder in folders:
            share = damage(folder, share=self._ranks.rank, shares=self._ranks.world_size)
            wrong = [line for line in _all_gather(share) if line]
            if not wrong:
                return self._restore(folder)
            found.append(wrong[0])
            self._damaged.add(folder)
            if self._ranks.rank == 0:
                logger.warning("checkpoint %s is damaged (%s); trying older", folder, wrong[0])
        if found:
            raise CheckpointError("\n  ".join([f"{self._root}: no intact checkpoint", *found]))
        return None

    def _restore(self, folder: Path) -> Progress:
        state = read_state(folder)
        ours = json.loads(json.dumps(config_to_dict(self._config)))
        _check_model(folder, state["config"]["model"], ours["model"])
        if self._ranks.rank == 0:
            for line in _changes(state["config"], ours):
                logger.warning("resuming %s with %s", folder, line)
        restore(self._engine, self._ranks, folder, state)
        return Progress(step=state["step"], tokens=state["tokens"])

    def _publish(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        # Also waits: the thread of this rank may still be writing.
        error = pending.done.exception()
        results = _all_gather(_reason(error) if error else pending.done.result())
        failed = [f"rank {n}: {r}" for n, r in enumerate(results) if isinstance(r, str)]
        if failed:
            self._rank_0(lambda: shutil.rmtree(pending.partial, ignore_errors=True))
            raise CheckpointError(
                f"checkpoint {self._root / step_name(pending.step)} could not be written: "
                + "; ".join(failed)
            )
        self._rank_0(lambda: self._publish_files(pending, results))

    def _publish_files(self, pending: _Pending, results: list[tuple[list, dict]]) -> None:
        partial, final = pending.partial, self._root / step_name(pending.step)
        pending.writer.finish(pending.metadata, [written for written, _ in results])
        write_json(partial / STATE, pending.state)
        files = {name: entry for _, own in results for name, entry in own.items()}
        files |= {name: describe_file(partial / name) for name in (".metadata", STATE)}
        write_json(
            partial / MANIFEST,
            {
                "format": FORMAT,
                "step": pending.step,
                "world_size": self._ranks.world_size,
                "files": files,
            },
        )
        sync_folder(partial)
        if final.exists():
            # Saved before, e.g. by a run that was resumed from an older step.
            old = self._root / f".{final.name}.old.partial"
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
        replace_text(self._root / LATEST, final.name)
        # A damaged one must not take the place of one that is kept.
        self._damaged.discard(final)
        for folder in [*self._intact()[self._config.checkpoint.keep :], *self._damaged]:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_partial_folders(self) -> None:
        """Left by runs that died while saving; only at start can none of them be ours."""
        for folder in self._root.glob(".step_*.partial"):
            shutil.rmtree(folder)

    def _rank_0(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; its failure is a CheckpointError on every rank."""
        error = None
        if self._ranks.rank == 0:
            try:
                action()
            except (OSError, CheckpointError) as caught:
                error = _reason(caught)
        error = _all_gather(error)[0]
        if error:
            raise CheckpointError(f"checkpoints in {self._root}: {error}")


def _write(
    writer: FileSystemWriter,
    planner: DefaultSavePlanner,
    plan: SavePlan,
    partial: Path,
    rank: int,
    states: dict[str, Any],
) -> tuple[list, dict[str, dict[str, Any]]]:
    """Write the files of one rank; returns what the index needs, and name -> size and hash."""
    results = writer.write_data(plan, planner).value()
    with (partial / rng_name(rank)).open("wb") as file:
        torch.save(states, file)
        file.flush()
        os.fsync(file.fileno())
    names = [rng_name(rank), *{result.storage_data.relative_path for result in results}]
    return results, {name: describe_file(partial / name) for name in names}


def _make_room(partial: Path, num_bytes: int) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < num_bytes:
        partial.rmdir()
        raise CheckpointError(
            f"step {_step_of_partial(partial)} needs {num_bytes / 1e9:.3f} GB, the disk has "
            f"{free / 1e9:.3f} GB free; make room, or use a smaller checkpoint.keep"
        )


def _step_of_partial(partial: Path) -> int:
    return step_of(Path(partial.name.removeprefix(".").removesuffix(".partial")))


def _check_model(folder: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    saved, ours = (_flat(m | {"layer_pattern": _letters(m)}) for m in (saved, ours))
    lines = [
        f"saved with model.{key}={json.dumps(saved.get(key))}, "
        f"this run has {json.dumps(ours.get(key))}"
        for key in {**saved, **ours}
        if saved.get(key) != ours.get(key) and key not in SAME_MODEL
    ]
    if lines:
        raise CheckpointError(f"checkpoint {folder}: {'; '.join(lines)}; the models differ")


def _letters(model: dict[str, Any]) -> str:
    """Pipeline stages may be cut elsewhere: that is another layout of the same model."""
    return model["layer_pattern"].replace(CUT, "")


def _changes(saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Settings that differ from the run so far and change how it goes on."""
    saved, ours = _flat(saved), _flat(ours)
    quiet = ("run.dir", "train.stop_after", "checkpoint.", "observe.", "data.cache_dir")
    reorder = ("data.", "run.seed", "train.seq_length", "train.global_batch_size")
    lines = []
    for key in sorted(saved.keys() | ours.keys()):
        if saved.get(key) == ours.get(key) or key.startswith(quiet):
            continue
        order = "; the order of the data changes here" if key.startswith(reorder) else ""
        lines.append(f"{key}={ours.get(key)!r}, which was {saved.get(key)!r}{order}")
    return lines


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _all_gather(value: Any) -> list[Any]:
    """The value of every rank, in order of rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
