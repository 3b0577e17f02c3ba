"""Sampling on the device with the semantics of runtime/decoding/sampling.py, and its generator.

Greedy takes the largest logit, the lowest id among equals. Otherwise scores are (logit - largest) /
temperature; top-k keeps all that reach the k-th largest, top-p of those the fewest most likely ones that
reach its share, lower ids first among equals; one draw by Philox(seed, sequence) at the position decides.
Options are a row's own and lie on the device, so one captured graph serves any mix of them.

Nothing is sorted. A vocabulary is cut into chunks, one program each, and a threshold is found digit by digit
as in a radix sort: scores are turned into integers that order as they do, every launch sums what the 64
values of the next 6 bits weigh (counts for top-k, probabilities for top-p), and the next launch begins by
choosing the value that the threshold lies in. Sums of chunks are added in order, so a draw depends on its row
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # entries of a program
PASSES = ((25, 6), (19, 6), (13, 6), (7, 6), (1, 6), (0, 1))  # the digits of a key of 31 bits: shift, bits
BINS = tl.constexpr(64)


@dataclass(frozen=True)
class Options:
    """Of each row, [R] on the device: temperature f32, 0 = greedy; top_k i32, 0 = off; top_p f32, 1 = off;
    seed and sequence i64, the bits of unsigned numbers; position i32; penalty f32 of seen tokens, 1 = off.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    sequence: Tensor
    position: Tensor
    penalty: Tensor


@dataclass(frozen=True)
class Workspace:
    """What launches hand on; see `allocate_workspace`."""

    best: Tensor  # [R, C] f32
    best_id: Tensor  # [R, C] i32
    bins: Tensor  # [2, R, C, 64] f32, read and written in turn
    key: Tensor  # [2, passes + 1, R] i32: the threshold's digits so far
    above: Tensor  # [2, passes + 1, R] f32: what the keys above those weigh
    total: Tensor  # [R] f32: what all that top-p chooses from weigh
    mass: Tensor  # [R, C] f32
    ties: Tensor  # [R, C] i32


def workspace_bytes(rows: int, vocabulary: int) -> int:
    """Bytes that `allocate_workspace` takes."""
    found = allocate_workspace(rows, vocabulary, "meta")
    return sum(tensor.nbytes for tensor in vars(found).values())


