"""Load on `gristmill serve` over loopback: many streams at once from a process of their own.

Every answer is compared with the same prompt's greedy text from the session alone, the server's memory is
read between rounds, and its throughput stands beside that of the scheduler without HTTP, in the same run.
Client and server share this machine's processors: leave one to the client (--threads).

    python benchmarks/serve_load.py ARTIFACT --streams 200 --max-slots 32 --tokens 64 --threads 1
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
import httpx
import numpy as np

import gristmill

WORDS = ["def", "class", "return", "import", "for", "while", "if", "try", "with", "print", "open", "list"]
TIMEOUT_S = 600


@dataclass
class Stream:
    """What one client saw. gaps: seconds between the pieces that it read."""

    text: str = ""
    tokens: int = 0
    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    refused: int = 0  # 429, tried again
    error: str = ""


def prompts(count: int) -> list[str]:
    """Different prompts, some of which begin alike."""
    return [f"{WORDS[i % len(WORDS)]} {WORDS[i // len(WORDS) % len(WORDS)]}_{i}(" for i in range(count)]


async def read_stream(client: httpx.AsyncClient, prompt: str, tokens: int) -> Stream:
    """One greedy stream; where the queue is full it waits as long as it is told."""
    seen = Stream()
    body = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    while True:
        last = began = time.perf_counter()
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                seen.refused += 1
                await answer.aread()
                await asyncio.sleep(int(answer.headers["retry-after"]))
                continue
            if answer.status_code != 200:
                seen.error = f"{answer.status_code} {(await answer.aread()).decode()}"
                return seen
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                event = json.loads(line[6:])
                if "error" in event:
                    seen.error = event["error"]["message"]
                    return seen
                last = take_in(seen, event, now, began, last)
        return seen


def take_in(seen: Stream, event: dict[str, Any], now: float, began: float, last: float) -> float:
    """Adds a piece to what was seen; returns when the latest text came."""
    if event["usage"]:
        seen.tokens = event["usage"]["completion_tokens"]
    text = event["choices"][0]["text"] if event["choices"] else ""
    if not text:
        return last
    if not seen.text:
        seen.ttft = now - began
    else:
        seen.gaps.append(now - last)
    seen.text += text
    return now


async def load_round(url: str, texts: list[str], tokens: int) -> tuple[list[Stream], float]:
    """All streams at once, and the seconds that they took together."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=len(texts))
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        began = time.perf_counter()
        seen = await asyncio.gather(*(read_stream(client, text, tokens) for text in texts))
        return seen, time.perf_counter() - began


@contextmanager
def server(artifact: str, options: list[str]) -> Iterator[tuple[str, int]]:
    """`gristmill serve`: its address and process id."""
    command = [sys.executable, "-m", "gristmill", "serve", artifact, "--port", "0", *options]
    process = subprocess.Popen(
        [*command, "--log", os.devnull],
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.path.dirname(artifact) or "/",
    )
    assert process.stderr is not None
    try:
        line = next((line for line in process.stderr if line.startswith(("serving", "error"))), "no answer")
        if not line.startswith("serving"):
            raise click.ClickException(f"the server did not start: {line}")
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.stderr.close()
        if process.wait(TIMEOUT_S):
            click.echo(f"the server ended with {process.returncode}", err=True)


def resident_mib(process: int) -> float:
    """Memory that a process holds now."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def processor_s(process: int) -> float:
    """Processor time that a process took so far."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(values: list[float]) -> str:
    p50, p95, p99 = np.percentile(values, [50, 95, 99]) * 1e3
    return f"p50 {p50:.1f}  p95 {p95:.1f}  p99 {p99:.1f} ms"


@click.command()
@click.argument("artifact", type=click.Path(exists=True))
@click.option("--streams", type=int, default=200, show_default=True)
@click.option("--tokens", type=int, default=64, show_default=True, help="New tokens of each stream.")
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--max-slots", type=int, default=32, show_default=True)
@click.option("--max-queue", type=int, default=256, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
def main(
    artifact: str, streams: int, tokens: int, rounds: int, max_slots: int, max_queue: int, threads: int
) -> None:
    """Rounds that alternate between the scheduler alone and the server; the first of each warms up."""
    artifact = os.path.abspath(artifact)
    texts = prompts(streams)
    session = gristmill.load(artifact, threads=threads, max_slots=max_slots)
    options = ["--max-slots", str(max_slots), "--max-queue", str(max_queue), "--threads", str(threads)]
    single = [session.generate(text, max_new_tokens=tokens, ignore_eos=True).text for text in texts]
    alone, served, memory, seen, bad = list[float](), list[float](), list[float](), list[Stream](), 0
    spent_alone, spent_served = list[float](), list[float]()  # processor seconds of a round
    with server(artifact, options) as (url, process):
        files = open_files(process)
        for number in range(rounds + 1):
            began, spent = time.perf_counter(), time.process_time()
            session.generate(texts, max_new_tokens=tokens, ignore_eos=True)
            direct = streams * tokens / (time.perf_counter() - began)
            spent, before = time.process_time() - spent, processor_s(process)
            round_seen, seconds = asyncio.run(load_round(url, texts, tokens))
            memory.append(resident_mib(process))
            bad += sum(
                one.text != text or bool(one.error) for one, text in zip(round_seen, single, strict=True)
            )
            for one in round_seen:
                if one.error:
                    click.echo(f"error: {one.error}", err=True)
            if number:
                alone.append(direct)
                spent_alone.append(spent)
                spent_served.append(processor_s(process) - before)
                served.append(sum(one.tokens for one in round_seen) / seconds)
                seen += round_seen
        for _ in range(100):  # connections close when the server's loop comes to it
            if open_files(process) > files:
                time.sleep(0.05)
        after = open_files(process)
    report(alone, served, memory, seen, bad, files, after)
    more = float(np.median(np.array(spent_served) / spent_alone)) - 1
    click.echo(f"processor time of the server beside the scheduler's: {more:+.0%}")
    if bad:
        raise click.ClickException(f"{bad} answers differ from their single runs")


def report(
    alone: list[float], served: list[float], memory: list[float], seen: list[Stream], bad: int, files: int,
    after: int,
) -> None:  # fmt: skip
    """Prints what was measured."""
    direct, http = float(np.median(alone)), float(np.median(served))
    shares = ", ".join(f"{s / a:.2f}" for s, a in zip(served, alone, strict=True))
    click.echo(f"answers: {len(seen)}, other than alone or failed: {bad}")
    click.echo(f"refused with 429 and tried again: {sum(one.refused for one in seen)}")
    click.echo(
        f"throughput: {http:.0f} tok/s served, {direct:.0f} without HTTP: {http / direct:.2f} ({shares})"
    )
    click.echo(f"time to first token: {percentiles([one.ttft for one in seen])}")
    click.echo(f"between pieces: {percentiles([gap for one in seen for gap in one.gaps])}")
    click.echo("memory after each round: " + ", ".join(f"{mib:.1f}" for mib in memory) + " MiB")
    click.echo(f"open files before and after: {files}, {after}")


if __name__ == "__main__":
    main()
