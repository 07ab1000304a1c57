"""tools/prepare_data.py: every kind of input, every refusal, and being killed."""

import gzip
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemomodel.config.schema import DataConfig, SourceConfig, TrainConfig
from nemomodel.data.batch import open_data
from nemomodel.data.indexed import IndexedFile, file_of
from nemomodel.data.metadata import Metadata, sha256_of
from nemomodel.data.tokenizer import load_tokenizer, train_tokenizer
from tools import prepare_data

TOOL = Path(prepare_data.__file__)
TEXTS = ["first document\r\nwith two lines\n", "second: 2021-01-01", "na\u00efve \u4f60\u597d"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, vocab_size=300).save(str(path))
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def prepare(tokenizer):
    """Run the tool in this process; the exit code."""

    def run(*args):
        if "--train-tokenizer" not in args and "--tokenizer" not in args:
            args = (*args, "--tokenizer", tokenizer)
        return prepare_data.main([str(a) for a in (*args, "--output", "out", "--workers", 1)])

    return run


def texts_of(prefix):
    """The documents of a token file, as text."""
    tokenizer = load_tokenizer(Path("out.tokenizer.json"))
    eod = Metadata.read(file_of(prefix, ".json")).eod_id
    stream = IndexedFile(prefix).tokens.tolist()
    documents, tokens = [], []
    for token in stream:
        if token == eod:
            documents.append(tokenizer.decode(tokens))
            tokens = []
        else:
            tokens.append(token)
    assert not tokens, "every document ends with the end token"
    return documents


def write_jsonl(path, texts=TEXTS, **extra):
    lines = [json.dumps({"text": text, **extra}) for text in texts]
    Path(path).write_text("\n".join(lines) + "\n\n")
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_text_folder():
    Path("in/deep").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.py", "deep/c.md"), TEXTS, strict=True):
        Path("in", name).write_bytes(text.encode())
    Path("in/.hidden").write_bytes(b"\xff")
    return "in"


def write_gzip():
    with gzip.open("in.jsonl.gz", "wb") as file:
        file.write(write_jsonl(Path("in.jsonl")).read_bytes())
    return "in.jsonl.gz"


def write_zstd():
    content = write_jsonl(Path("in.jsonl")).read_bytes()
    Path("in.jsonl.zst").write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return "in.jsonl.zst"


def write_saved_dataset():
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    datasets.DatasetDict({"train": data}).save_to_disk("in")
    return "in"


def write_dataset_folder():
    Path("in").mkdir()
    write_parquet("in/train.parquet", text=TEXTS, n=[1, 2, 3])
    return "in"


@pytest.mark.parametrize(
    "write",
    [
        write_text_folder,
        lambda: write_jsonl("in.jsonl"),
        write_gzip,
        write_zstd,
        lambda: write_parquet("in.parquet", text=TEXTS, other=[1, 2, 3]),
        write_saved_dataset,
        write_dataset_folder,
    ],
    ids=["text", "jsonl", "gz", "zst", "parquet", "saved_dataset", "dataset_folder"],
)
def test_text_survives(prepare, tokenizer, write):
    name = write()
    assert prepare(name) == 0
    assert texts_of(Path("out")) == TEXTS
    found = Metadata.read(Path("out.json"))
    assert found.documents == 3
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.tokens == len(IndexedFile(Path("out")))
    assert found.tokenizer_sha256 == sha256_of(tokenizer) == sha256_of(Path("out.tokenizer.json"))
    assert found.sources == (name,)
    assert not list(Path().glob("*.unfinished"))


def test_a_dataset_streams(prepare):
    assert prepare(write_dataset_folder(), "--streaming", "--split", "train") == 0
    assert texts_of(Path("out")) == TEXTS


def test_inputs_keep_their_order_and_empty_documents_are_left_out(prepare):
    names = [write_jsonl("z.jsonl", ["z", ""]), write_jsonl("a.jsonl", ["a", "", "b"])]
    assert prepare(*names) == 0
    assert texts_of(Path("out")) == ["z", "a", "b"]


def test_another_text_key(prepare):
    Path("in.jsonl").write_text('{"body": "x", "text": 3}\n{"body": null}\n')
    assert prepare("in.jsonl", "--text-key", "body") == 0
    assert texts_of(Path("out")) == ["x"]


