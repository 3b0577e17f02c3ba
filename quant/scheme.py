"""Number formats of weights, as values.

A `Scheme` says how one weight matrix [n, k] is stored: a format, how many consecutive columns share a scale
(0: the whole row), and whether zero is fixed at the middle of the range (symmetric) or stored per group.
Formats are rows of one table; a new one is a row here, a layout in `pack` and a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gristmill.runtime.errors import GristmillError

GROUP_SIZES = (32, 64, 128)  # legal group sizes besides 0, the whole row
SCALE_BITS = 16  # f16 scales; the rare tensor that needs f32 scales is counted where its bytes are


@dataclass(frozen=True)
class Format:
    """One number format.

    kind "float": the weights themselves, rounded. "integer": q in low..high, and a symmetric weight is
    scale * (q - zero_point), an asymmetric one scale * (q - zero) with a zero of zero_bits per group.
    "scaled": scale * a small float, whose largest value is `high`.
    """

    name: str
    bits: int
    kind: str
    low: int = 0
    high: int = 0
    zero_point: int = 0
    zero_bits: int = 0
    default_group: int = 0

    @property
    def integer(self) -> bool:
        return self.kind == "integer"

    @property
    def scaled(self) -> bool:
        """Whether groups of weights have a scale: integers and small floats."""
        return self.kind != "float"

    @property
    def dtype(self) -> str:
        """The numpy type that holds one unpacked integer, or the bits of a small float."""
        return "int8" if self.integer and self.low < 0 else "uint8"

    @property
    def levels(self) -> int:
        """Steps between the smallest and the largest integer."""
        return self.high - self.low


FORMATS = {
    f.name: f
    for f in (
        Format("f32", 32, "float"),
        Format("bf16", 16, "float"),
        Format("f16", 16, "float"),
        Format("fp8", 8, "scaled", low=-448, high=448),  # e4m3fn: no infinities
        Format("int8", 8, "integer", low=-128, high=127, zero_point=0, zero_bits=8),
        Format("int4", 4, "integer", high=15, zero_point=8, zero_bits=4, default_group=128),
        Format("int3", 3, "integer", high=7, zero_point=4, zero_bits=4, default_group=128),
        Format("int2", 2, "integer", high=3, zero_point=2, zero_bits=4, default_group=128),
    )
}


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is stored: format, columns per group (0: the whole row), symmetric or not."""

    format: str
    group_size: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise GristmillError(
                f"unknown weight format {self.format!r}: expected one of {', '.join(FORMATS)}"
            )
        if self.group_size not in (0, *GROUP_SIZES):
            raise GristmillError(
                f"group size {self.group_size!r}: expected 32, 64, 128, or 0 for the whole row"
            )
        if not self.has_scales and self.group_size:
            raise GristmillError(f"{self.format} weights have no groups: leave out the group size")
        if not self.is_integer and not self.symmetric:
            raise GristmillError(f"{self.format} weights have no zero points: leave out asymmetric")

    @property
    def numbers(self) -> Format:
        return FORMATS[self.format]

    @property
    def is_integer(self) -> bool:
        return self.numbers.integer

    @property
    def has_scales(self) -> bool:
        return self.numbers.scaled

    def __str__(self) -> str:
        """The text that `parse` reads back: `int4-g128`, `int4-g32-asym`, `int8`, `fp8-g128`, `bf16`."""
        group = f"-g{self.group_size}" if self.group_size else "-row" if self.numbers.default_group else ""
        return self.format + group + ("" if self.symmetric else "-asym")

    def normalize(self, k: int) -> Scheme:
        """The scheme of a matrix with k columns: a group at least as wide as the row is the row."""
        return replace(self, group_size=0) if self.group_size >= k else self

    def groups(self, k: int) -> int:
        """Scales per row of k columns; the last group may be short; floats have none."""
        if not self.has_scales:
            return 0
        return -(-k // self.group_size) if self.group_size else 1

    def bits_per_weight(self, k: int) -> float:
        """Bits per weight of a row of k columns with its scales and zero points, without padding."""
        zero_bits = 0 if self.symmetric else self.numbers.zero_bits
        return self.numbers.bits + self.groups(k) * (SCALE_BITS + zero_bits) / k


def parse(text: str, group_size: int | None = None, symmetric: bool | None = None) -> Scheme:
    """Read a scheme from `int4`, `int4-g64`, `int4-g32-asym`, `int8-row`, `bf16`...

    The two options mean what the text leaves unsaid; where they are None too, the format's own default holds.

    >>> parse("int4"), str(parse("int4", group_size=32, symmetric=False))
    (Scheme(format='int4', group_size=128, symmetric=True), 'int4-g32-asym')
    """
    name, *words = str(text).strip().lower().split("-")
    if name not in FORMATS:
        raise GristmillError(f"unknown weight format {text!r}: expected one of {', '.join(FORMATS)}")
    for word in words:
        if word in ("sym", "asym"):
            symmetric = word == "sym"
        elif word == "row":
            group_size = 0
        elif word[:1] == "g" and word[1:].isdecimal():
            group_size = int(word[1:])
        else:
            raise GristmillError(f"weight format {text!r}: {word!r} is not g32, g64, g128, row, sym or asym")
    group_size = FORMATS[name].default_group if group_size is None else group_size
    return Scheme(name, group_size, True if symmetric is None else symmetric)


def activation_group(schemes: Iterable[Scheme], k: int) -> int:
    """Columns that share one int8 activation scale beside these weight segments; 0: f32 activations.

    Float weights, scaled ones too, and narrow linears keep f32 activations. Else the activation group divides
    every segment's weight group, so that a product group has one weight scale and one activation scale: it is
    the smallest weight group, and 64 beside whole rows.
    """
    normal = [scheme.normalize(k) for scheme in schemes]
    families = {scheme.is_integer for scheme in normal}
    if len(families) != 1:
        raise GristmillError(
            "one linear needs segments that are all integer or all float, got a mixture or none"
        )
    if families == {False} or k < NARROW_COLUMNS:
        return 0
    return min(scheme.group_size or ROW_ACTIVATION_GROUP for scheme in normal)


# Beside int8 rows, KL to the float model on a small model with activation groups of 32, 64, 128 and the row
# is as 1 to 1.2 to 1.5 to 2.1 (int4 hides the difference). 64 is also a whole block of the int8 layout.
ROW_ACTIVATION_GROUP = 64

# Narrower linears keep f32 activations: their weights stream from a cache, where int8 products gain nothing,
# and the rounding of few columns does not average out (stories260k: 0.25 % of perplexity).
NARROW_COLUMNS = 256
