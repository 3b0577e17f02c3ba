"""The native module without x86: built for this machine with GRISTMILL_PORTABLE, and for aarch64 where a
compiler for it is found. `make test-aarch64` also runs the C++ tests there, in an emulator."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / "cpu").glob("*.cpp"))
RUNTIME = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "runtime" / "cpu").glob("*.cpp"))
HEADERS = ["-Iruntime/cpu", "-Ikernels/cpu"]
PYTHON_HEADERS = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
X86 = re.compile(r"\b(__builtin_ia32_\w+|__builtin_cpu_\w+|_mm\d*_\w+|__m(?:128|256|512)\w*)|x86_\w+")
FIND_KERNELS = "_ZN9gristmill12find_kernelsEPKc"  # gristmill::find_kernels(const char*)


def flags_of_setup() -> list[str]:
    """FLAGS of setup.py, which cannot be imported without setting up."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "FLAGS":
            return list(ast.literal_eval(statement.value))
    raise AssertionError("setup.py has no FLAGS")


FLAGS = [flag for flag in flags_of_setup() if not flag.startswith("-O")]


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stdout


def native_compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def lines_of_repository(preprocessed: str) -> Iterator[tuple[str, str]]:
    """(file, line) of what comes from the repository: its files are named by relative paths."""
    file = ""
    for line in preprocessed.splitlines():
        if marker := re.match(r'# \d+ "(.*?)"', line):
            file = marker[1]
        elif line.strip() and not file.startswith(("/", "<")):
            yield file, line


def x86_in(source: str, *flags: str) -> list[str]:
    """Lines that only x86 compiles, of a source and of what it includes."""
    command = [*native_compiler(), *FLAGS, *HEADERS, *PYTHON_HEADERS, *flags, "-E", source]
    lines = lines_of_repository(run(command))
    return [f"{file}: {line.strip()}" for file, line in lines if X86.search(line) or X86.search(file)]


@pytest.mark.parametrize("source", [*KERNELS, *RUNTIME])
def test_the_portable_build_has_no_x86_in_it(source: str) -> None:
    assert not any(flag.startswith("-m") for flag in FLAGS)
    assert not x86_in(source, "-DGRISTMILL_PORTABLE")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="this machine is no x86-64")
@pytest.mark.parametrize("source", ["kernels/cpu/avx2", "kernels/cpu/dispatch", "runtime/cpu/pool"])
def test_the_search_for_x86_finds_it(source: str) -> None:
    assert x86_in(f"{source}.cpp")


def test_the_portable_build_chooses_its_only_kernels(tmp_path: Path) -> None:
    library = tmp_path / "portable.so"
    flags = [*FLAGS, *HEADERS, "-O0", "-DGRISTMILL_PORTABLE", "-fvisibility=default", "-shared"]
    run([*native_compiler(), *flags, "-Wl,-z,defs", *KERNELS, "runtime/cpu/pool.cpp", "-o", str(library)])
    find = getattr(ctypes.CDLL(str(library)), FIND_KERNELS)
    find.restype = ctypes.POINTER(ctypes.c_char_p)  # a Kernels begins with its name
    assert find(b"auto")[0] == b"portable"
    assert not find(b"avx2")


def aarch64_compilers() -> Iterator[list[str]]:
    """What may compile for aarch64, the user's choice first."""
    if chosen := os.environ.get("AARCH64_CXX"):
        yield shlex.split(chosen)
    if shutil.which("aarch64-linux-gnu-g++"):
        yield ["aarch64-linux-gnu-g++"]
    if shutil.which("clang++"):
        yield ["clang++", "--target=aarch64-linux-gnu"]
    if importlib.util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]


@pytest.fixture(scope="module")
def aarch64_compiler(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("aarch64")
    (folder / "probe.cpp").write_text("#include <vector>\n#if !defined(__aarch64__)\n#error other\n#endif\n")
    for command in aarch64_compilers():
        if not subprocess.run([*command, "-c", "probe.cpp"], cwd=folder, capture_output=True).returncode:
            return command
    pytest.skip("needs a compiler for aarch64: aarch64-linux-gnu-g++, clang++ with its libraries, the Python "
                "package ziglang, or AARCH64_CXX")  # fmt: skip


def test_all_compiles_for_aarch64_by_the_flags_of_setup(aarch64_compiler: list[str], tmp_path: Path) -> None:
    def compile_one(source: str) -> Path:
        target = tmp_path / source.replace("/", ".").replace(".cpp", ".o")
        run([*aarch64_compiler, *FLAGS, *HEADERS, "-O0", "-c", source, "-o", str(target)])
        return target

    sources = [source for source in [*KERNELS, *RUNTIME] if not source.endswith("bindings.cpp")]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(target) for target in pool.map(compile_one, sources)]
    run([*aarch64_compiler, "-shared", "-pthread", "-Wl,-z,defs", *objects, "-o", str(tmp_path / "all.so")])