def test_held_out_documents_are_whole_and_chosen_by_content(prepare):
    texts = [f"document {i}" for i in range(400)]
    write_jsonl("in.jsonl", texts)
    write_jsonl("reversed.jsonl", texts[::-1])
    assert prepare("in.jsonl", "--validation-fraction", 0.2) == 0
    train, held_out = texts_of(Path("out")), texts_of(Path("out_validation"))
    assert sorted(train + held_out) == sorted(texts)
    assert 48 <= len(held_out) <= 112, "80 expected, 4 sigma is 32"
    assert prepare("reversed.jsonl", "--validation-fraction", 0.2, "--overwrite") == 0
    assert texts_of(Path("out_validation")) == held_out[::-1]


def test_a_trained_tokenizer_has_its_size_and_its_end_token(prepare):
    write_jsonl("in.jsonl", [Path(__file__).read_text()])
    assert prepare("in.jsonl", "--train-tokenizer", 300) == 0
    found = Metadata.read(Path("out.json"))
    assert (found.vocab_size, found.eod_id) == (300, 0)
    assert load_tokenizer(Path("out.tokenizer.json")).id_to_token(0) == "<|endoftext|>"


def test_training_reads_what_was_prepared(prepare):
    write_jsonl("in.jsonl", [f"{text} {i}" for i in range(60) for text in TEXTS])
    assert prepare("in.jsonl", "--validation-fraction", 0.2) == 0
    data = open_data(
        DataConfig(
            train=(SourceConfig(path="out"),),
            validation=(SourceConfig(path="out_validation"),),
            tokenizer="out.tokenizer.json",
        ),
        train=TrainConfig(steps=1, seq_length=32, validation_sequences=4),
        vocab_size=300,
        seed=0,
    )
    (batch,) = data.batch(0, dp_rank=0, dp_size=1)
    text = load_tokenizer(data.tokenizer).decode(batch.ids_BS[0].tolist())
    assert "document" in text or "2021" in text
    assert len(data.validation(dp_rank=0, dp_size=1)) == 4


def command(*args, workers=1):
    return [sys.executable, TOOL, *map(str, args), "--output", "out", "--workers", str(workers)]


def test_the_number_of_workers_does_not_change_the_output():
    write_jsonl("in.jsonl", [f"{text} {i}" for i in range(300) for text in TEXTS])
    made = []
    for workers in (1, 2):
        subprocess.run(
            command("in.jsonl", "--train-tokenizer", 350, "--overwrite", workers=workers),
            check=True,
            capture_output=True,
        )
        made.append([Path(f"out.{s}").read_bytes() for s in ("bin", "idx", "tokenizer.json")])
    assert made[0] == made[1]


def test_help_is_fast():
    started = time.monotonic()
    out = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True)
    assert "--validation-fraction" in out.stdout
    assert time.monotonic() - started < 1


