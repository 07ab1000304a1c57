"""PREFIX.json: what is known about a token file beyond its tokens."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Metadata:
    tokens: int
    """Tokens in PREFIX.bin, end-of-document tokens included."""
    documents: int
    bytes: int
    """UTF-8 bytes of the text the tokens came from."""
    vocab_size: int
    """Highest token id of the tokenizer, plus one."""
    eod_id: int
    """Token that ends every document."""
    tokenizer_sha256: str
    sources: tuple[str, ...]
    format: int = FORMAT

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "Metadata":
        """
        Raises:
            ValueError: if the file is not what `write` writes.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            found = Metadata(**{**raw, "sources": tuple(raw["sources"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: is not readable as the description of a token file ({error}); "
                "prepare the data again"
            ) from None
        if found.format != FORMAT:
            raise ValueError(
                f"{path}: format {found.format}, this version reads format {FORMAT}; "
                "prepare the data again"
            )
        return found


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
