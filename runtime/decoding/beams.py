"""Beam search: the most likely continuations that a search of fixed width finds, diverse or not.

Every beam lives in a slot. A step takes the best of all beams' next tokens; a beam that has one child keeps
its slot, one that has several gives its rows to slots of beams that died out, and only from where the two
texts part. Ranks, scores, length penalty and the rules of stopping are those of transformers'
`generate(num_beams=n)`.

Diverse beam search (Vijayakumar et al., arXiv 1610.02424, algorithm 1) searches in groups, one after the
other at every step; a token loses `diversity_penalty` for every beam of the groups before that chose it just
now.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from gristmill.runtime.decoding.beam_scores import Process, ScoreBuffers, best_of, log_softmax
from gristmill.runtime.decoding.options import check_integer, check_number, refuse_unknown
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.slots import common_prefix

MOST_BEAMS = 1024
MOST_LENGTH_PENALTY = 5.0  # a million tokens to this power is still an f32

# (tokens [T], positions [T], slots [T], rows [R], all i32) -> logits [R, V] f32
Run = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
# (source, target, length, start): the target slot gets positions start to length of the source
CopySlot = Callable[[int, int, int, int], object]


@dataclass(frozen=True)
class BeamOptions:
    """num_beams: width of the search and slots it takes. A finished text's score is the sum of its
    log-probabilities / its new tokens ** length_penalty, so more than 0 favours long texts.

    early_stopping: True ends with the num_beams-th finished text; False when the best running beam, were it
    to end here, would not better the worst finished one; "never" when it could not at any length.
    diversity_penalty: in log-probability, for num_beam_groups > 1.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    @staticmethod
    def of(**values: Any) -> BeamOptions:
        """Options from keywords. Raises GristmillError for unknown names and for values out of range."""
        refuse_unknown(values, [f.name for f in fields(BeamOptions)], "beam search")
        options = BeamOptions(**values)
        options._check()
        return options

    def _check(self) -> None:
        check_integer("num_beams", self.num_beams, 1, MOST_BEAMS)
        check_integer("num_return_sequences", self.num_return_sequences, 1, self.num_beams)
        check_integer("num_beam_groups", self.num_beam_groups, 1, self.num_beams)
        check_number("length_penalty", self.length_penalty, -MOST_LENGTH_PENALTY, MOST_LENGTH_PENALTY)
        check_number("diversity_penalty", self.diversity_penalty, 0.0, 1e6)
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise GristmillError(
                f"early_stopping is {self.early_stopping!r}, expected False, True or 'never'"
            )
        if self.num_beams % self.num_beam_groups:
            raise GristmillError(
                f"{self.num_beams} beams are no whole number for each of {self.num_beam_groups} groups; "
                "expected num_beams to be a multiple of num_beam_groups"
            )
        if (self.num_beam_groups > 1) != (self.diversity_penalty > 0):
            raise GristmillError(
                f"num_beam_groups is {self.num_beam_groups}, diversity_penalty {self.diversity_penalty!r}; "
                "expected more than 1 and more than 0 for a diverse search, or neither"
            )


@dataclass(frozen=True)
class Beam:
    """A finished text. token_ids: its new tokens, the ending one too; finish_reason: "stop" or "length"."""

    token_ids: list[int]
    score: float
    finish_reason: str


@dataclass
class Running:
    """A beam on its way: its tokens [length] i32 with the prompt, of which `slot` holds all but the last."""

    tokens: np.ndarray
    score: np.float32  # the sum of its new tokens' log-probabilities
    slot: int


@dataclass
class Group:
    """Beams that compete with each other: at most `size` run, and the `size` best finished ones are kept."""

    size: int
    running: list[Running]
    finished: list[Beam] = field(default_factory=list)  # best first


@dataclass(frozen=True)
class Rules:
    """What is the same at every step. limit: new tokens of the longest text; keep: candidates of a step,
    enough for a full set of running beams after every one that may end."""

    options: BeamOptions
    eos_ids: Collection[int]
    prompt_tokens: int
    limit: int

    def keep(self, size: int) -> int:
        return max(2, 1 + len(self.eos_ids)) * size

    def final_score(self, score: np.float32, new_tokens: int) -> np.float32:
        return score / np.float32(float(new_tokens) ** self.options.length_penalty)


def beam_search(
    run: Run,
    copy_slot: CopySlot,
    slots: Sequence[int],
    prompt_ids: Sequence[int],
    options: BeamOptions,
    eos_ids: Collection[int],
    max_new_tokens: int,
    vocabulary: int,
    max_tokens: int,
    process: Process | None = None,
) -> list[Beam]:
    """The best `options.num_return_sequences` continuations of the prompt, best first.

    slots: num_beams of them, empty. run: takes at most max_tokens rows. max_new_tokens: the caller sees to it
    that a slot holds the prompt and all of these but one. process: changes log-probabilities before beams are
    compared. Fewer come back where `process` leaves too few tokens to go on with.
    """
    assert len(slots) == options.num_beams and len(prompt_ids) > 0 and max_new_tokens > 0
    rules = Rules(options, frozenset(eos_ids), len(prompt_ids), max_new_tokens)
    prompt = np.array(prompt_ids, np.int32)
    buffers = ScoreBuffers(options.num_beams, vocabulary)
    held = dict.fromkeys(slots, prompt[:0])  # the tokens of a slot's rows
    held[slots[0]] = prompt
    size = options.num_beams // options.num_beam_groups
    groups = [Group(size, [Running(prompt, np.float32(0), slots[0])]) for _ in range(options.num_beam_groups)]
    logits = np.repeat(prefill(run, slots[0], prompt, max_tokens), len(groups), axis=0)
    while True:
        scores = next_scores(logits, groups, buffers, process)
        extend(groups, scores, rules)
        running = [beam for group in groups for beam in group.running]
        if not running:
            break
        settle(running, held, copy_slot)
        logits = decode(run, running, max_tokens)
        held.update({beam.slot: beam.tokens for beam in running})
    finished = sorted((beam for group in groups for beam in group.finished), key=lambda b: -b.score)
    return finished[: options.num_return_sequences]


