"""An artifact → a directory with a TorchScript module, for libtorch deployments that still need one (legacy).

model.pt is the traced ProgramModule with its weights packed as the artifact has them; torch::jit::freeze (or
torch.jit.freeze) makes them constants, and with that dequantizes them once: as f32, in memory. Its inputs are
tokens [T], positions [T], rows [R], all int64, and a list of caches [kv_heads, length, dim] f32 that it
writes in place; its outputs logits [R, vocabulary] and hidden states [R, hidden] (an empty tensor if the
program has none).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gristmill.export.folder import SESSION_FILES, Progress, new_folder, write_session_files
from gristmill.export.program_module import ProgramModule
from gristmill.export.stored import Stored
from gristmill.runtime.artifact import EXPORT, PROGRAM, open_artifact
from gristmill.runtime.program import Program

MODULE = "model.pt"
EXAMPLE_ROWS = 5  # more than one: torch takes a length of 1 for a constant in places
EXAMPLE_LENGTH = 24  # of the caches


def export_torchscript(
    artifact: str | Path, out: str | Path, force: bool = False, progress: Progress | None = None
) -> Path:
    """Write the artifact's model to the directory `out`. force: replace an earlier export."""
    opened = open_artifact(artifact)
    program = Program.from_json(opened.json(PROGRAM))
    written = {MODULE, *SESSION_FILES}
    with new_folder(out, force, lambda names: EXPORT in names and names <= written) as folder:
        module = ProgramModule(program, Stored(opened.weights_path), packed=True)
        torch.jit.save(traced(module), str(folder / MODULE))
        if progress is not None:
            progress("trace", 1.0)
        program.caches = [replace(c, k_dtype="f32", v_dtype="f32") for c in program.caches]
        write_session_files(folder, opened, program, "torchscript", {})
    return Path(out).resolve()


def traced(module: ProgramModule) -> torch.jit.ScriptModule:
    """The module for any number of rows and any length of caches."""
    ids = torch.arange(EXAMPLE_ROWS)
    example = (ids % module.program.vocabulary, ids, ids[2:4], module.empty_caches(EXAMPLE_LENGTH))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch calls all of TorchScript deprecated
        found = torch.jit.trace(WithHidden(module).eval(), example, check_trace=False, strict=False)
    assert isinstance(found, torch.jit.ScriptModule)
    return found


class WithHidden(nn.Module):
    """Logits and hidden states."""

    def __init__(self, module: ProgramModule) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, tokens: Tensor, positions: Tensor, rows: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self.module.with_hidden(tokens, positions, rows, caches)
