"""What a user may ask of the sizes: an average of bits, a size of the file, formats of single matrices.

Text becomes values here, and values become budgets in bits. Imports nothing heavy: the command line reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from gristmill.quant.scheme import Scheme, parse
from gristmill.runtime.errors import GristmillError

UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30,
}  # fmt: skip
ROLES = ("embedding", "head", "linear")
MOST_BITS = 32.0


def parse_size(text: str) -> int:
    """Bytes.

    >>> parse_size("400MB"), parse_size("1.5 GiB"), parse_size("4096")
    (400000000, 1610612736, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise GristmillError(
            f"size is {text!r}, expected a number of bytes with a unit such as 400MB, 1.5GiB or 900kB"
        )
    return int(float(match[1]) * UNITS[match[2]])


def parse_bits(text: str | float) -> float:
    """Average bits per weight, above 0 and at most 32."""
    try:
        bits = math.nan if isinstance(text, bool) else float(text)
    except ValueError:
        bits = math.nan
    if not 0 < bits <= MOST_BITS:
        raise GristmillError(f"bits is {text!r}, expected an average per weight such as 3.5, at most 32")
    return bits


def matrix_bits(scheme: Scheme, n: int, k: int) -> int:
    """What a matrix [n, k] takes with its scales and zero points, as the average of bits counts it."""
    return round(n * k * scheme.bits_per_weight(k))


def budget_of_bits(bits_per_weight: float, weights: int) -> int:
    """All the bits that ``weights`` weights may take, scales included."""
    return math.floor(bits_per_weight * weights)


def budget_of_size(size_bytes: int, fixed_bytes: int) -> int:
    """The bits that are left for matrices in a file of ``size_bytes``.

    fixed_bytes: what the file holds besides them (header, vectors, padding).
    """
    if size_bytes <= fixed_bytes:
        raise GristmillError(
            f"a size of {size_bytes} bytes leaves nothing for the weight matrices: "
            f"the rest of the file takes {fixed_bytes} bytes; allow more"
        )
    return 8 * (size_bytes - fixed_bytes)


@dataclass(frozen=True)
class Keep:
    """Matrices whose role is ``pattern``, or whose stored name matches it, have ``scheme`` in any case.

    scheme: as `quant.scheme.parse` reads it; what it leaves unsaid (group size, zero points) stays open.
    """

    scheme: str
    pattern: str

    def matches(self, name: str, role: str) -> bool:
        """name: as stored, without `.weight`; role: embedding, head or linear."""
        return self.pattern == role or fnmatchcase(name, self.pattern)

    def __str__(self) -> str:
        return f"{self.scheme}:{self.pattern}"


def parse_keep(text: str) -> Keep:
    """Read `f16:head`, `int8:*.down_proj`, `int4-g32-asym:model.layers.0.*`.

    >>> parse_keep("int8:*.down_proj").matches("model.layers.3.mlp.down_proj", "linear")
    True
    """
    scheme, colon, pattern = (part.strip() for part in str(text).partition(":"))
    if not (scheme and colon and pattern):
        raise GristmillError(
            f"keep is {text!r}, expected FORMAT:PATTERN such as f16:head or int8:*.down_proj"
        )
    parse(scheme)
    return Keep(scheme, pattern.removesuffix(".weight"))


def keep_scheme(keeps: Sequence[Keep], name: str, role: str) -> str | None:
    """The scheme that was asked for a matrix; of several matches the last one's, as later options win."""
    return next((keep.scheme for keep in reversed(keeps) if keep.matches(name, role)), None)


def refuse_unmatched(keeps: Iterable[Keep], roles: Mapping[str, str]) -> None:
    """Raises GristmillError for a pattern that no matrix matches, naming near ones.

    roles: the role of every matrix by its stored name.
    """
    for keep in keeps:
        if not any(keep.matches(name, role) for name, role in roles.items()):
            near = ", ".join(_near(keep.pattern, roles)) or "nothing similar"
            raise GristmillError(f"keep {str(keep)!r} matches no weight matrix; this model has {near}")


def _near(pattern: str, roles: Mapping[str, str]) -> list[str]:
    """Roles, patterns of last components and whole names that look like ``pattern``; else what there is."""
    ends = list(dict.fromkeys(_end(name) for name in roles))
    short = [*dict.fromkeys(roles.values()), *ends]
    known = short if any(c in pattern for c in "*?[") else [*short, *roles]
    return get_close_matches(pattern, known) or get_close_matches(_end(pattern), ends) or short


def _end(name: str) -> str:
    """model.layers.0.mlp.down_proj → *.down_proj."""
    return f"*.{name.rpartition('.')[2]}"
