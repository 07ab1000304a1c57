"""What the files of a checkpoint say about its texts."""

import json
from pathlib import Path

import pytest

from nemomodel.data.tokenizer import train_tokenizer
from nemomodel.infer.text_format import TextFormat, context_length

TEXTS = ["the model reads what it has been given", "and learns to say it again"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder whose weights nobody reads."""
    (tmp_path / "model.safetensors").touch()
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", model_type="nemotron_h", max_position_embeddings=4096)
    return tmp_path


def write(path: Path, **values: object) -> None:
    path.write_text(json.dumps(values))


def test_texts_begin_and_end_as_the_files_say(folder: Path) -> None:
    text = TextFormat.of(folder)
    begin = text.tokenizer.token_to_id("<s>")
    assert (text.prefix_id, text.end_ids) == (0, [0])
    write(folder / "generation_config.json", eos_token_id=[5, 0])
    assert (TextFormat.of(folder).prefix_id, TextFormat.of(folder).end_ids) == (5, [5, 0])
    for token in ("<s>", {"content": "<s>", "special": True}):
        write(folder / "tokenizer_config.json", bos_token=token)
        assert TextFormat.of(folder).prefix_id == begin
    write(folder / "tokenizer_config.json", bos_token=None)
    assert TextFormat.of(folder).prefix_id == 5


def test_text_comes_back_without_special_tokens(folder: Path) -> None:
    text = TextFormat.of(folder)
    ids = text.encode("<|endoftext|>the model<|endoftext|>")
    assert ids[0] == ids[-1] == 0
    assert text.decode(ids) == "the model"


def test_tokenizers_that_do_not_fit_are_named(folder: Path) -> None:
    text = TextFormat.of(folder)
    size = text.tokenizer.get_vocab_size()
    text.check_vocabulary(size)
    with pytest.raises(ValueError, match=f"has {size} tokens, the model {size - 1}"):
        text.check_vocabulary(size - 1)
    moved = folder / "elsewhere.json"
    (folder / "tokenizer.json").rename(moved)
    with pytest.raises(ValueError, match=r"no tokenizer.json lies there; give --tokenizer"):
        TextFormat.of(folder)
    assert TextFormat.of(folder, moved).end_ids == [0]
    moved.write_text(moved.read_text().replace("<|endoftext|>", "<|unknown|>"))
    with pytest.raises(ValueError, match="nothing says which token ends a text"):
        TextFormat.of(folder, moved)


@pytest.mark.parametrize("wrong", ["long", -5, 0, 2.5, True])
def test_a_wrong_context_length_names_its_file(folder: Path, wrong: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": wrong}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: max_position_embeddings=.* no number of"):
        context_length(folder)


def test_context_length_is_that_of_the_config(folder: Path) -> None:
    assert context_length(folder) == 4096
    write(folder / "config.json", model_type="nemotron_h")
    assert context_length(folder) == 2048
