"""What of a model a pipeline stage holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks; the first stage embeds, the last has the head and MTP."""

    blocks: range
    num_blocks: int
    """Of the whole backbone."""

    @property
    def first(self) -> bool:
        return self.blocks.start == 0

    @property
    def last(self) -> bool:
        return self.blocks.stop == self.num_blocks
