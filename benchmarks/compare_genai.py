"""Compare a folder of `gristmill export --to onnx` with one that ONNX Runtime GenAI's own builder made, both
run by ONNX Runtime GenAI, side by side in one run.

How fast a process is depends on when it was started, by several per cent: of two that stay loaded, the first
was slower, whichever it ran. So every measurement has a process of its own, one at a time, in the order ours,
theirs, theirs, ours; a speed of a round is the mean of two. Ratios are medians over the rounds, a first one
that fills the file cache left out.

    gristmill export bench/int4 --to onnx -o ours
    ort/bin/python -m onnxruntime_genai.models.builder -i HF_DIR -o theirs -p int4 -e cpu -c CACHE_DIR \\
        --extra_options block_size=128 prune_lm_head=true
    python benchmarks/compare_genai.py ort/bin/python ours theirs
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
Lengths = tuple[int, int, int]  # prompt, context, tokens


def one_round(start: Callable[[Path], Peer], ours: Path, theirs: Path, lengths: Lengths) -> list[Row]:
    """A row of ours and one of theirs."""
    found: dict[Path, list[dict[str, float]]] = {ours: [], theirs: []}
    for path in (ours, theirs, theirs, ours):
        peer = start(path)
        try:
            peer.measure(*lengths)  # warms up
            found[path].append(peer.measure(*lengths))
        finally:
            peer.close()
    return [
        {"engine": engine} | {c: fmean(one[c] for one in found[path]) for c in COLUMNS[2:]}
        for engine, path in (("ours", ours), ("theirs", theirs))
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
    load, versions = os.getloadavg()[0], set[str]()

    def start(path: Path) -> Peer:
        peer = started("onnxruntime-genai", python, path, threads, 0)
        versions.add(peer.about["version"])
        return peer

    measured = [one_round(start, ours, theirs, (prompt, context, tokens)) for _ in range(rounds + 1)][1:]
    machine = f"{date.today()}, {cpu_model()}, {threads} threads, load average {load:.1f} before"
    about = [
        f"{machine}, {', '.join(versions)}",
        f"prefill of {prompt}, {tokens} tokens after a context of {context}, medians of {rounds} rounds",
        f"ours: {ours.name}, theirs: {theirs.name}",
    ]
    lines = table(measured)
    rows = [{"round": n, **row} for n, found in enumerate(measured, 1) for row in found]
    write_results(results / f"{date.today()}-genai-{ours.name}.csv", COLUMNS, rows, about + lines)
    print("\n".join(about + lines))


if __name__ == "__main__":
    main()
