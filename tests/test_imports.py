"""The import table of the design: who may import whom, and that running an artifact needs no compiler."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_artifact

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "passes", "quant", "kernels", "runtime", "report", "export", "integrations")
MAY_IMPORT = {  # folder -> prefixes of gristmill.* it may import, besides itself and runtime.errors
    "compiler": ("passes", "quant", "runtime", "kernels.ops", ""),
    "passes": ("kernels.ops",),
    "quant": ("kernels.ops", "runtime.artifact"),
    "kernels": (),
    "runtime": ("kernels",),
    "report": ("compiler", "quant.scheme", "quant.tensor", "runtime", ""),  # of quant the formats alone
    "export": ("runtime", "quant", "kernels.reference", ""),
    "integrations": ("runtime", "quant.formats"),
}
HEAVY = {"torch", "triton", "transformers", "huggingface_hub", "sentencepiece", "onnx", "onnxruntime"}
SERVING = {"fastapi", "starlette", "uvicorn", "httptools", "pydantic", "prometheus_client"}
DEVICES = ("cuda", "onnx", "torchscript", "pt2", "parallel")  # folders of the runtime that loads import


def files(folder: str) -> list[Path]:
    found = sorted(path for path in (ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def imported(path: Path, only_at_import: bool) -> set[str]:
    """Absolute names of the modules that `path` imports; TYPE_CHECKING blocks do not count."""
    package = ["gristmill", *path.relative_to(ROOT).with_suffix("").parts]
    package = package[:-1]
    names = set()
    for node in nodes(ast.parse(path.read_text()), only_at_import):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            names |= (
                {f"{module}.{alias.name}" for alias in node.names}
                if module.startswith("gristmill")
                else {module}
            )
    return names


def nodes(tree: ast.AST, only_at_import: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if only_at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield node
        yield from nodes(node, only_at_import)


def is_allowed(folder: str, name: str) -> bool:
    inside = name.removeprefix("gristmill").lstrip(".")
    if inside.startswith((folder, "runtime.errors")):
        return True
    return any(inside.startswith(prefix) if prefix else "." not in inside for prefix in MAY_IMPORT[folder])


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_imports_what_the_table_allows(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(folder)
        for name in sorted(imported(path, only_at_import=False))
        if name.startswith("gristmill") and not is_allowed(folder, name)
    ]
    assert not wrong, wrong


def test_the_runtime_imports_nothing_heavy_but_for_its_devices() -> None:
    own = {ROOT / "runtime" / device for device in DEVICES}
    cpu = [path for path in files("runtime") if path.parent not in own]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in [*cpu, *files("gristmill"), ROOT / "compiler" / "options.py"]
        for name in imported(path, only_at_import=path.parts[-2] == "gristmill")
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, wrong


def test_only_a_load_for_a_device_imports_its_executor() -> None:
    """Inside a function; what runs exported folders by name alone."""
    homes = {ROOT / "runtime" / device for device in DEVICES}
    importers = [
        (path.relative_to(ROOT).as_posix(), name)
        for path in [*files("runtime"), *files("gristmill")]
        if path.parent not in homes
        for at_import in (True, False)
        for name in imported(path, at_import)
        if name.startswith(tuple(f"gristmill.runtime.{device}" for device in DEVICES))
    ]
    assert sorted(importers) == [
        ("runtime/check_machine.py", "gristmill.runtime.cuda.device_for"),
        ("runtime/session.py", "gristmill.runtime.cuda.open_executor"),
        ("runtime/session.py", "gristmill.runtime.parallel.open_executor"),
    ]


def test_ray_is_imported_where_it_was_asked_for() -> None:
    """At import by modules that only --replicas or a cluster imports; elsewhere inside functions."""
    server = ROOT / "runtime" / "server"
    with_ray = {server / f"{name}.py" for name in ("ray_app", "ray_replicas", "ray_router", "serve_replicas")}
    names = ("ray", *(f"gristmill.runtime.server.{path.stem}" for path in with_ray))
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in [*(file for folder in FOLDERS for file in files(folder)), *files("gristmill")]
        if path not in with_ray
        for name in imported(path, only_at_import=True)
        if any(name == known or name.startswith(f"{known}.") for known in names)
    ]
    assert not wrong, wrong
    assert any("ray" in imported(path, only_at_import=True) for path in with_ray), "the names are still right"


def test_only_serving_imports_what_a_server_needs() -> None:
    server = ROOT / "runtime" / "server"
    own = [path for folder in FOLDERS for path in files(folder) if path.parent != server]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in [*own, *files("gristmill")]
        for name in imported(path, only_at_import=path.name == "cli_serve.py")
        if name.split(".")[0] in SERVING or name.startswith("gristmill.runtime.server")
    ]
    assert not wrong, wrong


def python(code: str, cwd: Path) -> str:
    """What a fresh Python prints for `code`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_gristmill_is_quick(tmp_path: Path) -> None:
    code = (
        "import time, sys; t = time.perf_counter(); import gristmill; s = time.perf_counter() - t;"
        "print(s); assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    assert min(float(python(code, tmp_path)) for _ in range(3)) < 0.3


def test_an_artifact_runs_without_torch(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "a")
    code = f"""
import sys
for name in {sorted(HEAVY | SERVING)}:
    sys.modules[name] = None  # importing it fails
import gristmill
from gristmill.cli import run_command
session = gristmill.load({str(path)!r})
assert len(session.generate("x", max_new_tokens=3).token_ids) == 3
for command in (["verify", "--selftest"], ["inspect", "--program"], ["run", "--prompt", "x"]):
    assert run_command([command[0], {str(path)!r}, *command[1:]]) == 0, command
"""
    python(code, tmp_path)


def test_compiling_without_torch_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them fails
import gristmill
try:
    gristmill.compile("model", "out")
except gristmill.GristmillError as error:
    print(error)
"""
    assert "gristmill[compile]" in python(code, tmp_path)
