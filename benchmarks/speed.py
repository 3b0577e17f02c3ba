"""Speed of a model shape in many weight and cache formats: decode, prefill, batches, long contexts.

Artifacts of a random model of that shape are compiled into --work once. Then rounds go over all of them: the
memory's read stream, and each kind of work one after the other; a peer is measured in the same rounds. What
is printed and written are medians over the rounds, with the share of the floor: the sum over all instructions
of max(bytes / stream, operations / peak), see gristmill/runtime/profile.py.

    python benchmarks/speed.py tinyllama-1.1b --work bench --weights int4,int8,f16 --kv f16,int8
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import click
from bandwidth import cpu_model, read_gb_s
from compare_llamacpp import llama_cpp
from make_model import SHAPES, make_model
from tables import write_results

import gristmill
from gristmill.report.peers.peer_process import Peer
from gristmill.runtime.profile import Forward, Roofs, collect, cpu_executor, prepared

HERE = Path(__file__).parent
COLUMNS = ("weights", "kv", "work", "tok_s", "ms", "gb_s", "stream_share", "gop_s", "floor_share")
PEER_TOKENS = 24  # that a peer decodes
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A forward to be timed; tokens: how many it brings (rows that were taken in, or decoded)."""

    name: str
    forward: Forward

    @property
    def tokens(self) -> int:
        return self.forward.rows * self.forward.sequences


def works(prompt: int, context: int, batch: int) -> list[Work]:
    return [
        Work("decode", Forward(1, 16)),
        Work(f"decode at {context}", Forward(1, context)),
        Work(f"decode of {batch}", Forward(1, 16, batch)),
        Work(f"prefill of {prompt}", Forward(prompt, 0)),
    ]


@dataclass
class Candidate:
    weights: str
    kv: str
    session: gristmill.Session


def compiled(shape: str, folder: Path, weights: str, kv: str, group: int) -> Path:
    """The artifact of one format, from the last run or new."""
    out = folder / f"{shape}-{weights}-g{group}-{kv}"
    if not out.exists():
        model = make_model(shape, folder / shape)
        options: dict[str, Any] = {"weights": weights, "kv": kv, "gate": False}
        if weights.startswith("int"):
            options["group_size"] = group
        gristmill.compile(model, out, **options)
    return out


def seconds_of(candidate: Candidate, item: Work, at_least: float) -> float:
    """Of one forward: the mean over as many as fill `at_least` seconds."""
    with prepared(candidate.session, item.forward) as run:
        run()
        begin, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begin < at_least:
            run()
            count += 1
        return (time.perf_counter() - begin) / count


def row_of(candidate: Candidate, item: Work, seconds: float, roofs: Roofs) -> Row:
    program = candidate.session.program
    kinds = collect(program, [0.0] * len(program.instructions), roofs, item.forward)
    read, operations = sum(kind.bytes for kind in kinds), sum(kind.operations for kind in kinds)
    floor = sum(kind.floor for kind in kinds)
    return {
        "weights": candidate.weights, "kv": candidate.kv, "work": item.name, "tok_s": item.tokens / seconds,
        "ms": 1e3 * seconds, "gb_s": read / seconds / 1e9, "stream_share": read / seconds / roofs.stream,
        "gop_s": operations / seconds / 1e9, "floor_share": floor / seconds,
    }  # fmt: skip


def one_round(candidates: list[Candidate], items: list[Work], seconds: float) -> Iterator[Row]:
    for candidate in candidates:
        peaks = Roofs.measure(candidate.session, 1.0)
        for item in items:
            before = read_gb_s(candidate.session.threads, 0.2)
            taken = seconds_of(candidate, item, seconds)
            stream = (before + read_gb_s(candidate.session.threads, 0.2)) / 2
            yield row_of(candidate, item, taken, replace(peaks, stream=1e9 * stream))


def peer_round(peer: Peer, name: str, cache: str, items: list[Work]) -> Iterator[Row]:
    """Decode and prefill of one sequence."""
    for item in items:
        if item.forward.sequences > 1:
            continue
        rows, context = item.forward.rows, item.forward.context
        found = peer.measure(rows, context, 1 if rows > 1 else PEER_TOKENS)
        tok_s = found["prefill_tok_s"] if rows > 1 else found["decode_tok_s"]
        yield {"weights": name, "kv": cache, "work": item.name, "tok_s": tok_s}


def medians(rounds: list[Row]) -> list[Row]:
    """One row per format and work, in the order in which they first came."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rounds:
        groups.setdefault((row["weights"], row["kv"], row["work"]), []).append(row)
    return [
        {**rows[0], **{k: median(r[k] for r in rows) for k, v in rows[0].items() if isinstance(v, float)}}
        for rows in groups.values()
    ]


def table(rows: list[Row]) -> str:
    lines = [
        "weights | kv | work | tok/s | GB/s | of the stream | Gop/s | of the floor",
        "|".join(["---"] * 8),
    ]
    for row in rows:
        cells = [row["weights"], row["kv"], row["work"], f"{row['tok_s']:.1f}"]
        if "gb_s" in row:
            cells += [f"{row['gb_s']:.1f}", f"{row['stream_share']:.0%}"]
            cells += [f"{row['gop_s']:.0f}", f"{row['floor_share']:.0%}"]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("shape", type=click.Choice(sorted(SHAPES)), default="tinyllama-1.1b")
@click.option("--work", "folder", type=click.Path(path_type=Path), default=Path("bench"), show_default=True)
@click.option("--weights", default="int4,int3,int2,int8,fp8,f16", show_default=True)
@click.option("--kv", default="f16", show_default=True)
@click.option("--group", default=128, show_default=True)
@click.option("--prompt", default=512, show_default=True)
@click.option("--context", default=1900, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Least time of one measurement.")
@click.option("--peer-python", help="A Python that has llama-cpp-python, gguf and numpy.")
@click.option("--peer", "peers", multiple=True, type=click.Path(path_type=Path, exists=True), help="A GGUF.")
@click.option("--peer-kv", type=click.Choice(["f16", "q8_0"]), default="f16", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(
    shape: str, folder: Path, weights: str, kv: str, group: int, prompt: int, context: int, batch: int,
    threads: int, rounds: int, seconds: float, peer_python: str | None, peers: tuple[Path, ...],
    peer_kv: str, results: Path,
) -> None:  # fmt: skip
    items = works(prompt, context, batch)
    length = max(prompt, context + 1)
    candidates = [
        Candidate(w, c, gristmill.load(compiled(shape, folder, w, c, group), threads=threads,
                                       max_slots=batch, max_len=length))
        for w, c in itertools.product(weights.split(","), kv.split(","))
    ]  # fmt: skip
    running = [
        (path.stem, llama_cpp(peer_python or "", path, threads, length + PEER_TOKENS, peer_kv))
        for path in peers
    ]
    versions = [f"gristmill {gristmill.__version__}", *(peer.about["version"] for _, peer in running)]
    machine = f"{date.today()}, {cpu_model()}, {threads} threads, {cpu_executor(candidates[0].session).isa}"
    found: list[Row] = []
    try:
        for number in range(rounds):
            found += one_round(candidates, items, seconds)
            for name, peer in running:
                found += peer_round(peer, f"llama.cpp {name}", peer_kv, items)
            rows = medians(found)
            about = [machine, ", ".join(versions), f"medians of {number + 1} rounds"]
            write_results(results / f"{date.today()}-speed-{shape}.csv", COLUMNS, rows, about)
            print(f"round {number + 1} of {rounds}\n{table(rows)}\n", flush=True)
    finally:
        for _, peer in running:
            peer.close()


if __name__ == "__main__":
    main()
