"""The parts of setup that need a program: which folder is which package, and the C++ extension.

The folders stand at the top of the repository and are imported under `gristmill`. The extension is compiled
here, a file for each processor at a time, into build/native, and only what changed: the compiler's
dependency files tell.
"""
from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
FOLDERS = ["compiler", "passes", "quant", "kernels", "runtime", "report", "export", "integrations"]
SOURCES = ["runtime/cpu/*.cpp", "kernels/cpu/*.cpp"]
OBJECTS = Path("build/native")
# Products and sums are fused only where the source says fma: every instruction set gives the same bits.
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-pthread", "-fPIC", "-fvisibility=hidden",
         "-ffp-contract=off", "-fno-math-errno"]


def package_directories() -> dict[str, str]:
    """Import name -> folder, for every folder with an __init__.py."""
    found = {"gristmill": "gristmill"}
    for folder in FOLDERS:
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            relative = init.parent.relative_to(ROOT)
            found["gristmill." + ".".join(relative.parts)] = str(relative)
    return found


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def is_current(target: Path, command: list[str]) -> bool:
    """Whether the object is newer than every file that it was made from, by the same command."""
    depends, last = target.with_suffix(".d"), target.with_suffix(".command")
    if not all(file.exists() for file in (target, depends, last)) or last.read_text() != shlex.join(command):
        return False
    files = [Path(name) for name in depends.read_text().replace("\\\n", " ").split()[1:]]
    return all(file.exists() and file.stat().st_mtime <= target.stat().st_mtime for file in files)


def compile_object(source: str) -> Path:
    import pybind11  # only the extension needs it, not the listing of packages

    target = OBJECTS / source.replace("/", ".").replace(".cpp", ".o")
    include = ["-Iruntime/cpu", "-Ikernels/cpu", "-isystem", pybind11.get_include(),
               "-isystem", sysconfig.get_paths()["include"]]
    command = [*compiler(), *FLAGS, *include, "-MMD", "-c", source, "-o", str(target)]
    if not is_current(target, command):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".command").unlink(missing_ok=True)
        if subprocess.run(command).returncode:
            raise CompileError(f"{source} does not compile")
        target.with_suffix(".command").write_text(shlex.join(command))
    return target


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(path) for path in pool.map(compile_object, ext.sources)]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run([*compiler(), "-shared", "-pthread", *objects, "-o", str(target)]).returncode:
            raise CompileError(f"{target.name} does not link")


sources = sorted(str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern))
directories = package_directories()
setup(
    include_package_data=False,  # C++ sources are for the source distribution
    packages=sorted(directories),
    package_dir=directories,
    package_data={"": ["*.pyi", "py.typed", "data/*"]},
    ext_modules=[Extension("gristmill.runtime.cpu._native", sources, language="c++")] if sources else [],
    cmdclass={"build_ext": BuildNative},
)
