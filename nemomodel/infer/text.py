"""Tokens to text while they come."""

from tokenizers import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of a growing list of tokens; a character cut between two tokens waits for the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # Tokens whose text is out, which may decide on the space before the next, and the others.
        self.shown: list[int] = []
        self.waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self.waiting.append(token)
        text = self._waiting_text()
        if text.endswith(INCOMPLETE):
            return ""
        self.shown, self.waiting = self.waiting, []
        return text

    def close(self) -> str:
        """What is left: characters that will never be whole."""
        text, self.waiting = self._waiting_text(), []
        return text

    def _waiting_text(self) -> str:
        shown = self.tokenizer.decode(self.shown)
        return self.tokenizer.decode(self.shown + self.waiting)[len(shown) :]
