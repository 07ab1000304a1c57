"""Where a process stands among those that share the work of one model.

    axis   what it cuts                                            ranks exchange
    tp     heads, inner widths, vocabulary; between them positions all-gather, reduce-scatter
    cp     positions; inside attention and Mamba heads             all-to-all
    pp     blocks, into stages                                     point to point
    ep     experts                                                 all-to-all of token copies
    etp    the inner width of an expert                            all-to-all, to all and back
    dp     sequences                                               sums of gradients

Between mixers the positions of a sequence are cut over cp and tp together, tp running faster.
"""

from dataclasses import dataclass, field

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis, and which of them this is."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def part(self, count: int) -> range:
        """This rank's equal part of `count` things, which the number of ranks divides."""
        return self.parts(range(count))[self.rank]

    def parts(self, things: range) -> list[range]:
        """The equal parts of all ranks."""
        assert len(things) % self.size == 0, (things, self.size)
        each = len(things) // self.size
        return [things[rank * each : (rank + 1) * each] for rank in range(self.size)]


@dataclass(frozen=True)
class Mesh:
    """One axis of each kind; by default a single process."""

    tp: Axis = field(default_factory=Axis)
    cp: Axis = field(default_factory=Axis)
    pp: Axis = field(default_factory=Axis)
    ep: Axis = field(default_factory=Axis)
    etp: Axis = field(default_factory=Axis)
    positions: Axis = field(default_factory=Axis)
    """tp and cp together."""
    experts: Axis = field(default_factory=Axis)
    """ep and etp together, etp running faster."""
    dispatcher: str = "alltoall"
    """What carries tokens to their experts: `parallel.dispatcher`."""


SINGLE = Mesh()
