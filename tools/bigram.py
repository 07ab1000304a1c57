"""What a model that sees only the previous token reaches: a yardstick for a validation loss.

    python tools/bigram.py TRAIN_PREFIX VALIDATION_PREFIX

Prints the cross-entropy of a smoothed bigram model, in nats per token, to compare with
loss/validation of a run on the same token files.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from nemomodel.data.indexed import IndexedFile

ALPHAS = tuple(2.0**power for power in range(-6, 17))


def bigram_nats_per_token(
    train_ids: np.ndarray,
    train_lengths: np.ndarray,
    validation_ids: np.ndarray,
    validation_lengths: np.ndarray,
    *,
    vocab_size: int,
) -> float:
    """Mean cross-entropy, in nats, of a smoothed bigram model on the validation tokens.

        p(b)     = (c(b) + 1) / (sum c + V)
        p(b | a) = (c(a, b) + alpha p(b)) / (c(a) + alpha)

    c counts the pairs of neighbours (a, b) of the training tokens, and c(b) their second tokens.
    alpha, how many imagined observations of the unigram model a context has, is the value of
    `ALPHAS` that is best on the last 10 % of the training pairs under counts of the others; the
    final counts are of all pairs. A document's first token is no target, in either set.

    Args:
        train_lengths, validation_lengths: tokens of each document, in order; they add up to
            the number of tokens.
    """
    first, second = document_pairs(train_ids, train_lengths)
    target_first, target_second = document_pairs(validation_ids, validation_lengths)
    fitted = len(first) - len(first) // 10
    held_out = _Counts(first[:fitted], second[:fitted], vocab_size)
    alpha = min(ALPHAS, key=lambda a: held_out.nats(first[fitted:], second[fitted:], alpha=a))
    counts = _Counts(first, second, vocab_size)
    return counts.nats(target_first, target_second, alpha=alpha)


def document_pairs(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token with its successor, except across the end of a document; int64."""
    ids = np.asarray(ids).astype(np.int64)
    lengths = np.asarray(lengths).astype(np.int64)
    assert lengths.sum() == len(ids), f"lengths add up to {lengths.sum()}, not {len(ids)} tokens"
    document = np.repeat(np.arange(len(lengths)), lengths)
    inside = document[:-1] == document[1:]
    return ids[:-1][inside], ids[1:][inside]


class _Counts:
    """Pair counts, sparse: the sorted codes a * V + b that occur, and how often."""

    def __init__(self, first: np.ndarray, second: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.codes, self.pairs = np.unique(first * vocab_size + second, return_counts=True)
        self.context = np.bincount(first, minlength=vocab_size)
        target = np.bincount(second, minlength=vocab_size)
        self.unigram = (target + 1) / (len(second) + vocab_size)

    def probability(self, first: np.ndarray, second: np.ndarray, *, alpha: float) -> np.ndarray:
        """p(second | first), elementwise."""
        code = first * self.vocab_size + second
        at = np.minimum(np.searchsorted(self.codes, code), max(len(self.codes) - 1, 0))
        seen = np.zeros(len(code))
        if len(self.codes):
            seen = np.where(self.codes[at] == code, self.pairs[at], 0)
        return (seen + alpha * self.unigram[second]) / (self.context[first] + alpha)

    def nats(self, first: np.ndarray, second: np.ndarray, *, alpha: float) -> float:
        if len(first) == 0:
            return 0.0
        return float(-np.log(self.probability(first, second, alpha=alpha)).mean())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path, help="PREFIX of PREFIX.bin and PREFIX.idx")
    parser.add_argument("validation", type=Path, help="PREFIX of the held-out tokens")
    args = parser.parse_args()
    try:
        files = [IndexedFile(args.train), IndexedFile(args.validation)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    parts = []
    for file in files:
        document = file.documents(0, len(file))
        parts += [np.asarray(file.tokens), np.bincount(document)]
    vocab_size = 1 + max(int(file.tokens.max()) for file in files)
    print(f"{bigram_nats_per_token(*parts, vocab_size=vocab_size):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
