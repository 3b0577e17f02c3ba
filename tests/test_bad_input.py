"""Every file of an artifact, damaged in every way: one line that says so, and never another exception."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import resign, tiny_artifact

import gristmill
from gristmill.runtime import selftest
from gristmill.runtime.artifact import WEIGHTS, open_artifact
from gristmill.runtime.errors import GristmillError

FILES = (
    "manifest.json", "program.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "selftest.json", "evaluation.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return tiny_artifact(folder / "a", seed=0), tiny_artifact(folder / "b", seed=1, max_len=32)


@pytest.fixture
def artifact(originals: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[0], tmp_path / "a"))


def refused(path: Path) -> str:
    """The one line with which `path` is refused, by load or at the latest by verify."""
    with pytest.raises(GristmillError) as caught:
        gristmill.load(path, threads=1)
        open_artifact(path).verify()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_original_is_not_refused(artifact: Path) -> None:
    gristmill.load(artifact, threads=1)
    open_artifact(artifact).verify()
    assert {path.name for path in artifact.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_missing(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    assert name in refused(artifact)


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
@pytest.mark.parametrize("name", FILES)
def test_truncated(artifact: Path, name: str, keep: float) -> None:
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert name in refused(artifact)


@pytest.mark.parametrize("name", FILES)
def test_longer(artifact: Path, name: str) -> None:
    with (artifact / name).open("ab") as file:
        file.write(b"\n")
    assert name in refused(artifact)


@pytest.mark.parametrize("name", FILES)
def test_bit_flipped(artifact: Path, name: str) -> None:
    data = bytearray((artifact / name).read_bytes())
    random = np.random.default_rng(0)
    for at in [0, len(data) - 1, *random.integers(0, len(data), 60).tolist()]:
        for bit in (0, 5, 7):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            (artifact / name).write_bytes(flipped)
            refused(artifact)


@pytest.mark.parametrize("name", FILES)
def test_swapped_with_another_artifact(artifact: Path, originals: tuple[Path, Path], name: str) -> None:
    shutil.copy(originals[1] / name, artifact / name)
    if (originals[0] / name).read_bytes() != (originals[1] / name).read_bytes():
        refused(artifact)


def test_weights_of_another_model_are_noticed_at_load(tmp_path: Path) -> None:
    """The same shapes, other weights: the header names the model, and its hash is checked."""
    one, other = tiny_artifact(tmp_path / "a", seed=0), tiny_artifact(tmp_path / "b", seed=1)
    shutil.copy(other / WEIGHTS, one / WEIGHTS)
    with pytest.raises(GristmillError, match=WEIGHTS):
        gristmill.load(one)


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_place_of_a_file(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    (artifact / name).mkdir()
    assert name in refused(artifact)


def test_a_link_out_of_the_artifact(artifact: Path, tmp_path: Path) -> None:
    (artifact / "tokenizer.json").rename(tmp_path / "outside.json")
    (artifact / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    assert "link" in refused(artifact)


@pytest.mark.parametrize(
    "name", ["../a/program.json", "/etc/passwd", "x/y", "..", ".", "", "a\\b", "a\0b", "manifest.json"]
)
def test_names_that_leave_the_directory(artifact: Path, name: str) -> None:
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    resign(artifact, files={**files, name: {"size": 1, "sha256": "0" * 64}})
    assert "name" in refused(artifact)


HOSTILE_FIELDS = [
    {"format": 2}, {"format": 0}, {"format": "1"}, {"format": True}, {"format": None}, {"kind": "other"},
    {"files": []}, {"files": {}}, {"files": {"program.json": 3}}, {"files": None}, {"content_id": None},
    {"content_id": "0" * 64}, {"quantization": []}, {"quantization": {"x": 1}}, {"weights_header_sha256": 5},
]  # fmt: skip


@pytest.mark.parametrize("fields", HOSTILE_FIELDS, ids=str)
def test_hostile_manifests_with_a_fitting_hash(artifact: Path, fields: dict[str, Any]) -> None:
    resign(artifact, **fields)
    refused(artifact)


@pytest.mark.parametrize(
    "entry", [{}, {"size": -1, "sha256": ""}, {"size": 1.5, "sha256": "x"}, {"size": True, "sha256": 3}]
)
def test_hostile_file_entries(artifact: Path, entry: dict[str, Any]) -> None:
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    resign(artifact, files={**files, "tokenizer.json": entry})
    refused(artifact)


def test_a_newer_format_says_what_it_needs(artifact: Path) -> None:
    resign(artifact, format=7)
    assert "format 7" in refused(artifact) and "newer" in refused(artifact)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "[" * 100_000, '{"kind": ' * 5000, "\ufeff{}", "{\x00}"]
)
def test_manifests_that_are_no_manifest(artifact: Path, text: str) -> None:
    (artifact / "manifest.json").write_text(text)
    assert "manifest.json" in refused(artifact)


def test_places_that_are_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path / "file", tmp_path, "a\0b"):
        refused(Path(path))


def replace_file(artifact: Path, name: str, data: bytes) -> None:
    """Puts `data` in place of a file and makes the whole manifest agree."""
    from gristmill.runtime.artifact import FileEntry, content_id

    (artifact / name).write_bytes(data)
    manifest = json.loads((artifact / "manifest.json").read_text())
    import hashlib

    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    table = {key: FileEntry(**entry) for key, entry in manifest["files"].items()}
    resign(artifact, files=manifest["files"], content_id=content_id(table, manifest["quantization"]))


JSON_VALUES = [b"", b"[]", b"null", b"{", b'"x"', b"[" * 5000, b"\xff\xfe{}", b"{}"]


@pytest.mark.parametrize("data", JSON_VALUES)
def test_hostile_programs_with_a_fitting_hash(artifact: Path, data: bytes) -> None:
    replace_file(artifact, "program.json", data)
    assert "program" in refused(artifact)


def test_mutated_programs_with_a_fitting_hash(artifact: Path) -> None:
    """One value replaced by another that does not fit: an error or a working session."""
    program = json.loads((artifact / "program.json").read_text())
    random = np.random.default_rng(1)
    for _ in range(150):
        mutant = mutate(program, random)
        replace_file(artifact, "program.json", json.dumps(mutant).encode())
        try:
            gristmill.load(artifact, threads=1).forward([1, 2], [0, 1], [0, 0])
        except GristmillError as error:
            assert "\n" not in str(error)


def mutate(value: Any, random: np.random.Generator) -> Any:
    """A copy of a JSON value with one leaf changed."""
    value = json.loads(json.dumps(value))
    spots = list(leaves(value))
    holder, key = spots[random.integers(len(spots))]
    strange: list[Any] = [-1, 0, 1, 3, 2**31, 2**63, 10**30, 1e300, None, "x", [], {}, True, -0.5]
    holder[key] = strange[random.integers(len(strange))]
    return value


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, (dict, list)):
            yield from leaves(item)
        yield value, key


@pytest.mark.parametrize("data", JSON_VALUES[:-1])
def test_hostile_tokenizers_with_a_fitting_hash(artifact: Path, data: bytes) -> None:
    replace_file(artifact, "tokenizer.json", data)
    session = gristmill.load(artifact, threads=1)  # the tokenizer is read when it is needed
    with pytest.raises(GristmillError, match="tokenizer"):
        session.generate("x")


@pytest.mark.parametrize("ids", ["x", None, [None, "1", 2.5], {}, -3, 10**30, []])
def test_hostile_end_ids(artifact: Path, ids: Any) -> None:
    replace_file(artifact, "generation_config.json", json.dumps({"eos_token_id": ids}).encode())
    assert len(gristmill.load(artifact, threads=1).generate("x", max_new_tokens=2).token_ids) == 2


def one_logit(ids: list[int], column: int, logit: float) -> dict:
    return {"ids": ids, "highest": [{"ids": [column], "logits": [logit]}]}


HOSTILE_RECORDS = [
    {}, {"ids": []}, {"ids": "x", "highest": 3}, one_logit([1], 9**9, 1.0), one_logit([9**9], 1, 1.0),
    one_logit([1], 1, 1e9), one_logit([1], 1, float("nan")), one_logit([9**30], 1, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("record", HOSTILE_RECORDS, ids=str)
def test_hostile_selftests(artifact: Path, record: dict[str, Any]) -> None:
    replace_file(artifact, "selftest.json", json.dumps(record).encode())
    with pytest.raises(GristmillError):
        selftest.check(gristmill.load(artifact, threads=1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_files_that_may_not_be_read(artifact: Path) -> None:
    (artifact / "program.json").chmod(0)
    assert "program.json" in refused(artifact)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.append(1) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__call__.__globals__['json'] }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ ('%s' | attr('format')).__globals__ }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**12 }}",
    "{% if",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_chat_templates_stay_in_their_sandbox(template: str) -> None:
    from gristmill.runtime.chat_template import render

    try:
        text = render(template, [{"role": "user", "content": "x"}], {})
    except GristmillError as error:
        assert "\n" not in str(error)
    else:
        assert text == "", text  # an attribute that the sandbox hides is undefined, and prints as nothing
