"""Number formats as plain data: elements, and blocks of elements that share a scale."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Element:
    """A small binary format without infinities.

    Values of exponent e, or of `min_exponent` where e is below it, are multiples of
    2^(e - mantissa_bits), up to `max`. A format of one fixed step is one with
    min_exponent = max_exponent: its values stay below 2^(min_exponent + 1).
    """

    name: str
    mantissa_bits: int
    min_exponent: int
    max: float

    @property
    def max_exponent(self) -> int:
        """floor(log2(max))."""
        exponent = self.min_exponent
        while 2.0 ** (exponent + 1) <= self.max:
            exponent += 1
        return exponent


# OCP Microscaling Formats v1.0, tables 1 to 5. E4M3 is the variant without infinities ("fn");
# E5M2's infinities are never made, because values saturate.
E2M1 = Element("E2M1", 1, 0, 6.0)
E2M3 = Element("E2M3", 3, 0, 7.5)
E3M2 = Element("E3M2", 2, -2, 28.0)
E4M3 = Element("E4M3", 3, -6, 448.0)
E5M2 = Element("E5M2", 2, -14, 57344.0)
INT8 = Element("INT8", 6, 0, 127 / 64)


@dataclass(frozen=True)
class MXFormat:
    """`block_size` elements that share a power of two (OCP Microscaling Formats v1.0)."""

    name: str
    element: Element
    block_size: int = 32


MXFP4 = MXFormat("MXFP4", E2M1)
MXFP6_E2M3 = MXFormat("MXFP6_E2M3", E2M3)
MXFP6_E3M2 = MXFormat("MXFP6_E3M2", E3M2)
MXFP8_E4M3 = MXFormat("MXFP8_E4M3", E4M3)
MXFP8_E5M2 = MXFormat("MXFP8_E5M2", E5M2)
MXINT8 = MXFormat("MXINT8", INT8)


@dataclass(frozen=True)
class BDRFormat:
    """Shared microexponents: a power of two per block, and one bit that halves it per pair.

    Source: arXiv:2302.08007 (block data representations). Elements are sign and
    `mantissa_bits` of magnitude, a fixed step within their pair.
    """

    name: str
    mantissa_bits: int
    block_size: int = 16
    pair_size: int = 2

    @property
    def element(self) -> Element:
        """Of values divided by the power of two of their pair: below 2."""
        m = self.mantissa_bits
        return Element(self.name, m - 1, 0, (2**m - 1) / 2 ** (m - 1))


MX9 = BDRFormat("MX9", 7)
MX6 = BDRFormat("MX6", 4)
MX4 = BDRFormat("MX4", 2)

BY_NAME: Mapping[str, MXFormat | BDRFormat] = {
    format.name: format
    for format in (
        *(MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8),
        *(MX9, MX6, MX4),
    )
}


def lookup[F: (MXFormat, BDRFormat)](format: F | str, kind: type[F]) -> F:
    """A format itself, or that of a name.

    Raises:
        ValueError: it is no format of this kind.
    """
    found = BY_NAME.get(format) if isinstance(format, str) else format
    if not isinstance(found, kind):
        names = ", ".join(name for name, each in BY_NAME.items() if isinstance(each, kind))
        raise ValueError(f"format={format!r}: use one of {names}")
    return found
