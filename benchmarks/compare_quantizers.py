"""How far quantized models are from the float model: gristmill, GPTQModel and llama.cpp on the same tokens.

Everything is measured as KL divergence to the float model, per token of unseen text, in the same windows; an
interval is of the paired difference over blocks of the text. GPTQModel gets the same calibration ids, and its
checkpoint is executed as an artifact that holds its integers unchanged, with f32 activations as ours;
llama.cpp's own logits are compared, and with them our artifact as it ships, int8 activations and all.

    peers: see gptqmodel_peer.py and report/peers/llamacpp_peer.py for their environments
    python benchmarks/compare_quantizers.py examples/py7m --text held_out.txt \
        --gptqmodel-python gptq/bin/python --llamacpp-python peer/bin/python
"""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
from bandwidth import cpu_model
from numpy.typing import NDArray

import gristmill
from gristmill.compiler.calibration_set import calibration_set
from gristmill.compiler.statistics import Blocks, bootstrap_mean, token_scores
from gristmill.report.peers.peer_process import command_of
from gristmill.runtime.evaluation import read_text, window_logits
from gristmill.runtime.report import read_program

HERE = Path(__file__).parent
Array = NDArray[Any]
Logits = Callable[[int], Array]  # window number → [len(window), V]
EXACT: dict[str, Any] = {"embedding": "f16", "head": "f16", "kv": "f16", "activations": "f32"}


@dataclass
class Measured:
    """kl: [tokens] per window; bits: stored bits per weight, all matrices counted."""

    name: str
    bits: float
    kl: list[Array]
    nll_increase: float


