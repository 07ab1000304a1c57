"""Batches: a pure function of the step, equal to a slow and obvious reading of the files."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from nemomodel.config.load import ConfigError
from nemomodel.config.schema import DataConfig, SourceConfig, TrainConfig
from nemomodel.data.batch import open_data
from nemomodel.data.indexed import IndexedWriter, file_of
from nemomodel.data.metadata import Metadata, sha256_of
from nemomodel.data.order import BLOCK
from nemomodel.data.tokenizer import train_tokenizer

SEQ = 16
VOCAB = 5000


def write(prefix, lengths, *, first=1, eod=0):
    """Documents whose tokens count up over the file, so that a token tells where it stood."""
    documents = []
    for n in lengths:
        documents.append([*range(first, first + n - 1), eod])
        first += n - 1
    writer = IndexedWriter(prefix, dtype=np.dtype("<u2"))
    for tokens in documents:
        writer.add(np.array(tokens))
    writer.finish()
    return documents


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Two token files: name -> (prefix, documents)."""
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(1)
    return {
        name: (folder / name, write(folder / name, rng.integers(1, 30, size=100), first=first))
        for name, first in (("a", 1), ("b", 2500))
    }


def open_files(files, weights, *, seed=3, validation=(), micro=2, batch=8, sequences=10):
    data = DataConfig(
        train=tuple(SourceConfig(path=str(files[n][0]), weight=w) for n, w in weights.items()),
        validation=tuple(SourceConfig(path=str(files[n][0])) for n in validation),
    )
    train = TrainConfig(
        steps=10,
        seq_length=SEQ,
        micro_batch_size=micro,
        global_batch_size=batch,
        validation_sequences=sequences,
    )
    return open_data(data, train=train, vocab_size=VOCAB, seed=seed)


def rows(batches):
    """All sequences of some micro-batches, as plain lists."""
    return [
        tuple(tuple(values.tolist()) for values in row)
        for m in batches
        for row in zip(m.ids_BS, m.labels_BS, m.loss_mask_BS, m.document_BS, strict=True)
    ]


def global_batch(data, step, *, dp):
    return [row for r in range(dp) for row in rows(data.batch(step, dp_rank=r, dp_size=dp))]


def windows_of(documents):
    """Every (ids, labels, mask, document number), cut from the stream one token at a time."""
    stream = [(token, d) for d, tokens in enumerate(documents) for token in tokens]
    found = []
    for start in range(0, len(stream) - SEQ, SEQ):
        ids, labels, mask, numbers = [], [], [], []
        number = 0
        for here, after in zip(stream[start:], stream[start + 1 : start + SEQ + 1], strict=False):
            ids.append(here[0])
            labels.append(after[0])
            mask.append(here[1] == after[1])
            numbers.append(number)
            number += here[1] != after[1]
        found.append((tuple(ids), tuple(labels), tuple(mask), tuple(numbers)))
    return found


def test_shapes_and_dtypes(files):
    batches = open_files(files, {"a": 1.0}).batch(0, dp_rank=0, dp_size=2)
    assert len(batches) == 2
    found = [(v.shape, v.dtype) for v in vars(batches[0]).values()]
    types = [torch.int64, torch.int64, torch.bool, torch.int32]
    assert found == [(torch.Size([2, SEQ]), dtype) for dtype in types]
    assert all(v.is_contiguous() for v in vars(batches[0]).values())


def test_each_epoch_visits_each_window_once_in_its_own_order(files):
    data, expected = open_files(files, {"a": 1.0}, batch=2), windows_of(files["a"][1])
    per_epoch = len(expected)
    seen = [row for step in range(per_epoch) for row in global_batch(data, step, dp=1)]
    first, second = seen[:per_epoch], seen[per_epoch:]
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second


def test_the_mask_is_false_exactly_where_the_next_document_starts(files):
    for ids, _, mask, number in global_batch(open_files(files, {"a": 1.0}), 0, dp=1):
        assert [token != 0 for token in ids] == list(mask)
        assert number[0] == 0
        assert [b - a for a, b in itertools.pairwise(number)] == [
            int(not keep) for keep in mask[:-1]
        ]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(files, dp):
    data = open_files(files, {"a": 1.0, "b": 3.0})
    assert [global_batch(data, s, dp=dp) for s in range(5)] == [
        global_batch(data, s, dp=1) for s in range(5)
    ]


def test_a_step_is_the_same_after_a_restart_and_twice(files):
    data = open_files(files, {"a": 1.0, "b": 3.0})
    steps = [global_batch(data, step, dp=2) for step in range(8)]
    again = open_files(files, {"a": 1.0, "b": 3.0})
    assert [global_batch(again, step, dp=2) for step in (7, 5, 5)] == [
        steps[7], steps[5], steps[5],
    ]  # fmt: skip


def test_seeds_give_different_orders(files):
    one, other = (global_batch(open_files(files, {"a": 1.0}, seed=s), 0, dp=1) for s in (1, 2))
    assert one != other


def test_a_blend_has_its_shares(files):
    data = open_files(files, {"a": 1.0, "b": 3.0}, batch=BLOCK)
    tokens = [ids for step in range(2) for ids, *_ in global_batch(data, step, dp=1)]
    assert sum(max(ids) >= 2500 for ids in tokens) == 2 * BLOCK * 3 // 4


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 7])
def test_validation_is_the_same_set_for_any_ranks(files, dp):
    data = open_files(files, {"a": 1.0}, validation=["b"], sequences=10)
    parts = [data.validation(dp_rank=r, dp_size=dp) for r in range(dp)]
    assert len({len(part) for part in parts}) == 1, "collectives of different ranks must meet"
    found = [row for part in parts for row in rows(part)]
    real = [row for row in found if any(row[2])]
    assert not any(any(row[0]) for row in found if row not in real)
    everything = windows_of(files["b"][1])
    assert len(set(real)) == 10
    assert set(real) <= set(everything)
    single = open_files(files, {"a": 1.0}, validation=["b"], seed=99, sequences=10)
    assert real == [r for r in rows(single.validation(dp_rank=0, dp_size=1)) if any(r[2])]


