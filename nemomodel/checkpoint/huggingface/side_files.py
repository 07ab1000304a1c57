"""The small files beside weights: tokenizer, chat template, generation settings."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from nemomodel.checkpoint.files import FOLDER, CheckpointError
from nemomodel.checkpoint.huggingface.folder import (
    CONFIG,
    contained,
    is_hf_folder,
    read_json,
)

CARRIED = "hf"
"""Where an imported checkpoint, and a run from it, keep the files of the folder it came from."""

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
# No code, no weights. These speak of the tokens of one tokenizer.
_OF_TOKENIZER = re.compile(
    r"tokenizer(_config)?\.(json|model)|tokenizer\.model(\.v\d+)?|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)"
    r"|generation_config\.json"
)
_OTHERS = re.compile(r"config\.json|(LICENSE|NOTICE)(\.\w+)?")
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


def find_tokenizer(path: Path | str) -> Path | None:
    """tokenizer.json of a run folder, step folder, imported checkpoint or Hugging Face folder.

    Raises:
        CheckpointError: it is no file, or a link that leads out of its folder.
    """
    return next((f / TOKENIZER for f in _folders(Path(path)) if _has_file(f, TOKENIZER)), None)


def has_own_tokenizer(path: Path | str) -> bool:
    """Whether a run was trained with another tokenizer than the folder that it started from.

    Then nothing that folder says about tokens holds. `path` is as for `find_tokenizer`.
    """
    carried, tokenizer = find_carried(path), find_tokenizer(path)
    if carried is None or tokenizer is None or tokenizer.parent == carried:
        return False
    before = carried / TOKENIZER
    # As JSON: the same tokenizer saved by another tool may differ in its spaces.
    return not before.is_file() or read_json(carried, TOKENIZER) != read_json(
        tokenizer.parent, TOKENIZER
    )


def find_carried(path: Path | str) -> Path | None:
    """The folder of files that a checkpoint was imported with, if it was."""
    folders = (root / CARRIED for root in _roots(Path(path)))
    return next((folder for folder in folders if folder.is_dir()), None)


def end_token_ids(path: Path | str) -> list[int]:
    """Ids of the tokens that end a text; empty when nothing says so.

    What generation_config.json says counts, else config.json, else the well-known end tokens of
    tokenizer.json. Of a run with its own tokenizer only that counts. `path` is as for
    `find_tokenizer`.

    Raises:
        CheckpointError: eos_token_id is no token id and no list of them, or the config.json beside
            it has fewer tokens.
    """
    folders = [] if has_own_tokenizer(path) else _folders(Path(path))
    for name in (GENERATION, CONFIG):
        for folder in folders:
            if ids := _stated_ids(folder, name):
                return ids
    tokenizer = find_tokenizer(path)
    return list(known_end_tokens(tokenizer).values()) if tokenizer else []


def known_end_tokens(tokenizer: Path) -> dict[str, int]:
    """Name and id of each well-known end token of a tokenizer.json."""
    vocab = _vocab(tokenizer)
    return {name: vocab[name] for name in _END_TOKENS if name in vocab}


def num_tokens(tokenizer: Path) -> int:
    """Highest token id plus one."""
    return max(_vocab(tokenizer).values(), default=-1) + 1


def copy_carried(source: Path, target: Path, *, of_tokenizer: bool = True) -> list[str]:
    """Copy the known small files of a folder; returns their names.

    Args:
        of_tokenizer: also those that speak of tokens.

    Raises:
        CheckpointError: as `check_carried`.
    """
    names = _carried_names(source)
    if not of_tokenizer:
        names = [name for name in names if _OTHERS.fullmatch(name)]
    for name in names:
        shutil.copyfile(contained(source, name), target / name)
    return names


def check_carried(source: Path) -> None:
    """
    Raises:
        CheckpointError: one of the small files of a folder is no file, or a link that leads out
            of the folder; or as `end_token_ids`.
    """
    _carried_names(source)
    for name in (GENERATION, CONFIG):
        _stated_ids(source, name)


def carry_over(source: Path | str, run_dir: Path) -> None:
    """Keep the small files of what a run starts from, for the export of the run.

    Args:
        source: a Hugging Face folder or an imported checkpoint; others have no such files.

    Raises:
        CheckpointError: as `check_carried`.
    """
    source = Path(source)
    carried = source if is_hf_folder(source) else find_carried(source)
    if carried:
        (run_dir / CARRIED).mkdir(parents=True, exist_ok=True)
        copy_carried(carried, run_dir / CARRIED)


def tokenizer_config(tokenizer: Path, *, max_length: int | None) -> dict[str, Any]:
    """tokenizer_config.json for a tokenizer.json that has none."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if max_length is not None:
        config["model_max_length"] = max_length
    end = next(iter(known_end_tokens(tokenizer)), None)
    if end is not None:
        config |= {"eos_token": end, "pad_token": end}
    return config


def _carried_names(source: Path) -> list[str]:
    found = sorted(path.name for path in source.iterdir())
    names = [n for n in found if _OF_TOKENIZER.fullmatch(n) or _OTHERS.fullmatch(n)]
    for name in names:
        _has_file(source, name)
    return names


def _has_file(folder: Path, name: str) -> bool:
    path = folder / name
    if path.is_symlink() or path.exists():
        if not contained(folder, name).is_file():
            raise CheckpointError(f"{path}: is no file, or a link to none")
        return True
    return False


def _stated_ids(folder: Path, name: str) -> list[int]:
    """eos_token_id of one file; empty where nothing says it."""
    if not _has_file(folder, name):
        return []
    ids = read_json(folder, name).get("eos_token_id")
    if ids is None:
        return []
    size = read_json(folder, CONFIG).get("vocab_size") if _has_file(folder, CONFIG) else None
    limit = size if type(size) is int else math.inf
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and 0 <= i < limit for i in ids):
        raise CheckpointError(
            f"{folder / name}: eos_token_id={json.dumps(ids)}: "
            f"token ids are whole numbers from 0 to {limit - 1}"
        )
    return ids


def _roots(path: Path) -> list[Path]:
    """A checkpoint, and the run folder of a step folder."""
    path = path.resolve()
    return [path, path.parent.parent] if path.parent.name == FOLDER else [path]


def _folders(path: Path) -> list[Path]:
    """Where the files of a checkpoint may lie, the nearest first."""
    return [folder for root in _roots(path) for folder in (root, root / CARRIED)]


def _vocab(tokenizer: Path) -> dict[str, int]:
    try:
        raw = json.loads(tokenizer.read_text(encoding="utf-8"))
        vocab = raw["model"]["vocab"]
        # A Unigram model lists [token, score] in the order of ids.
        pairs = (
            vocab.items() if isinstance(vocab, dict) else ((t[0], i) for i, t in enumerate(vocab))
        )
        return dict(pairs) | {token["content"]: token["id"] for token in raw["added_tokens"]}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{tokenizer}: is no tokenizer.json: {error!r}") from None
