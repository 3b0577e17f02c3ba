"""`gristmill serve --replicas` on Ray Serve as processes: replicas killed under load, replicas that do not
start, signals. After each of them no process, socket or folder of Ray's is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from adapters import random_pairs, save_adapter
from families import save_tiny
from tiny import tiny_artifact

import gristmill

pytest.importorskip("ray.serve", reason="replicas need gristmill[ray]")
httpx = pytest.importorskip("httpx", reason="the tests of serving need httpx")

pytestmark = pytest.mark.minutes  # a local Ray takes ten seconds to start, and two to end
TIMEOUT_S = 600.0
ENDLESS = {"prompt": "ab", "temperature": 0, "max_tokens": 90_000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    return tiny_artifact(folder / "tiny", max_tokens=64, max_len=100_000, max_slots=2)


class Served:
    """`gristmill serve` with replicas, as a process of its own."""

    def __init__(self, artifact: Path, folder: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log, self.before = folder / "log", ray_folders()
        command = [
            sys.executable, "-P", "-m", "gristmill", "serve", str(artifact), "--port", str(self.port),
            "--log", str(self.log), *options,
        ]  # fmt: skip
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
        )

    def health(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = httpx.get(self.url + "/health", timeout=TIMEOUT_S).json()
        except httpx.TransportError:
            return {"status": "not there", "replicas": []}
        return found

    def ready(self, count: int) -> bool:
        return sum(replica["state"] == "ok" for replica in self.health()["replicas"]) == count

    def pids(self) -> list[int]:
        return [replica["pid"] for replica in self.health()["replicas"] if replica["state"] == "ok"]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def metric(self, name: str) -> float:
        text = httpx.get(self.url + "/metrics", timeout=TIMEOUT_S).text
        return float(next(line for line in text.splitlines() if line.startswith(name + " ")).split()[1])

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code, and what stood on stderr; nothing of it is left."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        self.assert_gone()
        return self.process.returncode, errors

    def assert_gone(self) -> None:
        wait_until(lambda: not of_session(self.process.pid, self.log.parent))
        assert self.process.returncode == -signal.SIGKILL or ray_folders() == self.before


@pytest.fixture
def serve(artifact: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(*options: str, of: Path = artifact) -> Served:
        made.append(Served(of, tmp_path, *options))
        return made[-1]

    yield start
    for served in made:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


def of_session(pid: int, folder: Path) -> list[int]:
    """Processes that a server has started, and those of its Ray: they are in its folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == folder and int(entry.name) != pid:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def ray_folders() -> set[Path]:
    return set(Path("/tmp").glob("gristmill-ray-*"))


def wait_until(true: Callable[[], bool], seconds: float = TIMEOUT_S) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "waited for long"
        time.sleep(0.05)


async def stream(client: Any, url: str, body: dict[str, Any], begun: Callable[[], None]) -> tuple[int, str]:
    """Status and all that came; begun: called with the first of it."""
    async with client.stream("POST", url + "/v1/completions", json=body) as response:
        text = ""
        async for part in response.aiter_text():
            if not text:
                begun()
            text += part
        return response.status_code, text


def test_a_replica_killed_under_load(serve: Callable[..., Served]) -> None:
    """Two replicas of two slots: four texts flow, eight requests wait. One replica is killed with kill -9."""
    served = serve("--replicas", "2", "--threads", "2")
    wait_until(lambda: served.ready(2))
    short = {"prompt": "abc", "max_tokens": 20, "temperature": 0}
    expected = httpx.post(served.url + "/v1/completions", json=short, timeout=TIMEOUT_S).json()

    async def load() -> None:
        flowing = 0
        four = asyncio.Event()

        def begun() -> None:
            nonlocal flowing
            flowing += 1
            if flowing == 4:
                four.set()

        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            long = [
                asyncio.ensure_future(stream(client, served.url, {**ENDLESS, "user": str(i)}, begun))
                for i in range(4)
            ]
            await asyncio.wait_for(four.wait(), TIMEOUT_S)
            post = partial(client.post, served.url + "/v1/completions", json=short)
            asked = [asyncio.ensure_future(post()) for _ in range(8)]
            while (await client.get(served.url + "/health")).json()["replicas"][0]["queued"] < 2:
                await asyncio.sleep(0.05)
            os.kill(served.pids()[0], signal.SIGKILL)
            lost, _ = await asyncio.wait(long, return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT_S)
            await asyncio.sleep(1.0)
            lost = {task for task in long if task.done()}
            assert len(lost) == 2, "the other replica's texts go on"
            for task in lost:
                status, text = task.result()
                last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
                assert status == 200 and last["error"]["code"] == "replica_lost"
                assert "[DONE]" not in text and "lost" in last["error"]["message"]
            for task in set(long) - lost:
                task.cancel()
            for answer in await asyncio.gather(*asked):
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"] == expected["choices"]

    asyncio.run(load())
    assert served.metric("gristmill_replicas_lost_total") == 1
    assert served.metric("gristmill_retries_total") >= 1
    wait_until(lambda: served.ready(2))
    assert served.metric("gristmill_running") == 0
    listed = served.health()["replicas"]
    assert [r["texts"] for r in listed] == [r["tokens"] for r in listed] == [0, 0]
    code, errors = served.end()
    assert code == 0 and "Traceback" not in errors, errors


