"""Last-word accuracy, as in LAMBADA (arXiv:1606.06031): how often greedy decoding gets the last word of a
passage from all that stands before it.

A file of JSON lines, each {"text": passage}, and no network: a quick check of what quantization or a cache
format costs in understanding, where perplexity tells little. The word with the white space before it is cut
off, and a hit needs every token of it to be the most likely one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import read_text
from gristmill.runtime.scoring import score_continuations
from gristmill.runtime.slots import common_prefix

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class LastWordScore:
    """accuracy: hits by passages, between low and high at 95 % (Wilson); tokens: of all passages, last words
    included; tok_s: those by the seconds that scoring took."""

    hits: int
    passages: int
    accuracy: float
    low: float
    high: float
    tokens: int
    tok_s: float


def score_last_words(session: Session, path: str | Path, adapter: str | None = None) -> LastWordScore:
    """Scores the passages in the file at `path`, by the model or by it with an adapter.

    Raises GristmillError that names the line for one that is no passage or does not fit into max_len.
    """
    requests = [_request(session, text, f"{path} line {line}") for line, text in read_passages(path)]
    began = time.perf_counter()
    scores = score_continuations(session, requests, adapter=adapter)
    seconds = time.perf_counter() - began
    hits, tokens = sum(score.greedy for score in scores), sum(len(a) + len(b) for a, b in requests)
    low, high = wilson_interval(hits, len(scores))
    return LastWordScore(hits, len(scores), hits / len(scores), low, high, tokens, tokens / seconds)


def read_passages(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of every line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, _text_of(line, f"{path} line {number}")


def split_last_word(text: str) -> tuple[str, str]:
    """The text before the last word, and the word with the white space before it; ("", word) where it is the
    only one.

    >>> split_last_word("to be or not to be ")
    ('to be or not to', ' be')
    """
    text = text.rstrip()
    words = text.split()
    before = text[: len(text) - len(words[-1])].rstrip() if words else ""
    return before, text[len(before) :]


def wilson_interval(hits: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a share of hits (Wilson 1927): unlike the normal one it stays within 0 to
    1, and says something at 0 and at 1.

    >>> [round(x, 4) for x in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    share, scale = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half if hits else 0.0), (middle + half if hits < count else 1.0)


def _text_of(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise GristmillError(f'{where} is not JSON ({error}); expected {{"text": "..."}}') from error
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise GristmillError(f'{where} holds no "text" that is a text; expected {{"text": "..."}}')
    if not split_last_word(text)[0]:
        raise GristmillError(f"{where} has no two words; a last word needs text before it")
    return text


def _request(session: Session, text: str, where: str) -> tuple[list[int], list[int]]:
    """Context and last word as ids of the whole text; a token over the border is to be predicted."""
    before, word = split_last_word(text)
    ids = session.tokenizer.encode(before + word)
    start = common_prefix(session.tokenizer.encode(before), ids)
    if len(ids) > session.max_len + 1:
        raise GristmillError(
            f"{where} has {len(ids)} tokens, max_len is {session.max_len}; shorten it or use --max-len"
        )
    if not 0 < start < len(ids):
        raise GristmillError(f"{where}: no token stands before the last word {word.strip()!r}")
    return ids[:start], ids[start:]
