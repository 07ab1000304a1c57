"""What a run records and leaves behind, computed again from outside."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nemomodel
from nemomodel.checkpoint.checkpoints import Checkpoints
from nemomodel.checkpoint.files import CheckpointError, step_name
from nemomodel.config.schema import Config
from nemomodel.data.batch import MicroBatch, open_data
from nemomodel.data.indexed import IndexedWriter
from nemomodel.data.tokenizer import load_tokenizer, train_tokenizer
from nemomodel.model.nemotron import Nemotron
from nemomodel.ops.documents import Documents
from nemomodel.parallel.mcore import start_ranks, stop_ranks
from nemomodel.parallel.optimizer import step_optimizer
from nemomodel.train.loop import build_engine
from tests.oracles.schedule import lr_oracle
from tests.ranks.test_train import VOCAB, Result, backward, make_config, run_to_end
from tests.ranks.test_train import train as train  # the fixture

SCHEDULES = {
    "wsd": (),
    "cosine": ("schedule.decay_steps=none",),
    "constant": ("schedule.decay_steps=none", "optim.min_lr=0.0"),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_recorded_learning_rate_is_that_of_the_oracle(
    train: Callable[..., Result], tmp_path: Path, kind: str
) -> None:
    overrides = (*SCHEDULES[kind], f"schedule.kind={kind}", "schedule.warmup_steps=3")
    records, _ = train("run", *overrides)
    config = make_config(tmp_path / "files", *overrides)
    for record in records:
        expected = lr_oracle(
            int(record["step"]),
            config.schedule,
            max_lr=config.optim.lr,
            min_lr=config.optim.min_lr,
            steps=config.train.steps,
        )
        assert record["optim/lr"] == pytest.approx(expected, rel=1e-12), record["step"]


def _validation(config: Config) -> list[MicroBatch]:
    data = open_data(config.data, train=config.train, vocab_size=VOCAB, seed=config.run.seed)
    return data.validation(dp_rank=0, dp_size=1)


def _sum_of_losses(logits_BSV: Tensor, window: MicroBatch, ahead: int) -> tuple[float, int]:
    """Cross-entropy of the token `ahead` further than the next one, in the same document."""
    total, count = 0.0, 0
    for logits_SV, labels_S, document_S, mask_S in zip(
        logits_BSV, window.labels_BS, window.document_BS, window.loss_mask_BS, strict=True
    ):
        for s in range(len(labels_S) - ahead):
            if document_S[s] == document_S[s + ahead] and mask_S[s + ahead]:
                total += F.cross_entropy(logits_SV[s].double(), labels_S[s + ahead]).item()
                count += 1
    return total, count


def test_validation_losses_are_those_of_the_saved_model(
    run_ranks: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # no threads before a fork
    config, text_bytes = _with_tokenizer(tmp_path)
    run_ranks(1, run_to_end, config)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    recorded = {k: v for k, v in json.loads(lines[-1]).items() if k.startswith("loss/validation")}

    model = nemomodel.load_model(tmp_path / "run")
    sums, counts, num_bytes = [0.0] * 3, [0] * 3, 0
    windows = _validation(config)
    assert sum(len(window.ids_BS) for window in windows) == config.train.validation_sequences
    for window in windows:
        documents = Documents.from_ids(window.document_BS)
        with torch.no_grad():
            heads = [model(window.ids_BS, documents), *model.mtp_logits(window.ids_BS, documents)]
        for k, logits in enumerate(heads):
            total, count = _sum_of_losses(logits, window, k)
            sums[k] += total
            counts[k] += count
        num_bytes += sum(text_bytes(i) for i in window.labels_BS[window.loss_mask_BS].tolist())
    assert counts[0] > counts[1] > counts[2] > 0
    expected = {
        "loss/validation": sums[0] / counts[0],
        "loss/validation_mtp_1": sums[1] / counts[1],
        "loss/validation_mtp_2": sums[2] / counts[2],
        "loss/validation_bits_per_byte": sums[0] / math.log(2) / num_bytes,
    }
    assert recorded == pytest.approx(expected, rel=1e-6)


def _with_tokenizer(path: Path) -> tuple[Config, Callable[[int], int]]:
    """A config whose token files are text, and the bytes of text that a token stands for."""
    words = "the model reads what it has been given and learns to say it again"
    texts = [words[i % 17 : 30 + i % 37] + "." for i in range(400)]
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB)
    tokenizer.save(str(path / "tokenizer.json"))
    for name in ("train", "validation"):
        writer = IndexedWriter(path / name, dtype=np.dtype("<u2"))
        for text in texts:
            writer.add(np.array([*tokenizer.encode(text).ids, 0]))
        writer.finish()
    saved = load_tokenizer(path / "tokenizer.json")

    def text_bytes(token: int) -> int:
        return 0 if token == 0 else len(saved.decode([token]).encode())

    return make_config(path, f"data.tokenizer={path}/tokenizer.json"), text_bytes


def _logits_of_live_model(config: Config, path: Path) -> None:
    """Train and save, and keep what the model in memory says then."""
    ranks = start_ranks(config)
    engine = build_engine(config, ranks)
    for step in (1, 2, 3):
        backward(config, engine, ranks, step - 1)
        step_optimizer(engine.optimizer)
        engine.scheduler.step(1)
    for router in engine.ddp.module.routers().values():
        router.expert_bias.copy_(torch.tensor([0.1, -0.1, 0.2, 0.0]))
    checkpoints = Checkpoints(config, ranks, engine)
    checkpoints.save(3, tokens=3)
    checkpoints.finish()
    torch.save(_logits(engine.ddp.module), path)
    stop_ranks()


def _logits(model: Nemotron) -> list[Tensor]:
    ids_BS = torch.arange(64).view(2, 32) * 4 % VOCAB
    documents = Documents.from_ids((torch.arange(64).view(2, 32) % 32 > 11).int())
    with torch.no_grad():
        return [model(ids_BS), model(ids_BS, documents), *model.mtp_logits(ids_BS, documents)]


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_loaded_model_is_the_live_one(run_ranks: Callable, tmp_path: Path, recipe: str) -> None:
    config = make_config(tmp_path, "train.stop_after=3", f"precision.recipe={recipe}")
    run_ranks(1, _logits_of_live_model, config, tmp_path / "live.pt")
    live = torch.load(tmp_path / "live.pt")
    folder = tmp_path / "run/checkpoints" / step_name(3)
    for path in (tmp_path / "run", str(tmp_path / "run"), folder):
        model = nemomodel.load_model(path)
        assert not model.training
        for actual, expected in zip(_logits(model), live, strict=True):
            assert torch.equal(actual, expected)
    wide = nemomodel.load_model(tmp_path / "run", dtype=torch.float64, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert wide.embedding.weight.equal(model.embedding.weight.double())
    # Vectors of the scan and the router biases stay FP32 where the weights are not.
    narrow = nemomodel.load_model(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    assert narrow.blocks[0].mixer.A_log.dtype == torch.float32
    assert narrow.blocks[1].mixer.router.expert_bias.dtype == torch.float32


def test_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no checkpoint here; give a run folder or a"):
            nemomodel.load_model(path)


def test_loading_a_model_leaves_the_logs_alone(
    run_ranks: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(1, run_to_end, make_config(tmp_path, "train.stop_after=1"))
    with caplog.at_level(logging.INFO, logger="nemomodel"):
        nemomodel.load_model(tmp_path / "run")
    assert [record for record in caplog.records if record.name.startswith("nemomodel")] == []
