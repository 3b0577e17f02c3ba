from __future__ import annotations

from pathlib import Path

import pytest
from sample_report import sample_report

from gristmill.report.page import write_report


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the page of the sample."""
    pytest.importorskip("matplotlib", reason="pictures need gristmill[report]")
    folder = tmp_path_factory.mktemp("page")
    write_report(sample_report(), folder)
    return folder
