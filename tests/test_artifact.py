"""Artifacts written and read: layout, identity, atomic placement, what a failed compile leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tiny import fill, tiny_artifact, tiny_program, tiny_weights

from gristmill.runtime.artifact import WEIGHTS, open_artifact
from gristmill.runtime.artifact_writer import ArtifactWriter
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.weights_file import TensorSpec, read_tensors


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    artifact = open_artifact(tiny_artifact(tmp_path / "a"))
    artifact.verify()
    assert artifact.json("evaluation.json") == {"perplexity": 4.0}
    assert artifact.manifest["source"] == {"name": "tiny-0"}
    assert leftovers(tmp_path) == []


def test_weights_are_aligned_safetensors_without_holes(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "a")
    expected = tiny_weights(tiny_program())
    with safe_open(path / WEIGHTS, "np") as file:
        for name, array in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), array, err_msg=name)
    data = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    spans = sorted(e["data_offsets"] for name, e in entries.items() if name != "__metadata__")
    assert [a for a, _ in spans] == [0] + [b for _, b in spans[:-1]]
    assert 8 + length + spans[-1][1] == len(data)
    starts = [e["data_offsets"][0] for name, e in entries.items() if not name.startswith("__")]
    assert len(starts) == len(expected) and all((8 + length + start) % 64 == 0 for start in starts)
    assert spans[-1][1] - spans[-1][0] >= 64
    assert set(read_tensors(path / WEIGHTS)) == set(expected)


def test_weights_may_come_in_pieces(tmp_path: Path) -> None:
    array = np.arange(100, dtype=np.int8)
    with ArtifactWriter(tmp_path / "a") as writer:
        weights = writer.declare_weights([TensorSpec("w", "I8", (10, 10)), TensorSpec("v", "I8", (3,))])
        weights.write("w", array[:33])
        weights.write("w", array[33:])
        weights.write("v", array[:3])
        writer.write_json("program.json", {})
        writer.commit({"quantization": {}})
    with safe_open(tmp_path / "a" / WEIGHTS, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("w"), array.reshape(10, 10))
        np.testing.assert_array_equal(file.get_tensor("v"), array[:3])


def test_same_input_same_bytes(tmp_path: Path) -> None:
    one, two, other = (tiny_artifact(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name
    assert open_artifact(one).content_id != open_artifact(other).content_id


def test_content_id_is_not_about_the_evaluation(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "a")
    with ArtifactWriter(tmp_path / "b") as writer:
        writer.commit(fill(writer))
    assert open_artifact(path).content_id == open_artifact(tmp_path / "b").content_id


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: Any) -> None:
    with pytest.raises(error), ArtifactWriter(tmp_path / "a") as writer:
        writer.seal(fill(writer))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_artifact_stays_unless_forced(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "a", seed=0)
    before = open_artifact(path).content_id
    with pytest.raises(GristmillError, match="--force"), ArtifactWriter(path):
        pass
    with pytest.raises(RuntimeError), ArtifactWriter(path, force=True) as writer:
        fill(writer, seed=1)
        raise RuntimeError
    assert open_artifact(path).content_id == before
    with ArtifactWriter(path, force=True) as writer:
        writer.commit(fill(writer, seed=1))
    assert open_artifact(path).content_id != before
    assert leftovers(tmp_path) == []


def test_a_damaged_artifact_can_be_replaced(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "a")
    (path / "manifest.json").write_text("")
    with ArtifactWriter(path, force=True) as writer:
        writer.commit(fill(writer))
    open_artifact(path).verify()


@pytest.mark.parametrize("names", [["notes.txt"], ["config.json", "model.safetensors"], ["manifest.json"]])
def test_what_is_not_an_artifact_is_never_replaced(tmp_path: Path, names: list[str]) -> None:
    target = tmp_path / "a"
    target.mkdir()
    for name in names:
        (target / name).write_text("{}")
    with pytest.raises(GristmillError, match="not a gristmill artifact"), ArtifactWriter(target, force=True):
        pass
    assert sorted(path.name for path in target.iterdir()) == sorted(names)


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GristmillError, match="is a file"), ArtifactWriter(tmp_path / "file", force=True):
        pass
    with pytest.raises(GristmillError, match="cannot be replaced"), ArtifactWriter("/", force=True):
        pass


def test_an_empty_directory_is_a_fine_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with ArtifactWriter(tmp_path / "a") as writer:
        writer.commit(fill(writer))
    open_artifact(tmp_path / "a").verify()


def test_two_writers_of_one_place(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "a") as first:
        with pytest.raises(GristmillError, match="another compile"), ArtifactWriter(tmp_path / "a"):
            pass
        first.commit(fill(first))
    open_artifact(tmp_path / "a").verify()


def with_path() -> dict[str, str]:
    """An environment in which another Python finds what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


