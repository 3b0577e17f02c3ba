"""Reading an artifact: a directory whose manifest accounts for every byte of every other file.

What is checked when: opening reads the manifest (which carries its own hash), the sizes of all files, the
hashes of the JSON files and of the weights' header; that costs milliseconds whatever the model's size. The
weights' data is hashed by `verify` only: between the two a flipped weight may give wrong numbers, and the
executor's own checks keep it from doing more.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.weights_file import read_header_bytes

FORMAT_VERSION = 1
KIND = "gristmill artifact"
MANIFEST, PROGRAM, WEIGHTS = "manifest.json", "program.json", "weights.safetensors"
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
GENERATION_CONFIG, SELFTEST, EVALUATION = "generation_config.json", "selftest.json", "evaluation.json"
MODEL_CONFIG = "model_config.json"  # the source's config.json: nothing here reads it, exports need it
EXPORT = "export.json"  # what a folder of `gristmill export` has instead of a manifest
SPECIAL_TOKENS_MAP = "special_tokens_map.json"  # older models name their special tokens here
IDENTITY_FILES = (
    PROGRAM,
    WEIGHTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    CHAT_TEMPLATE,
)  # what content_id covers

MAX_MANIFEST_BYTES = 16_000_000
BLANK_HASH = "0" * 64
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OWN_HASH = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_AGAIN = "compile the model again or copy the artifact anew"


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: what it says of itself, and its files, each read only after its hash agreed.

    listing: the file that holds the hashes. again: what to do where they do not agree."""

    path: Path
    manifest: dict[str, Any]
    files: dict[str, FileEntry]
    listing: str = MANIFEST
    again: str = _AGAIN

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS

    @property
    def content_id(self) -> str:
        return str(self.manifest["content_id"])

    def read(self, name: str) -> bytes:
        """The bytes of file `name`, checked against the manifest."""
        if name not in self.files:
            raise GristmillError(f"{self.path} has no {name}")
        data = _read_bytes(self.path / name)
        if hashlib.sha256(data).hexdigest() != self.files[name].sha256:
            raise self._damaged(name)
        return data

    def json(self, name: str) -> dict[str, Any]:
        """File `name` as a JSON object."""
        return parse_json(self.read(name), self.path / name)

    def verify(self) -> None:
        """Reads and hashes every file, the weights included."""
        for name, entry in self.files.items():
            if _hash_file(self.path / name) != entry.sha256:
                raise self._damaged(name)

    def _damaged(self, name: str) -> GristmillError:
        return GristmillError(
            f"{self.path / name} does not agree with its hash in {self.listing}; {self.again}"
        )


def open_artifact(path: str | Path) -> Artifact:
    """Opens the artifact at `path` and checks all that needs no reading of the weights' data."""
    root = Path(path)
    manifest = read_manifest(root)
    artifact = Artifact(root, manifest, _file_table(root, manifest))
    for name, entry in artifact.files.items():
        _check_file(root, name, entry)
    if manifest["content_id"] != content_id(artifact.files, manifest["quantization"]):
        raise GristmillError(f"{root / MANIFEST}: content_id does not follow from the files; {_AGAIN}")
    for name in artifact.files:
        if name != WEIGHTS:
            artifact.read(name)
    if (
        hashlib.sha256(read_header_bytes(artifact.weights_path)).hexdigest()
        != manifest["weights_header_sha256"]
    ):
        raise GristmillError(f"{root / WEIGHTS} has another header than {MANIFEST} says; {_AGAIN}")
    return artifact


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of directory `root`, complete, of a known version and unchanged since it was written."""
    if not root.is_dir():
        raise GristmillError(
            f"{root} is {'a file' if root.exists() else 'missing'}; expected an artifact directory"
        )
    file = root / MANIFEST
    if not file.is_file():
        _refuse_export(root)
        raise GristmillError(
            f"{root} has no {MANIFEST}: not a gristmill artifact; write one with `gristmill compile`"
        )
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise GristmillError(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes: not a gristmill manifest")
    data = _read_bytes(file)
    manifest = parse_json(data, file)
    if manifest.get("kind") != KIND:
        raise GristmillError(
            f"{file} is not the manifest of a gristmill artifact; write one with `gristmill compile`"
        )
    _check_version(manifest.get("format"), file)
    found = _OWN_HASH.findall(data)
    if len(found) != 1 or manifest_hash(data) != found[0].decode():
        raise GristmillError(f"{file} was changed after it was written; {_AGAIN}")
    _check_fields(manifest, file)
    return manifest


def parse_json(data: bytes, source: str | Path) -> dict[str, Any]:
    """`data` as a JSON object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise GristmillError(f"{source} is not valid JSON; {_AGAIN}") from error
    if not isinstance(value, dict):
        raise GristmillError(f"{source} holds a {type(value).__name__}, expected an object; {_AGAIN}")
    return value


