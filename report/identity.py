"""What a cached result depends on: the model's files, the code that computes, the machine.

Files are hashed whole, each time: a second for a gigabyte, and nothing to be fooled by.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import gristmill
from gristmill.runtime.artifact import MANIFEST
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.machine import processor_name, usable_cpus

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "pytorch_model*.bin")
COMPILER = ("compiler", "passes", "quant", "kernels")  # folders that decide what an artifact holds
RUNTIME = ("runtime", "kernels", "compiler", "report/accuracy.py", "report/reference.py")  # what is measured
_CODE = (".py", ".so")


def digest(value: Any) -> str:
    """64 bits of the hash of a JSON value, as 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """sha256 of a file, or of all files of a folder. Raises GristmillError for one that cannot be read."""
    path = Path(path)
    try:
        if path.is_dir():
            return digest([[p.name, file_digest(p)] for p in sorted(path.iterdir()) if p.is_file()])
        with path.open("rb") as file:
            return _stream_digest(file)
    except OSError as error:
        raise GristmillError(f"{path} cannot be read: {error.strerror or error}") from None


def _stream_digest(file: Any) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 22):
        found.update(block)
    return found.hexdigest()


def is_artifact(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def model_directory(model: str) -> Path:
    """The directory of a model: itself, or what the hub's cache holds of it. Raises GristmillError."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise GristmillError(
                f"{folder} has neither config.json nor {MANIFEST}: neither a Hugging Face model directory "
                "nor an artifact"
            )
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise GristmillError(
            f"{model}: {'is a file' if folder.exists() else 'no such directory'}; expected a Hugging Face "
            "model directory, artifacts, or a hub name like owner/model"
        )
    from gristmill.compiler.load import load_source

    return load_source(model).directory


def model_digests(directory: Path) -> dict[str, str]:
    """sha256 of every file of a model that a compile may read."""
    files = (p for p in sorted(directory.iterdir()) if any(fnmatch.fnmatch(p.name, m) for m in MODEL_FILES))
    return {path.name: file_digest(path) for path in files if path.is_file()}


@functools.cache
def code_digest(folders: tuple[str, ...]) -> str:
    """Of gristmill's own code in these folders and files, the native extension included."""
    root = Path(gristmill.__file__).parent
    listed = (root / name for name in folders)
    files = (p for path in listed for p in (sorted(path.rglob("*")) if path.is_dir() else [path]))
    return digest([[str(p.relative_to(root)), file_digest(p)] for p in files if p.suffix in _CODE])


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"gristmill": gristmill.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def compile_versions() -> dict[str, str]:
    """What an artifact's bytes may follow from beside the model and the options."""
    return {
        **versions(("torch", "transformers", "numpy", "tokenizers")),
        "code": code_digest(COMPILER),
        "machine": platform.machine(),
    }


@functools.cache
def machine_name(device: str) -> str:
    """The processor, or the GPU that a session on "cuda" would use."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "no GPU"
    return processor_name()


def machine_key(device: str) -> dict[str, Any]:
    """What tells this machine from another one whose figures must not be mixed with its own."""
    return {
        "device": device,
        "name": machine_name(device),
        "cpus": usable_cpus(),
        "host": os.uname().nodename,
    }
