"""What each format of the KV cache costs, by how far into the context a token stands.

Every format reads the same windows of the text. Per token the nll is compared with that of the first format
(paired), and the increase is given in per cent of its mean nll, with the 95 % bootstrap interval over blocks
of 32 tokens.

    python benchmarks/kv_by_position.py examples/py7m TEXT --tokens 60000
    python benchmarks/kv_by_position.py MODEL TEXT --format f16 --format int8/int4 --format "int4/f16 rotated"
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

import gristmill
from gristmill.compiler.statistics import Blocks, bootstrap_mean
from gristmill.runtime.evaluation import read_text, text_windows, window_nll
from gristmill.runtime.session import Session

FORMATS = (
    "f16",
    "int8",
    "fp8",
    "int4",
    "int4 rotated",
    "int4/f16",
    "int4/f16 rotated",
    "f16/int4",
    "fp8/f16",
    "f16/fp8",
    "int8/int4",
    "int8 rotated",
    "fp8 rotated",
)
EDGES = (0, 64, 256, 512, 1024, 2048, 4096)
Scores = list[NDArray[np.float64]]  # nll of each window's tokens


def cache_options(text: str) -> dict[str, object]:
    """ "int8/int4 rotated" -> keys int8, values int4, with the Hadamard transform."""
    match = re.fullmatch(r"(\w+)(?:/(\w+))?( rotated)?", text)
    if not match:
        raise click.BadParameter(f"{text!r} is no format such as int8, int8/int4 or 'int4/f16 rotated'")
    return {"kv_k": match[1], "kv_v": match[2] or match[1], "kv_rotate": bool(match[3])}


def score(session: Session, text: str, window: int, tokens: int) -> Scores:
    """nll of every token that has one before it, window by window; short windows at the end are left out."""
    ids = session.tokenizer.encode(text, add_special_tokens=False)[:tokens]
    pieces = [p for p in text_windows(ids, session.tokenizer.prefix_ids, window) if len(p) == window]
    if not pieces:
        raise click.ClickException(f"{len(ids)} tokens do not fill one window of {window}; give more text")
    with session.slot() as slot:
        return [window_nll(session, piece, slot, 1) for piece in pieces]


def measure(model: str, text: str, weights: str, cache: str, window: int | None, tokens: int) -> Scores:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "artifact"
        gristmill.compile(model, out, weights=weights, max_len=window, gate=False, **cache_options(cache))
        session = gristmill.load(out)
        return score(session, text, session.max_len, tokens)


def report_line(exact: Scores, scores: Scores, begin: int, end: int) -> str:
    """Increase of nll over positions [begin, end), in per cent of the exact mean, and the interval."""
    differences = [b[begin:end] - a[begin:end] for a, b in zip(exact, scores, strict=True)]
    mean = float(np.mean([a[begin:end].mean() for a in exact]))
    found = bootstrap_mean(Blocks.of(differences))
    low, estimate, high = (100 * x / mean for x in (found.low, found.estimate, found.high))
    return f"{estimate:+8.3f} ({low:+.3f} to {high:+.3f})"


@click.command()
@click.argument("model")
@click.argument("text", type=click.Path(exists=True))
@click.option("--weights", default="f16", show_default=True, help="Format of the linear layers.")
@click.option("--window", type=int, help="Tokens of a window.  [default: the model's positions]")
@click.option("--tokens", default=50_000, show_default=True, help="Tokens of the text to read.")
@click.option(
    "--format", "formats", multiple=True, default=FORMATS, help="Keys/values; the first is the reference."
)
def main(
    model: str, text: str, weights: str, window: int | None, tokens: int, formats: tuple[str, ...]
) -> None:
    """Print the increase of nll of each cache format over the first, by position, in per cent."""
    content = read_text(text)
    exact: Scores = []
    for cache in formats:
        scores = measure(model, content, weights, cache, window, tokens)
        exact = exact or scores
        length = len(exact[0])
        edges = [e for e in EDGES if e < length] + [length]
        spans = [(0, length), *zip(edges[:-1], edges[1:], strict=True)]
        if scores is exact:
            print(f"{len(exact)} windows of {length + 1} tokens, nll {np.mean(exact):.4f} with {cache}")
            print(" " * 18 + "".join(f"{f'{a}-{b}':>32}" for a, b in spans), flush=True)
            continue
        cells = [report_line(exact, scores, begin, end) for begin, end in spans]
        print(f"{cache:18}" + "".join(f"{cell:>32}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