WRITE_SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored from the start
signal.signal(signal.SIGINT, signal.default_int_handler)  # and this one in background jobs of a shell
from tiny import fill
from gristmill.runtime.artifact_writer import ArtifactWriter
with ArtifactWriter(sys.argv[1], force=True) as writer:
    writer.seal(fill(writer))
    print("sealed", flush=True)
    time.sleep(60)
"""


def start_slow_writer(out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_SLOWLY, str(out)],
        stdout=subprocess.PIPE, text=True, env=with_path(), cwd=out.parent,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "sealed\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path: Path, number: int) -> None:
    process = start_slow_writer(tmp_path / "a")
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_compile_left_goes_with_the_next(tmp_path: Path) -> None:
    process = start_slow_writer(tmp_path / "a")
    process.kill()
    process.wait(timeout=30)
    assert len(leftovers(tmp_path)) == 1 and not (tmp_path / "a").exists()
    tiny_artifact(tmp_path / "a")
    assert leftovers(tmp_path) == []


def test_a_leftover_goes_though_another_process_has_its_number(tmp_path: Path) -> None:
    left = tmp_path / f".a.tmp-{os.getppid()}"
    left.mkdir()
    tiny_artifact(tmp_path / "a")
    assert left.exists()  # it may be about to lock it
    os.utime(left, (0, 0))
    shutil.rmtree(tmp_path / "a")
    tiny_artifact(tmp_path / "a")
    assert not left.exists()


def test_a_living_compile_keeps_its_directory(tmp_path: Path) -> None:
    process = start_slow_writer(tmp_path / "a")
    tiny_artifact(tmp_path / "a")
    assert len(leftovers(tmp_path)) == 1
    process.kill()
    process.wait(timeout=30)


def test_an_artifact_moved_aside_comes_back(tmp_path: Path) -> None:
    """A replacement killed between its two renames: the old artifact is found under its temporary name."""
    path = tiny_artifact(tmp_path / "a", seed=3)
    path.rename(tmp_path / ".a.old-999999999")
    with pytest.raises(RuntimeError), ArtifactWriter(path, force=True):
        raise RuntimeError
    open_artifact(path).verify()
    assert leftovers(tmp_path) == []


FILL_THE_DISK = """
import resource, sys
from tiny import tiny_artifact
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # a write past it fails as on a full disk
tiny_artifact(sys.argv[1])
"""


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, env=with_path(), cwd=tmp_path, timeout=60)
    assert done.returncode != 0 and "OSError" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_opening_costs_little_whatever_the_size(tmp_path: Path) -> None:
    """No byte of the weights' data is read: 600 MB of holes open in milliseconds."""
    size = 600_000_000
    with ArtifactWriter(tmp_path / "a") as writer:
        weights = writer.declare_weights([TensorSpec("w", "U8", (size,))])
        for start in range(0, size, 1 << 22):
            weights.write("w", bytes(min(1 << 22, size - start)))
        writer.write_json("program.json", {})
        writer.commit({"quantization": {}})
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        open_artifact(tmp_path / "a")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.02, seconds
