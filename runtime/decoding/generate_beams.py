"""Beam search over a Session: slots for all beams at once, texts of what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gristmill.runtime.decoding.beam_scores import Process, process_of
from gristmill.runtime.decoding.beams import Beam, BeamOptions, Run, beam_search
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from gristmill.runtime.session import Session


@dataclass(frozen=True)
class BeamText(Beam):
    """A finished beam and what it says: `text` without special tokens, empty without a tokenizer."""

    text: str = ""


def generate_beams(
    session: Session,
    prompt: str | Sequence[int],
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    ignore_eos: bool = False,
    skip_special_tokens: bool = True,
    process: Process | None = None,
    **beams: Any,
) -> list[BeamText]:
    """Continues `prompt` (text or token ids) by beam search; the best texts, best first.

    Waits until num_beams slots are free at once. beams: see BeamOptions. process: changes log-probabilities
    [n, V] after the penalties, given the sequences [n, length] with the prompt. Raises GristmillError for
    what does not fit: the prompt, the options, more beams than the session has slots.
    """
    options = BeamOptions.of(**beams)
    _check(max_new_tokens, min_new_tokens, repetition_penalty, no_repeat_ngram)
    ids = session._prompt_ids(prompt)
    eos_ids = frozenset() if ignore_eos else session.eos_ids
    penalties = process_of(repetition_penalty, no_repeat_ngram, min_new_tokens, eos_ids, len(ids))
    limit = min(max_new_tokens, session.max_len - len(ids) + 1)
    slots = session._slots.take_many(options.num_beams)
    try:
        found = beam_search(
            _run_of(session), lambda *copy: _copy(session, *copy), slots, ids, options, eos_ids, limit,
            session.vocabulary, session.max_tokens, _both(penalties, process),
        )  # fmt: skip
    finally:
        session._slots.give_back_many(slots)
    return [_with_text(session, ids, beam, skip_special_tokens) for beam in found]


def _run_of(session: Session) -> Run:
    return lambda tokens, positions, slots, rows: session._run(tokens, positions, slots, rows)


def _copy(session: Session, source: int, target: int, length: int, start: int) -> None:
    with session._lock:
        session.executor.copy_slot(source, target, length, start)
        session._slots.copied(source, target, length)


def _both(first: Process | None, second: Process | None) -> Process | None:
    if first is None or second is None:
        return first or second
    return lambda scores, sequences: second(first(scores, sequences), sequences)


def _with_text(session: Session, prompt: list[int], beam: Beam, skip_special_tokens: bool) -> BeamText:
    text = ""
    if session.has_tokenizer:
        decoder = StreamDecoder(session.tokenizer, prompt, skip_special_tokens)
        text = "".join(decoder.push(token) for token in beam.token_ids) + decoder.flush()
    return BeamText(beam.token_ids, beam.score, beam.finish_reason, text)


def _check(most: Any, least: Any, penalty: Any, ngram: Any) -> None:
    counts = {"max_new_tokens": (most, 1), "min_new_tokens": (least, 0), "no_repeat_ngram": (ngram, 0)}
    for name, (value, lowest) in counts.items():
        if type(value) is not int or value < lowest:
            raise GristmillError(f"{name} is {value!r}, expected an integer from {lowest}")
    if least > most:
        raise GristmillError(f"min_new_tokens is {least}, expected at most max_new_tokens = {most}")
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 < penalty < float("inf"):
        raise GristmillError(f"repetition_penalty is {penalty!r}, expected a number above 0 (1 is off)")