def allocate_workspace(rows: int, vocabulary: int, device: torch.device | str = "cuda") -> Workspace:
    """For up to ``rows`` rows of logits."""
    chunks, states = triton.cdiv(vocabulary, CHUNK), (2, len(PASSES) + 1, rows)

    def floats(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return Workspace(
        floats(rows, chunks), integers(rows, chunks), floats(2, rows, chunks, 64), integers(*states),
        floats(*states), floats(rows), floats(rows, chunks), integers(rows, chunks),
    )  # fmt: skip


@triton.jit
def _logits(logits, seen, penalty, r, at, stride, vocabulary):
    """Logits with CTRL's penalty (arXiv 1909.05858); -inf beyond the vocabulary."""
    x = tl.load(logits + r * stride + at, at < vocabulary, float("-inf")).to(tl.float32)
    if seen is not None:
        by = tl.load(penalty + r)
        was = tl.load(seen + r * vocabulary + at, at < vocabulary, 0) != 0
        x = tl.where(was, tl.where(x < 0, x * by, tl.div_rn(x, by + 0.0 * x)), x)
    return x


@triton.jit
def _best_kernel(
    logits, seen, penalty, best, best_id, stride, vocabulary, C: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = c * CHUNK + tl.arange(0, CHUNK)
    x = _logits(logits, seen, penalty, r, at, stride, vocabulary)
    x = tl.where(x == x, x, float("inf"))  # found as the largest, and refused
    largest = tl.max(x, 0)
    tl.store(best + r * C + c, largest)
    tl.store(best_id + r * C + c, tl.min(tl.where(x == largest, at, vocabulary), 0))


@triton.jit
def _largest(best, best_id, r, C: tl.constexpr, CB: tl.constexpr):
    """The row's largest logit and the lowest id that has it."""
    each = tl.arange(0, CB)
    values = tl.load(best + r * C + each, each < C, float("-inf"))
    ids = tl.load(best_id + r * C + each, each < C, 0x7FFFFFFF)
    largest = tl.max(values, 0)
    return largest, tl.min(tl.where(values == largest, ids, 0x7FFFFFFF), 0)


@triton.jit
def _scored(logits, seen, penalty, temperature, largest, r, at, stride, vocabulary):
    """Weights e^score and keys that order as scores do; weight 0 and key -1 beyond the vocabulary."""
    x = _logits(logits, seen, penalty, r, at, stride, vocabulary)
    score = tl.div_rn(x - largest, tl.load(temperature + r) + 0.0 * x)
    inside = at < vocabulary
    score = tl.where(inside, score, float("-inf"))
    key = 0x7FFFFFFF - tl.abs(score).to(tl.int32, bitcast=True)
    return tl.exp(score), tl.where(inside, key, -1)


@triton.jit
def _narrowed(bins, key, above, target, r, SHIFT: tl.constexpr, C: tl.constexpr, CB: tl.constexpr):
    """The key with its next digit, of whose values the largest that reaches ``target`` is taken."""
    chunk = tl.arange(0, CB)
    digit = tl.arange(0, BINS)
    each = tl.load(bins + (r * C + chunk[:, None]) * BINS + digit[None, :], chunk[:, None] < C, 0.0)
    weight = tl.sum(each, 0)
    at_least = tl.sum(tl.where(digit[None, :] >= digit[:, None], weight[None, :], 0.0), 1)
    chosen = tl.max(tl.where(above + at_least >= target, digit, 0), 0)
    above += tl.sum(tl.where(digit > chosen, weight, 0.0), 0)
    return key + (chosen << SHIFT), above


@triton.jit(do_not_specialize=["rows"])
def _select_kernel(
    logits, seen, penalty, temperature, top_k, top_p, best, best_id, bins_in, bins_out, keys, aboves, total,
    stride, vocabulary, rows,
    MASS: tl.constexpr, PASS: tl.constexpr, STATES: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    BEFORE: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Chooses the digit that pass PASS - 1 has weighed, at the shift BEFORE, and weighs the next.

    PASS = STATES - 1 only chooses. MASS: of probabilities, for top-p; else counts, for top-k.
    """
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k, share = tl.load(top_k + r), tl.load(top_p + r)
    wanted = ((k > 0) & (k < vocabulary)) if not MASS else share < 1.0
    if (tl.load(temperature + r) == 0.0) | (wanted == 0):
        return
    state = MASS * STATES * rows + r
    key = tl.full((), 0, tl.int32)
    above = tl.full((), 0.0, tl.float32)
    if PASS > 0:
        key = tl.load(keys + state + (PASS - 1) * rows)
        above = tl.load(aboves + state + (PASS - 1) * rows)
        target = k.to(tl.float32)
        if MASS:
            if PASS == 1:
                chunks = tl.arange(0, CB)[:, None]
                places = (r * C + chunks) * BINS + tl.arange(0, BINS)[None, :]
                each = tl.load(bins_in + places, chunks < C, 0.0)
                whole = tl.sum(tl.sum(each, 0), 0)
                if c == 0:
                    tl.store(total + r, whole)
            else:
                whole = tl.load(total + r)
            target = tl.maximum(share * whole, 1e-30)  # the most likely entry stays, whatever the share
        key, above = _narrowed(bins_in, key, above, target, r, BEFORE, C, CB)
    if c == 0:
        tl.store(keys + state + PASS * rows, key)
        tl.store(aboves + state + PASS * rows, above)
    if PASS < STATES - 1:
        lowest = tl.full((), 0, tl.int32)
        if MASS:
            lowest = tl.load(keys + r + (STATES - 1) * rows)  # what top-k left; 0 where it is off
            lowest = tl.where((k > 0) & (k < vocabulary), lowest, 0)
        largest, _ = _largest(best, best_id, r, C, CB)
        digits = tl.arange(0, BINS)
        sums = tl.zeros((BINS,), tl.float32)
        for start in range(0, CHUNK, STEP):
            at = c * CHUNK + start + tl.arange(0, STEP)
            weight, entry = _scored(logits, seen, penalty, temperature, largest, r, at, stride, vocabulary)
            if not MASS:
                weight = tl.full((STEP,), 1.0, tl.float32)
            counts = (entry >= lowest) & (entry >> (SHIFT + BITS) == key >> (SHIFT + BITS))
            digit = tl.where(counts, entry >> SHIFT & ((1 << BITS) - 1), -1)
            sums += tl.sum(tl.where(digit[:, None] == digits[None, :], weight[:, None], 0.0), 0)
        tl.store(bins_out + (r * C + c) * BINS + digits, sums)


@triton.jit
def _weight_of(key):
    """e^score of a key; 0 of key 0, which no entry has."""
    return tl.where(key == 0, 0.0, tl.exp(-((0x7FFFFFFF - key).to(tl.float32, bitcast=True))))


@triton.jit
def _threshold(temperature, top_k, top_p, keys, aboves, total, r, rows, vocabulary, STATES: tl.constexpr):
    """The lowest key that may be drawn, and how many of the equals that have it."""
    k, share = tl.load(top_k + r), tl.load(top_p + r)
    key = tl.where((k > 0) & (k < vocabulary), tl.load(keys + (STATES - 1) * rows + r), 0)
    quota = tl.full((), 0x7FFFFFFF, tl.int32)
    if share < 1.0:
        key = tl.load(keys + (2 * STATES - 1) * rows + r)
        left = share * tl.load(total + r) - tl.load(aboves + (2 * STATES - 1) * rows + r)
        weight = _weight_of(key)
        count = tl.ceil(left / tl.maximum(weight, 1e-38))
        quota = tl.maximum(tl.minimum(count, 1e9), 1.0).to(tl.int32)
    return key, quota


@triton.jit(do_not_specialize=["rows"])
def _mass_kernel(
    logits, seen, penalty, temperature, top_k, top_p, best, best_id, keys, aboves, total, mass, ties, stride,
    vocabulary, rows, STATES: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What a chunk's entries above the threshold weigh, and how many lie on it."""
    r, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(temperature + r) == 0.0:
        return
    key, _ = _threshold(temperature, top_k, top_p, keys, aboves, total, r, rows, vocabulary, STATES)
    largest, _ = _largest(best, best_id, r, C, CB)
    at = c * CHUNK + tl.arange(0, CHUNK)
    weight, entry = _scored(logits, seen, penalty, temperature, largest, r, at, stride, vocabulary)
    tl.store(mass + r * C + c, tl.sum(tl.where(entry > key, weight, 0.0), 0))
    tl.store(ties + r * C + c, tl.sum((entry == key).to(tl.int32), 0))


@triton.jit
def _uniform(seed, sequence, position):
    """The number in [0, 1) that numpy's Philox 4x64-10 gives with this key, at this counter."""
    key0, key1 = seed.to(tl.uint64), sequence.to(tl.uint64)
    c0 = (position.to(tl.int64) + 1).to(tl.uint64)  # numpy counts up before it draws
    c1 = key0 & 0
    c2 = key0 & 0
    c3 = key0 & 0
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, c1 * 0 + 0xD2E7470EE14C6C93), c0 * 0xD2E7470EE14C6C93
        high1, low1 = tl.umulhi(c2, c1 * 0 + 0xCA5A826395121157), c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B97F4A7C15
        key1 += 0xBB67AE8584CAA73B
    return (c0 >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _first_above(ends, usable, target, indices):
    """The lowest index whose end exceeds the target; the last usable one where rounding leaves none."""
    found = tl.min(tl.where(usable & (ends > target), indices, 0x7FFFFFFF), 0)
    return tl.where(found == 0x7FFFFFFF, tl.max(tl.where(usable, indices, 0), 0), found)


@triton.jit(do_not_specialize=["rows"])
def _draw_kernel(
    logits, seen, penalty, temperature, top_k, top_p, seed, sequence, position, best, best_id, keys, aboves,
    total, mass, ties, tokens, stride, vocabulary, rows,
    STATES: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    largest, token = _largest(best, best_id, r, C, CB)
    if tl.load(temperature + r) != 0.0:
        key, quota = _threshold(temperature, top_k, top_p, keys, aboves, total, r, rows, vocabulary, STATES)
        tie = _weight_of(key).to(tl.float64)
        chunk = tl.arange(0, CB)
        equals = tl.load(ties + r * C + chunk, chunk < C, 0)
        before = tl.cumsum(equals, 0) - equals
        kept = tl.minimum(tl.maximum(quota - before, 0), equals)
        weights = tl.load(mass + r * C + chunk, chunk < C, 0.0).to(tl.float64) + kept.to(tl.float64) * tie
        ends = tl.cumsum(weights, 0)
        whole = tl.sum(weights, 0)
        target = _uniform(tl.load(seed + r), tl.load(sequence + r), tl.load(position + r)) * whole
        c = _first_above(ends, weights > 0, target, chunk)
        base = tl.sum(tl.where(chunk < c, weights, 0.0), 0)
        quota -= tl.sum(tl.where(chunk < c, equals, 0), 0)
        at = c * CHUNK + tl.arange(0, CHUNK)
        weight, entry = _scored(logits, seen, penalty, temperature, largest, r, at, stride, vocabulary)
        equal = (entry == key).to(tl.int32)
        keep = (entry > key) | ((equal != 0) & (tl.cumsum(equal, 0) <= quota))
        weight = tl.where(keep, weight, 0.0).to(tl.float64)
        token = _first_above(tl.cumsum(weight, 0), weight > 0, target - base, at)
    token = tl.where(tl.abs(largest) < float("inf"), token, -1)
    tl.store(tokens + r, token)
    if seen is not None:
        tl.store(seen + r * vocabulary + token, 1, token >= 0)


def sample(
    logits: Tensor, options: Options, workspace: Workspace, tokens: Tensor, seen: Tensor | None = None,
    greedy: bool = False,
) -> None:  # fmt: skip
    """tokens [R] i32: the next token of each row, -1 where its largest logit is not finite.

    logits: [R, V] of any float type, rows any stride apart, V up to 2^20; seen: [R, V] i8, 1 where the
    penalty applies, which the chosen token joins. greedy: all rows have temperature 0, which takes 2 launches
    and not 17.
    """
    rows, vocabulary = logits.shape
    chunks, w, o = triton.cdiv(vocabulary, CHUNK), workspace, options
    assert w.best.shape[1] == chunks and w.best.shape[0] >= rows == len(tokens), "a workspace of other sizes"
    size = {"C": chunks, "CB": max(2, triton.next_power_of_2(chunks)), "CHUNK": CHUNK}
    row = (logits, seen, o.penalty)
    states = len(PASSES) + 1
    _best_kernel[(rows, chunks)](*row, w.best, w.best_id, logits.stride(0), vocabulary, C=chunks, CHUNK=CHUNK)
    for n in range(0 if greedy else 2 * states):
        phase, turn = divmod(n, states)
        shift, bits = PASSES[min(turn, len(PASSES) - 1)]
        _select_kernel[(rows, chunks if turn < len(PASSES) else 1)](
            *row, o.temperature, o.top_k, o.top_p, w.best, w.best_id, w.bins[1 - n % 2], w.bins[n % 2],
            w.key, w.above, w.total, logits.stride(0), vocabulary, rows,
            MASS=phase, PASS=turn, STATES=states, SHIFT=shift, BITS=bits, BEFORE=PASSES[max(turn - 1, 0)][0],
            STEP=128, **size,
        )  # fmt: skip
    threshold = (w.key, w.above, w.total, w.mass, w.ties)
    options_ = (o.temperature, o.top_k, o.top_p)
    if not greedy:
        _mass_kernel[(rows, chunks)](
            *row, *options_, w.best, w.best_id, *threshold, logits.stride(0), vocabulary, rows,
            STATES=states, **size,
        )  # fmt: skip
    _draw_kernel[(rows,)](
        *row, *options_, o.seed, o.sequence, o.position, w.best, w.best_id, *threshold, tokens,
        logits.stride(0), vocabulary, rows, STATES=states, num_warps=8, **size,
    )  # fmt: skip
