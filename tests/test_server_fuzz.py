"""Requests made up from the server's own OpenAPI description: none may end in an error of the server's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving import Running, running
from tiny import tiny_artifact

import gristmill

requests = pytest.importorskip("requests", reason="fuzzing needs schemathesis")
schemathesis = pytest.importorskip("schemathesis", reason="fuzzing needs schemathesis")

EXAMPLES = 10  # of each endpoint that takes a body, of right ones and of wrong ones
schemathesis.checks.load_all_checks()
HELD = [
    schemathesis.checks.CHECKS.get_one(n)
    for n in ("not_a_server_error", "response_schema_conformance", "status_code_conformance")
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("fuzzed")
    session = gristmill.load(tiny_artifact(folder / "a", max_tokens=64, max_len=64), threads=1)
    with running(session, folder / "log", max_new_tokens=4, deadline_s=30.0) as server:
        yield server
    assert not [line for line in server.lines() if line["level"] == "error"]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_no_request_breaks_the_server(fuzzed: Running, mode: Any) -> None:
    described = schemathesis.openapi.from_url(fuzzed.url + "/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) >= 6
    with requests.Session() as connection:  # one for all: opening each anew takes longest
        for operation in operations:
            try_out(operation, mode, connection)


def try_out(operation: Any, mode: Any, connection: Any) -> None:
    if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
        return  # there is nothing to get wrong

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES if operation.body else 5, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def tries(case: Any) -> None:
        case.validate_response(case.call(session=connection), checks=HELD)

    tries()
