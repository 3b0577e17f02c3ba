"""What compiles besides Hugging Face directories and GGUF: modules, TorchScript files, torch.compile."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from ...runtime.errors import GristmillError
from ..load import Source

SCRIPTS = (".pt", ".pth", ".ts", ".torchscript")


def source_of(model: Any, example: Any = None, tokenizer: Any = None) -> str | Source:
    """What a compile starts from: a module or TorchScript file traced, or the name of what load.py opens.

    Raises GristmillError for anything else, and for arguments that are of no use to it.
    """
    from torch import nn

    if isinstance(model, nn.Module):
        from .module import module_source

        return module_source(model, example, tokenizer)
    if not isinstance(model, (str, PathLike)):
        raise GristmillError(
            f"model is {type(model).__name__}, expected a directory, a file, a hub name or a torch.nn.Module"
        )
    if Path(model).suffix.lower() in SCRIPTS and not Path(model).is_dir():
        from .torchscript import script_file

        return script_file(Path(model), example, tokenizer)
    for name, value in (("example", example), ("tokenizer", tokenizer)):
        if value is not None:
            raise GristmillError(f"{name} is for modules and TorchScript files; {model} brings its own")
    return str(model)
