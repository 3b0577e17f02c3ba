"""Compare the speed of an artifact with llama.cpp's on the same model, side by side in one run.

Both stay loaded, and every round measures the memory's read stream, gristmill, the stream again and llama.cpp
one after the other, so that whatever else happens on the machine happens to all. Ratios and shares (of the
mean of both streams) are medians over the rounds. Only the weights are counted in GB/s.

    python benchmarks/make_model.py tinyllama-1.1b bench/hf
    gristmill compile bench/hf -o bench/int4 --group-size 128 --no-gate
    peer/bin/python report/peers convert bench/hf bench/gguf q4_0
    python benchmarks/compare_llamacpp.py bench/int4 bench/gguf/q4_0.gguf --peer-python peer/bin/python
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from statistics import median

import click
from bandwidth import cpu_model, read_gb_s
from tables import write_results

import gristmill
from gristmill.report.peers.peer_process import Peer, command_of
from gristmill.runtime.bench import BenchOptions, measure_round

HERE = Path(__file__).parent
COLUMNS = [
    "round",
    "stream_gb_s",
    "decode_tok_s",
    "decode_gb_s",
    "prefill_tok_s",
    "peer_decode_tok_s",
    "peer_decode_gb_s",
    "peer_prefill_tok_s",
]


def llama_cpp(python: str, gguf: Path, threads: int, length: int, cache: str = "f16") -> Peer:
    """llama.cpp, by the Python that has it installed."""
    options = ("--threads", str(threads), "--length", str(length), "--cache", cache)
    return Peer(command_of(python, "serve", "llama.cpp", str(gguf), *options))


def one_round(session: gristmill.Session, peer: Peer, options: BenchOptions, number: int) -> dict[str, float]:
    decode, prefill, before = measure_round(session, options)
    after = read_gb_s(session.threads)
    theirs = peer.measure(options.prompt, options.context, options.tokens)
    return {
        "round": number,
        "stream_gb_s": (before + after) / 2,
        "decode_tok_s": decode,
        "prefill_tok_s": prefill,
        "decode_gb_s": decode * session.executor.weight_bytes_per_token / 1e9,
        "peer_decode_tok_s": theirs["decode_tok_s"],
        "peer_prefill_tok_s": theirs["prefill_tok_s"],
        "peer_decode_gb_s": theirs["decode_tok_s"] * peer.about["read_bytes_per_token"] / 1e9,
    }


def summary(rounds: list[dict[str, float]]) -> str:
    """One line of medians."""

    def ratio(top: str, bottom: str) -> float:
        return median(row[top] / row[bottom] for row in rounds)

    middle = {name: median(row[name] for row in rounds) for name in COLUMNS}
    return (
        f"decode {middle['decode_tok_s']:.1f} against {middle['peer_decode_tok_s']:.1f} tok/s "
        f"({ratio('decode_tok_s', 'peer_decode_tok_s'):.2f}x), {middle['decode_gb_s']:.1f} GB/s, "
        f"{ratio('decode_gb_s', 'stream_gb_s'):.0%} of the read stream of {middle['stream_gb_s']:.1f} "
        f"(llama.cpp {ratio('peer_decode_gb_s', 'stream_gb_s'):.0%}); prefill "
        f"{middle['prefill_tok_s']:.0f} against {middle['peer_prefill_tok_s']:.0f} tok/s "
        f"({ratio('prefill_tok_s', 'peer_prefill_tok_s'):.2f}x)"
    )


def compare(
    artifact: Path, gguf: Path, python: str, threads: int, options: BenchOptions
) -> tuple[list[dict[str, float]], str]:
    """(the rounds after one that warms up, the peer's version)"""
    length = max(options.prompt, options.context + options.tokens) + 64
    session = gristmill.load(artifact, threads=threads, max_slots=1, max_len=length)
    peer = llama_cpp(python, gguf, threads, length)
    try:
        rounds = [one_round(session, peer, options, number) for number in range(options.rounds + 1)]
    finally:
        peer.close()
    return rounds[1:], peer.about["version"]


@click.command(help=__doc__)
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.argument("gguf", type=click.Path(path_type=Path, exists=True))
@click.option("--peer-python", required=True, help="A Python that has llama-cpp-python, gguf and numpy.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--prompt", default=256, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--context", default=16, show_default=True)
@click.option("--name", help="Of the model, for the name of the results file; default: that of the artifact.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results")
def main(
    artifact: Path,
    gguf: Path,
    peer_python: str,
    threads: int,
    results: Path,
    name: str | None,
    rounds: int,
    prompt: int,
    tokens: int,
    context: int,
) -> None:
    options = BenchOptions(prompt, tokens, context, rounds, threads)
    load = os.getloadavg()[0]
    measured, version = compare(artifact, gguf, peer_python, threads, options)
    line = summary(measured)
    machine = f"{date.today()}, {cpu_model()}, {threads} threads, load average {load:.1f} before the run"
    versions = f"gristmill {gristmill.__version__} ({artifact.name}), {version} ({gguf.name})"
    lengths = f"prefill of {options.prompt}, {options.tokens} tokens after a context of {options.context}"
    path = results / f"{date.today()}-{name or artifact.name}-{gguf.stem}.csv"
    write_results(path, COLUMNS, measured, [machine, versions, lengths, line])
    print(line)


if __name__ == "__main__":
    main()