def write_bytes(name, content):
    Path(name).write_bytes(content)
    return [name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ["no.jsonl"], "no.jsonl: no such file or folder"),
        (lambda: ["./no"], "./no: no such file or folder"),
        (lambda: write_bytes("e.txt", b""), "the train part has no documents; the inputs are em"),
        (lambda: write_bytes("e.jsonl", b"\n"), "the train part has no documents; the inputs ar"),
        (lambda: write_bytes("x.txt", b"ab\xff"), "x.txt: is not UTF-8 text (byte 2)"),
        (lambda: write_bytes("x.jsonl", b'{"text": "a"}\n{'), "x.jsonl line 2: is not JSON"),
        (lambda: write_bytes("x.jsonl", b"[1]"), "x.jsonl line 1: is a JSON list; use one obj"),
        (lambda: write_bytes("x.jsonl", b'{"text": 3}'), "line 1: 'text' is a int, not text"),
        (lambda: write_bytes("x.jsonl", b'{"text": "\\ud800"}'), "line 1: 'text' has half a sur"),
        (
            lambda: write_bytes("x.jsonl", b'{"a": "", "b": ""}'),
            "x.jsonl line 1: no key 'text', it has a, b; choose one with --text-key",
        ),
        (lambda: write_bytes("x.jsonl.gz", gzip.compress(b"x" * 99)[:-9]), "x.jsonl.gz: is not re"),
        (lambda: write_bytes("x.parquet", b"PAR1"), "x.parquet: is not readable as Parquet"),
        (
            lambda: [write_parquet("x.parquet", a=["b"])],
            "x.parquet: no key 'text', it has a; choose one with --text-key",
        ),
        (lambda: [write_saved_dataset(), "--split", "x"], "unknown split 'x', it has train"),
        (lambda: [write_jsonl("x.jsonl"), "--split", "x"], "--split has no effect"),
        (lambda: [write_text_folder(), "--text-key", "x"], "--text-key has no effect"),
        (lambda: [write_jsonl("x.jsonl"), "--validation-fraction", 1], "--validation-fraction=1"),
        (lambda: [write_jsonl("x.jsonl"), "--train-tokenizer", 299], "--train-tokenizer=299: use"),
        (lambda: [write_jsonl("x.jsonl"), "--tokenizer", "t"], "t: no such file; give the token"),
        (lambda: [write_jsonl("x.jsonl"), "--eod-token", "<e>"], "--eod-token='<e>': the token"),
        (
            lambda: [write_jsonl("x.jsonl", ["a"]), "--validation-fraction", 1e-9],
            "the validation part has no documents; change --validation-fraction",
        ),
    ],
)
def test_a_user_error_is_one_sentence(prepare, capsys, make, message):
    assert prepare(*make()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prepare_data: ")
    assert message in error
    assert not list(Path().glob("out*"))


def test_an_existing_output_is_kept(prepare, capsys):
    write_jsonl("in.jsonl")
    assert prepare("in.jsonl") == 0
    before = Path("out.bin").read_bytes()
    assert prepare("in.jsonl") == 2
    assert "out.json: exists; give another --output, or --overwrite" in capsys.readouterr().err
    assert Path("out.bin").read_bytes() == before
    write_jsonl("in.jsonl", ["new"])
    assert prepare("in.jsonl", "--overwrite") == 0
    assert texts_of(Path("out")) == ["new"]


def start_and_wait_until_it_writes(tokenizer):
    """A run in the middle of its documents."""
    write_jsonl("in.jsonl", ["some words of text " * 20] * 50_000)
    process = subprocess.Popen(
        command("in.jsonl", "--tokenizer", tokenizer), stderr=subprocess.PIPE, text=True
    )
    staged = Path("out.unfinished/train.bin")
    while process.poll() is None and not (staged.exists() and staged.stat().st_size):
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be interrupted"
    return process


def test_a_killed_run_leaves_no_output_and_the_next_one_works(prepare, tokenizer):
    process = start_and_wait_until_it_writes(tokenizer)
    process.kill()
    process.wait()
    process.stderr.close()
    assert Path("out.unfinished/train.bin").exists()
    assert not list(Path().glob("out.[!u]*"))
    write_jsonl("in.jsonl")
    assert prepare("in.jsonl") == 0
    assert texts_of(Path("out")) == TEXTS
    assert not Path("out.unfinished").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up(tokenizer, number):
    process = start_and_wait_until_it_writes(tokenizer)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert not list(Path().glob("out*"))


def test_two_runs_do_not_write_the_same_output(prepare, tokenizer, capsys):
    process = start_and_wait_until_it_writes(tokenizer)
    assert prepare("in.jsonl") == 2
    assert "out: another process is writing it; wait for it" in capsys.readouterr().err
    process.kill()
    process.communicate()


def test_a_full_disk_is_an_error_that_leaves_nothing(tokenizer):
    write_jsonl("in.jsonl", ["some words of text " * 20] * 5000)
    out = subprocess.run(
        command("in.jsonl", "--tokenizer", tokenizer),
        capture_output=True,
        text=True,
        # A limit on the size of files fails like a disk without room.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert out.returncode == 1
    assert out.stderr == "prepare_data: [Errno 27] File too large; nothing was written\n"
    assert not list(Path().glob("out*"))


def test_a_terminal_shows_a_bar(tokenizer):
    write_jsonl("in.jsonl", ["some words of text " * 20] * 2000)
    ours, theirs = pty.openpty()
    out = subprocess.run(command("in.jsonl", "--tokenizer", tokenizer), stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert out.returncode == 0
    assert "tokenizing" in shown
    assert "M tokens/s" in shown


def test_elsewhere_plain_lines_appear(prepare, capsys):
    write_jsonl("in.jsonl")
    assert prepare("in.jsonl") == 0
    out, err = capsys.readouterr()
    assert err.startswith("tokenizing: 3 documents, ")
    assert "\x1b" not in err
    assert "out: 3 documents, " in out
