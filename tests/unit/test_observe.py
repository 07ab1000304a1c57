"""Metrics reach every sink once per step, also after a crash and a resume."""

import json
import logging
import math

import pytest
import torch

from nemomodel.config.schema import ObserveConfig
from nemomodel.observe.console import console_lines
from nemomodel.observe.logs import setup_logging
from nemomodel.observe.metrics import check_names
from nemomodel.observe.peak import datasheet_flops, peak_flops
from nemomodel.observe.sinks import (
    JsonLinesSink,
    TensorBoardSink,
    check_backends,
    open_sinks,
    write_metrics,
)

RECORD = {
    "loss/lm": 3.25,
    "loss/mtp_1": 3.5,
    "loss/mtp_2": 4.0,
    "optim/grad_norm": 0.5,
    "optim/lr": 3e-3,
    "perf/tokens_per_s": 12345.6,
    "perf/mfu": 0.315,
    "perf/step_s": 0.5,
}


@pytest.fixture
def plain_logging():
    """Give logging back as it was."""
    root, package = logging.getLogger(), logging.getLogger("nemomodel")
    before = root.handlers[:], root.level, package.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_steps(path, steps, *, start_step):
    sink = JsonLinesSink(path, start_step=start_step)
    for step in steps:
        sink.write(step, {"loss/lm": float(step)})
    sink.close()


def test_numbered_names_are_known():
    check_names({"loss/mtp_1": 1.0, "loss/mtp_12": 1.0, "loss/validation_mtp_2": 1.0})


@pytest.mark.parametrize("name", ["loss/ml", "loss/mtp_", "loss/mtp_x", "loss/lm_1", "loss"])
def test_an_unknown_name_is_our_bug(name):
    with pytest.raises(AssertionError, match=f"'{name}'"):
        write_metrics([], 1, {"loss/lm": 1.0, name: 1.0})


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2], start_step=0)
    write_steps(path, [1], start_step=0)
    assert path.read_text() == '{"step": 1, "loss/lm": 1.0}\n'


def test_resume_leaves_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20, 30, 40], start_step=0)
    write_steps(path, [30, 40, 50], start_step=20)
    assert steps_in(path) == [10, 20, 30, 40, 50]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "torn", ['{"step": 30, "loss/l', '{"step": 30}garbage', "\0\0\0\n", "3\n", '{"lo": 1}\n']
)
def test_a_torn_line_is_dropped_with_a_warning(tmp_path, caplog, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20], start_step=0)
    with path.open("a") as file:
        file.write(torn)
    write_steps(path, [30], start_step=20)
    assert steps_in(path) == [10, 20, 30]
    assert "line 3 is not a record" in caplog.text


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}')
    write_steps(path, [30], start_step=20)
    assert steps_in(path) == [10, 20, 30]


def test_records_are_readable_while_the_run_goes_on(tmp_path):
    sink = JsonLinesSink(tmp_path / "metrics.jsonl", start_step=0)
    sink.write(1, {"loss/lm": math.nan, "optim/grad_norm": math.inf, "data/tokens": 2048})
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    sink.close()
    assert record == {"step": 1, "loss/lm": None, "optim/grad_norm": None, "data/tokens": 2048}


def test_console_line():
    assert console_lines(20, RECORD, num_steps=600) == [
        "step  20/600  loss  3.2500  mtp  3.5000  4.0000  grad   0.5000  lr 3.000e-03"
        "     12,346 tokens/s  mfu  31.5%  left 0:04:50"
    ]


def test_validation_has_its_own_console_line():
    values = {"loss/validation": 3.0, "loss/validation_mtp_1": 3.5}
    values |= {"loss/validation_bits_per_byte": 1.25}
    line = "step 600/600  validation  3.0000  mtp  3.5000  bits/byte 1.2500"
    assert console_lines(600, values, num_steps=600) == [line]
    assert console_lines(600, RECORD | values, num_steps=600)[1:] == [line]


def test_tensorboard_reads_the_events_and_hides_those_of_a_dead_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start_step, steps in [(0, [10, 20, 30]), (20, [30, 40])]:
        sink = TensorBoardSink(tmp_path, start_step=start_step)
        for step in steps:
            sink.write(step, {"loss/lm": step + start_step / 1000, "data/tokens": step})
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    read = [(event.step, round(event.value, 3)) for event in events.Scalars("loss/lm")]
    assert read == [(10, 10.0), (20, 20.0), (30, 30.02), (40, 40.02)]
    assert events.Tags()["scalars"] == ["loss/lm", "data/tokens"]


def test_only_rank_0_has_sinks(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="nemomodel")
    options = {"num_steps": 600, "start_step": 0, "config": {}}
    assert open_sinks(ObserveConfig(), tmp_path, rank=1, **options) == []
    assert list(tmp_path.iterdir()) == []
    sinks = open_sinks(ObserveConfig(), tmp_path, rank=0, **options)
    write_metrics(sinks, 20, RECORD)
    for sink in sinks:
        sink.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [20]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert caplog.messages == console_lines(20, RECORD, num_steps=600)


def test_without_tensorboard_there_are_no_events(tmp_path):
    options = {"rank": 0, "num_steps": 600, "start_step": 0, "config": {}}
    for sink in open_sinks(ObserveConfig(tensorboard=False), tmp_path, **options):
        sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_missing_wandb_is_found_before_the_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_backends(ObserveConfig())
    with pytest.raises(ValueError, match=r'observe\.wandb_project="x" needs the wandb package'):
        check_backends(ObserveConfig(wandb_project="x"))


@pytest.mark.usefixtures("plain_logging")
def test_rank_0_says_what_happens_and_others_what_is_wrong(capsys):
    log = logging.getLogger("nemomodel.train.loop")
    for rank in 0, 3:
        setup_logging(rank)
        log.info("fact of rank %d", rank)
        log.warning("trouble")
        logging.getLogger("library").info("chatter")
    # 20 characters of date and time come first.
    said = [line[20:] for line in capsys.readouterr().out.splitlines()]
    assert said == ["fact of rank 0", "WARNING: trouble", "rank 3: WARNING: trouble"]


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H20", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
    ],
)
def test_datasheet_peak_of_a_device_name(name, bf16):
    assert datasheet_flops(name, torch.bfloat16) == bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_cpu_is_measured(dtype):
    peak = peak_flops(torch.device("cpu"), dtype)
    assert peak.flops > 1e8
    assert peak.source.startswith("measured on this CPU with a ")