def prefill(run: Run, slot: int, prompt: np.ndarray, max_tokens: int) -> np.ndarray:
    """Puts `prompt` [n] into `slot`, in chunks of max_tokens; the logits [1, V] after its last token."""
    for start in range(0, len(prompt), max_tokens):
        chunk = prompt[start : start + max_tokens]
        positions = np.arange(start, start + len(chunk), dtype=np.int32)
        last = start + len(chunk) == len(prompt)
        rows = np.array([len(chunk) - 1] if last else [], np.int32)
        logits = run(chunk, positions, np.full(len(chunk), slot, np.int32), rows)
    return logits


def decode(run: Run, running: list[Running], max_tokens: int) -> np.ndarray:
    """The logits [n, V] after the last token of each beam."""
    parts = []
    for start in range(0, len(running), max_tokens):
        part = running[start : start + max_tokens]
        tokens = np.array([beam.tokens[-1] for beam in part], np.int32)
        positions = np.array([len(beam.tokens) - 1 for beam in part], np.int32)
        slots = np.array([beam.slot for beam in part], np.int32)
        parts.append(run(tokens, positions, slots, np.arange(len(part), dtype=np.int32)))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def next_scores(
    logits: np.ndarray, groups: list[Group], buffers: ScoreBuffers, process: Process | None
) -> np.ndarray:
    """The score [n, V] of every beam with every token after it, from its logits [n, V]."""
    running = [beam for group in groups for beam in group.running]
    scores = log_softmax(logits, buffers)
    if process is not None:
        scores = process(scores, np.stack([beam.tokens for beam in running]))
    scores += np.array([beam.score for beam in running], np.float32)[:, None]
    return scores


def extend(groups: list[Group], scores: np.ndarray, rules: Rules) -> None:
    """One step of every group, on its rows of `scores` [n, V]: earlier groups' tokens cost later groups."""
    penalty = np.float32(rules.options.diversity_penalty)
    chosen: list[int] = []
    first = 0
    for group in groups:
        own = scores[first : first + len(group.running)]
        first += len(group.running)
        if not group.running:
            continue
        for token in chosen:
            own[:, token] -= penalty
        chosen += extend_group(group, own, rules)


def extend_group(group: Group, scores: np.ndarray, rules: Rules) -> list[int]:
    """Takes the best candidates of `scores` [beams, V]: those that end, if they rank among the first `size`,
    compete with the finished texts, the best others go on, whose tokens are returned. A group that is done
    has no running beams."""
    best = best_of(scores, rules.keep(group.size))
    children = [
        Running(np.append(group.running[row].tokens, np.int32(token)), score, group.running[row].slot)
        for row, token, score in zip(*np.divmod(best, scores.shape[1]), scores.reshape(-1)[best], strict=True)
    ]
    new_tokens = len(group.running[0].tokens) + 1 - rules.prompt_tokens
    going_on = []
    for rank, child in enumerate(children):
        stopped = int(child.tokens[-1]) in rules.eos_ids
        if not stopped and new_tokens < rules.limit:
            going_on.append(child)
        elif rank < group.size:
            ids = child.tokens[rules.prompt_tokens :].tolist()
            score = float(rules.final_score(child.score, new_tokens))
            group.finished.append(Beam(ids, score, "stop" if stopped else "length"))
    group.finished.sort(key=lambda beam: -beam.score)  # stable: the earlier among equals
    del group.finished[group.size :]
    group.running = going_on[: group.size]
    chosen = [int(beam.tokens[-1]) for beam in group.running]
    if is_done(group, new_tokens, rules):
        group.running = []
    return chosen


def is_done(group: Group, new_tokens: int, rules: Rules) -> bool:
    """Whether the group's finished texts stay: by the rule of `early_stopping`, with `new_tokens` so far."""
    if len(group.finished) < group.size or not group.running:
        return not group.running
    if rules.options.early_stopping is True:
        return True
    longest = rules.options.early_stopping == "never" and rules.options.length_penalty > 0
    best = rules.final_score(group.running[0].score, rules.limit if longest else new_tokens)
    return not best > np.float32(group.finished[-1].score)


def settle(running: list[Running], held: dict[int, np.ndarray], copy_slot: CopySlot) -> None:
    """Gives every beam, whose `slot` is its parent's, a slot of its own with its parent's rows in it.

    The first child of a beam stays. Another one takes, of the slots that no beam lives in, the one that
    shares the longest prefix with it, and gets the rest copied. held: the tokens of each slot's rows.
    """
    free, moving = set(held), []
    for beam in running:
        if beam.slot in free:
            free.remove(beam.slot)
        else:
            moving.append(beam)
    for beam in moving:
        rows = beam.tokens[:-1]
        shared = {slot: common_prefix(held[slot], rows) for slot in free}
        target = max(free, key=lambda slot: (shared[slot], -slot))
        free.remove(target)
        if shared[target] < len(rows):  # beams of two groups may say the same
            copy_slot(beam.slot, target, len(rows), shared[target])
        held[target], beam.slot = rows, target
