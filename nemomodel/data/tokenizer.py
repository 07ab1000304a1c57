"""tokenizer.json files: train one, load one, find its end token, encode documents."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
MIN_VOCAB_SIZE = 300
BATCH_CHARACTERS = 4_000_000
BATCH_DOCUMENTS = 4096


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens; the end-of-document token is id 0.

    The result depends on the texts only, not on the number of threads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """
    Raises:
        ValueError: if `path` is missing or is no tokenizer.json.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the tokenizer.json of a tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises nothing more precise
        raise ValueError(f"{path}: is not a tokenizer.json: {error}") from None


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """Highest token id plus one, which is what the embedding needs; ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str], *, eod_id: int
) -> Iterator[np.ndarray]:
    """Tokens of each text in order, `eod_id` at the end. Batches run on the library's threads.

    Text that spells a special token stays text: a document cannot end itself.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield from _encode(tokenizer, batch, eod_id)
            batch, characters = [], 0
    yield from _encode(tokenizer, batch, eod_id)


def _encode(tokenizer: Tokenizer, batch: list[str], eod_id: int) -> Iterator[np.ndarray]:
    for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
        tokens = np.empty(len(encoding) + 1, dtype=np.int64)
        tokens[:-1] = encoding.ids
        tokens[-1] = eod_id
        yield tokens


def end_token_id(tokenizer: Tokenizer, *, name: str | None) -> int:
    """Id of the token that ends documents: `name`, or else the one well-known name it has.

    Raises:
        ValueError: if there is no such token, or more than one.
    """
    if name is not None:
        token_id = tokenizer.token_to_id(name)
        if token_id is None:
            raise ValueError(f"--eod-token={name!r}: the tokenizer has no such token")
        return token_id
    found = [known for known in KNOWN_END_TOKENS if tokenizer.token_to_id(known) is not None]
    if len(found) != 1:
        have = f"has several end tokens ({', '.join(found)})" if found else "has no known end token"
        raise ValueError(f"--eod-token: the tokenizer {have}; name the one that ends a document")
    return tokenizer.token_to_id(found[0])