def manifest_hash(data: bytes) -> str:
    """sha256 of a manifest's bytes with its own hash blanked."""
    blank = f'"manifest_sha256": "{BLANK_HASH}"'.encode()
    return hashlib.sha256(_OWN_HASH.sub(blank, data)).hexdigest()


def content_id(files: dict[str, FileEntry], quantization: Any) -> str:
    """The identity of what an artifact computes: program, weights, tokenizer, quantization."""
    identity = {name: files[name].sha256 for name in IDENTITY_FILES if name in files}
    text = json.dumps(
        {"files": identity, "quantization": quantization}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()


def is_plain_name(name: object) -> bool:
    """A file name that cannot leave the directory."""
    return isinstance(name, str) and len(name) < 200 and _PLAIN_NAME.fullmatch(name) is not None


def _refuse_export(root: Path) -> None:
    """Names the device for a folder that `gristmill export` wrote."""
    if (root / EXPORT).is_file():
        to = parse_json(_read_bytes(root / EXPORT), root / EXPORT).get("to")
        device = {"onnx": "onnx:cpu", "pt2": "pt2:cpu"}.get(str(to), to)
        raise GristmillError(f"{root} is an export to {to}: load it with device={device!r}")


def _check_version(version: object, file: Path) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise GristmillError(f"{file}: format is {version!r}, expected a version number; {_AGAIN}")
    if version > FORMAT_VERSION:
        raise GristmillError(
            f"{file} has format {version}, this gristmill reads up to {FORMAT_VERSION}; install a newer one"
        )


def _check_fields(manifest: dict[str, Any], file: Path) -> None:
    expected = {"content_id": str, "weights_header_sha256": str, "files": dict, "quantization": dict}
    for key, kind in expected.items():
        if not isinstance(manifest.get(key), kind):
            raise GristmillError(f"{file}: {key} is missing or not a {kind.__name__}; {_AGAIN}")


def _file_table(root: Path, manifest: dict[str, Any]) -> dict[str, FileEntry]:
    table = {}
    for name, entry in manifest["files"].items():
        if not is_plain_name(name) or name == MANIFEST:
            raise GristmillError(
                f"{root / MANIFEST} names the file {name!r}; only plain names inside the artifact are read"
            )
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise GristmillError(f"{root / MANIFEST}: no size and sha256 for {name}; {_AGAIN}")
        table[name] = FileEntry(size, digest)
    for name in (PROGRAM, WEIGHTS):
        if name not in table:
            raise GristmillError(f"{root / MANIFEST} lists no {name}; {_AGAIN}")
    return table


def _check_file(root: Path, name: str, entry: FileEntry) -> None:
    file = root / name
    if not file.is_file():
        raise GristmillError(f"{file} is missing; {_AGAIN}")
    if file.is_symlink() and file.resolve().parent != root.resolve():
        raise GristmillError(f"{file} is a link that leaves the artifact; copy the file itself")
    size = file.stat().st_size
    if size != entry.size:
        raise GristmillError(f"{file} has {size} bytes, {MANIFEST} says {entry.size}; {_AGAIN}")


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise GristmillError(f"{file} cannot be read: {error.strerror or error}") from error


def _hash_file(file: Path) -> str:
    try:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise GristmillError(f"{file} cannot be read: {error.strerror or error}") from error