def test_sigterm_lets_texts_end_and_tells_the_others(serve: Callable[..., Served]) -> None:
    served = serve("--replicas", "2", "--grace", "2")
    wait_until(lambda: served.ready(2))

    async def load() -> tuple[Any, Any]:
        both = asyncio.Event()
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            long = asyncio.ensure_future(stream(client, served.url, ENDLESS, both.set))
            await asyncio.wait_for(both.wait(), TIMEOUT_S)
            body = {**ENDLESS, "max_tokens": 3000}
            short = asyncio.ensure_future(stream(client, served.url, body, lambda: None))
            await asyncio.sleep(0.2)
            served.process.send_signal(signal.SIGTERM)
            return await long, await short

    (status, cut), (_, whole) = asyncio.run(load())
    assert status == 200 and "shutting_down" in cut and "[DONE]" not in cut
    assert whole.endswith("data: [DONE]\n\n")
    assert served.process.wait(TIMEOUT_S) == 0
    served.assert_gone()
    assert [line["cut_short"] for line in served.lines() if line["event"] == "stopped"] == [1]


def test_replicas_that_do_not_start(serve: Callable[..., Served], artifact: Path, tmp_path: Path) -> None:
    """One that is lost and cannot come back leaves the others; where none starts, the server ends and says
    why in a line."""
    moved = tmp_path / "away"
    served = serve("--replicas", "2", of=artifact)
    wait_until(lambda: served.ready(2))
    artifact.rename(moved)
    try:
        os.kill(served.pids()[0], signal.SIGKILL)
        wait_until(lambda: "does not start" in served.health().get("problem", ""))
        health = served.health()
        assert health["status"] == "ok" and str(artifact) in health["problem"]
        assert "\n" not in health["problem"]
        body = {"prompt": "x", "max_tokens": 3}
        assert httpx.post(served.url + "/v1/completions", json=body, timeout=TIMEOUT_S).status_code == 200
    finally:
        moved.rename(artifact)
    wait_until(lambda: served.ready(2))
    assert served.end()[0] == 0


def test_a_server_none_of_whose_replicas_starts(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command itself can see it refuses before Ray is started; the rest it hears from Ray."""
    script = (
        "import sys; from gristmill.runtime.server import ray_replicas, serve_replicas, serve, settings\n"
        "from gristmill.runtime.errors import GristmillError\n"
        "options = ray_replicas.ReplicaOptions(sys.argv[1], max_len=10**9)\n"
        "try:\n"
        "    serve_replicas.serve_replicas(options, 2, settings.Settings('m'), serve.bind('127.0.0.1', 0),\n"
        "                                  sys.argv[2], lambda: None)\n"
        "except GristmillError as error:\n"
        "    sys.exit(f'error: {error}')\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    found = subprocess.run(
        [sys.executable, "-P", "-c", script, str(artifact), str(tmp_path / "log")], cwd=tmp_path,
        timeout=TIMEOUT_S, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1, found.stderr
    assert found.stderr.startswith("error: a replica does not start: ") and found.stderr.count("\n") == 1
    wait_until(lambda: not of_session(0, tmp_path))


def test_the_front_killed_takes_its_ray_along(serve: Callable[..., Served]) -> None:
    served = serve("--replicas", "2")
    wait_until(lambda: served.ready(2))
    served.process.kill()
    served.process.wait()
    served.assert_gone()
    for left in ray_folders() - served.before:  # its removal is what was killed
        subprocess.run(["rm", "-rf", str(left)], check=True)


CLUSTER = """
import sys, time, yaml
from pathlib import Path
from ray import serve
from ray.serve.schema import ServeDeploySchema
from gristmill.runtime import ray_session
from gristmill.runtime.server.ray_app import build

config = ServeDeploySchema.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text()))
(application,) = config.applications
assert application.import_path == f"{build.__module__}:{build.__name__}"
folder = ray_session.start()
try:
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    args = {**application.args, "artifact": sys.argv[3], "replicas": 2, "threads": 1, "model_name": "tiny"}
    serve.run(build(args), name=application.name, route_prefix=application.route_prefix)
    print("running", flush=True)
    sys.stdin.read()
