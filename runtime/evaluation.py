"""How well an artifact predicts a text: the negative log-likelihood of each of its tokens, in nats.

The text is cut into windows that do not overlap. Each window begins with what the tokenizer puts before every
text (BOS, mostly) and is otherwise predicted from its own tokens alone, so a window's first tokens are harder
than the later ones: compare figures of one window length only. Without a BOS the first token of a window has
nothing before it and is not counted. Perplexity is exp(mean nll).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

LOGITS_BYTES = 64 << 20  # the most that the logits of one chunk may take


@dataclass(frozen=True)
class TextScore:
    """nll: mean in nats over `tokens` counted tokens; ppl = exp(nll); window: tokens per window."""

    nll: float
    ppl: float
    tokens: int
    window: int


def text_windows(ids: list[int], prefix: list[int], window: int) -> list[list[int]]:
    """Cuts `ids` (without special tokens) into pieces that with `prefix` before them have at most `window`
    tokens.
    """
    room = window - len(prefix)
    if room < 2:
        raise GristmillError(f"a window of {window} tokens has no room for text; use 3 or more")
    pieces = [prefix + ids[start : start + room] for start in range(0, len(ids), room)]
    return [piece for piece in pieces if len(piece) > 1]


def window_logits(session: Session, window: list[int], slot: int) -> Iterator[tuple[int, np.ndarray]]:
    """Runs one window in `slot` from position 0 and yields (first row, logits [rows, V] f32) in chunks that
    cover all rows.
    """
    rows = min(session.max_tokens, max(1, LOGITS_BYTES // (4 * session.vocabulary)))
    for start in range(0, len(window), rows):
        chunk = np.array(window[start : start + rows], np.int32)
        positions = np.arange(start, start + len(chunk), dtype=np.int32)
        slots = np.full(len(chunk), slot, np.int32)
        yield start, session._run(chunk, positions, slots, np.arange(len(chunk), dtype=np.int32))


def window_nll(session: Session, window: list[int], slot: int, given: int) -> np.ndarray:
    """nll [len(window) - max(given, 1)] f64 of a window's tokens; the first `given` are not counted (its
    prefix).
    """
    parts = []
    for start, logits in window_logits(session, window[:-1], slot):  # nothing follows the last token
        targets = window[start + 1 : start + 1 + len(logits)]
        parts.append(token_nll(logits, np.array(targets)))
    return np.concatenate(parts)[max(given, 1) - 1 :]


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target]: logits [R, V] f32, targets [R] -> [R] f64."""
    highest = logits.max(axis=1, initial=-np.inf)
    if not np.isfinite(highest).all():
        raise GristmillError(
            "the model gave a logit that is not a number: its weights are damaged (see `gristmill verify`)"
        )
    sums = np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64)
    return np.log(sums) + highest - logits[np.arange(len(targets)), targets]


def negative_log_likelihood(
    session: Session, ids: list[int], window: int | None = None, adapter: str | None = None
) -> np.ndarray:
    """nll [tokens] f64 of every counted token of `ids` (token ids of a text without special tokens).

    window: tokens per window, the prefix included; default and most: the session's max_len. adapter: the name
    of the one that changes the model.
    """
    window = session.max_len if window is None else window
    if window > session.max_len:
        raise GristmillError(
            f"a window of {window} tokens, max_len is {session.max_len}; use less or load with more"
        )
    prefix = session.tokenizer.prefix_ids if session.has_tokenizer else []
    with session.slot(adapter) as slot:
        found = [
            window_nll(session, piece, slot, len(prefix)) for piece in text_windows(list(ids), prefix, window)
        ]
    if not found:
        raise GristmillError("the text is too short: it has no token that another one stands before")
    return np.concatenate(found)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises GristmillError where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise GristmillError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GristmillError(
            f"{path} is not UTF-8 text: byte {error.start} does not fit; convert it first"
        ) from error
    if not text.strip():
        raise GristmillError(f"{path} holds no text; give a file with some hundred words or more")
    return text


def score_text(
    session: Session, text: str, window: int | None = None, max_tokens: int | None = None,
    adapter: str | None = None,
) -> TextScore:  # fmt: skip
    """Scores `text`, or its first `max_tokens` tokens, by the model or by it with an adapter."""
    if max_tokens is not None and max_tokens < 2:
        raise GristmillError(f"max_tokens is {max_tokens}, expected 2 or more")
    ids = session.tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
    nll = negative_log_likelihood(session, ids, window, adapter)
    mean = float(nll.mean())
    return TextScore(mean, float(np.exp(mean)), len(nll), window or session.max_len)
