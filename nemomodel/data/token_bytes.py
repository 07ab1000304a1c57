"""How many bytes of text each token stands for, which turns a loss into bits per byte."""

import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer

from nemomodel.data.tokenizer import load_tokenizer


def token_bytes(path: Path | str, *, vocab_size: int) -> torch.Tensor:
    """UTF-8 bytes that each token stands for, int32 [vocab_size].

    Special tokens and ids without a token have 0. Exact for byte-level BPE, where a character of
    the vocabulary is a byte; else the growth of a decoded text when the token is appended.
    """
    tokenizer = load_tokenizer(Path(path))
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    layout = json.loads(tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps([layout["pre_tokenizer"], layout["decoder"]])
    anchor = _anchor(tokenizer, set(vocab.values()) - set(added))
    lengths = torch.zeros(vocab_size, dtype=torch.int32)
    for token, token_id in vocab.items():
        if token_id in added:
            lengths[token_id] = 0 if added[token_id].special else len(token.encode())
        elif byte_level:
            lengths[token_id] = len(token)
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            lengths[token_id] = 1  # a byte-fallback token decodes to nothing by itself
        else:
            both, alone = tokenizer.decode([anchor, token_id]), tokenizer.decode([anchor])
            lengths[token_id] = len(both.encode()) - len(alone.encode())
    return lengths


def _anchor(tokenizer: Tokenizer, ids: set[int]) -> int:
    """A token with ordinary text, to put before others: decoders strip a space at the start."""
    return next(i for i in sorted(ids) if tokenizer.decode([i]).strip().isalnum())