def test_without_validation_files_there_is_none(files):
    assert not open_files(files, {"a": 1.0}).has_validation
    assert open_files(files, {"a": 1.0}, validation=["b"]).has_validation


def test_describe_has_a_line_per_file(files):
    lines = open_files(files, {"a": 1.0, "b": 3.0}, validation=["b"]).describe()
    assert [line.split(":")[0].split("/")[-1] for line in lines] == ["a", "b", "b"]
    assert "100 documents" in lines[0]
    assert "share 25.0%" in lines[0]


def open_one(
    prefix, *, seq=SEQ, vocab=VOCAB, tokenizer=None, weight=1.0, global_batch_size=1, **validation
):
    data = DataConfig(
        train=(SourceConfig(path=str(prefix), weight=weight),),
        validation=(SourceConfig(path=str(prefix)),) if validation else (),
        tokenizer=tokenizer and str(tokenizer),
    )
    return open_data(
        data,
        train=TrainConfig(
            steps=1, seq_length=seq, global_batch_size=global_batch_size, **validation
        ),
        vocab_size=vocab,
        seed=0,
    )


def describe_file(prefix, **changes):
    values = {
        "tokens": file_of(prefix, ".bin").stat().st_size // 2,
        "documents": 100, "bytes": 1, "vocab_size": VOCAB, "eod_id": 0,
        "tokenizer_sha256": "0" * 64, "sources": (),
    }  # fmt: skip
    Metadata(**{**values, **changes}).write(file_of(prefix, ".json"))


@pytest.fixture
def prefix(files, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copyfile(file_of(files["a"][0], suffix), tmp_path / f"a{suffix}")
    return tmp_path / "a"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["some text of no weight"], vocab_size=300).save(str(path))
    return path


def test_all_missing_files_are_listed(tmp_path):
    data = DataConfig(
        train=(SourceConfig(path=f"{tmp_path}/x"), SourceConfig(path=f"{tmp_path}/y")),
        validation=(SourceConfig(path=f"{tmp_path}/z"),),
    )
    with pytest.raises(ConfigError) as error:
        open_data(data, train=TrainConfig(steps=1, seq_length=SEQ), vocab_size=VOCAB, seed=0)
    lines = str(error.value).splitlines()
    assert [line.split("=")[0] for line in lines] == [
        "data.train.0.path", "data.train.1.path", "data.validation.0.path",
    ]  # fmt: skip
    assert all("no such file" in line for line in lines)


def test_a_file_shorter_than_a_window_is_an_error(prefix):
    with pytest.raises(ConfigError, match=r"a\.bin has .* less than one window of train.seq_leng"):
        open_one(prefix, seq=100_000)


def test_a_token_beyond_the_vocabulary_is_named_with_its_place(prefix):
    data = open_one(prefix, vocab=10, global_batch_size=100)
    with pytest.raises(ValueError, match=r"a\.bin: token id \d+ at position \d+ is outside of mod"):
        data.batch(0, dp_rank=0, dp_size=1)


def test_metadata_of_a_larger_vocabulary_is_an_error(prefix):
    describe_file(prefix, vocab_size=5001)
    with pytest.raises(ConfigError, match=r"a\.json: its tokenizer has 5001 tokens, more than mod"):
        open_one(prefix)


def test_metadata_of_another_run_is_an_error(prefix):
    describe_file(prefix, tokens=7)
    with pytest.raises(ConfigError, match=r"a\.json describes 7 tokens, the files have"):
        open_one(prefix)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tokens": 1}'])
def test_unreadable_metadata_is_an_error(prefix, text):
    file_of(prefix, ".json").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json: is not readable as the description"):
        open_one(prefix)


def test_metadata_of_another_format_is_an_error(prefix):
    describe_file(prefix)
    path = file_of(prefix, ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ConfigError, match=r"a\.json: format 2, this version reads format 1"):
        open_one(prefix)


def test_another_tokenizer_is_an_error(prefix, tokenizer):
    describe_file(prefix)
    with pytest.raises(
        ConfigError, match=r"made with a tokenizer of 5000 tokens .* data.tokenizer"
    ):
        open_one(prefix, tokenizer=tokenizer)


def test_the_right_tokenizer_is_accepted(prefix, tokenizer):
    describe_file(prefix, tokenizer_sha256=sha256_of(tokenizer))
    assert open_one(prefix, tokenizer=tokenizer).tokenizer == tokenizer


def test_a_tokenizer_larger_than_the_model_is_an_error(prefix, tokenizer):
    with pytest.raises(ConfigError, match=r"has \d+ tokens, more than model.vocab_size=100; use"):
        open_one(prefix, tokenizer=tokenizer, vocab=100)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{}", "is not a tokenizer.json")]
)
def test_an_unreadable_tokenizer_is_an_error(prefix, tmp_path, content, message):
    path = tmp_path / "t.json"
    if content:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"data.tokenizer=.*{message}"):
        open_one(prefix, tokenizer=path)


def test_more_validation_than_there_is_is_an_error(prefix):
    with pytest.raises(ConfigError, match=r"train.validation_sequences=9999: takes 9999 seq.* use"):
        open_one(prefix, validation_sequences=9999)


def test_a_share_too_small_is_an_error(files):
    with pytest.raises(ConfigError, match=r"data.train: source 0: its share 1e-06 is below 1/4096"):
        open_files(files, {"a": 1e-6, "b": 1.0})
