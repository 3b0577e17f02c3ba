"""Texts that a model, a file or an error message brought in, made safe to show: nothing in them acts."""

from __future__ import annotations

import re
import unicodedata

SHOWN = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
_KEPT = {"\n", "\t"}  # harmless in running text
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # controls, direction marks, surrogates, unassigned


def clean(text: str) -> str:
    """Controls and marks that change how other text looks become their code: ESC is "‹U+001B›"."""
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _HIDDEN else _code(c) for c in text)


def visible(text: str) -> str:
    """A token as it stands: white space is seen; blanks other than U+0020 and what is hidden are codes."""
    return "".join(SHOWN.get(c) or (_code(c) if unicodedata.category(c) == "Zs" else clean(c)) for c in text)


def context(text: str) -> str:
    """As `visible`, but a single space between words stays one, so that lines break there."""
    return re.sub(r"(?<=[^␣\s])␣(?=[^␣\s])", " ", visible(text))


def _code(c: str) -> str:
    return f"‹U+{ord(c):04X}›"
