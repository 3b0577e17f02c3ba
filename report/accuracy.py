"""What a configuration loses: its distributions over the next token beside the float model's, token by token.

Perplexity says how well the text itself is predicted, and noise can raise it by luck; the divergence
KL(float || artifact) asks for the whole distribution and forgives nothing; agreements say how often a greedy
reader would notice. All of them are means, so the tokens where the two differ most are shown by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.compiler import statistics
from gristmill.compiler.gate import HeldText, score_window
from gristmill.report.reference import Reference
from gristmill.report.schema import Accuracy, LastWord, PositionBin, WorstToken
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import window_logits
from gristmill.runtime.last_word import score_last_words
from gristmill.runtime.session import Session

WORST = 20  # tokens that are shown
FIRST_BIN = 16  # positions in the first bin; each further one has as many as all before it
BEFORE_TOKENS = 32  # that are shown before one of the worst

Array = NDArray[Any]
# Given a window of token ids, yields (first row, logits [rows, V] f32) that cover it; see `window_logits`.
WindowLogits = Callable[[list[int]], Iterator[tuple[int, Array]]]
Decode = Callable[[Sequence[int]], str]


def measure_accuracy(
    session: Session, reference: Reference, *, last_word: str | Path | None = None, worst: int = WORST
) -> Accuracy:
    """A session's artifact against a reference, on the text and the windows of that.

    last_word: a file of JSON lines, see runtime/last_word.py. Raises GristmillError for an artifact of
    another model: another vocabulary, or other tokens for the same text.
    """
    _refuse_other_model(session, reference)

    def logits(ids: list[int]) -> Iterator[tuple[int, Array]]:
        with session.slot() as slot:
            yield from window_logits(session, ids, slot)

    def decode(ids: Sequence[int]) -> str:
        return session.tokenizer.decode(ids, skip_special_tokens=False)

    found = compare(logits, reference, decode, worst=worst)
    return found if last_word is None else replace(found, last_word=last_words(session, last_word))


def compare(logits: WindowLogits, reference: Reference, decode: Decode, *, worst: int = WORST) -> Accuracy:
    """Whatever gives logits for token ids against a reference.

    top1_agreement: share of the tokens where both models' most likely tokens are the same. top5_agreement:
    share where the reference's most likely token is among the five that the artifact finds most likely (fewer
    than five have a larger logit).
    """
    windows = reference.windows
    counted = max(len(reference.text.prefix), 1) - 1  # rows before the first counted token
    scores = [
        score_window(logits(ids), ids, expected)[counted:]
        for ids, expected in zip(windows, reference.logits(), strict=True)
    ]
    found = statistics.Comparison.of(scores)
    return Accuracy(
        text=reference.text.name,
        text_sha256=reference.text.sha256,
        tokens=found.tokens,
        window=reference.window,
        reference_ppl=found.reference_ppl,
        ppl=found.ppl,
        ppl_increase=found.ppl_increase,
        kl=found.kl,
        kl_p99=found.kl_p99,
        kl_max=found.kl_max,
        top1_agreement=found.top1_agreement,
        top5_agreement=found.top5_agreement,
        by_position=position_bins(scores, counted + 1),
        worst=worst_tokens(windows, scores, counted + 1, decode, worst),
        reference=reference.name,
    )


def last_words(session: Session, path: str | Path) -> LastWord:
    """How often the last words of a file's passages are guessed."""
    found = score_last_words(session, path)
    return LastWord(found.accuracy, found.low, found.high, found.passages)


def position_bins(scores: Sequence[Array], first: int) -> tuple[PositionBin, ...]:
    """Means by position: up to FIRST_BIN, and then in bins that double.

    scores: of each window from position ``first`` on; a position is the number of tokens before a token.
    """
    positions = np.concatenate([np.arange(first, first + len(window)) for window in scores])
    values = np.concatenate(scores)
    low, high, bins = 0, FIRST_BIN - 1, []
    while low <= positions.max():
        rows = values[(positions >= low) & (positions <= high)]
        if len(rows):
            increase = float((rows[:, statistics.NLL] - rows[:, statistics.REFERENCE_NLL]).mean())
            last = min(high, int(positions.max()))
            kl = float(rows[:, statistics.KL].mean())
            bins.append(PositionBin(max(low, first), last, len(rows), kl, increase))
        low, high = high + 1, 2 * high + 1
    return tuple(bins)


def worst_tokens(
    windows: Sequence[list[int]], scores: Sequence[Array], first: int, decode: Decode, count: int
) -> tuple[WorstToken, ...]:
    """The ``count`` tokens with the largest divergence, that one first."""
    owner = np.concatenate([np.full(len(window), number) for number, window in enumerate(scores)])
    position = np.concatenate([np.arange(first, first + len(window)) for window in scores])
    values = np.concatenate(scores)
    order = np.argsort(-values[:, statistics.KL], kind="stable")[:count]
    return tuple(_worst(windows[owner[at]], int(position[at]), values[at], decode) for at in order)


def _worst(window: list[int], position: int, row: Array, decode: Decode) -> WorstToken:
    before = window[max(0, position - BEFORE_TOKENS) : position]
    token, reference_choice, choice = (
        _text_after(before, int(token), decode)
        for token in (window[position], row[statistics.REFERENCE_CHOICE], row[statistics.CHOICE])
    )
    return WorstToken(
        kl=float(row[statistics.KL]),
        position=position,
        before=decode(before),
        token=token,
        reference_choice=reference_choice,
        choice=choice,
        reference_probability=float(np.exp(-row[statistics.REFERENCE_BEST])),
        probability=float(np.exp(-row[statistics.BEST])),
    )


def _text_after(before: Sequence[int], token: int, decode: Decode) -> str:
    """What a token adds to the text before it: many tokenizers write a leading space only behind other
    text."""
    shorter, longer = decode(before), decode([*before, token])
    return longer[len(shorter) :] if longer.startswith(shorter) and longer != shorter else decode([token])


def _refuse_other_model(session: Session, reference: Reference) -> None:
    if session.vocabulary != reference.vocabulary:
        raise GristmillError(
            f"the artifact has a vocabulary of {session.vocabulary}, {reference.name} of "
            f"{reference.vocabulary}: they are not the same model"
        )
    if session.max_len < reference.window:
        raise GristmillError(
            f"windows of {reference.window} tokens do not fit into max_len {session.max_len}; load with "
            "more, or measure with a smaller window"
        )
    text = HeldText.of(reference.text.name, reference.whole_text, session.tokenizer, len(reference.text.ids))
    if (text.ids, text.prefix) != (reference.text.ids, reference.text.prefix):
        raise GristmillError(
            f"the artifact's tokenizer makes other tokens of {text.name} than that of {reference.name}: they "
            "are not the same model"
        )