class Comparison:
    """The float model's logits on windows of a text, and what is measured against them."""

    def __init__(self, model: Path, text: str, windows: int, length: int, work: Path) -> None:
        self.model, self.work = model, work
        self.reference = self.compile("float", weights="f32")
        tokenizer = gristmill.load(self.reference).tokenizer
        ids = tokenizer.encode(read_text(text), add_special_tokens=False)
        room = length - len(tokenizer.prefix_ids)
        count = min(windows, len(ids) // room)
        self.windows = [tokenizer.prefix_ids + ids[i * room : (i + 1) * room] for i in range(count)]
        self.tokenizer = tokenizer
        np.save(work / "windows.npy", np.array(self.windows, np.int32))

    def compile(self, name: str, model: Path | None = None, **options: Any) -> Path:
        out = self.work / name
        gristmill.compile(model or self.model, out, gate=False, force=True, **options)
        return out

    def artifact(self, name: str, path: Path) -> Measured:
        """An artifact against the float model."""
        session = gristmill.load(path, max_slots=1)
        bits = read_program(path)[0].manifest["bits_per_weight"]
        return self.measure(name, bits, lambda i: run(session, self.windows[i]))

    def measure(self, name: str, bits: float, logits: Logits) -> Measured:
        reference = gristmill.load(self.reference, max_slots=1)
        scores = []
        for i, window in enumerate(self.windows):
            targets = np.array(window[1:])
            expected = run(reference, window)[:-1]
            scores.append(token_scores(expected, logits(i)[:-1], targets))
        increase = float(np.concatenate([s[:, 1] - s[:, 0] for s in scores]).mean())
        return Measured(name, bits, [s[:, 2] for s in scores], increase)


def run(session: gristmill.Session, window: list[int]) -> Array:
    with session.slot() as slot:
        return np.concatenate([logits for _, logits in window_logits(session, window, slot)])


def line(found: Measured, peer: Measured | None) -> dict[str, Any]:
    """A row of the results: KL with its interval, and the paired difference to a peer."""
    kl = bootstrap_mean(Blocks.of(found.kl))
    row: dict[str, Any] = {
        "what": found.name, "bits_per_weight": f"{found.bits:.3f}",
        "nll_increase": f"{found.nll_increase:.5f}",
        "kl": f"{kl.estimate:.6f}", "kl_low": f"{kl.low:.6f}", "kl_high": f"{kl.high:.6f}",
    }  # fmt: skip
    if peer is not None:
        pairs = zip(found.kl, peer.kl, strict=True)
        difference = bootstrap_mean(Blocks.of([a - b for a, b in pairs]))
        ratio = kl.estimate / bootstrap_mean(Blocks.of(peer.kl)).estimate
        row |= {
            "against": peer.name, "ratio": f"{ratio:.3f}", "difference_low": f"{difference.low:.6f}",
            "difference_high": f"{difference.high:.6f}",
        }  # fmt: skip
    return row


def against_gptqmodel(
    c: Comparison, python: str, settings: list[tuple[int, int]], samples: int, length: int
) -> Iterator[dict[str, Any]]:
    """Same model, ids, bits, group and act-order; f32 activations, embedding and head f16 in both."""
    chosen = calibration_set(None, c.tokenizer, samples, length)
    ids = c.work / "calibration.npy"
    np.save(ids, np.array(chosen.samples, np.int32))
    for bits, group in settings:
        out = c.work / f"gptqmodel-{bits}-{group}"
        executable = os.path.abspath(python) if os.sep in python else python
        paths = (HERE / "gptqmodel_peer.py", c.model, out, ids)
        command = [executable, *(str(path.absolute()) for path in paths), str(bits), str(group)]
        subprocess.run(command, check=True, capture_output=True, cwd=c.work)  # it leaves logs where it runs
        theirs = c.artifact(f"GPTQModel int{bits} g{group}", c.compile("theirs", out, **EXACT))
        yield line(theirs, None)
        quantized: dict[str, Any] = {
            "weights": f"int{bits}",
            "group_size": group,
            "samples": samples,
            "sample_length": length,
        }
        for method in ("gptq", "awq+gptq"):
            ours = c.compile("ours", method=method, **quantized, **EXACT)
            yield line(c.artifact(f"{method} int{bits} g{group}", ours), theirs)
        shipped = c.compile("ours", method="gptq", **quantized)
        yield line(c.artifact(f"gptq int{bits} g{group}, as it ships", shipped), theirs)


# Ours beside llama.cpp's kind: at most its bits per weight, all tensors counted.
OURS: dict[str, dict[str, Any]] = {
    "q4_k_m": {"weights": "int4", "group_size": 32},
    "q3_k_m": {"weights": "int3", "group_size": 64},
    "q8_0": {"weights": "int8", "group_size": 32, "keep": "int8-g32:head"},
}


def against_llamacpp(c: Comparison, python: str, samples: int, length: int) -> Iterator[dict[str, Any]]:
    """llama.cpp's quantizations of the same model, and ours as they ship."""
    folder = c.work / "gguf"
    peer = command_of(python)
    subprocess.run([*peer, "convert", str(c.model), str(folder), *OURS], check=True, capture_output=True)
    for kind, options in OURS.items():
        file = folder / f"{kind}.gguf"
        command = [*peer, "logits", str(file), str(c.work / "windows.npy"), str(c.work / "logits.npy")]
        bits = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        logits = np.load(c.work / "logits.npy", mmap_mode="r")
        theirs = c.measure(f"llama.cpp {kind.upper()}", bits, lambda i, logits=logits: np.array(logits[i]))  # type: ignore[misc]
        yield line(theirs, None)
        ours = c.compile("ours", method="gptq", samples=samples, sample_length=length, **options)
        name = f"gptq {options['weights']} g{options['group_size']}, as it ships"
        yield line(c.artifact(name, ours), theirs)


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--text", required=True, type=click.Path(exists=True), help="Unseen text to measure on.")
@click.option("--gptqmodel-python", help="A Python that has gptqmodel.")
@click.option("--llamacpp-python", help="A Python that has llama-cpp-python, gguf and numpy.")
@click.option("--settings", default="4:128,4:64,3:128", show_default=True, help="BITS:GROUP for GPTQModel.")
@click.option("--windows", default=40, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--samples", default=64, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for artifacts.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results")
def main(
    model: Path, text: str, gptqmodel_python: str | None, llamacpp_python: str | None, settings: str,
    windows: int, length: int, samples: int, work: Path, results: Path,
) -> None:  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(model, text, windows, length, work)
    rows: list[dict[str, Any]] = []
    about = (
        f"# {date.today()}, {cpu_model()}, {model.name}, {len(comparison.windows)} windows of {length} "
        f"tokens of {Path(text).name}, calibration {samples} x {length} of the default text"
    )
    columns = ["what", "bits_per_weight", "nll_increase", "kl", "kl_low", "kl_high", "against", "ratio",
               "difference_low", "difference_high"]  # fmt: skip
    pairs = [(int(a), int(b)) for a, _, b in (s.partition(":") for s in settings.split(","))]
    sources = []
    if llamacpp_python:
        sources.append(against_llamacpp(comparison, llamacpp_python, samples, length))
    if gptqmodel_python:
        sources.append(against_gptqmodel(comparison, gptqmodel_python, pairs, samples, length))
    for source in sources:
        for row in source:
            rows.append(row)
            print(*row.values(), sep="  ", flush=True)
            with (results / f"{date.today()}-quantizers-{model.name}.csv").open("w", newline="") as file:
                file.write(about + "\n")
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
