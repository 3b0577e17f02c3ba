"""Speed of an artifact on this machine, beside what its memory can deliver.

Decoding one token reads every weight once, and the keys and values of its context: read_gb_s is those bytes
times tokens per second, bandwidth_share their share of a read-only stream measured in the same run. Rounds of
probe, prefill and decode alternate, and medians are reported, so that a machine that slows down meanwhile
slows all three.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.runtime.decoding.next_tokens import most_likely_token
from gristmill.runtime.devices import DEVICES
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.profile import Forward, Probe, probe_of, random_ids, take_in
from gristmill.runtime.program import CacheSpec
from gristmill.runtime.session import Session, load

HOW = ("device", "threads", "hugepages", "pin", "tensor_parallel")  # what goes to `load`


@dataclass(frozen=True)
class BenchOptions:
    """prompt: tokens of the timed prefill; tokens: decoded tokens per round; context: positions before the
    first of them; profile: also time every instruction; device, hugepages, pin,
    tensor_parallel: as in `load`.
    """

    prompt: int = 256
    tokens: int = 64
    context: int = 0
    rounds: int = 3
    threads: int | None = None
    profile: bool = False
    hugepages: bool = False
    pin: bool = False
    device: str = "cpu"
    tensor_parallel: int | None = None


def bench(path: str | Path, options: BenchOptions) -> dict[str, Any]:
    """Loads the artifact and measures it. decode_tok_s, prefill_tok_s in tokens per second; read_gb_s in 10^9
    bytes per second.
    """
    check_options(options)
    needed = max(options.prompt, options.context + options.tokens)
    started = time.perf_counter()
    how = {name: getattr(options, name) for name in HOW}
    device = DEVICES.get(options.device)
    if options.profile and device is not None and not device.profile:
        raise GristmillError(
            f"a profile of instructions is not for device {options.device!r}: its runtime has its own"
        )
    if device is not None and not device.bench:
        raise GristmillError(
            f"bench does not measure the memory of device {options.device!r}, which it holds a run against; "
            "time a generation instead"
        )
    session = load(path, max_slots=1, **how)
    load_s = time.perf_counter() - started
    if needed > session.max_len:
        session.close()
        session = load(path, max_slots=1, max_len=needed, **how)
    probe, ranks = probe_of(session), options.tensor_parallel or 1
    rounds = [measure_round(session, options, probe) for _ in range(options.rounds)]
    decode, prefill, stream = (statistics.median(column) for column in zip(*rounds, strict=True))
    read_bytes = decode_read_bytes(session, options.context + options.tokens // 2)
    share = statistics.median(decode_tok_s * read_bytes / 1e9 / gb_s for decode_tok_s, _, gb_s in rounds)
    found = {
        "decode_tok_s": decode,
        "prefill_tok_s": prefill,
        "read_gb_s": decode * read_bytes / 1e9,
        "bandwidth_share": share,
        "stream_gb_s": stream,
        "load_s": load_s,
        "device": options.device,
        "threads": session.threads,
        "tensor_parallel": ranks,
        **({"communication_s": probe.communication(Forward(1, options.context))} if ranks > 1 else {}),
        "prompt": options.prompt,
        "tokens": options.tokens,
        "context": options.context,
        "read_bytes_per_token": read_bytes,
        **session.memory,
        **({"profile": _profiles(session, options, probe, stream)} if options.profile else {}),
    }
    session.close()
    return found


def _profiles(session: Session, options: BenchOptions, probe: Probe, stream_gb_s: float) -> dict[str, Any]:
    """A decoded token and the longest chunk of the prompt, instruction by instruction."""
    roofs = probe.roofs(stream_gb_s)
    rows = min(options.prompt, session.max_tokens)
    decode = probe.profile(roofs, Forward(1, options.context), options.tokens)
    prefill = probe.profile(roofs, Forward(rows), options.rounds)
    return {"roofs": asdict(roofs), "decode": decode.to_json(), "prefill": prefill.to_json()}


def measure_round(
    session: Session, options: BenchOptions, probe: Probe | None = None
) -> tuple[float, float, float]:
    """Decoded and prefilled tokens per second, and the read stream in GB/s, one after the other.

    Both are wall-clock times as a caller sees them: every token, or the logits of the last chunk, has come to
    the host.
    """
    stream_gb_s = (probe or probe_of(session)).read_stream()
    ids = random_ids(session, max(options.prompt, options.context))
    with session.slot() as slot:
        prefill_s = _prefill(session, slot, ids[: options.prompt])
    with session.slot() as slot:
        take_in(session, slot, ids[: options.context])
        decode_s = _decode(session, slot, options.context, options.tokens)
    return options.tokens / decode_s, options.prompt / prefill_s, stream_gb_s


def decode_read_bytes(session: Session, context: int) -> int:
    """Bytes read to decode one token after `context` others: all weights, and the cache rows it reads."""
    cache_bytes = sum(cache.row_bytes() * attended_rows(cache, context) for cache in session.program.caches)
    return int(session.executor.weight_bytes_per_token) + cache_bytes


def attended_rows(cache: CacheSpec, context: int) -> int:
    """Positions that the row after `context` others attends to, itself included."""
    return min(context + 1, cache.window) if cache.window else context + 1


def _prefill(session: Session, slot: int, ids: NDArray[np.int32]) -> float:
    """Seconds to take in `ids`."""
    started = time.perf_counter()
    take_in(session, slot, ids)
    return time.perf_counter() - started


def _decode(session: Session, slot: int, context: int, count: int) -> float:
    """Seconds to decode `count` tokens greedily, one at a time; two more before them warm up."""
    token = 1 % session.vocabulary
    for _ in range(min(2, count)):  # the same position again: rolled back each time
        most_likely_token(session, token, context, slot)
    started = time.perf_counter()
    for position in range(context, context + count):
        token = most_likely_token(session, token, position, slot)
    return time.perf_counter() - started


def check_options(options: BenchOptions) -> None:
    """Raises GristmillError for counts that cannot be measured."""
    for name, least in (("prompt", 1), ("tokens", 1), ("context", 0), ("rounds", 1)):
        value = getattr(options, name)
        if value < least:
            raise GristmillError(f"{name} is {value}, expected {least} or more")
