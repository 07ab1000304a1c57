"""Loss on a stream of tokens: against one token at a time, and against training's validation."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nemomodel.config.schema import Config, ModelConfig
from nemomodel.data.indexed import IndexedFile, IndexedWriter
from nemomodel.data.metadata import Metadata, sha256_of
from nemomodel.data.tokenizer import encode_documents, load_tokenizer, train_tokenizer
from nemomodel.infer.evaluate import Losses, Stream, encode_texts, evaluate, windows
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Nemotron
from tests.ranks.test_train import VOCAB, make_config, run_to_end
from tools.evaluate import main

SHAPES = [(8, 8), (8, 3), (8, 1), (64, 64), (1, 1), (5, 4)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


@pytest.fixture
def model(config: Config) -> Nemotron:
    return random_model(config.model)


def random_model(config: ModelConfig) -> Nemotron:
    """In float64 and far from uniform, so that every mistake shows."""
    model = Nemotron(config, dtype=torch.float64)
    initialize(model, seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.eval()


def random_stream(lengths: tuple[int, ...]) -> Stream:
    tokens = np.random.default_rng(0).integers(0, VOCAB, sum(lengths), dtype=np.uint16)
    number = np.repeat(np.arange(len(lengths)), lengths)
    return Stream("random", tokens, lambda start, stop: number[start:stop])


@pytest.mark.parametrize(("seq_length", "stride"), SHAPES)
@pytest.mark.parametrize("num_targets", [1, 2, 7, 8, 9, 11, 16, 40])
def test_windows_score_every_target_once_with_the_promised_context(
    num_targets: int, seq_length: int, stride: int
) -> None:
    found = list(windows(num_targets, seq_length=seq_length, stride=stride))
    scored = [i for w in found for i in range(w.first, w.stop)]
    assert scored == list(range(num_targets))
    assert all(0 < w.stop - w.start <= seq_length and w.first < w.stop for w in found)
    assert all(b.start - a.start == stride for a, b in pairwise(found))
    context = [i - w.start for w in found[1:] for i in range(w.first, w.stop)]
    assert all(c >= seq_length - stride for c in context)


@torch.no_grad()
def losses_one_by_one(
    model: Nemotron, stream: Stream, *, seq_length: int, stride: int, num_targets: int
) -> list[list[float]]:
    """Losses of each head, each target from a pass of its own over what it may see."""
    tokens = torch.from_numpy(stream.tokens.astype(np.int64))
    number = stream.documents(0, len(tokens))
    found: list[list[float]] = [[], [], []]
    for target in range(1, num_targets + 1):
        start = max(0, math.ceil((target - seq_length) / stride)) * stride
        while number[start] != number[target]:
            start += 1
        seen = tokens[None, start:target]
        if not seen.numel():
            continue
        logits = [model(seen), *model.mtp_logits(seen)]
        for k, head in enumerate(logits[: seen.shape[1]]):
            loss = F.cross_entropy(head[0, -1 - k], tokens[target])
            found[k].append(loss.item())
    return found


@pytest.mark.parametrize(("seq_length", "stride"), SHAPES)
def test_losses_are_those_of_one_target_at_a_time(
    model: Nemotron, seq_length: int, stride: int
) -> None:
    stream = random_stream((13, 1, 2, 1, 9, 14))
    expected = losses_one_by_one(
        model, stream, seq_length=seq_length, stride=stride, num_targets=37
    )
    found = evaluate(
        model, stream, seq_length=seq_length, stride=stride, batch_size=3, max_tokens=37
    )
    assert found.tokens == tuple(map(len, expected))
    means = [sum(losses) / len(losses) if losses else None for losses in expected]
    assert found.nats_per_token == tuple(
        pytest.approx(mean, rel=1e-10) if mean is not None else None for mean in means
    )
    assert found.bytes is None
    assert found.bits_per_byte is None


def test_batch_size_and_progress(model: Nemotron) -> None:
    stream, advances = random_stream((30, 41)), []
    results = [
        evaluate(model, stream, seq_length=8, stride=5, batch_size=size, on_tokens=advances.append)
        for size in (1, 4, 100)
    ]
    assert sum(advances) == 3 * 70
    assert results[0].tokens == results[1].tokens == results[2].tokens
    assert results[0].nats_per_token == pytest.approx(results[1].nats_per_token, rel=1e-12)
    assert results[0].nats_per_token == pytest.approx(results[2].nats_per_token, rel=1e-12)


def test_bits_per_byte_and_perplexity() -> None:
    losses = Losses((2.0, None), (30, 0), 80)
    assert losses.perplexity == pytest.approx(math.e**2)
    assert losses.bits_per_byte == pytest.approx(2.0 / math.log(2) * 30 / 80)
    assert losses.record()["mtp"] == [{"depth": 1, "loss": None, "tokens": 0}]


OK = {"seq_length": 8, "stride": 8, "batch_size": 2}
WRONG = {
    "stride": ({"stride": 9}, "stride=9: is more than seq_length=8"),
    "zero": ({"batch_size": 0}, "batch_size=0: must be at least 1"),
    "none": ({"max_tokens": 0}, "max_tokens=0: must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_are_named(model: Nemotron, name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        evaluate(model, random_stream((20,)), **(OK | changes))


def test_streams_that_cannot_be_scored_are_named(model: Nemotron) -> None:
    foreign = random_stream((20,))
    foreign.tokens[13] = VOCAB
    wrong = {
        "token id 300 at position 13": foreign,
        "no document has two tokens": random_stream((1, 1, 1)),
        "has 1 tokens; at least 2": random_stream((1,)),
    }
    for message, stream in wrong.items():
        with pytest.raises(ValueError, match=message):
            evaluate(model, stream, **OK)
    # What is not scored may be anything.
    evaluate(model, foreign, **OK, max_tokens=12)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, random_stream((20,)), **OK)


def text_files(path: Path) -> list[str]:
    """Token files of a text, with tokenizer; returns the documents of the validation part."""
    words = "the model reads what it has been given and learns to say it again \u00e9t\u00e9 "
    texts = [words[i % 17 : 30 + i % 37] + "." for i in range(120)]
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB)
    tokenizer.save(str(path / "train.tokenizer.json"))
    for name, part in (("train", texts), ("validation", texts[:50])):
        writer = IndexedWriter(path / name, dtype=np.dtype("<u2"))
        for ids in encode_documents(tokenizer, part, eod_id=0):
            writer.add(ids)
        writer.finish()
        sha256 = sha256_of(path / "train.tokenizer.json")
        num_bytes = sum(len(text.encode()) for text in part)
        Metadata(
            tokens=writer.num_tokens,
            documents=len(part),
            bytes=num_bytes,
            vocab_size=VOCAB,
            eod_id=0,
            tokenizer_sha256=sha256,
            sources=("words",),
        ).write(path / f"{name}.json")
    return texts[:50]


def test_text_is_the_stream_of_its_token_file(tmp_path: Path) -> None:
    texts = text_files(tmp_path)
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB)
    stream = encode_texts("texts", [texts[0], "", *texts[1:]], tokenizer, eod_id=0)
    file = IndexedFile(tmp_path / "validation")
    assert np.array_equal(stream.documents(0, len(file)), file.documents(0, len(file)))
    assert len(stream.tokens) == len(file)


def evaluated(tmp_path: Path, *arguments: str) -> dict:
    assert main(["perplexity", *arguments, "--json", str(tmp_path / "result.json")]) == 0
    return json.loads((tmp_path / "result.json").read_text())


def test_command_gives_the_validation_loss_of_training(
    run_ranks: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # no threads before a fork
    texts = text_files(tmp_path)
    tokenizer, prefix, run = (
        str(tmp_path / name) for name in ("train.tokenizer.json", "validation", "run")
    )
    num_windows = (len(IndexedFile(Path(prefix))) - 1) // 32
    config = make_config(
        tmp_path,
        "train.stop_after=4",
        "train.validation_interval=4",
        f"train.validation_sequences={num_windows}",
        f"data.tokenizer={tokenizer}",
    )
    run_ranks(1, run_to_end, config)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    data = (run, "--data", prefix, "--tokenizer", tokenizer)
    found = evaluated(tmp_path, *data, "--max-tokens", str(num_windows * 32))
    assert found["seq_length"] == found["stride"] == 32  # of the run
    assert {
        "loss/validation": found["loss"],
        "loss/validation_mtp_1": found["mtp"][0]["loss"],
        "loss/validation_mtp_2": found["mtp"][1]["loss"],
        "loss/validation_bits_per_byte": found["bits_per_byte"],
    } == pytest.approx({k: v for k, v in last.items() if "validation" in k}, rel=1e-6)

    # The same text as files: the same stream. Its bytes are all but those of first tokens.
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    by_file = evaluated(tmp_path, *data, "--stride", "20")
    by_text = evaluated(
        tmp_path, run, "--text", str(tmp_path / "texts.jsonl"), "--stride", "20", *data[3:]
    )
    assert by_text == by_file
    assert by_file["loss"] != found["loss"]
    loaded = load_tokenizer(Path(tokenizer))
    firsts = sum(len(loaded.decode(loaded.encode(text).ids[:1]).encode()) for text in texts)
    assert by_text["bytes"] == sum(len(text.encode()) for text in texts) - firsts

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the model", "category": "a"}\n\n{"prompt": "reads what"}\n')
    command = ["acceptance", run, "--tokenizer", tokenizer, "--prompts", str(prompts)]
    assert main([*command, "--max-new-tokens", "12", "--json", "-"]) == 0
    summary = json.loads(capsys.readouterr().out.split("bytes\n")[-1])
    assert list(summary["categories"]) == ["a", "none"]
    assert summary["all"]["prompts"] == 2
    assert summary["draft_length"] == 2
    check_errors(tmp_path, run, prefix, tokenizer, capsys)


def check_errors(
    path: Path, run: str, prefix: str, tokenizer: str, capsys: pytest.CaptureFixture
) -> None:
    """Each mistake ends with code 2 and one sentence that names what is wrong."""
    other = path / "other.json"
    other.write_text(Path(tokenizer).read_text().replace("{", "{ ", 1))
    (path / "bad.jsonl").write_text('{"prompt": ""}\nnothing\n[1]\n{"category": "x"}\n')
    (path / "names.jsonl").write_text('{"prompt": "a", "category": 3}\n')
    wrong = {
        "missing.idx: no such file": ("perplexity", run, "--data", f"{path}/missing"),
        "other.json: is not the tokenizer": (
            *("perplexity", run, "--data", prefix, "--tokenizer", str(other)),
        ),
        "nowhere.txt: no such file": ("perplexity", run, "--text", f"{path}/nowhere.txt"),
        "no checkpoint here": ("perplexity", str(path / "files"), "--data", prefix),
        "--eod-token": ("perplexity", run, "--data", prefix, "--eod-token", "x"),
        "stride=40: is more": ("perplexity", run, "--data", prefix, "--stride", "40"),
        "--threads=0": ("perplexity", run, "--data", prefix, "--threads", "0"),
        "--device=tpu9": ("perplexity", run, "--data", prefix, "--device", "tpu9"),
        "its folder does not exist": (
            *("perplexity", run, "--data", prefix, "--json", f"{path}/no/result.json"),
        ),
        "is a folder; give a file": ("perplexity", run, "--data", prefix, "--json", str(path)),
        "no_run: no such folder": ("perplexity", f"{path}/no_run", "--text", f"{path}/a.txt"),
        "4 lines are wrong": ("acceptance", run, "--prompts", f"{path}/bad.jsonl"),
        "names.jsonl:1: 'category' is 3": ("acceptance", run, "--prompts", f"{path}/names.jsonl"),
        "top_p=0": (*("acceptance", run, "--prompts", f"{path}/prompts.jsonl", "--top-p", "0"),),
        "draft_length=99": (
            *("acceptance", run, "--prompts", f"{path}/prompts.jsonl", "--draft-length", "99"),
        ),
    }
    for message, arguments in wrong.items():
        capsys.readouterr()
        assert main(list(arguments)) == 2, message
        assert message in capsys.readouterr().err
    assert not list(path.glob("*.partial"))


def test_missing_tokens_of_a_description_are_named(tmp_path: Path, capsys) -> None:
    text_files(tmp_path)
    writer = IndexedWriter(tmp_path / "validation", dtype=np.dtype("<u2"))
    writer.add(np.arange(9))
    writer.finish()
    assert main(["perplexity", str(tmp_path), "--data", str(tmp_path / "validation")]) == 2
    assert "they are of different runs" in capsys.readouterr().err
