"""What one run shares: the device, its roofs, the artifacts being written, and the time that is left."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from make_model import SHAPES
from random_artifact import RandomModel, format_name

from gpu.paper import DEVICES, Device
from gpu.results import Results
from gpu.roofs import READERS, Clock, Reader, ReadRoof, matmul_roof
from gristmill.compiler.options import CompileOptions
from gristmill.runtime.errors import GristmillError

BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """How much is measured. context: positions before the decoded one; chunk: rows of a forward in smaller
    chunks; long_*: of attention alone; rounds: what medians are over; replays, launches: steps in a round."""

    context: int = 127
    batch: int = 16
    prompt: int = 2048
    chunk: int = 512
    long_context: int = 32768
    long_layers: int = 4
    rounds: int = 9
    replays: int = 20
    launches: int = 5
    prompts: int = 5
    peer_tokens: int = 64
    check_prompt: int = 64
    check_steps: int = 4
    check_vocabulary: int = 4096
    roof_bytes: int = 4 << 30
    readers: tuple[Reader, ...] = tuple(READERS)
    matmuls: tuple[tuple[int, int, int], ...] = (
        (8192, 8192, 8192), (4096, 16384, 8192), (2048, 28672, 4096), (2048, 4096, 14336),
    )  # fmt: skip
    peer_options: tuple[str, ...] = ("--mode", "max-autotune")


# For a dry run: more than four rows in a prompt and its chunks, for fewer take the interpreter long.
TINY = Sizes(
    context=5, batch=2, prompt=16, chunk=8, long_context=40, long_layers=1, rounds=1, replays=1, launches=1,
    prompts=1, peer_tokens=2, check_prompt=5, check_steps=1, check_vocabulary=32, roof_bytes=1 << 16,
    readers=(Reader(1024, 4, 4),), matmuls=((64, 64, 64),), peer_options=("--backend", "eager"),
)  # fmt: skip
DRY_SHAPE = {
    **SHAPES["tinyllama-1.1b"], "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}  # fmt: skip


def options_of(weights: str) -> CompileOptions:
    """A compile's own defaults for the format, with f16 caches."""
    return CompileOptions.of(weights=weights)


@dataclass
class Bench:
    """``deadline``: by time.monotonic()."""

    shape: str
    config: dict[str, Any]
    folder: Path
    formats: list[str]
    sizes: Sizes
    results: Results
    clock: Clock
    deadline: float
    writer: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def log(self) -> Path:
        """What the process that writes artifacts says."""
        return self.folder / f"{self.shape}.log"

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def processors(self) -> int:
        if not self.clock.on_gpu:
            return 1
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    @cached_property
    def roof(self) -> ReadRoof:
        made = ReadRoof(self.clock, self.sizes.roof_bytes, self.sizes.readers)
        self.results.add("roofs", "", "read", made.sample() / 1e9, "GB/s", made.name)
        return made

    @cached_property
    def matmul(self) -> float:
        """Operations per second."""
        found, name = matmul_roof(self.clock, self.sizes.matmuls, self.sizes.rounds)
        self.results.add("roofs", "bf16", "torch.matmul", found / 1e12, "TFLOP/s", name)
        return found

    @property
    def paper_device(self) -> Device:
        """The data sheet that fits the device's name; an H100's where none does."""
        return DEVICES["h200" if "H200" in self.results.device else "h100"]

    def start_writing(self) -> None:
        """All artifacts, in a process of their own beside the first measurements."""
        if self.shape not in SHAPES:
            formats = [options_of(name) for name in self.formats]
            RandomModel(self.shape, self.config).write_all(self.folder, formats)
            return
        command = [sys.executable, str(BENCHMARKS / "random_artifact.py"), self.shape, str(self.folder)]
        command += ["--weights", ",".join(self.formats)]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.writer = subprocess.Popen(command, stdout=log, stderr=log)

    def artifact(self, name: str) -> Path:
        """The artifact of a format, once it is complete. Raises GristmillError where it cannot be written."""
        path = self.folder / f"{self.shape}-{format_name(options_of(name))}"
        while True:
            ended = self.writer is None or self.writer.poll() is not None  # asked before the path is
            if path.exists():
                return path
            if ended:
                said = self.log.read_text()[-1000:] if self.log.exists() else ""
                raise GristmillError(f"{path} was not written\n{said}")
            if self.left < 0:
                raise GristmillError(f"{path} is not complete yet, and the time is over")
            time.sleep(0.05)

    def close(self) -> None:
        if self.writer is not None and self.writer.poll() is None:
            self.writer.terminate()
            self.writer.wait()
