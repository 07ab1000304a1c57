"""From text to tokens and back, as the files of a checkpoint say."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from nemomodel.checkpoint.huggingface.folder import CONFIG, is_hf_folder, read_json
from nemomodel.checkpoint.huggingface.side_files import (
    TOKENIZER_CONFIG,
    end_token_ids,
    find_carried,
    find_tokenizer,
    known_end_tokens,
)
from nemomodel.checkpoint.weights import read_config
from nemomodel.data.tokenizer import load_tokenizer, vocab_size_of
from nemomodel.infer.loading import check_checkpoint

DEFAULT_CONTEXT_LENGTH = 2048


@dataclass(frozen=True)
class TextFormat:
    """The tokenizer of a checkpoint and the tokens that begin and end a text."""

    path: Path
    tokenizer: Tokenizer
    prefix_id: int
    """What stands before a text that has no context: the tokenizer's token for it (`bos_token`
    in tokenizer_config.json), else the end token, as between documents in training."""
    end_ids: list[int]

    @staticmethod
    def of(checkpoint: Path | str, tokenizer: Path | str | None = None) -> "TextFormat":
        """
        Args:
            tokenizer: tokenizer.json, instead of the one that lies with the checkpoint.

        Raises:
            ValueError: there is no tokenizer, or nothing says which token ends a text.
        """
        path = tokenizer_file(checkpoint, tokenizer)
        loaded = load_tokenizer(path)
        ends = end_token_ids(checkpoint) or list(known_end_tokens(path).values())
        if not ends:
            raise ValueError(
                f"{path}: nothing says which token ends a text; give eos_token_id in "
                "generation_config.json beside the checkpoint"
            )
        prefix = loaded.token_to_id(_bos_token(path.parent) or "")
        return TextFormat(path, loaded, ends[0] if prefix is None else prefix, ends)

    def check_vocabulary(self, vocab_size: int) -> None:
        """
        Raises:
            ValueError: the tokenizer has tokens that the model has not.
        """
        if (have := vocab_size_of(self.tokenizer)) > vocab_size:
            raise ValueError(
                f"{self.path}: has {have} tokens, the model {vocab_size}; it is another model's"
            )

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; those that the tokenizer puts around a text come along.

        Args:
            add_special_tokens: whether they do; None is yes, unless the text begins with one.
        """
        if add_special_tokens is None:
            prefix = self.tokenizer.id_to_token(self.prefix_id)
            add_special_tokens = not text.startswith(prefix)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def tokenizer_file(checkpoint: Path | str, given: Path | str | None) -> Path:
    """`given`, else the tokenizer.json that lies with the checkpoint.

    Raises:
        ValueError: there is none, or no checkpoint.
    """
    check_checkpoint(checkpoint)
    path = Path(given) if given else find_tokenizer(checkpoint)
    if path is None:
        raise ValueError(f"{checkpoint}: no tokenizer.json lies there; give --tokenizer FILE")
    return path


def context_length(checkpoint: Path | str) -> int:
    """Positions the model was made for: max_position_embeddings of a Hugging Face config, also of
    the one a checkpoint was imported from, else train.seq_length, else 2,048.

    Raises:
        ValueError: what a config.json says is no number of positions.
    """
    path = Path(checkpoint)
    folder = path if is_hf_folder(path) else find_carried(path)
    if folder and (folder / CONFIG).is_file():
        found = read_json(folder, CONFIG).get("max_position_embeddings")
        if found is not None and (type(found) is not int or found < 1):
            raise ValueError(
                f"{folder / CONFIG}: max_position_embeddings={json.dumps(found)}: "
                "is no number of positions"
            )
    else:
        found = read_config(path).get("train", {}).get("seq_length")
    return found or DEFAULT_CONTEXT_LENGTH


def _bos_token(folder: Path) -> str | None:
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    token = read_json(folder, TOKENIZER_CONFIG).get("bos_token")
    return token.get("content") if isinstance(token, dict) else token
