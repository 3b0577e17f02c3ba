"""What every test may use: the example model, and the folder `shared` where one is beside the repository."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: no library's threads besides
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads this when it is imported, and torch may import it in any test. 0 runs the kernels on a device.
os.environ.setdefault("TRITON_INTERPRET", "1")


OVER = "not run: the seconds are over"
_begun = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, help="Tests that would begin later are left out, and said so.")


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - _begun > seconds:
        pytest.skip(OVER)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(OVER in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests were {OVER}", red=True)


@pytest.fixture(scope="session", autouse=True)
def exports_are_remembered() -> Iterator[None]:
    """Where any test imported the tracer (and so torch, which takes seconds)."""
    tracing = sys.modules.get("gristmill.compiler.trace")
    if tracing is None:
        yield
        return
    from gristmill.compiler.exports import remembered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_export", remembered(tracing._export))
        yield


@pytest.fixture
def rows_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies by BLAS, whose order of summing depends on a row's place on some
    processors; a device's does not."""
    rows = "...ij,...jk->...ik"
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: np.einsum(rows, a, b, dtype=dtype))


@pytest.fixture(scope="session")
def py7m() -> Path:
    """The example model, a Hugging Face directory."""
    return ROOT / "examples" / "py7m"


@pytest.fixture(scope="session")
def py7m_f32(py7m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model as an artifact in f32."""
    return artifact_of(py7m, tmp_path_factory, weights="f32")


@pytest.fixture(scope="session")
def py7m_int4(py7m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model in int4 with an int8 cache, which is what activations and caches round most."""
    return artifact_of(py7m, tmp_path_factory, weights="int4", kv="int8")


def artifact_of(model: Path, folders: pytest.TempPathFactory, **options: Any) -> Path:
    import gristmill

    out = folders.mktemp("artifact") / "a"
    gristmill.compile(model, out, gate=False, **options)
    return out


@pytest.fixture(scope="session")
def shared() -> Path:
    """Models and texts that do not belong into the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not on this machine")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A Llama of 260 k parameters with shapes that no group divides."""
    return shared / "models" / "stories260k"


@pytest.fixture(scope="session")
def stories_f32(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260k as an artifact in f32."""
    return artifact_of(stories260k, tmp_path_factory, weights="f32")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 9,000 characters to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(300)))
    return path


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the report's page of the sample."""
    pytest.importorskip("matplotlib", reason="pictures need gristmill[report]")
    from sample_report import sample_report

    from gristmill.report.page import write_report

    folder = tmp_path_factory.mktemp("page")
    write_report(sample_report(), folder)
    return folder
