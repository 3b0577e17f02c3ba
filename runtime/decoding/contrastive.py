"""Contrastive search (Su et al., arXiv 2202.06417): of the likely next tokens the one least like the text.

    next = argmax over v in V(k) of  (1 - alpha) p(v | x) - alpha max_j cos(h_v, h_j)        (equation 5)

V(k): the k most likely tokens after the text x; h_v: the hidden state of v as the next token; h_j: that of
every token of x, the prompt's included. A text that repeats itself repeats its hidden states, so the penalty
alpha keeps it from that without drawing at random.

Every candidate is a row in a slot of its own, and all slots hold the text so far. Once one has won, its row
alone is copied to the other slots; the logits after it are there already. So a token costs one forward of k
rows.
"""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.decoding.chooser import Choice
from gristmill.runtime.decoding.greedy import most_likely
from gristmill.runtime.decoding.options import GenerationOptions, check_number
from gristmill.runtime.decoding.sampling import candidates
from gristmill.runtime.decoding.sequence import Generation, Prompt, Sequence
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.hidden import run_hidden
from gristmill.runtime.program import NO_HIDDEN_STATES

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

CONTRASTIVE_OPTIONS = (
    "max_new_tokens", "penalty_alpha", "top_k", "stop", "stop_ids", "ignore_eos", "skip_special_tokens",
    "adapter", "on_text",
)  # fmt: skip
LOGITS_BYTES = 64 << 20  # the most that the logits of one chunk of the prompt may take

# (tokens [T], positions [T], slots [T], rows [R], all i32) -> logits [R, V] f32, hidden states [R, H] f32
Run = abc.Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# (source, target, length, start): the target slot gets positions start to length of the source
CopySlot = abc.Callable[[int, int, int, int], object]


@dataclass(frozen=True)
class ContrastiveOptions:
    """penalty_alpha: 0 is greedy, 1 looks at the hidden states alone. top_k: candidates, and slots they
    take."""

    penalty_alpha: float = 0.6
    top_k: int = 4

    def __post_init__(self) -> None:
        k = self.top_k
        check_number("penalty_alpha", self.penalty_alpha, 0.0, 1.0)
        if type(k) is not int or k < 1:
            raise GristmillError(f"top_k is {k!r}, expected an integer from 1")

    @property
    def candidates(self) -> int:
        """Tokens that are tried: without a penalty the likeliest wins anyway."""
        return self.top_k if self.penalty_alpha > 0 else 1


class Context:
    """The hidden states of a text so far, as unit vectors [length, H] f32."""

    def __init__(self, states: np.ndarray, capacity: int):
        self._units = np.empty((capacity, states.shape[1]), np.float32)  # pages not reached take no memory
        self._length = 0
        self.add(states)

    def add(self, states: np.ndarray) -> None:
        """The states [n, H] of the tokens that come next."""
        self._units[self._length : self._length + len(states)] = unit(states)
        self._length += len(states)

    def similarity(self, states: np.ndarray) -> np.ndarray:
        """The largest cosine [n] between each of `states` [n, H] and those of the text."""
        return np.asarray((unit(states) @ self._units[: self._length].T).max(axis=1))


