"""Write artifacts with random weights, packed from the start: no float model is made or read.

The program is the compiler's own, for it comes from the compiler: the model is traced from its config (its
parameters are never touched), goes through every pass and is lowered. Only rounding is left out: the stored
bytes are random, and scales are such that weights have a deviation of 0.02, as those of make_model. The same
name and formats give the same bytes.

    python benchmarks/random_artifact.py llama-3.1-8b OUT --weights int4,int8,fp8,bf16

writes OUT/llama-3.1-8b-int4-f16 and so on; one that is there already is kept.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
from make_model import DEVIATION, SHAPES, write_tokenizer
from numpy.typing import NDArray

from gristmill.compiler.lower import Lowered, Matrix
from gristmill.compiler.options import CompileOptions
from gristmill.compiler.pipeline import bits_per_weight, tool_versions
from gristmill.compiler.shapes import Shape
from gristmill.compiler.tokenizer_files import tokenizer_files
from gristmill.quant import e4m3, pack
from gristmill.quant.scheme import Scheme
from gristmill.quant.tensor import stored_shapes
from gristmill.runtime.artifact import MODEL_CONFIG, PROGRAM
from gristmill.runtime.artifact_writer import ArtifactWriter
from gristmill.runtime.program import Program
from gristmill.runtime.weights_file import TensorSpec, WeightsWriter

Array = NDArray[Any]
POOL_BYTES = 16 << 20  # random bytes that all matrices of a format are cut from
NAN_BITS = 0x7F  # of e4m3, with any sign


class RandomModel:
    """A shape of make_model, or any config like those, traced once for all formats."""

    def __init__(self, name: str, config: dict[str, Any] | None = None) -> None:
        self.name, self.config = name, config or SHAPES[name]

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The tokenizer's files."""
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(self.config, Path(folder))
            return tokenizer_files(Path(folder), [])

    @cached_property
    def shape(self) -> Shape:
        """Its graph, traced from the config."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(self.config))
            return Shape.of(Path(folder))

    def lowered(self, options: CompileOptions) -> Lowered:
        """The program and what its matrices are."""
        return self.shape.lowered(options)

    def program(self, options: CompileOptions) -> Program:
        return self.lowered(options).program

    def write(self, out: Path, options: CompileOptions) -> Path:
        """The artifact, without self-test and evaluation: there is nothing that it should say."""
        made = self.lowered(options)
        with ArtifactWriter(out, options.force) as writer:
            write_weights(writer.declare_weights(specs(made), {"model": self.name}), made)
            writer.write_bytes(PROGRAM, made.program.to_bytes())
            writer.write_json(MODEL_CONFIG, self.config)
            for name, data in self.files.items():
                writer.write_bytes(name, data)
            schemes = {name: str(matrix.scheme) for name, matrix in made.matrices.items()}
            return writer.commit({
                "source": {"name": f"{self.name}, random", "model_type": self.config["model_type"]},
                "tools": tool_versions(),
                "quantization": {
                    "method": "random", "kv": str(options.cache_format), "rotated": False, "schemes": schemes,
                },
                "bits_per_weight": bits_per_weight(made),
                "origins": made.origins,
            })  # fmt: skip

    def write_all(self, folder: Path, formats: list[CompileOptions]) -> dict[str, Path]:
        """An artifact for each, kept where it is there; paths by name of the format.

        Two are written at the same time, in the given order: the first is wanted first.
        """
        paths = {format_name(options): self.path(folder, options) for options in formats}
        missing = [options for options in formats if not self.path(folder, options).exists()]
        if missing:
            _ = self.shape, self.files  # once, before threads ask for them
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda options: self.write(self.path(folder, options), options), missing))
        return paths

    def path(self, folder: Path, options: CompileOptions) -> Path:
        return folder / f"{self.name}-{format_name(options)}"


def format_name(options: CompileOptions) -> str:
    """int4-f16: of the linears and of the cache."""
    return f"{options.linear_format}-{options.cache_format}".replace("/", "-")


def specs(made: Lowered) -> Iterator[TensorSpec]:
    """Every tensor in the order of `write_weights`, which is a compile's."""
    for matrix in made.matrices.values():
        n, k = matrix.lazy.shape
        for name, dtype, shape in stored_shapes(matrix.name, n, k, matrix.scheme, np.float16):
            yield TensorSpec(name, dtype, shape)
    for name, lazy in made.vectors.items():
        yield TensorSpec(name, "F32", tuple(lazy.shape))


def write_weights(weights: WeightsWriter, made: Lowered) -> None:
    assert not made.orders, "random weights have no order of columns"
    pools: dict[Scheme, dict[str, Array]] = {}
    for seed, matrix in enumerate(made.matrices.values()):
        pool = pools.setdefault(matrix.scheme, random_pool(matrix.scheme))
        write_matrix(weights, matrix, pool, seed)
    for name, lazy in made.vectors.items():
        weights.write(name, np.ascontiguousarray(lazy.load().numpy().astype(np.float32)))


def write_matrix(weights: WeightsWriter, matrix: Matrix, pool: dict[str, Array], seed: int) -> None:
    """Pieces of the pool from a place of the matrix's own on."""
    n, k = matrix.lazy.shape
    for name, _, shape in stored_shapes(matrix.name, n, k, matrix.scheme, np.float16):
        values = pool[name.removeprefix(matrix.name + ".")]
        at, left = seed * 4_000_037 % len(values), math.prod(shape)
        while left:
            piece = values[at : at + left]
            weights.write(name, piece)
            at, left = 0, left - len(piece)


def random_pool(scheme: Scheme) -> dict[str, Array]:
    """Flat random values of what a matrix is stored as, by suffix: weight and, as the scheme asks, scale."""
    assert scheme.symmetric, "random zero points are not made"
    generator = np.random.Generator(np.random.SFC64(7))
    if not scheme.has_scales:
        values = generator.standard_normal(POOL_BYTES // 4, np.float32) * np.float32(DEVIATION)
        return {"weight": pack.encode_float(values, scheme.format)}
    stored = generator.integers(0, 256, POOL_BYTES, np.uint8)
    if scheme.format == "fp8":
        stored[stored & NAN_BITS == NAN_BITS] = 0
    spread = generator.uniform(0.5, 1.5, POOL_BYTES // 16)
    scale = (spread * DEVIATION / deviation(scheme)).astype(np.float16)
    return {"weight": stored.view(np.int8) if scheme.format == "int8" else stored, "scale": scale}


def deviation(scheme: Scheme) -> float:
    """The root mean square of what a scheme's codes stand for, all of them equally likely, with scale 1."""
    numbers = scheme.numbers
    if scheme.is_integer:
        values = np.arange(numbers.low, numbers.high + 1, dtype=np.float64) - numbers.zero_point
    else:
        codes = np.arange(256, dtype=np.uint8)
        values = e4m3.decode(codes[codes & NAN_BITS != NAN_BITS]).astype(np.float64)
    return float(np.sqrt(np.square(values).mean()))


@click.command(help=__doc__)
@click.argument("shape", type=click.Choice(sorted(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--weights", default="int4", show_default=True, help="Formats, with commas between.")
@click.option("--kv", default="f16", show_default=True)
@click.option("--max-tokens", default=512, show_default=True)
def main(shape: str, out: Path, weights: str, kv: str, max_tokens: int) -> None:
    formats = [CompileOptions.of(weights=w, kv=kv, max_tokens=max_tokens) for w in weights.split(",")]
    for path in RandomModel(shape).write_all(out, formats).values():
        print(path)


if __name__ == "__main__":
    main()