finally:
    ray_session.stop(folder)
"""


def test_the_application_for_clusters(artifact: Path, tmp_path: Path) -> None:
    """The example's file, on a Ray of this machine, behind Serve's own proxy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(path for path in sys.path if path)
    example = Path(__file__).parents[1] / "examples" / "ray_serve.yaml"
    url = f"http://127.0.0.1:{port}"
    running = subprocess.Popen(
        [sys.executable, "-P", "-c", CLUSTER, str(example), str(port), str(artifact)], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdin and running.stdout
    try:
        assert "running" in running.stdout.readline()
        wait_until(lambda: len(_ok(url)) == 2)
        body = {"prompt": "abc", "max_tokens": 20, "temperature": 0}
        found = httpx.post(url + "/v1/completions", json=body, timeout=TIMEOUT_S)
        assert found.status_code == 200 and found.json()["model"] == "tiny"
        os.kill(_ok(url)[0], signal.SIGKILL)
        for _ in range(5):
            again = httpx.post(url + "/v1/completions", json=body, timeout=TIMEOUT_S)
            assert again.json()["choices"] == found.json()["choices"]
        streamed = httpx.post(url + "/v1/completions", json={**body, "stream": True}, timeout=TIMEOUT_S).text
        assert streamed.endswith("data: [DONE]\n\n")
        with httpx.stream("POST", url + "/v1/completions", json=ENDLESS, timeout=TIMEOUT_S) as left:
            next(left.iter_text())
        wait_until(lambda: "gristmill_running 0.0" in httpx.get(url + "/metrics", timeout=TIMEOUT_S).text)
        wait_until(lambda: len(_ok(url)) == 2)
    finally:
        running.stdin.close()
        running.wait(TIMEOUT_S)
        running.stdout.close()
    assert running.returncode == 0


def _ok(url: str) -> list[int]:
    listed = httpx.get(url + "/health", timeout=TIMEOUT_S).json()["replicas"]
    return [replica["pid"] for replica in listed if replica["state"] == "ok"]


def test_replicas_have_the_adapters(tmp_path: Path, serve: Callable[..., Served]) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    gristmill.compile(tmp_path / "model", tmp_path / "out", weights="f32", gate=False)
    folder = save_adapter(tmp_path / "adapter", random_pairs(model, ("q_proj", "up_proj"), size=0.5))
    session = gristmill.load(tmp_path / "out", threads=1, adapters={"a": folder})
    served = serve("--replicas", "2", "--adapter", f"a={folder}", of=tmp_path / "out")
    wait_until(lambda: served.ready(2))
    assert {m["id"] for m in httpx.get(served.url + "/v1/models").json()["data"]} == {"out", "a"}
    texts = {}
    for name, adapter in (("out", None), ("a", "a")):
        body = {"model": name, "prompt": "def f(", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        for _ in range(3):  # of either replica
            answer = httpx.post(served.url + "/v1/completions", json=body, timeout=TIMEOUT_S).json()
            texts[name] = answer["choices"][0]["text"]
            result = session.generate("def f(", max_new_tokens=12, ignore_eos=True, adapter=adapter)
            assert texts[name] == result.text
    assert texts["out"] != texts["a"]
    assert served.end()[0] == 0
