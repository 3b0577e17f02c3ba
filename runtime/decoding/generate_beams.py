"""Beam search over a Session: slots for all beams at once, texts of what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gristmill.runtime.decoding.beam_scores import Process, process_of
from gristmill.runtime.decoding.beams import Beam, BeamOptions, beam_search
from gristmill.runtime.decoding.options import GenerationOptions, refuse_unknown
from gristmill.runtime.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

GENERAL = (
    "max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram", "ignore_eos", "stop_ids",
    "skip_special_tokens", "adapter",
)  # fmt: skip


@dataclass(frozen=True)
class BeamText(Beam):
    """A finished beam and what it says: `text` without special tokens, empty without a tokenizer."""

    text: str = ""


def generate_beams(
    session: Session,
    prompt: str | Sequence[int],
    process: Process | None = None,
    **options: Any,
) -> list[BeamText]:
    """Continues `prompt` (text or token ids) by beam search; the best texts, best first.

    Waits until num_beams slots are free at once. options: those of BeamOptions, and of GenerationOptions
    those in GENERAL. process: changes log-probabilities [n, V] after the penalties, given the sequences [n,
    length] with the prompt. Raises GristmillError for what does not fit: the prompt, the options, more beams
    than the session has slots.
    """
    names = [f.name for f in fields(BeamOptions)]
    refuse_unknown(options, [*names, *GENERAL], "beam search")
    beams = BeamOptions.of(**{name: value for name, value in options.items() if name in names})
    general = GenerationOptions.of(**{name: value for name, value in options.items() if name in GENERAL})
    ids = session._prompt_ids(prompt)
    ending = frozenset(general.stop_ids) | (frozenset() if general.ignore_eos else session.eos_ids)
    penalties = process_of(
        general.repetition_penalty, general.no_repeat_ngram, general.min_new_tokens, ending, len(ids)
    )
    limit = min(general.max_new_tokens, session.max_len - len(ids) + 1)
    slots = session._slots.take_many(beams.num_beams, session.adapters.number(general.adapter))
    try:
        found = beam_search(
            session._run, session._copy_slot, slots, ids, beams, ending, limit,
            session.vocabulary, session.max_tokens, _both(penalties, process),
        )  # fmt: skip
    finally:
        session._slots.give_back_many(slots)
    return [_with_text(session, ids, beam, general.skip_special_tokens) for beam in found]


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
