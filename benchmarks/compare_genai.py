"""Compare a folder of `gristmill export --to onnx` with one that ONNX Runtime GenAI's own builder made, both
run by ONNX Runtime GenAI, side by side in one run.

Two processes of each stay loaded, started ours, theirs, theirs, ours: the first one was slower by some 12 %
whatever it ran. Every round measures all four, from the other end each time; a speed is the mean of two.
Ratios are medians over the rounds, a first one that warms up left out.

    gristmill export bench/int4 --to onnx -o ours
    ort/bin/python -m onnxruntime_genai.models.builder -i HF_DIR -o theirs -p int4 -e cpu -c CACHE_DIR \\
        --extra_options block_size=128 prune_lm_head=true
    python benchmarks/compare_genai.py ort/bin/python ours theirs
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click
from bandwidth import cpu_model
from compare_peers import started
from tables import write_results

from gristmill.report.peers.peer_process import Peer

HERE = Path(__file__).parent
COLUMNS = ("round", "engine", "prefill_tok_s", "decode_tok_s")
Row = dict[str, Any]


def one_round(peers: list[Peer], number: int, lengths: tuple[int, int, int]) -> list[Row]:
    """A row of ours and one of theirs. lengths: prompt, context, tokens"""
    numbers = range(len(peers)) if number % 2 else reversed(range(len(peers)))
    found = {at: peers[at].measure(*lengths) for at in numbers}
    return [
        {"round": number, "engine": engine} | {c: fmean(found[at][c] for at in members) for c in COLUMNS[2:]}
        for engine, members in (("ours", (0, 3)), ("theirs", (1, 2)))
    ]


def table(rounds: list[list[Row]]) -> list[str]:
    """Medians of both, and of the first's speed over the second's in the same round."""
    lines = ["what | ours tok/s | theirs tok/s | ratio (least to most)", "---|---|---|---"]
    for column in COLUMNS[2:]:
        ours, theirs = ([row[which][column] for row in rounds] for which in (0, 1))
        ratios = [a / b for a, b in zip(ours, theirs)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"{column} | {median(ours):.1f} | {median(theirs):.1f} | {spread}")
    return lines


@click.command(help=__doc__)
@click.argument("python")
@click.argument("ours", type=click.Path(path_type=Path, exists=True))
@click.argument("theirs", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--prompt", default=256, show_default=True)
@click.option("--tokens", default=32, show_default=True)
@click.option("--context", default=16, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results")
def main(
    python: str, ours: Path, theirs: Path, threads: int, rounds: int, prompt: int, tokens: int, context: int,
    results: Path,
) -> None:  # fmt: skip
    load, peers = os.getloadavg()[0], list[Peer]()
    try:
        for path in (ours, theirs, theirs, ours):
            peers.append(started("onnxruntime-genai", python, path, threads, 0))
        version = peers[0].about["version"]
        measured = [one_round(peers, n, (prompt, context, tokens)) for n in range(rounds + 1)][1:]
    finally:
        for peer in peers:
            peer.close()
    about = [
        f"{date.today()}, {cpu_model()}, {threads} threads, load average {load:.1f} before, {version}",
        f"prefill of {prompt}, {tokens} tokens after a context of {context}, medians of {rounds} rounds",
        f"ours: {ours.name}, theirs: {theirs.name}",
    ]
    lines = table(measured)
    rows = [row for found in measured for row in found]
    write_results(results / f"{date.today()}-genai-{ours.name}.csv", COLUMNS, rows, about + lines)
    print("\n".join(about + lines))


if __name__ == "__main__":
    main()
