"""`gristmill serve` when something goes wrong: clients that leave or stand still, full disks, signals.

After each of them nothing is held: no slot, no thread, no file.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from serving import MODEL, Running, handles, httpx, nothing_runs, openai, raw, running, threads, wait_until
from tiny import FakeExecutor, fake_session, tiny_artifact

import gristmill
from gristmill.cli import cli, run_command
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server import logs
from gristmill.runtime.server.settings import KEYS_VARIABLE, Keys, Settings, read_keys
from gristmill.runtime.session import Session

ENDLESS = 90_000  # tokens: no test waits for so many
LONG: dict[str, Any] = {"prompt": "ab", "temperature": 0, "max_tokens": ENDLESS, "stream": True}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Two slots with room for texts that take minutes."""
    folder = tmp_path_factory.mktemp("endless")
    return gristmill.load(tiny_artifact(folder / "a", max_tokens=64, max_len=100_000, max_slots=2), threads=1)


@pytest.fixture(autouse=True)
def nothing_leaks(endless: Session) -> Iterator[None]:
    """Files and threads before and after, the first server's lasting ones aside."""
    before = handles()
    yield
    assert nothing_runs(endless)
    wait_until(lambda: not threads())  # the preparing ones end by themselves
    wait_until(lambda: handles() <= before)


def requests_logged(server: Running) -> list[dict[str, Any]]:
    return [line for line in server.lines() if line["event"] == "request" and line.get("id")]


# ---- clients ----


