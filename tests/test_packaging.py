"""The wheel has what it needs and nothing else, and what is installed is what was tested."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
