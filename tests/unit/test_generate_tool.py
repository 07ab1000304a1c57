"""tools/generate.py and the text it streams."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from nemomodel.data.tokenizer import train_tokenizer
from nemomodel.infer.text import INCOMPLETE, TextStream
from tests.hf_models import make_model, save
from tools.generate import main

TEXT = "def naïve(x): return '€' + x  # 文字 🙂\n"
VOCAB = 330


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20], vocab_size=VOCAB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(make_model("M*E-", mtp_blocks=1, vocab_size=VOCAB, eos_token_id=0), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_streamed_text_is_the_whole_text_and_never_half_a_character(tokenizer: Tokenizer) -> None:
    letters = Tokenizer.from_str(tokenizer.to_str())
    for text in (TEXT, "🙂€", " a  b"):
        stream = TextStream(letters)
        pieces = [stream.add(token) for token in letters.encode(text).ids]
        assert "".join(pieces) + stream.close() == text
        assert INCOMPLETE not in "".join(pieces)


def test_a_character_that_stays_cut_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = train_tokenizer(["ab"], vocab_size=300).encode("a€").ids[:-1]
    stream = TextStream(train_tokenizer(["ab"], vocab_size=300))
    assert [stream.add(token) for token in ids] == ["a", *[""] * (len(ids) - 1)]
    assert stream.close().startswith(INCOMPLETE)
    assert stream.close() == ""


def test_text_goes_to_standard_output_and_statistics_to_standard_error(
    folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), "--prompt", "def naïve", "--max-new-tokens", "12"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == tokenizer.decode(record["tokens"])
    assert len(record["tokens"]) == 12 or record["stopped"]
    assert main([*arguments, "--draft-length", "2", "--compare"]) == 0
    out, error = capsys.readouterr()
    assert out == record["text"] + "\n"
    assert "tokens/s; acceptance length" in error
    assert "accepted at draft position" in error
    assert "outputs are identical" in error
    assert "draft_length=2 is more than model.mtp.num_depths=1" in error
    assert error.count("num_depths") == 1


def test_prompts_come_from_files_or_standard_input(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "prompt").write_text("€", encoding="utf-8")
    options = [str(folder), "--max-new-tokens", "3", "--json", "--temperature", "0.7"]
    assert main([*options, "--prompt", "x", "--prompt-file", str(tmp_path / "prompt")]) == 0
    prompts = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert prompts == ["x", "€"]
    with (tmp_path / "prompt").open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(options) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "€"


FAULTS = {
    "no-folder": (["nowhere", "--prompt", "x"], "nowhere: no such folder"),
    "empty-prompt": (["{folder}", "--prompt", ""], "--prompt: it is empty"),
    "no-prompt-file": (["{folder}", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
    "no-tokenizer": (["{empty}", "--prompt", "x"], "holds no tokenizer.json; give --tokenizer"),
    "temperature": (["{folder}", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
    "device": (["{folder}", "--prompt", "x", "--device", "nowhere"], "--device=nowhere: "),
    "prompt-file": (["{folder}", "--prompt-file", "{damaged}/latin"], "latin: 'utf-8' codec"),
    "checkpoint": (["{damaged}", "--prompt", "x"], "damaged: no checkpoint here"),
    "drafts": (["{folder}", "--prompt", "x", "--draft-length", "99"], "draft_length=99"),
}


@pytest.mark.parametrize(("arguments", "message"), FAULTS.values(), ids=FAULTS)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    for weights in damaged.glob("model*.safetensors*"):
        weights.unlink()
    (damaged / "latin").write_bytes(b"\xe9t\xe9")
    filled = [a.format(folder=folder, empty=tmp_path, damaged=damaged) for a in arguments]
    assert main(filled) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("generate: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", [["--compare"], ["--threads", "0"]])
def test_options_without_sense_are_refused(option: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["folder", "--prompt", "x", *option])
