"""An artifact → a directory with an AOTInductor package, for libtorch programs and for `--device pt2:cpu`.

model.pt2             machine code of two entry points, `decode` and `prefill` (export/entry_points.py),
                      without weights
weights.safetensors   the artifact's, mapped once and handed to both
export.json, program.json, tokenizer files
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.export.entry_points import Decode, Prefill
from gristmill.export.folder import SESSION_FILES, Progress, new_folder, write_session_files
from gristmill.runtime.artifact import EXPORT, PROGRAM, WEIGHTS, open_artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Limits, Program
from gristmill.runtime.pt2.constants import constants
from gristmill.runtime.pt2.package import DECODE, PACKAGE, PREFILL, opened_package, this_machine

EXAMPLE_ROWS, EXAMPLE_LENGTH = 5, 24  # more than one, and different
# Of what TorchInductor fuses: a product with packed weights is one loop, whatever it reads and computes.
FUSION = {"realize_reads_threshold": 64, "realize_acc_reads_threshold": 64, "realize_opcount_threshold": 1000}
OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "cpp.dynamic_threads": True,  # as many as torch is told to use when the package runs
    "cpp.threads": 16,  # loops are cut as for so many, whatever this machine has
    "cpp.march": "",  # nothing beyond the instruction set that the package names
    "compile_threads": 1,
    **FUSION,
}


def export_pt2(
    artifact: str | Path,
    out: str | Path,
    device: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the artifact's model to the directory `out`, for processors like this one and this torch.

    device: "cpu", which None is, too. force: replace an earlier export. Raises GristmillError where this
    torch or machine cannot compile it.
    """
    if device not in (None, "cpu"):
        raise GristmillError(
            f"packages for device {device!r} are not written yet, expected 'cpu'; an NVIDIA GPU runs the "
            "artifact itself, with CUDA Graphs: --device cuda"
        )
    _refuse_old_torch()
    opened = open_artifact(artifact)
    program = Program.from_json(opened.json(PROGRAM))
    written = {PACKAGE, WEIGHTS, *SESSION_FILES}
    with new_folder(out, force, lambda names: EXPORT in names and names <= written) as folder:
        shutil.copyfile(opened.weights_path, folder / WEIGHTS)
        weights = constants(folder / WEIGHTS, program)
        with tempfile.TemporaryDirectory(prefix="gristmill-pt2-") as work:
            write_package(folder / PACKAGE, program, weights, Path(work), progress)
        program.caches = [replace(c, k_dtype="f32", v_dtype="f32") for c in program.caches]
        write_session_files(folder, opened, program, "pt2", dict(this_machine()))
    return Path(out).resolve()


def write_package(
    path: Path, program: Program, weights: dict[str, Tensor], work: Path, progress: Progress | None = None
) -> None:
    """Compiles both entry points in the directory `work` and writes them to `path`."""
    from torch._inductor.package.package import package_aoti

    files = {}
    entries = ((DECODE, Decode, decode_example), (PREFILL, Prefill, prefill_example))
    for count, (name, kind, example) in enumerate(entries):
        files[name] = compiled(kind(program, weights), *example(program), work / name)
        if progress is not None:
            progress("compile", (count + 1) / len(entries))
    package_aoti(str(path), files)
    for runner in opened_package(path).values():
        missing = set(runner.get_constant_fqns()) - weights.keys()
        assert not missing, f"a package asks for {sorted(missing)}, which no weights file holds"


Example = tuple[tuple[Any, ...], tuple[Any, ...]]  # arguments, and which of their lengths may change


def decode_example(program: Program) -> Example:
    position, caches = torch.tensor([EXAMPLE_LENGTH - 1]), empty_caches(program, EXAMPLE_LENGTH)
    length = torch.export.Dim("length", min=2, max=_most_positions(program.limits))
    return (torch.tensor([0]), position, caches), (None, None, [{0: length}] * len(caches))


def prefill_example(program: Program) -> Example:
    ids, caches = torch.arange(EXAMPLE_ROWS), empty_caches(program, EXAMPLE_LENGTH)
    count = torch.export.Dim("count", min=2, max=max(4, program.limits.max_tokens))
    asked = torch.export.Dim("asked", min=2, max=max(4, program.limits.max_tokens))
    length = torch.export.Dim("length", min=2, max=_most_positions(program.limits))
    shapes = ({0: count}, {0: count}, {0: asked}, [{0: length}] * len(caches))
    return (ids % program.vocabulary, ids, ids[1:4], caches), shapes


def _most_positions(limits: Limits) -> int:
    return max(EXAMPLE_LENGTH, limits.max_position, limits.max_len)


def empty_caches(program: Program, length: int) -> list[Tensor]:
    """Keys and values of each cache in turn, [length, kv_heads, dim] f32 zeros."""
    return [
        torch.zeros(length, cache.kv_heads, dim)
        for cache in program.caches
        for dim in (cache.k_dim, cache.v_dim)
    ]


def compiled(module: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...], folder: Path) -> Any:
    """What AOTInductor makes of a module: files for a package. Raises GristmillError without a compiler."""
    from torch._inductor import aot_compile
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    options = {**OPTIONS, "aot_inductor.output_path": str(folder)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own, about its own
        exported = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        try:
            return aot_compile(exported.module(), arguments, options=options)
        except (CppCompileError, InvalidCxxCompiler) as error:
            reason = str(error).splitlines()[0]
            raise GristmillError(
                f"AOTInductor needs a C++ compiler that works ({reason}); install g++, or set CXX"
            ) from error


def _refuse_old_torch() -> None:
    from torch._inductor import config

    if not hasattr(config.cpp, "march"):
        raise GristmillError(
            f"torch {torch.__version__} compiles packages for this very processor alone; install torch 2.13 "
            "or later, or export with --to torchscript"
        )
