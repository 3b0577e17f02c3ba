"""The front before several replicas, without Ray: replicas are objects of this process, made up or real."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_artifact

import gristmill
from gristmill.cli import run_command

for name in ("fastapi", "uvicorn", "httptools", "prometheus_client"):
    pytest.importorskip(name, reason="serving needs gristmill[serve]")

from gristmill.runtime.server import fleet as fleets  # noqa: E402
from gristmill.runtime.server import front as fronts  # noqa: E402
from gristmill.runtime.server.fleet import Ask, Fleet, ask_of  # noqa: E402
from gristmill.runtime.server.front import Front, Lost  # noqa: E402
from gristmill.runtime.server.gate import Gate  # noqa: E402
from gristmill.runtime.server.replica import RECORD, Call, Replica  # noqa: E402
from gristmill.runtime.server.settings import Settings  # noqa: E402

STATUS: dict[str, Any] = {
    "state": "ok", "slots": 2, "capacity": 4, "details": {}, "families": [], "lines": [],
}  # fmt: skip
JSON_HEADERS = [(b"content-type", b"application/json")]
TIMEOUT_S = 60.0


class Quiet:
    """A log that loses nothing."""

    dropped = 0


class Scripted:
    """A replica that does as it is told. script: what each answer consists of: pieces of a stream, a whole
    body, an exception, or an event to wait for."""

    def __init__(self, *script: Any, status: int = 200, stream: bool = True):
        self.script, self.http_status, self.stream = script, status, stream
        self.calls: list[Call] = []
        self.left = 0  # answers that were given up

    def status(self) -> dict[str, Any]:
        return STATUS

    async def answer(self, call: Call) -> AsyncGenerator[list[Any], None]:
        self.calls.append(call)
        kind = b"text/event-stream" if self.stream else b"application/json"
        yield [
            {"type": "http.response.start", "status": self.http_status, "headers": [(b"content-type", kind)]}
        ]
        over = False
        try:
            for part in self.script:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, asyncio.Event):
                    await part.wait()
                else:
                    yield [{"type": "http.response.body", "body": part, "more_body": self.stream}]
            if self.stream:
                yield [{"type": "http.response.body", "body": b"", "more_body": False}]
            over = True
            yield [{"type": RECORD, "record": {"id": "cmpl-1"}}]
        finally:
            self.left += not over


class Objects:
    """A link to replicas of this process. kill: what happens to those that were asked meanwhile is the
    replica's own script."""

    def __init__(self, fleet: Fleet, **replicas: Any):
        self.fleet, self.replicas = fleet, dict(replicas)
        fleet.present(replicas)
        self.trouble: tuple[str | None, bool] = (None, False)
        self.stopped = False

    def _chosen(self, ask: Ask) -> str:
        chosen = self.fleet.place(ask.name, list(self.replicas))
        if chosen is None:
            raise Lost
        return chosen

    async def answer(self, ask: Ask, call: Call) -> AsyncGenerator[list[Any], None]:
        chosen = self._chosen(ask)
        try:
            async for messages in self.replicas[chosen].answer(call):
                yield messages
        except Lost:
            self.lose(chosen)
            raise

    def lose(self, id: str) -> None:
        self.replicas.pop(id, None)
        self.fleet.leave(id)

    async def status(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        chosen = self._chosen(ask)
        return chosen, self.replicas[chosen].status()

    async def problem(self) -> tuple[str | None, bool]:
        return self.trouble

    async def stop(self) -> None:
        self.stopped = True


class Answer:
    """What a client got."""

    def __init__(self) -> None:
        self.status, self.headers, self.parts, self.over = 0, dict[str, str](), list[bytes](), False
        self.news = asyncio.Event()

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of the error object, in the body or in the last event."""
        body = self.body.removeprefix(b"data: ") if not self.parts[1:] else self.parts[-1][6:]
        return str(json.loads(body)["error"]["code"])


class Site:
    """A front, its gate, and clients."""

    def __init__(self, link: Objects, **settings: Any):
        self.link = link
        self.settings = Settings(model="tiny", **settings)
        self.front = Front(link, link.fleet, self.settings, Quiet())
        self.app = Gate(self.front, self.front, self.settings)

    async def __aenter__(self) -> Site:
        self.front.start()
        await until(lambda: self.front.fleet.ready == len(self.link.replicas))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.front.stop()
        assert self.link.stopped and self.front.taken == 0 and self.front.fleet.under_way == 0
        assert all(m["texts"] == m["tokens"] == 0 for m in self.front.fleet.listed()), (
            "nothing is counted twice"
        )

    def send(
        self, path: str, body: Any = None, method: str = "POST", headers: Any = (), gone: Any = None
    ) -> tuple[Answer, asyncio.Task[None]]:
        """Asks, and goes away when `gone` is set."""
        answer, gone = Answer(), gone or asyncio.Event()
        data = b"" if body is None else json.dumps(body).encode()
        waiting = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.parts += [message["body"]] if message["body"] else []
                answer.over = not message.get("more_body", False)
            answer.news.set()

        scope = {
            "type": "http", "method": method, "path": path, "query_string": b"",
            "headers": [*JSON_HEADERS, *headers], "client": ("127.0.0.1", 1),
        }  # fmt: skip
        return answer, asyncio.ensure_future(self.app(scope, receive, send))

    async def ask(self, body: Any, path: str = "/v1/completions", **more: Any) -> Answer:
        answer, task = self.send(path, body, **more)
        await asyncio.wait_for(task, TIMEOUT_S)
        assert answer.over
        return answer

    async def get(self, path: str) -> Answer:
        return await self.ask(None, path, method="GET")


async def until(true: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not true():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(wait(), TIMEOUT_S)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fronts, "POLL_S", 0.005)


# ---- which replica ----


def placed(fleet: Fleet, ask: Ask) -> str:
    fleet.enter(ask)
    found = fleet.place(ask.name, fleet.ids)
    assert found is not None and ask.member == found
    return found


def ready_fleet(*ids: str, **status: Any) -> Fleet:
    fleet = Fleet()
    fleet.present(ids)
    for id in ids:
        fleet.report(id, {**STATUS, **status})
    return fleet


def test_the_least_work_in_tokens_decides() -> None:
    fleet = ready_fleet("a", "b", "c")
    long = Ask(texts=1, tokens=1000)
    first = placed(fleet, long)
    others = [placed(fleet, Ask(texts=1, tokens=100)) for _ in range(4)]
    assert {id: others.count(id) for id in fleet.ids} == {id: 2 * (id != first) for id in fleet.ids}
    fleet.end(long)
    assert placed(fleet, Ask(texts=1, tokens=1)) == first


def test_sessions_and_beginnings_stay_where_they_were() -> None:
    fleet = ready_fleet("a", "b")
    system = "You are a helpful assistant. " * 40
    chat: Any = {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": "Hello" * 99}]
    }

    def ask(body: Any, **headers: str) -> Ask:
        return ask_of("/v1/chat/completions", headers, json.dumps(body).encode())

    first = ask(chat)
    home = placed(fleet, first)
    fleet.end(first)
    other = placed(fleet, Ask(texts=1, tokens=5))  # so that the other one is not the least
    fleet.end(Ask())
    assert other != home
    more = {"messages": [*chat["messages"], {"role": "assistant", "content": "Hi"}]}
    next_turn = ask(more)
    assert placed(fleet, next_turn) == home
    fleet.end(next_turn)
    assert placed(
        fleet,
        ask(
            {"messages": [{"role": "user", "content": "Else" * 999}]},
        ),
    ) in ("a", "b")
    session = ask({"messages": [], "user": "ann"})
    assert session.keys != ask({"messages": [], "user": "bob"}).keys
    assert session.keys == ask({"messages": [], "prompt_cache_key": "ann", "user": "bob"}).keys
    assert session.keys == ask({"messages": []}, **{"x-session-id": "ann"}).keys


def test_what_belongs_to_a_busy_replica_goes_elsewhere() -> None:
    fleet = ready_fleet("a", "b")
    key = (b"session",)
    home = placed(fleet, Ask(key, 1, 100))
    assert placed(fleet, Ask(key, 1, 100)) == home, "a slot is free"
    assert placed(fleet, Ask(key, 1, 100)) != home, (
        "both slots are taken, and the other one has nothing to do"
    )
    assert placed(fleet, Ask(key, 1, 100)) != home, "it is where the session was last"


def test_replicas_that_refuse_are_full_or_silent_come_last() -> None:
    fleet = ready_fleet("a", "b")
    fleet.report("a", None)
    assert {placed(fleet, Ask(texts=1, tokens=9)) for _ in range(3)} == {"b"}
    fleet.report("a", STATUS)
    assert placed(fleet, Ask(texts=1, tokens=9, refused_by={"a"})) == "b"
    assert placed(fleet, Ask(texts=4, tokens=0, keys=(b"k",))) == "a", "b has no room for four"
    fleet.leave("a")
    assert placed(fleet, Ask(texts=9)) == "b", "it says itself what is wrong"
    assert fleet.lost == 1 and Fleet().place("x", []) is None


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"[1]", b'{"prompt": 3, "n": "x", "max_tokens": true}']
)
def test_what_cannot_be_read_asks_for_nothing(body: bytes) -> None:
    found = ask_of("/v1/completions", {}, body)
    assert (found.keys, found.texts, found.tokens) == ((), 0, 0)


def test_requests_are_weighed() -> None:
    def weight(**asked: Any) -> tuple[int, int]:
        found = ask_of("/v1/completions", {}, json.dumps(asked).encode())
        return found.texts, found.tokens

    assert weight(prompt="x" * 400, max_tokens=50) == (1, 150)
    assert weight(prompt=[1, 2, 3], max_tokens=5, n=2) == (2, 13)
    assert weight(prompt=["x" * 40, "y" * 40]) == (2, 20 + 2 * fleets.COMPLETION_TOKENS)
    assert weight(prompt=[[1, 2], [3]], max_tokens=1) == (2, 5)
    assert weight(prompt="\ud800") == (1, 16)


def test_one_that_has_died_stays_away() -> None:
    """Serve may name it for a while."""
    fleet = ready_fleet("a", "b")
    fleet.leave("a")
    fleet.present(["a", "b", "c"])
    assert sorted(fleet.ids) == ["b", "c"] and fleet.lost == 1
    ask = Ask(texts=1)
    fleet.enter(ask)
    assert fleet.place(ask.name, ["a", "b"]) == "b"
    assert fleet.place(ask.name, ["a"]) == "a", "the call fails, and is made again"
    assert "a" not in fleet.ids and fleet.lost == 1


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "MOST_KNOWN", 10)
    fleet = ready_fleet("a")
    for number in range(30):
        placed(fleet, Ask((b"%d" % number,), 1, 1))
    assert len(fleet._known) == 10
    assert len(list(fleets._beginnings(b"x" * 10**6, ""))) == fleets.MOST_BLOCKS


# ---- losing replicas ----


def test_a_request_that_had_not_streamed_is_asked_again() -> None:
    async def test() -> None:
        good = Scripted(b"data: text\n\n", b"data: [DONE]\n\n")
        link = Objects(Fleet(), bad=Scripted(Lost()), good=good)
        async with Site(link) as site:
            answers = [await site.ask({"prompt": "x", "stream": True}) for _ in range(2)]
            assert [a.body for a in answers] == [b"data: text\n\ndata: [DONE]\n\n"] * 2
            assert site.front.retries == 1 and site.front.fleet.lost == 1 and len(good.calls) == 2
            metrics = (await site.get("/metrics")).body.decode()
            assert "gristmill_retries_total 1.0" in metrics and "gristmill_replicas_lost_total 1.0" in metrics

    run(test())


def test_one_that_had_ends_with_an_error_in_the_stream() -> None:
    async def test() -> None:
        link = Objects(Fleet(), bad=Scripted(b"data: text\n\n", Lost()))
        async with Site(link) as site:
            answer = await site.ask({"prompt": "x", "stream": True})
            assert answer.status == 200 and answer.parts[0] == b"data: text\n\n"
            assert answer.code == "replica_lost" and b"[DONE]" not in answer.body
            assert site.front.retries == 0
            assert site.front.measurements.requests["/v1/completions", 200] == 1

    run(test())


def test_a_request_that_waits_for_a_replica_to_come_back() -> None:
    async def test() -> None:
        link = Objects(Fleet(), only=Scripted(Lost()))
        async with Site(link) as site:
            answer, task = site.send("/v1/completions", {"prompt": "x"})
            await until(lambda: site.front.fleet.lost == 1)
            refused = await site.ask({"prompt": "y"})
            assert (refused.status, refused.code) == (503, "no_replica") and refused.headers[
                "retry-after"
            ] == "5"
            health = await site.get("/health")
            assert (health.status, health.json) == (503, {"status": "failing", "replicas": []})
            link.replicas["new"] = Scripted(b'{"text": 1}', stream=False)
            link.fleet.present(["new"])
            await asyncio.wait_for(task, TIMEOUT_S)
            assert answer.json == {"text": 1} and answer.headers["content-type"] == "application/json"

    run(test())


def test_no_request_takes_all_replicas_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        link = Objects(Fleet(), **{str(i): Scripted(Lost()) for i in range(5)})
        async with Site(link) as site:
            answer = await site.ask({"prompt": "poison"})
            assert (answer.status, answer.code) == (503, "replica_lost")
            assert len(link.replicas) == 2

        monkeypatch.setattr(fronts, "WAIT_FOR_ANOTHER_S", 0.01)
        async with Site(Objects(Fleet(), only=Scripted(Lost()))) as site:
            assert (await site.ask({"prompt": "x"})).code == "no_replica", "none came back in time"

    run(test())


def test_a_full_replica_s_request_goes_to_another() -> None:
    async def test() -> None:
        full = Scripted(b'{"error": {"code": "queue_full"}}', status=429, stream=False)
        free = Scripted(b"{}", stream=False)
        async with Site(Objects(Fleet(), full=full, free=free)) as site:
            assert [(await site.ask({"prompt": "x"})).status for _ in range(3)] == [200] * 3
            assert full.calls
            calls = len(full.calls)
        async with Site(Objects(Fleet(), **{str(i): full for i in range(5)})) as site:
            answer = await site.ask({"prompt": "x"})
            assert (answer.status, answer.code) == (429, "queue_full") and site.front.retries == 0
            assert len(full.calls) - calls == 5, "each one once"
        async with Site(Objects(Fleet(), a=full, b=full)) as site:
            answer = await site.ask({"prompt": "x"})
            assert (answer.status, answer.code) == (429, "queue_full")

    run(test())


def test_a_replica_s_own_mistakes_are_500() -> None:
    async def test() -> None:
        async with Site(Objects(Fleet(), a=Scripted(ValueError("secret")))) as site:
            answer = await site.ask({"prompt": "x"})
            assert (answer.status, answer.code) == (500, "internal_error") and b"secret" not in answer.body
        cut = Scripted(b"data: x\n\n", ValueError("secret"))
        async with Site(Objects(Fleet(), a=cut)) as site:
            assert (await site.ask({"prompt": "x"})).code == "internal_error"

    run(test())


# ---- clients, ends ----


def test_a_client_that_leaves_leaves_the_replica() -> None:
    async def test() -> None:
        replica = Scripted(b"data: x\n\n", asyncio.Event())
        async with Site(Objects(Fleet(), a=replica)) as site:
            gone = asyncio.Event()
            answer, task = site.send("/v1/completions", {"prompt": "x"}, gone=gone)
            await until(lambda: bool(answer.parts))
            assert site.front.taken == 1 and site.front.fleet.listed()[0]["texts"] == 1
            gone.set()
            await asyncio.wait_for(task, TIMEOUT_S)
            assert replica.left == 1 and site.front.measurements.requests["/v1/completions", 499] == 1

    run(test())


def test_a_shutdown_tells_what_is_left() -> None:
    async def test() -> None:
        for stream, expected in ((True, 200), (False, 503)):
            replica = Scripted(*([b"data: x\n\n"] * stream), asyncio.Event(), stream=stream)
            async with Site(Objects(Fleet(), a=replica)) as site:
                answer, task = site.send("/v1/completions", {"prompt": "x"})
                await until(lambda: site.front.taken == 1 and (not stream or bool(answer.parts)))  # noqa: B023
                site.front.draining = True
                assert (await site.ask({"prompt": "late"})).code == "shutting_down"
                assert (await site.get("/health")).json["status"] == "stopping"
                assert not await site.front.idle(0.01)
                site.front.end_all()
                await asyncio.wait_for(task, TIMEOUT_S)
                assert (answer.status, answer.code) == (expected, "shutting_down")

    run(test())


def test_a_replica_that_says_nothing_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fronts, "SILENT_S", 0.02)
    monkeypatch.setattr(fronts, "GUARD_S", 0.1)

    class Stuck(Scripted):
        stuck = False

        async def answer(self, call: Call) -> AsyncGenerator[list[Any], None]:
            await asyncio.sleep(TIMEOUT_S * self.stuck)
            async for messages in super().answer(call):
                yield messages

    class Slow(Objects):
        async def status(self, ask: Ask) -> tuple[str, dict[str, Any]]:
            await asyncio.sleep(TIMEOUT_S * (ask.pin == "stuck" and self.replicas["stuck"].stuck))
            return await super().status(ask)

    async def test() -> None:
        stuck = Stuck(b"{}", stream=False)
        link = Slow(Fleet(), stuck=stuck)
        async with Site(link, deadline_s=0.2) as site:
            stuck.stuck = True
            answer = await site.ask({"prompt": "x"})
            assert (answer.status, answer.code) == (503, "deadline_exceeded")
            await until(lambda: site.front.fleet.listed()[0]["state"] == "silent")
            assert (await site.ask({"prompt": "x"})).code == "no_replica"

    run(test())


def test_replicas_that_never_start_end_the_server() -> None:
    async def test() -> None:
        link = Objects(Fleet())
        site = Site(link)
        ended = asyncio.Event()
        site.front.on_failure = ended.set
        link.trouble = ("a replica does not start: no such file", False)
        async with site:
            await until(lambda: site.front.problem is not None)
            health = await site.get("/health")
            assert health.json["problem"] == link.trouble[0] and health.status == 503
            assert b"no such file" in (await site.ask({"prompt": "x"})).body
            assert not ended.is_set()
            link.trouble = (link.trouble[0], True)
            await asyncio.wait_for(ended.wait(), TIMEOUT_S)
            assert site.front.failed == link.trouble[0]

    run(test())


def test_counts_of_lost_replicas_stay_in_the_sum() -> None:
    def families(tokens: float, running: float) -> Any:
        return [
            (
                "gristmill_generated_tokens",
                "counter",
                "x",
                [("gristmill_generated_tokens_total", {}, tokens)],
            ),
            ("gristmill_running", "gauge", "x", [("gristmill_running", {}, running)]),
        ]

    fleet = Fleet()
    fleet.present(["a", "b"])
    fleet.report("a", {**STATUS, "families": families(3, 1)})
    fleet.report("b", {**STATUS, "families": families(4, 1)})

    def sums() -> list[float]:
        return [samples[0][2] for _, _, _, samples in fleet.families()[0]]

    assert sums() == [7, 2]
    fleet.present(["b"])
    assert sums() == [7, 1] and list(fleet.families()[1]) == ["b"]
    fleet.present(["b", "c"])
    fleet.report("c", {**STATUS, "families": families(5, 2)})
    assert sums() == [12, 3]


# ---- the command ----


def test_the_command_without_ray(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for options, said in (
        (["--replicas", "2"], "error: this needs Ray; install it with `pip install 'gristmill[ray]'`\n"),
        (
            ["--replicas", "2", "--pin"],
            "error: --pin would put all replicas on the same processors; leave it out\n",
        ),
    ):
        assert run_command(["serve", str(artifact), *options]) == 1
        assert capsys.readouterr().err == said
    assert run_command(["serve", str(artifact), "--replicas", "0"]) == 2


# ---- over real engines ----


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(
        tmp_path_factory.mktemp("replicas") / "tiny", max_tokens=64, max_len=4096, max_slots=2
    )


async def real_site(artifact: Path, count: int, **settings: Any) -> Site:
    made = Settings(model="tiny", **settings)
    replicas = {}
    for number in range(count):
        session = gristmill.load(artifact, threads=1, max_waiting=2**31 - 1)
        replicas[f"r{number}"] = Replica(session, made)
        await replicas[f"r{number}"].start()
    return Site(Objects(Fleet(), **replicas), **settings)


async def stop(site: Site) -> None:
    for replica in site.link.replicas.values():
        await replica.stop()


def test_answers_are_those_of_one_process(artifact: Path) -> None:
    """The same body but for ids and times; texts equal bit by bit."""
    session = gristmill.load(artifact, threads=1)

    async def test() -> None:
        site = await real_site(artifact, 2)
        asked = {"prompt": "abc", "max_tokens": 40, "temperature": 0}
        expected = session.generate("abc", max_new_tokens=40)
        async with site:
            for _ in range(4):
                found = await site.ask(asked)
                assert found.json["choices"][0]["text"] == expected.text and found.status == 200
                assert "x-request-id" in found.headers
            streamed = await site.ask({**asked, "stream": True})
            events = [json.loads(e[6:]) for e in streamed.body.split(b"\n\n") if e[6:7] == b"{"]
            assert "".join(e["choices"][0]["text"] for e in events) == expected.text
            assert streamed.body.endswith(b"data: [DONE]\n\n")
            for body, code in (
                ({"prompt": []}, "invalid_value"),
                ({"prompt": "x", "model": "m"}, "model_not_found"),
            ):
                assert (await site.ask(body)).code == code
            assert (await site.ask({"prompt": "x", "n": 300})).code == "too_many_choices"
            assert (await site.get("/v1/models")).json["data"][0]["id"] == "tiny"
            assert "/v1/completions" in (await site.get("/openapi.json")).json["paths"]
            assert (await site.get("/nothing")).code == "not_found"
            await until(lambda: b"gristmill_texts_total" in _metrics(site))
            metrics = (await site.get("/metrics")).body.decode()
            assert 'gristmill_replica_slots{replica="r1"} 2.0' in metrics and "gristmill_slots 4.0" in metrics
            assert 'gristmill_requests_total{endpoint="/v1/completions",status="200"} 5.0' in metrics
            health = (await site.get("/health")).json
            assert [r["state"] for r in health["replicas"]] == ["ok", "ok"]
        await stop(site)

    run(test())


def _metrics(site: Site) -> bytes:
    from prometheus_client import generate_latest

    return bytes(generate_latest(site.front._registry))


def test_keys_and_sizes_are_the_gate_s(artifact: Path) -> None:
    async def test() -> None:
        site = Site(Objects(Fleet(), a=Scripted(b"{}", stream=False)), keys=("k",), max_body_bytes=1024)
        async with site:
            assert (await site.ask({"prompt": "x"})).status == 401
            key = [(b"authorization", b"Bearer k")]
            assert (await site.ask({"prompt": "x"}, headers=key)).status == 200
            assert (await site.ask({"prompt": "x" * 2000}, headers=key)).status == 413
            assert (await site.get("/health")).status == 200

    run(test())


def test_leaving_a_real_replica_frees_its_slot(artifact: Path) -> None:
    async def test() -> None:
        site = await real_site(artifact, 1)
        engine = site.link.replicas["r0"].engine
        async with site:
            gone = asyncio.Event()
            body = {"prompt": "ab", "max_tokens": 4000, "stream": True, "temperature": 0, "ignore_eos": True}
            answer, task = site.send("/v1/completions", body, gone=gone)
            await until(lambda: bool(answer.parts))
            gone.set()
            with suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, TIMEOUT_S)
            await until(lambda: engine.taken == 0)
            assert engine.measurements.disconnects == 1
        await stop(site)

    run(test())
