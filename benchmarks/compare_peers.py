"""Compare the speed of an artifact with other engines' on the same model, side by side in one run.

All stay loaded, each peer in a process of its own, and every round measures gristmill and the peers one after
the other, so that whatever else happens on the machine happens to all. Ratios are medians over the rounds, a
first one that warms up left out. A peer is its kind, a Python that has it installed and its model: see
llamacpp_peer.py and other_peers.py in report/peers for how these are made.

    python benchmarks/compare_peers.py bench/int4 --peer llama.cpp peer/bin/python bench/gguf/q4_0.gguf \\
        --peer ctranslate2 ct2/bin/python CT2_DIR --peer openvino ov/bin/python OV_DIR
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import click
from bandwidth import cpu_model
from compare_llamacpp import llama_cpp
from tables import write_results

import gristmill
from gristmill.report.peers.commands import KINDS
from gristmill.report.peers.peer_process import Peer, command_of
from gristmill.runtime.bench import BenchOptions, measure_round

HERE = Path(__file__).parent
COLUMNS = ("round", "engine", "prefill_tok_s", "decode_tok_s", "stream_gb_s")
OURS = "gristmill"
Row = dict[str, Any]


def started(kind: str, python: str, model: Path, threads: int, length: int) -> Peer:
    if kind == "llama.cpp":
        return llama_cpp(python, model, threads, length)
    return Peer(command_of(python, "serve", kind, str(model), "--threads", str(threads)))


def one_round(
    session: gristmill.Session, peers: dict[str, Peer], options: BenchOptions, number: int
) -> Iterator[Row]:
    decode, prefill, stream = measure_round(session, options)
    yield {"round": number, "engine": OURS, "prefill_tok_s": prefill, "decode_tok_s": decode,
           "stream_gb_s": stream}  # fmt: skip
    for name, peer in peers.items():
        found = peer.measure(options.prompt, options.context, options.tokens)
        yield {"round": number, "engine": name, "prefill_tok_s": found["prefill_tok_s"],
               "decode_tok_s": found["decode_tok_s"]}  # fmt: skip


def table(rows: list[Row]) -> list[str]:
    """Medians of each engine, and of gristmill's speed over the engine's in the same round."""
    by_engine: dict[str, list[Row]] = {}
    for row in rows:
        by_engine.setdefault(row["engine"], []).append(row)
    lines = ["engine | prefill tok/s | gristmill's | decode tok/s | gristmill's", "---|---|---|---|---"]
    for engine, theirs in by_engine.items():
        cells = [engine]
        for column, digits in (("prefill_tok_s", 0), ("decode_tok_s", 1)):
            ratios = [ours[column] / their[column] for ours, their in zip(by_engine[OURS], theirs)]
            cells += [f"{median(their[column] for their in theirs):.{digits}f}", f"{median(ratios):.2f}x"]
        lines.append(" | ".join(cells))
    return lines


def compare(
    artifact: Path, peers: tuple[tuple[str, str, Path], ...], options: BenchOptions, threads: int
) -> tuple[list[Row], list[str]]:
    """(the rows of all rounds after one that warms up, the peers' versions)"""
    length = max(options.prompt, options.context + options.tokens) + 64
    session = gristmill.load(artifact, threads=threads, max_slots=1, max_len=length)
    running: dict[str, Peer] = {}
    try:
        for kind, python, model in peers:
            running[f"{kind} {model.stem}"] = started(kind, python, model, threads, length)
        versions = [peer.about["version"] for peer in running.values()]
        rounds = [list(one_round(session, running, options, i)) for i in range(options.rounds + 1)]
    finally:
        for peer in running.values():
            peer.close()
    return [row for rows in rounds[1:] for row in rows], versions


@click.command(help=__doc__)
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--peer",
    "peers",
    multiple=True,
    required=True,
    metavar="KIND PYTHON MODEL",
    type=(click.Choice(KINDS), str, click.Path(path_type=Path, exists=True)),
)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--prompt", default=512, show_default=True)
@click.option("--tokens", default=32, show_default=True)
@click.option("--context", default=16, show_default=True)
@click.option("--name", help="Of the results file; default: that of the artifact.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results")
def main(
    artifact: Path, peers: tuple[tuple[str, str, Path], ...], threads: int, rounds: int, prompt: int,
    tokens: int, context: int, name: str | None, results: Path,
) -> None:  # fmt: skip
    load = os.getloadavg()[0]
    rows, versions = compare(artifact, peers, BenchOptions(prompt, tokens, context, rounds, threads), threads)
    lines = table(rows)
    stream = median(row["stream_gb_s"] for row in rows if row["engine"] == OURS)
    about = [
        f"{date.today()}, {cpu_model()}, {threads} threads, load average {load:.1f} before the run, "
        f"read stream {stream:.1f} GB/s",
        ", ".join([f"gristmill {gristmill.__version__} ({artifact.name})", *versions]),
        f"prefill of {prompt}, {tokens} tokens after a context of {context}, medians of {rounds} rounds",
    ]
    write_results(results / f"{date.today()}-peers-{name or artifact.name}.csv", COLUMNS, rows, about + lines)
    print("\n".join(about + lines))


if __name__ == "__main__":
    main()
