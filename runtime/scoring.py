"""How likely an artifact finds given continuations: many at once, and what they share is computed once.

Requests with the same tokens are one job. Jobs are sorted by their tokens, so that those with a common
beginning stand together; each slot works through a stretch of them, rolling back to where the next one
parts from the last. What all have in common (the examples of a few-shot prompt) is computed in one slot and
copied to the others. Logits are asked for at the rows that predict a continuation and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import LOGITS_BYTES, token_nll
from gristmill.runtime.slots import common_prefix

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

WORTH_COPYING = 16  # tokens that all jobs begin with: fewer are computed in every slot


@dataclass(frozen=True)
class ContinuationScore:
    """log_likelihood: sum over the continuation's tokens, in nats; greedy: whether each of them is the most
    likely one."""

    log_likelihood: float
    greedy: bool


@dataclass
class Job:
    """Input tokens, of which the rows from `first` on predict a continuation. asked: (number of a request,
    the last token of its continuation); the others are among `tokens`, so only that one may differ."""

    tokens: list[int]
    first: int
    asked: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Lane:
    """A slot, the jobs that wait for it, the tokens whose rows it holds, and how the first job stands: rows
    that predicted, the nll of what they did, whether each was the most likely one, the last one's logits
    [1, V]."""

    slot: int
    jobs: list[Job]
    held: list[int] = field(default_factory=list)
    predicted: int = 0
    nll: float = 0.0
    greedy: bool = True
    last: np.ndarray | None = None


def score_continuations(
    session: Session,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    on_done: Callable[[int], None] | None = None,
    adapter: str | None = None,
) -> list[ContinuationScore]:
    """Scores each (context, continuation), both lists of token ids.

    on_done: called with a number of requests whenever that many more have their score. adapter: the name of
    the one that changes the model. All slots that are free are used. Raises GristmillError for an empty
    context or continuation and for one that together with its context is longer than max_len + 1 (the last
    token is predicted and never put in).
    """
    if not requests:
        return []
    scores: dict[int, ContinuationScore] = {}
    jobs = _jobs(session, requests)
    with _free_slots(session, len(jobs), adapter) as slots:
        lanes = [Lane(slot, part) for slot, part in zip(slots, _split(jobs, len(slots)), strict=True)]
        _share_beginning(session, lanes, jobs)
        while lanes := [lane for lane in lanes if lane.jobs]:
            for lane in _step(session, lanes):
                found = _finish(lane)
                scores.update(found)
                if on_done:
                    on_done(len(found))
    return [scores[number] for number in range(len(requests))]


def _jobs(session: Session, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Job]:
    """The different inputs, sorted."""
    found: dict[tuple[tuple[int, ...], int], Job] = {}
    for number, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise GristmillError(
                f"request {number} has a context of {len(context)} and a continuation of {len(continuation)} "
                "tokens; each needs one at least"
            )
        tokens = [*context, *continuation][:-1]
        if len(tokens) > session.max_len:
            raise GristmillError(
                f"request {number} has {len(tokens) + 1} tokens, max_len is {session.max_len}; "
                "shorten its context or load with more"
            )
        first = len(context) - 1
        job = found.setdefault((tuple(tokens), first), Job(tokens, first))
        job.asked.append((number, continuation[-1]))
    return [found[key] for key in sorted(found)]


@contextmanager
def _free_slots(session: Session, most: int, adapter: str | None) -> Iterator[list[int]]:
    """Slots for `forward`: one, which may have to be waited for, and up to `most` that are free now."""
    with session.slot(adapter) as first:
        slots, number = [first], session.adapters.number(adapter)
        try:
            while len(slots) < most:
                slot = session._slots.take(wait=False, lend=True, adapter=number)
                if slot is None:
                    break
                slots.append(slot)
            yield slots
        finally:
            for slot in slots[1:]:
                session._slots.give_back(slot)


def _split(jobs: list[Job], lanes: int) -> list[list[Job]]:
    """`jobs` in order, in `lanes` stretches of about equal work; those that share more than half of what is
    not common to all stay together."""
    common = _common(jobs)
    between = (common_prefix(a.tokens, b.tokens) for a, b in zip(jobs, jobs[1:], strict=False))
    shared = [common, *between]
    work = [max(1, len(job.tokens) - before) for job, before in zip(jobs, shared, strict=True)]
    parts: list[list[Job]] = [[]]
    load, target = 0, sum(work) / lanes
    for job, before, rows in zip(jobs, shared, work, strict=True):
        alone = before - common <= (len(job.tokens) - common) / 2
        if alone and load >= target * len(parts) and len(parts) < lanes:
            parts.append([])
        parts[-1].append(job)
        load += rows
    return parts + [[] for _ in range(lanes - len(parts))]


def _common(jobs: list[Job]) -> int:
    """Tokens that all of the sorted `jobs` begin with."""
    return common_prefix(jobs[0].tokens, jobs[-1].tokens)


def _share_beginning(session: Session, lanes: list[Lane], jobs: list[Job]) -> None:
    """Computes what all jobs begin with once, where there is more than one lane to use it."""
    busy = [lane for lane in lanes if lane.jobs]
    beginning = jobs[0].tokens[: _common(jobs)]
    if len(busy) < 2 or len(beginning) < WORTH_COPYING:
        return
    source = busy[0]
    for start in range(0, len(beginning), session.max_tokens):
        tokens = beginning[start : start + session.max_tokens]
        _forward(session, [(source, tokens)], [0])
        source.held += tokens
    for lane in busy[1:]:
        session._copy_slot(source.slot, lane.slot, len(beginning))
        lane.held = list(beginning)


def _step(session: Session, lanes: list[Lane]) -> list[Lane]:
    """One forward with the next tokens of as many lanes as fit; returns those whose job is complete."""
    rows_left = session.max_tokens
    logits_left = max(1, min(rows_left, LOGITS_BYTES // (4 * session.vocabulary)))
    chunks: list[tuple[Lane, list[int]]] = []
    wanted: list[int] = []
    for lane in lanes:
        if rows_left <= 0 or logits_left <= 0:
            break
        job, start = lane.jobs[0], _roll_back(session, lane)
        end = min(start + rows_left, len(job.tokens), max(job.first, start) + logits_left)
        chunks.append((lane, job.tokens[start:end]))
        wanted.append(max(0, end - max(job.first, start)))
        rows_left -= end - start
        logits_left -= wanted[-1]
    _take_in(chunks, wanted, _forward(session, chunks, wanted))
    lanes[:] = lanes[len(chunks) :] + lanes[: len(chunks)]  # who had no turn goes first
    return [lane for lane, _ in chunks if len(lane.held) == len(lane.jobs[0].tokens)]


def _roll_back(session: Session, lane: Lane) -> int:
    """Where the lane's job goes on: at the end of the job it has begun, else where its tokens part from those
    of the last job, or its first logits are."""
    job = lane.jobs[0]
    if not lane.predicted:
        length = min(common_prefix(lane.held, job.tokens), job.first)
        lane.held = lane.held[: session._slots.reachable(lane.slot, length)]
    return len(lane.held)


def _forward(session: Session, chunks: list[tuple[Lane, list[int]]], wanted: list[int]) -> np.ndarray:
    """Logits [sum of wanted, V] of the last rows of each chunk, which goes behind what its lane holds."""
    tokens = np.array([token for _, chunk in chunks for token in chunk], np.int32)
    starts = [np.arange(len(lane.held), len(lane.held) + len(chunk)) for lane, chunk in chunks]
    slots = np.repeat([lane.slot for lane, _ in chunks], [len(chunk) for _, chunk in chunks])
    ends = np.cumsum([len(chunk) for _, chunk in chunks]).tolist()
    rows = [np.arange(end - count, end) for end, count in zip(ends, wanted, strict=True)]
    return session.forward(tokens, np.concatenate(starts), slots, np.concatenate(rows))


def _take_in(chunks: list[tuple[Lane, list[int]]], wanted: list[int], logits: np.ndarray) -> None:
    begin = 0
    for (lane, tokens), count in zip(chunks, wanted, strict=True):
        lane.held = lane.held + tokens
        _judge(lane, logits[begin : begin + count])
        begin += count


def _judge(lane: Lane, logits: np.ndarray) -> None:
    """Adds what the logits [rows, V] of the last rows that `lane` holds say about the tokens behind them."""
    end = len(lane.held)
    follow = np.array(lane.jobs[0].tokens[end - len(logits) + 1 : end + 1], np.int64)
    known = logits[: len(follow)]  # all but the last row of a job, which every request judges for itself
    lane.nll += float(token_nll(known, follow).sum())
    lane.greedy = lane.greedy and bool((known.argmax(axis=1) == follow).all())
    lane.predicted += len(logits)
    if len(follow) < len(logits):
        lane.last = np.array(logits[-1:])


def _finish(lane: Lane) -> dict[int, ContinuationScore]:
    """The scores of the lane's first job by number of the request; the next one is its turn."""
    assert lane.last is not None, "the last row of a job is always asked for"
    targets = np.array([token for _, token in lane.jobs[0].asked])
    nll = lane.nll + token_nll(np.repeat(lane.last, len(targets), axis=0), targets)
    best = lane.greedy & (lane.last.argmax() == targets)
    numbers = [number for number, _ in lane.jobs.pop(0).asked]
    lane.predicted, lane.nll, lane.greedy, lane.last = 0, 0.0, True, None
    found = zip(numbers, nll.tolist(), best.tolist(), strict=True)
    return {number: ContinuationScore(-value, greedy) for number, value, greedy in found}
