"""The embedded corpus and the tokenizers."""

import __future__

import multiprocessing
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemomodel.config.load import ConfigError
from nemomodel.config.schema import DataConfig, TrainConfig
from nemomodel.data.batch import open_data
from nemomodel.data.corpus import ensure_corpus
from nemomodel.data.indexed import IndexedFile, file_of
from nemomodel.data.metadata import Metadata
from nemomodel.data.token_bytes import token_bytes
from nemomodel.data.tokenizer import (
    encode_documents,
    end_token_id,
    load_tokenizer,
    train_tokenizer,
)

VOCAB = 512


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(cache):
    return ensure_corpus(cache, vocab_size=VOCAB)


@pytest.mark.slow
def test_the_corpus_is_the_library_itself(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    parts = [Metadata.read(file_of(part, ".json")) for part in (corpus.train, corpus.validation)]
    train, validation = parts
    assert tokenizer.get_vocab_size() == VOCAB
    assert train.eod_id == tokenizer.token_to_id("<|endoftext|>") == 0
    assert 0.03 < validation.bytes / (train.bytes + validation.bytes) < 0.08
    text = tokenizer.decode(IndexedFile(corpus.train).tokens[:3000].tolist())
    assert text.startswith(Path(__future__.__file__).read_text()), "the first file by name"


@pytest.mark.slow
def test_the_corpus_is_built_once(corpus, cache):
    built = corpus.train.parent.stat()
    again = ensure_corpus(cache, vocab_size=VOCAB)
    assert again == corpus
    assert again.train.parent.stat().st_mtime_ns == built.st_mtime_ns


@pytest.mark.slow
def test_a_run_without_files_trains_on_the_corpus(corpus, cache):
    train = TrainConfig(steps=1, seq_length=64, validation_sequences=8)
    data = open_data(DataConfig(cache_dir=str(cache)), train=train, vocab_size=VOCAB, seed=0)
    assert data.tokenizer == corpus.tokenizer
    assert data.has_validation
    assert data.batch(0, dp_rank=0, dp_size=1)[0].ids_BS.max() < VOCAB


def build_and_report(folder, queue):
    queue.put(ensure_corpus(folder, vocab_size=300).train.parent.stat().st_ino)


@pytest.mark.slow
def test_processes_that_start_together_build_one_corpus(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=build_and_report, args=(tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1]
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_vocabulary_too_small_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size=299: the embedded corpus .* 300"):
        ensure_corpus(tmp_path, vocab_size=299)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*: cannot hold the embedded corpus"):
        ensure_corpus(tmp_path / "file", vocab_size=300)


def test_a_python_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.train is empty, and .* has no Python sources"):
        ensure_corpus(tmp_path, vocab_size=300)
    assert not list(tmp_path.glob("*/*"))


TEXTS = ["the cat sat on the mat\r\n" * 20, "na\u00efve \u00e9t\u00e9 \u4f60\u597d \U0001f600 " * 9]


def test_training_a_tokenizer_twice_gives_the_same(tmp_path):
    one, other = (train_tokenizer(TEXTS, vocab_size=320).to_str() for _ in range(2))
    assert one == other


def test_text_survives_and_cannot_end_its_document():
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    texts = [*TEXTS, "a <|endoftext|> inside"]
    for text, tokens in zip(texts, encode_documents(tokenizer, texts, eod_id=0), strict=True):
        assert tokens[-1] == 0
        assert 0 not in tokens[:-1]
        assert tokenizer.decode(tokens[:-1].tolist()) == text


def test_token_bytes_add_up_to_the_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.save(str(path))
    lengths = token_bytes(path, vocab_size=400)
    assert lengths.shape == (400,)
    assert lengths[0] == 0
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert lengths[ids].sum() == len(text.encode())


def test_token_bytes_of_a_tokenizer_with_byte_fallback(tmp_path):
    words = {"<unk>": 0, "</s>": 1, "<0xE4>": 2, "\u2581the": 3, "s": 4, "\u2581\u00e9t\u00e9": 5}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    lengths = token_bytes(tmp_path / "t.json", vocab_size=6)
    assert lengths.tolist() == [0, 0, 1, 4, 1, 6]


def test_the_end_token_is_found_or_named():
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    assert end_token_id(tokenizer, name=None) == 0
    assert end_token_id(tokenizer, name="a") == tokenizer.token_to_id("a")
    with pytest.raises(ValueError, match=r"--eod-token='<pad>': the tokenizer has no such token"):
        end_token_id(tokenizer, name="<pad>")
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(ValueError, match=r"--eod-token: the tokenizer has several end tokens"):
        end_token_id(tokenizer, name=None)
    with pytest.raises(ValueError, match=r"--eod-token: the tokenizer has no known end token"):
        end_token_id(Tokenizer(models.BPE()), name=None)
