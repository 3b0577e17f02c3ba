"""Texts that a model, a file or an error message brought in, made safe to show: nothing in them acts."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import fields, is_dataclass, replace
from typing import Any

from gristmill.report.schema import Point, WorstToken

SHOWN = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
LONGEST_LABEL = 60
_KEPT = {"\n", "\t"}  # harmless in running text
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # controls, direction marks, surrogates, unassigned


def clean(text: str) -> str:
    """Controls and marks that change how other text looks become their code: ESC is "‹U+001B›"."""
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _HIDDEN else _code(c) for c in text)


def tidy(value: Any) -> Any:
    """A report whose texts can be shown anywhere: clean and on one line, labels not too long.

    The texts around worst tokens keep their white space: it is what they are shown for.
    """
    if isinstance(value, str):
        return " ".join(clean(value).split())
    if isinstance(value, tuple):
        return tuple(tidy(item) for item in value)
    if isinstance(value, dict):
        return {tidy(key): tidy(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, (type, WorstToken)):
        value = replace(value, **{f.name: tidy(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, Point) and len(value.label) > LONGEST_LABEL:
        value = replace(value, label=value.label[: LONGEST_LABEL - 1] + "…")
    return value


def visible(text: str) -> str:
    """A token as it stands: white space is seen; blanks other than U+0020 and what is hidden are codes."""
    return "".join(SHOWN.get(c) or (_code(c) if unicodedata.category(c) == "Zs" else clean(c)) for c in text)


def context(text: str) -> str:
    """As `visible`, but a single space between words stays one, so that lines break there."""
    return re.sub(r"(?<=[^␣\s])␣(?=[^␣\s])", " ", visible(text))


def _code(c: str) -> str:
    return f"‹U+{ord(c):04X}›"
