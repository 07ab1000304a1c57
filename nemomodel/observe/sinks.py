"""Where metrics go: console, metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 only."""

import importlib.util
import json
import logging
import math
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemomodel.config.schema import ObserveConfig
from nemomodel.observe.console import ConsoleSink
from nemomodel.observe.files import write_atomically
from nemomodel.observe.metrics import check_names

log = logging.getLogger(__name__)


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of `step`. Steps increase; each is written once."""
        ...

    def close(self) -> None: ...


def check_backends(observe: ObserveConfig) -> None:
    """Complain about a missing optional package before any work is done."""
    if observe.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f'observe.wandb_project="{observe.wandb_project}" needs the wandb package; '
            "pip install nemomodel[wandb]"
        )


def open_sinks(
    observe: ObserveConfig,
    run_dir: Path,
    *,
    rank: int,
    num_steps: int,
    start_step: int,
    config: Mapping[str, Any],
) -> list[Sink]:
    """The sinks of this rank: none but on rank 0.

    Args:
        start_step: last step that is already done, 0 for a new run. What a dead run recorded
            after it is removed or hidden.
        config: the resolved configuration, shown by Weights & Biases.
    """
    if rank != 0:
        return []
    sinks: list[Sink] = [ConsoleSink(num_steps=num_steps)]
    sinks.append(JsonLinesSink(run_dir / "metrics.jsonl", start_step=start_step))
    if observe.tensorboard:
        sinks.append(TensorBoardSink(run_dir, start_step=start_step))
    if observe.wandb_project is not None:
        sinks.append(WandbSink(observe.wandb_project, run_dir, config=config))
    return sinks


def write_metrics(sinks: Sequence[Sink], step: int, values: Mapping[str, float]) -> None:
    """Give one record to every sink."""
    check_names(values)
    for sink in sinks:
        sink.write(step, values)


class JsonLinesSink:
    """One JSON object per line: `step` and the metrics. NaN and infinity are written as null."""

    def __init__(self, path: Path, *, start_step: int) -> None:
        _cut_after(path, start_step)
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _cut_after(path: Path, start_step: int) -> None:
    """Drop records of steps that will be done again, and the line a crash left half written."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            keep = json.loads(line)["step"] <= start_step
        except (ValueError, KeyError, TypeError):
            log.warning("%s: line %d is not a record; dropped", path, number)
            keep = False
        kept += f"{line}\n" if keep else ""
    if kept != text:
        write_atomically(path, kept)


class TensorBoardSink:
    """Event files in the run folder, flushed at every record.

    Written with TensorBoard's record format alone: its own writer and torch's start a thread and
    import TensorFlow where that is installed.
    """

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = event_pb2, summary_pb2
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self.writer = RecordWriter((run_dir / name).open("wb"))
        self._add(file_version="brain.Event:2")
        # START hides what earlier files have from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=start_step + 1, session_log=start)

    def _add(self, **fields: Any) -> None:
        event = self.event.Event(wall_time=time.time(), **fields)
        self.writer.write(event.SerializeToString())
        self.writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self.summary.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._add(step=step, summary=self.summary.Summary(value=scalars))

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """Weights & Biases, with our step as the x axis; a resumed run continues its page."""

    def __init__(self, project: str, run_dir: Path, *, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(4))
        self.run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=run_dir,
            config=dict(config),
        )
        # Its own step may not go back, ours does after a crash.
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()
