"""What generation brings beside one token at a time: speculation, and many generations over the slots.

    python benchmarks/decoding.py bench/tinyllama-1.1b-int4-g128-f16

Lines, each beside plain decoding measured in the same rounds:
    scripted A    proposals of which each is right with probability A behind right ones, whatever the text
    nothing       prompt lookup on a text that repeats nothing: it should cost nothing
    slots         64 generations of mixed length over 8 slots, against one after the other
Written to --out as CSV: medians over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import numpy as np
from bandwidth import cpu_model
from tables import write_results

import gristmill
from gristmill.runtime.decoding.generate import generate_all
from gristmill.runtime.decoding.lookup import Lookup
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sequence import Prompt, Sequence

PROMPT = [5 + 37 * n % 1000 for n in range(16)]


class Scripted(Lookup):
    """Knows the text that will come, and spoils each token of it with probability 1 - right."""

    def __init__(self, sequence: Sequence, text: list[int], right: float, vocabulary: int):
        super().__init__(sequence.tokens)
        self._text, self._right, self._vocabulary = text, right, vocabulary
        self._random = np.random.default_rng(1)

    def propose(self, most: int) -> list[int]:
        at = len(self._tokens) - len(PROMPT)
        coming = self._text[at : at + max(most, 0)]
        spoilt = self._random.random(len(coming)) >= self._right
        return [(t + 1) % self._vocabulary if bad else t for t, bad in zip(coming, spoilt, strict=True)]


def options(count: int, lookup: bool = False) -> GenerationOptions:
    return GenerationOptions.of(max_new_tokens=count, ignore_eos=True, lookup=lookup)


def timed(work: Callable[[], int]) -> float:
    """Tokens per second."""
    began = time.perf_counter()
    count = work()
    return count / (time.perf_counter() - began)


def run_one(session: gristmill.Session, count: int, right: float | None, text: list[int]) -> list[int]:
    """One generation through the scheduler, with scripted proposals where `right` says so."""
    sequence = Sequence(session, Prompt(PROMPT, options(count, lookup=False)), time.perf_counter())
    if right is not None:
        sequence.lookup = Scripted(sequence, text, right, session.vocabulary)
    session._scheduler.submit([sequence])
    session._scheduler.run_until(lambda: sequence.done)
    if sequence.error:
        raise sequence.error
    return list(sequence.result.token_ids)


def sampled(session: gristmill.Session, count: int, lookup: bool) -> list[int]:
    """A text that repeats nothing: drawn at a high temperature."""
    found = session.generate(
        PROMPT, max_new_tokens=count, ignore_eos=True, lookup=lookup, temperature=100.0, seed=4
    )
    return list(found.token_ids)


def many(session: gristmill.Session, together: bool) -> int:
    """64 generations of 8 to 39 tokens."""
    prompts = [Prompt([*PROMPT, n], options(8 + 17 * n % 32)) for n in range(64)]
    batches = [prompts] if together else [[prompt] for prompt in prompts[::8]]
    return sum(len(result.token_ids) for batch in batches for result in generate_all(session, batch))


@click.command()
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=96, show_default=True, help="Of one generation.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", type=int)
@click.option("--out", type=click.Path(path_type=Path), help="CSV of the result.")
def main(artifact: Path, tokens: int, rounds: int, threads: int | None, out: Path | None) -> None:
    """Speculation and continuous batching on ARTIFACT."""
    session = gristmill.load(artifact, threads=threads, max_slots=8, max_len=max(tokens + 32, 128))
    text = run_one(session, tokens, None, [])
    if any(run_one(session, tokens, right, text) != text for right in (0.5, 0.8)):
        raise click.ClickException("speculation changed the text")
    work: dict[str, Callable[[], int]] = {
        "plain": lambda: len(run_one(session, tokens, None, text)),
        "scripted 0.5": lambda: len(run_one(session, tokens, 0.5, text)),
        "scripted 0.8": lambda: len(run_one(session, tokens, 0.8, text)),
        "nothing, plain": lambda: len(sampled(session, tokens, lookup=False)),
        "nothing, lookup": lambda: len(sampled(session, tokens, lookup=True)),
        "one after the other": lambda: many(session, together=False),
        "64 over 8 slots": lambda: many(session, together=True),
    }
    base = {"nothing, lookup": "nothing, plain", "64 over 8 slots": "one after the other"}
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            found[name].append(timed(run))
    rows = []
    for name, speeds in found.items():
        against = found[base.get(name, "plain" if name.startswith("scripted") else name)]
        ratio = median(a / b for a, b in zip(speeds, against, strict=True))
        rows.append({"work": name, "tok_s": median(speeds), "ratio": ratio})
        click.echo(f"{name:22s} {median(speeds):8.1f} tok/s  {ratio:5.2f} x")
    if out:
        about = [
            f"gristmill {gristmill.__version__} ({artifact.name}), {session.threads} threads, {cpu_model()}",
            f"{tokens} tokens, medians of {rounds} rounds, ratios within a round",
        ]
        write_results(out, ("work", "tok_s", "ratio"), rows, about)


if __name__ == "__main__":
    main()
