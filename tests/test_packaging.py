"""The wheel has what it needs and nothing else, and what is installed is what was tested."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import test_compatibility
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "v1"
RUN_AN_ARTIFACT = """
import json, sys
from importlib.util import find_spec
import gristmill
session = gristmill.load(sys.argv[1])
found = session.generate(json.loads(sys.argv[2]), max_new_tokens=int(sys.argv[3]), ignore_eos=True)
torch = find_spec("torch") is not None
print(json.dumps({"ids": found.token_ids, "torch": torch, "file": gristmill.__file__}))
"""
IN_THE_WHEEL = """
import json, sys
import gristmill, gristmill.cli, gristmill.runtime.session
from gristmill.runtime.cpu import _native
print(json.dumps({"file": gristmill.__file__, "isas": _native.isas(), "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(out), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("gristmill-*.whl"))


def in_the_wheel(paths: Iterable[Path]) -> set[str]:
    return {f"gristmill/{path.relative_to(ROOT)}" for path in paths}


def test_the_wheel_has_every_module_and_no_sources_of_the_extension(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("compiler", "passes", "quant", "kernels", "runtime", "report"):
        modules = [path for path in (ROOT / folder).rglob("*.py") if (path.parent / "__init__.py").exists()]
        assert modules and in_the_wheel(modules) <= set(names)
    for folder in ("compiler", "report"):
        assert in_the_wheel((ROOT / folder / "data").iterdir()) <= set(names)
    assert "gristmill/py.typed" in names
    assert [name for name in names if re.fullmatch(r"gristmill/runtime/cpu/_native\..*so", name)]
    assert not [name for name in names if name.endswith((".cpp", ".h", ".inc"))]
    assert not [name for name in names if not name.startswith(("gristmill/", "gristmill-"))]


def test_the_wheel_runs_from_anywhere_without_torch(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_WHEEL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["file"].startswith(str(tmp_path))
    assert "portable" in seen["isas"]
    assert not seen["torch"]


def test_every_direct_requirement_is_pinned() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    names = "dependencies|compile|constrain|cuda|dev|gguf|onnx|report|requires|serve"
    lists = re.findall(rf"^(?:{names}) = \[(.*?)\]\n", project, re.M | re.S)
    required = {name for text in lists for name in re.findall(r'"([\w-]+)', text)}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    assert len(required) > 15
    assert required - {"gristmill"} == pinned


def required(names: Iterable[str]) -> dict[str, Distribution]:
    """What distributions require, and what these do, without extras; of the packages that are installed."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        requirement = Requirement(waiting.pop())
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if name not in found and (marker is None or marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            waiting += found[name].requires or []
    return found


def test_the_wheel_runs_an_artifact_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """One that has the wheel, and links to what its metadata requires and nothing else."""
    environment = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    subprocess.run([*install, "--no-deps", str(wheel)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    metadata = next(site.glob("gristmill-*.dist-info"))
    for package in required(Distribution.at(metadata).requires or []).values():
        for top in {path.parts[0] for path in package.files or []} - {"..", "__pycache__"}:
            (site / top).symlink_to(package.locate_file(top))
    program = ["-c", RUN_AN_ARTIFACT, str(GOLDEN / "integers"), json.dumps(test_compatibility.PROMPT), "20"]
    done = subprocess.run(
        [str(python), "-I", *program], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["ids"] == test_compatibility.expected("integers")["greedy"].tolist()
    assert not seen["torch"] and Path(seen["file"]).is_relative_to(environment)
    command = subprocess.run(
        [str(environment / "bin" / "gristmill"), "verify", str(GOLDEN / "integers"), "--selftest"],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""},
    )  # fmt: skip
    assert command.returncode == 0, command.stderr
    assert "self-test" in command.stdout


def test_the_tag_of_the_wheel_is_one_that_its_symbols_allow(wheel: Path, tmp_path: Path) -> None:
    """As `make wheel` makes it: every other library is the system's own, and old enough for the tag."""
    if sys.platform != "linux" or shutil.which("auditwheel", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs auditwheel, on Linux")
    bin = str(Path(sys.executable).parent)
    command = [f"{bin}/auditwheel", "repair", "--wheel-dir", str(tmp_path), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": f"{bin}:/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.whl")
    assert "manylinux_2_" in made.name
    assert not [name for name in zipfile.ZipFile(made).namelist() if ".libs/" in name]
