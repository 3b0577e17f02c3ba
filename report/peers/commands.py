"""The command line of a peer's own Python.

    PYTHON report/peers serve KIND MODEL [--threads N] [--length N] [--cache f16|q8_0] [--logits]
    PYTHON report/peers time KIND MODEL [--threads N] [--prompt N] [--context N] [--tokens N]
    PYTHON report/peers convert HF_DIR OUT_DIR q4_0 q8_0         to GGUF; Llama-shaped models only
    PYTHON report/peers logits GGUF IDS.npy OUT.npy

KIND: llama.cpp, ctranslate2, openvino or onnxruntime-genai; see llamacpp_peer.py and other_peers.py for how
their models are made. `serve` answers requests on stdin, see peer_process.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import llamacpp_peer, other_peers
from .peer_process import Engine, own_stdout, serve

KINDS = ("llama.cpp", *other_peers.ENGINES)


def load(
    kind: str, model: Path, threads: int, length: int, cache: str = "f16", logits: bool = False
) -> Engine:
    """The engine with its model. length: positions; logits: of every position, where it can."""
    if kind == "llama.cpp":
        return llamacpp_peer.load(model, threads, length, cache, logits)
    return other_peers.load(kind, model, threads)


def time_once(engine: Engine, prompt: int, context: int, tokens: int) -> dict[str, Any]:
    """The second of two measurements; the first warms up."""
    engine.measure(prompt, context, tokens)
    lengths = {"prompt": prompt, "context": context, "tokens": tokens}
    return {**engine.about, **lengths, **engine.measure(prompt, context, tokens)}


def _file_type(name: str) -> str:
    """argparse's own choices refuse an empty list."""
    if name not in llamacpp_peer.FILE_TYPES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(sorted(llamacpp_peer.FILE_TYPES))}")
    return name


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="peers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name in ("serve", "time"):
        command = commands.add_parser(name)
        command.add_argument("kind", choices=KINDS)
        command.add_argument("model", type=Path)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--length", type=int, default=4096)
        command.add_argument("--cache", choices=sorted(llamacpp_peer.CACHE_TYPES), default="f16")
        command.add_argument("--logits", action="store_true")
        for count, default in (("prompt", 512), ("context", 16), ("tokens", 32)):
            command.add_argument(f"--{count}", type=int, default=default)
    convert = commands.add_parser("convert")
    convert.add_argument("model", type=Path)
    convert.add_argument("out", type=Path)
    kinds = ", ".join(sorted(llamacpp_peer.FILE_TYPES))
    convert.add_argument("types", nargs="*", type=_file_type, help=f"beside f16: {kinds}")
    logits = commands.add_parser("logits")
    for name in ("model", "ids", "out"):
        logits.add_argument(name, type=Path)
    return top


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if given.command == "convert":
        llamacpp_peer.convert(given.model, given.out, given.types)
    elif given.command == "logits":
        print(llamacpp_peer.logits(given.model, given.ids, given.out))
    else:
        out = own_stdout() if given.command == "serve" else None
        engine = load(given.kind, given.model, given.threads, given.length, given.cache, given.logits)
        if out:
            serve(engine, out)
        else:
            print(json.dumps(time_once(engine, given.prompt, given.context, given.tokens)))