def unit(states: np.ndarray) -> np.ndarray:
    """Rows [n, H] of length 1; one of zeros stays, and is like nothing."""
    norms = np.sqrt(np.square(states, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.asarray(states / np.where(norms > 0, norms, 1), np.float32)


def contrastive_search(
    run: Run,
    copy_slot: CopySlot,
    slots: abc.Sequence[int],
    prompt_ids: abc.Sequence[int],
    options: ContrastiveOptions,
    max_new_tokens: int,
    max_rows: int,
) -> abc.Iterator[int]:
    """The tokens after the prompt one by one, as many as the caller takes and at most `max_new_tokens`.

    slots: options.candidates of them, empty, with room for the prompt and all new tokens, for this search
    alone. max_rows: the most that `run` takes.
    """
    assert len(slots) == options.candidates and len(prompt_ids) > 0
    prompt = np.array(prompt_ids, np.int32)
    logits, states = prefill(run, slots[0], prompt, max_rows)
    for slot in slots[1:]:
        copy_slot(slots[0], slot, len(prompt), 0)
    context = Context(states, len(prompt) + max_new_tokens)
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        tokens, probabilities = likeliest(logits, len(slots))
        following, states = try_out(run, slots, tokens, position, max_rows)
        best = choose(probabilities, context.similarity(states), options.penalty_alpha)
        yield int(tokens[best])
        logits = following[best]
        context.add(states[best : best + 1])
        for slot in slots:
            if slot != slots[best]:
                copy_slot(slots[best], slot, position + 1, position)


def choose(probabilities: np.ndarray, similarity: np.ndarray, alpha: float) -> int:
    """The candidate [n] of the highest score by equation 5; the likeliest among equals."""
    return int(np.argmax((1 - alpha) * probabilities - alpha * similarity.astype(np.float64)))


def likeliest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] i32 of the `count` largest of `logits` [V], largest first and the lowest id among equals,
    and their probabilities [n] f64; all ids where there are fewer."""
    top = logits[most_likely(logits)]
    ids, scores = candidates(logits, count, 1.0)
    order = np.lexsort((ids, -scores))[:count]
    total = np.exp(logits - top).sum(dtype=np.float64)
    return ids[order].astype(np.int32), np.exp(scores[order].astype(np.float64) - top) / total


def prefill(run: Run, slot: int, prompt: np.ndarray, max_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts `prompt` [n] into `slot`; the logits [V] after its last token, the hidden states [n, H] of all."""
    states = []
    for start in range(0, len(prompt), max_rows):
        chunk = prompt[start : start + max_rows]
        rows = np.arange(len(chunk), dtype=np.int32)
        logits, part = run(chunk, start + rows, np.full(len(chunk), slot, np.int32), rows)
        states.append(part)
    return logits[-1], np.concatenate(states)


def try_out(
    run: Run, slots: abc.Sequence[int], tokens: np.ndarray, position: int, max_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Runs each of `tokens` [n] at `position` of its own slot; logits [n, V] and hidden states [n, H]."""
    parts = []
    for start in range(0, len(tokens), max_rows):
        chunk = tokens[start : start + max_rows]
        rows = np.arange(len(chunk), dtype=np.int32)
        where = np.array(slots[start : start + len(chunk)], np.int32)
        parts.append(run(chunk, np.full(len(chunk), position, np.int32), where, rows))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([states for _, states in parts])


def generate_contrastive(
    session: Session,
    prompt: str | abc.Sequence[int],
    max_new_tokens: int = 256,
    penalty_alpha: float = 0.6,
    top_k: int = 4,
    stop: str | abc.Sequence[str] | None = None,
    stop_ids: int | abc.Sequence[int] = (),
    ignore_eos: bool = False,
    skip_special_tokens: bool = True,
    adapter: str | None = None,
    on_text: abc.Callable[[str], None] | None = None,
) -> Generation:
    """Continues `prompt` (text or token ids) by contrastive search with `top_k` candidates a token.

    Waits until top_k slots are free at once. A text ends with the last position of a slot, since its last
    token is tried out as well. on_text: called with each new piece of the text. Where AWQ scaled the
    channels that a quantized head multiplies, cosines are of the scaled ones. Raises GristmillError for what
    does not fit: the prompt, the options, an artifact without hidden states of its model (--rotate), too few
    slots.
    """
    started = time.perf_counter()
    options = ContrastiveOptions(penalty_alpha, top_k)
    given = GenerationOptions.of(
        max_new_tokens=max_new_tokens, stop=stop, stop_ids=stop_ids, ignore_eos=ignore_eos,
        skip_special_tokens=skip_special_tokens, lookup=False, adapter=adapter,
    )  # fmt: skip
    ids = session._prompt_ids(prompt)
    _refuse_unable(session, options, len(ids))
    limit = min(given.max_new_tokens, session.max_len - len(ids))
    text = Sequence(session, Prompt(ids, replace(given, max_new_tokens=limit)), started)
    max_rows = max(1, min(session.max_tokens, LOGITS_BYTES // (4 * session.vocabulary)))
    slots = session._slots.take_many(options.candidates, text.adapter)
    try:
        tokens = contrastive_search(
            partial(run_hidden, session), session._copy_slot, slots, ids, options, limit, max_rows
        )
        while not text.done:
            text._append(Choice(next(tokens)))
            for piece in text.take_pieces():
                if on_text is not None:
                    on_text(piece)
    finally:
        session._slots.give_back_many(slots)
    return text.result


def _refuse_unable(session: Session, options: ContrastiveOptions, prompt_tokens: int) -> None:
    if session.program.hidden is None:
        raise GristmillError(NO_HIDDEN_STATES)
    if session.artifact is not None and session.artifact.manifest["quantization"].get("rotated"):
        raise GristmillError(
            "this artifact was compiled with --rotate: the last norm's weight is in its head, so that it has "
            "no hidden states to compare; compile without --rotate for contrastive search"
        )
    if options.candidates > session.max_slots:
        raise GristmillError(
            f"top_k is {options.top_k}, but the session has {session.max_slots} slots and each candidate "
            f"needs one; load with max_slots={options.top_k} or more"
        )
    if prompt_tokens >= session.max_len:
        raise GristmillError(
            f"the prompt fills all {session.max_len} positions of a slot, and contrastive search tries the "
            "next token; shorten it or load with a larger max_len"
        )