def test_a_client_that_leaves_frees_its_slot(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log") as server:
        with server.client() as client:
            stream = client.completions.create(model=MODEL, **LONG)
            next(iter(stream))
            assert server.taken == 1
            stream.close()
            wait_until(lambda: server.taken == 0)
        with server.connect() as waiting:  # not a stream: it has sent nothing yet
            waiting.sendall(raw(json.dumps({**LONG, "stream": False}).encode()))
            wait_until(lambda: endless._scheduler.running == 1)
        wait_until(lambda: server.taken == 0)
    for line in requests_logged(server):
        assert line["status"] == 499 and line["completion_tokens"] < ENDLESS
        assert line["finish_reasons"] == ["cancelled"]
    assert server.server.engine.measurements.disconnects == 2


def test_a_client_that_leaves_the_queue_is_forgotten(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log") as server, ThreadPoolExecutor(3) as pool:
        sockets = [server.connect() for _ in range(3)]
        for connection in sockets:
            connection.sendall(raw(json.dumps(LONG).encode()))
        wait_until(lambda: endless._scheduler.waiting == 1)
        done = pool.submit(server.complete, max_tokens=4)  # behind them
        for connection in sockets:
            connection.close()
        assert done.result().status_code == 200


def test_a_reader_that_stands_still_is_given_up(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log", stall_s=1.0) as server:
        server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        with socket.socket() as still:
            still.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            still.connect(server.listening.getsockname())
            still.sendall(raw(json.dumps({**LONG, "logprobs": 20}).encode()))
            wait_until(lambda: server.taken == 1)
            assert server.complete(max_tokens=4).status_code == 200, "others are served meanwhile"
            wait_until(lambda: server.taken == 0)
        wait_until(lambda: len(requests_logged(server)) == 2)
    assert requests_logged(server)[-1]["status"] == 499


def test_a_connection_that_says_nothing_is_closed(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log", stall_s=1.0) as server:
        with server.connect() as silent:
            assert silent.recv(100) == b""
        with server.connect() as slow:  # its body never comes
            slow.sendall(raw(b"{", length=100))
            answer = b"".join(iter(lambda: slow.recv(10_000), b""))
            assert b" 408 " in answer and b"connection: close" in answer and b"request_timeout" in answer


def test_too_long_a_body_is_refused_and_the_server_goes_on(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log") as server:
        found = server.complete("x" * 10_000_000)
        assert found.status_code == 413 and found.json()["error"]["code"] == "request_too_large"

        def chunks() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 100_000

        headers = {"content-type": "application/json"}
        assert (
            httpx.post(server.url + "/v1/completions", content=chunks(), headers=headers).status_code == 413
        )
        with server.connect() as enormous:
            enormous.sendall(raw(b"{", length=2**40))
            assert b" 413 " in enormous.recv(10_000)
        assert server.complete("x" * 10_000, max_tokens=2).status_code == 200


def test_a_reset_in_the_middle_of_a_request(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log") as server:
        for body in (raw(b"{", length=100), raw(json.dumps(LONG).encode())):
            connection = server.connect()
            connection.sendall(body)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        assert server.complete(max_tokens=4).status_code == 200
        wait_until(lambda: server.taken == 0)


# ---- limits ----


def test_a_full_queue_says_when_to_come_back(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log", max_queue=1) as server:
        sockets = [server.connect() for _ in range(3)]
        for connection in sockets:
            connection.sendall(raw(json.dumps(LONG).encode()))
        wait_until(lambda: server.taken == 3)
        found = server.complete()
        assert found.status_code == 429 and found.json()["error"]["code"] == "queue_full"
        assert 1 <= int(found.headers["retry-after"]) <= 60
        with server.client() as client, pytest.raises(openai.RateLimitError):
            client.completions.create(model=MODEL, prompt="a")
        for connection in sockets:
            connection.close()
        wait_until(lambda: server.taken == 0)
        assert server.complete(n=3, max_tokens=2).status_code == 200


def test_a_deadline_ends_a_text_where_it_is(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log", deadline_s=1.0) as server:
        found = server.complete(max_tokens=ENDLESS, n=2)
    choices = found.json()["choices"]
    assert [(c["finish_reason"], c["stop_reason"]) for c in choices] == [("length", "timeout")] * 2
    assert all(choice["text"] for choice in choices)


def test_a_deadline_that_passes_in_the_queue_is_an_error(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log", deadline_s=0.3) as server:
        taken = [endless._slots.take(), endless._slots.take()]  # by nobody who decodes
        try:
            found = server.complete()
        finally:
            for slot in taken:
                assert slot is not None
                endless._slots.give_back(slot)
    assert found.status_code == 503 and found.json()["error"]["code"] == "deadline_exceeded"


def test_keys_are_asked_for(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log", keys=("one", "two")) as server:
        assert server.get("/health").status_code == 200
        for path in ("/metrics", "/v1/models", "/openapi.json"):
            found = server.get(path)
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        with server.client(api_key="two") as client:
            assert client.completions.create(model=MODEL, prompt="a", max_tokens=2).choices
        with server.client(api_key="twO") as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(model=MODEL, prompt="a")
    assert "twO" not in Path(server.log_path).read_text()


def test_keys_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nalpha\n\n beta \n")
    monkeypatch.setenv(KEYS_VARIABLE, "gamma, alpha")
    assert read_keys(str(path)) == ("gamma", "alpha", "beta")
    keys = Keys(("alpha",))
    assert keys.accepts("Bearer alpha") and keys.accepts("bearer  alpha")
    assert not any(keys.accepts(given) for given in ("", "alpha", "Basic alpha", "Bearer alph", "Bearer "))
    assert not Keys(())
    path.write_text("# none\n")
    with pytest.raises(GristmillError, match="holds no API key"):
        read_keys(str(path))
    with pytest.raises(GristmillError, match="deadline_s"):
        Settings(model="m", deadline_s=0)


# ---- the machine ----


def test_a_full_disk_costs_lines_of_the_log_alone(endless: Session) -> None:
    with running(endless, "/dev/full") as server:
        assert server.complete(max_tokens=4).status_code == 200
        wait_until(lambda: server.log.dropped >= 3)
        assert "gristmill_log_lines_dropped_total 0.0" not in server.get("/metrics").text
        assert server.complete(max_tokens=4).status_code == 200


def test_a_log_that_nobody_reads_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_WAITING", 10)
    monkeypatch.setattr(logs, "CLOSING_S", 0.05)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"\n" * 512)
    os.close(writer)
    log = logs.Log(str(path))
    for _ in range(30):
        logs.log_event("x" * 100)
    assert log.dropped > 0
    log.close()
    assert threads() == {"gristmill-log"}, "it stands before the full pipe"
    data, ended = b"", False
    while not ended:
        try:
            chunk = os.read(reader, 1 << 20)
            data, ended = data + chunk, not chunk
        except BlockingIOError:
            time.sleep(0.005)
    os.close(reader)
    assert json.loads(data.strip().splitlines()[0])["event"] == "x" * 100


def test_a_failed_forward_is_an_error_and_the_next_request_is_served(tmp_path: Path) -> None:
    session = fake_session(max_len=400)
    executor: Any = session.executor
    forward = executor.forward
    broken = threading.Event()

    def may_fail(*arguments: np.ndarray) -> np.ndarray:
        if broken.is_set():
            raise RuntimeError("secret detail")
        return np.asarray(forward(*arguments))

    executor.forward = may_fail
    with running(session, tmp_path / "log") as server:
        broken.set()
        found = server.complete()
        assert found.status_code == 500 and "secret" not in found.text
        broken.clear()
        assert server.complete(max_tokens=3).status_code == 200
        assert server.get("/health").json() == {"status": "ok"}
    failed = [line for line in server.lines() if line["level"] == "error"]
    assert failed and failed[0]["exception"] == "RuntimeError" and failed[0]["traceback"]
    assert "secret" not in Path(server.log_path).read_text()


def test_a_failed_scheduler_ends_what_is_under_way(
    endless: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(endless, tmp_path / "log") as server:
        with monkeypatch.context() as patch:
            patch.setattr(endless._scheduler, "_plan", lambda: 1 / 0)
            found = server.complete()
            assert found.status_code == 500
            assert server.get("/health").json() == {"status": "failing"}
        assert server.complete(max_tokens=3).status_code == 200
        assert server.get("/health").json() == {"status": "ok"}


def test_health_waits_for_the_first_token(tmp_path: Path) -> None:
    class Slow(FakeExecutor):
        def forward(self, *arguments: np.ndarray) -> np.ndarray:
            go_on.wait()
            return super().forward(*arguments)

    go_on = threading.Event()
    session = fake_session()
    session.executor = Slow()
    server = Running(session, Settings(model=MODEL), tmp_path / "log", ready=False)
    found = server.get("/health")
    assert found.status_code == 503 and found.json() == {"status": "starting"}
    go_on.set()
    wait_until(lambda: server.get("/health").status_code == 200)
    server.end()
    server.join()


# ---- the end ----


def test_a_shutdown_finishes_what_it_can_and_refuses_the_rest(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log", grace_s=60.0) as server, ThreadPoolExecutor(2) as pool:
        kept = httpx.Client()
        assert kept.get(server.url + "/health").status_code == 200
        going = pool.submit(server.complete, max_tokens=3000)
        wait_until(lambda: endless._scheduler.running == 1)
        server.end()
        wait_until(lambda: server.server.engine.draining)
        late = kept.post(server.url + "/v1/completions", json={"prompt": "a"})
        assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
        assert late.headers["connection"] == "close" and int(late.headers["retry-after"]) > 0
        assert going.result().json()["usage"]["completion_tokens"] == 3000
        kept.close()


def test_what_outlasts_the_grace_is_told_so(endless: Session, tmp_path: Path) -> None:
    with running(endless, tmp_path / "log", grace_s=0.1) as server, ThreadPoolExecutor(4) as pool:
        whole = pool.submit(server.complete, max_tokens=ENDLESS)
        streamed = pool.submit(server.complete, max_tokens=ENDLESS, stream=True)
        wait_until(lambda: endless._scheduler.running == 2)
        waiting = pool.submit(server.complete, max_tokens=ENDLESS, stream=True)
        wait_until(lambda: server.taken == 3)
        time.sleep(0.1)  # some text is under way
        server.end()
        server.end()  # in a hurry
        for refused in (whole.result(), waiting.result()):
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        events = streamed.result().text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert [line["cut_short"] for line in server.lines() if line["event"] == "stopped"] == [3]


def serve_process(artifact: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """`gristmill serve` on a free port, and its address once it listens."""
    command = [sys.executable, "-m", "gristmill", "serve", str(artifact), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=artifact.parent
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("serving"))
    return process, line.split()[-1]


def test_sigterm_under_load_drops_nothing_silently(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", max_tokens=64, max_len=2000, max_slots=2)
    process, url = serve_process(artifact, "--grace", "1", "--threads", "1", "--log", str(tmp_path / "log"))
    ends: list[str] = []

    def one(number: int) -> None:
        tokens = 20 if number % 2 else 1500
        body = {"model": "a", "prompt": f"{number}", "max_tokens": tokens, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
            ends.append("" if answer.status_code == 200 else str(answer.status_code))
            text = answer.read().decode()
        ends.append("done" if text.endswith("data: [DONE]\n\n") else "told" if '"error"' in text else text)

    with ThreadPoolExecutor(16) as pool:
        going = [pool.submit(one, number) for number in range(16)]
        wait_until(lambda: len(ends) > 4)
        process.send_signal(signal.SIGTERM)
        for each in going:
            each.result()  # none was cut off without a word: httpx would raise
    assert process.wait(60) == 0 and process.stderr is not None
    process.stderr.close()
    assert ends.count("done") >= 1 and set(ends) <= {"", "503", "done", "told"}


def test_the_command_refuses_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*arguments: str) -> str:
        result = CliRunner(catch_exceptions=False).invoke(cli, ["serve", *arguments])
        return result.output

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        artifact = str(tiny_artifact(tmp_path / "a"))
        with pytest.raises(GristmillError, match="cannot listen at 127.0.0.1"):
            error(artifact, "--port", port)
    with pytest.raises(GristmillError, match="holds no tokenizer"):
        error(str(tiny_artifact(tmp_path / "b", tokenizer=False)))
    with pytest.raises(GristmillError, match="log .* cannot be opened"):
        error(artifact, "--port", "0", "--log", str(tmp_path / "none" / "log"))
    assert "Usage" in error(artifact, "--port", "70000")
    assert "/v1/chat/completions" in error("--help")


def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "gristmill.runtime.server.serve", raising=False)
    assert run_command(["serve", "nothing"]) == 1
    assert capfd.readouterr().err == (
        "error: serving needs uvicorn; install it with `pip install 'gristmill[serve]'`\n"
    )
