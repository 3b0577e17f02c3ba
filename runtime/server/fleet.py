"""Which replica takes a request: the one that holds its beginning, else the one with the least to do.

What a replica has to do is what was sent to it and has not ended, in tokens: those of the prompts, estimated
from their length, and those that were asked for. A request goes to the replica that had its session last, or
the longest part of its prompt, as long as that one has a free slot or at most twice as much to do as the one
with the least. Nothing here waits; the methods may be called from any thread.
"""

from __future__ import annotations

import itertools
import json
import secrets
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

BLOCK = 256  # characters of a prompt, or four times the token ids, that are hashed together
MOST_BLOCKS = 64  # of one prompt
MOST_KNOWN = 1 << 16  # blocks and sessions whose replica is remembered
CHARACTERS_PER_TOKEN = 4
COMPLETION_TOKENS, CHAT_TOKENS = 16, 256  # where a request names no limit; a chat seldom goes on to its own
UNEVEN = 2  # times the least work, that a replica may have and still get what belongs to it
SESSION_HEADER = "x-session-id"
SESSION_NAMES = ("prompt_cache_key", "user")

Sample = tuple[str, dict[str, str], float]
Family = tuple[str, str, str, list[Sample]]  # name, type, what it says, samples


@dataclass(eq=False)
class Ask:
    """What is known of a request before anyone has read it closely. keys: of its session and of its prompt's
    beginnings, the longest first; refused_by: replicas without room for it; pin: the only one it is for."""

    keys: tuple[bytes, ...] = ()
    texts: int = 0
    tokens: int = 0
    pin: str | None = None
    refused_by: set[str] = field(default_factory=set)
    member: str | None = None
    name: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(eq=False)
class Member:
    """A replica. texts, tokens: sent to it and not ended; chosen: when it last was."""

    id: str
    state: str = "starting"
    slots: int = 1
    capacity: int = 1
    texts: int = 0
    tokens: int = 0
    chosen: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    families: list[Family] = field(default_factory=list)


class Fleet:
    """The replicas that are there, and what each of them has to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._asks: dict[str, Ask] = {}
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._turn = itertools.count(1)
        self._departed: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self._gone: set[str] = set()
        self.lost = 0

    # ---- who is there ----

    def present(self, ids: Iterable[str]) -> None:
        """Takes in who is there now."""
        with self._lock:
            wanted = set(ids) - self._gone
            for gone in self._members.keys() - wanted:
                self._forget(gone)
            for new in wanted - self._members.keys():
                self._members[new] = Member(new)

    def leave(self, id: str) -> None:
        """A replica has died; it does not come back, whoever may still name it."""
        with self._lock:
            self._gone.add(id)
            if id in self._members:
                self._forget(id)

    def report(self, id: str, status: Mapping[str, Any] | None) -> None:
        """What a replica says of itself; None where it said nothing in time."""
        with self._lock:
            member = self._members.get(id)
            if member is None:
                return
            if status is None:
                member.state = "silent"
                return
            member.state, member.slots, member.capacity = (
                status["state"], status["slots"], status["capacity"],
            )  # fmt: skip
            member.details, member.families = dict(status["details"]), status["families"]

    @property
    def ids(self) -> list[str]:
        with self._lock:
            return list(self._members)

    @property
    def ready(self) -> int:
        """Replicas that take requests."""
        with self._lock:
            return sum(member.state == "ok" for member in self._members.values())

    def has_others(self, but: set[str]) -> bool:
        """Whether a replica that is none of these takes requests."""
        with self._lock:
            return any(m.state == "ok" and m.id not in but for m in self._members.values())

    def listed(self) -> list[dict[str, Any]]:
        """Each replica, for people."""
        with self._lock:
            return [
                {"id": m.id, "state": m.state, "texts": m.texts, "tokens": m.tokens, **m.details}
                for m in self._members.values()
            ]

    # ---- who takes what ----

    @property
    def under_way(self) -> int:
        with self._lock:
            return len(self._asks)

    def enter(self, ask: Ask) -> None:
        with self._lock:
            self._asks[ask.name] = ask

    def end(self, ask: Ask) -> None:
        """It has ended; its replica has as much less to do."""
        with self._lock:
            self._asks.pop(ask.name, None)
            self._unload(ask)

    def unload(self, ask: Ask) -> None:
        """It is no longer where it was, and has not ended."""
        with self._lock:
            self._unload(ask)

    def place(self, name: str, candidates: Iterable[str]) -> str | None:
        """The candidate that takes the request of this name, whose work is counted as its own from now on."""
        with self._lock:
            candidates = list(candidates)
            alive = [id for id in candidates if id not in self._gone]
            members = [self._members.setdefault(id, Member(id)) for id in alive]
            if not members:  # a call to one that has died fails at once
                return next(iter(candidates), None)
            ask = self._asks.get(name)
            if ask is None:  # it has ended meanwhile
                return members[0].id
            self._unload(ask)
            member = self._choose(ask, members)
            self._load(ask, member)
            return member.id

    def _choose(self, ask: Ask, members: list[Member]) -> Member:
        if ask.pin is not None:
            return next((m for m in members if m.id == ask.pin), members[0])
        able = [m for m in members if m.state == "ok"] or members
        able = [m for m in able if m.id not in ask.refused_by] or able
        able = [m for m in able if m.texts + ask.texts <= m.capacity] or able
        least = min(able, key=lambda m: (m.tokens, m.texts, m.chosen))
        own = self._owner(ask, able)
        if own is not None and (own.texts + ask.texts <= own.slots or own.tokens <= UNEVEN * least.tokens):
            return own
        return least

    def _owner(self, ask: Ask, able: list[Member]) -> Member | None:
        by_id = {member.id: member for member in able}
        return next((by_id[id] for key in ask.keys if (id := self._known.get(key)) in by_id), None)

    def _load(self, ask: Ask, member: Member) -> None:
        ask.member = member.id
        if ask.pin is not None:
            return
        member.texts += ask.texts
        member.tokens += ask.tokens
        member.chosen = next(self._turn)
        for key in reversed(ask.keys):
            self._known[key] = member.id
            self._known.move_to_end(key)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    def _unload(self, ask: Ask) -> None:
        member = self._members.get(ask.member or "")
        ask.member = None
        if member is not None and ask.pin is None:
            member.texts -= ask.texts
            member.tokens -= ask.tokens

    def _forget(self, id: str) -> None:
        member = self._members.pop(id)
        self.lost += 1
        for _, kind, _, samples in member.families:
            if kind in ("counter", "histogram"):
                for name, labels, value in samples:
                    self._departed[name, tuple(sorted(labels.items()))] += value

    # ---- what they measure ----

    def families(self) -> tuple[list[Family], dict[str, list[Family]]]:
        """The sums over all replicas, those that are gone included where a count may not fall; and each
        one's."""
        with self._lock:
            each = {member.id: member.families for member in self._members.values()}
            departed = self._departed.copy()
        return _sums(each.values(), departed), each


_FLEETS: dict[str, Fleet] = {}  # Serve makes the routers, and passes names alone


def fleet_named(name: str) -> Fleet:
    """The fleet of this process that has this name; a new one the first time."""
    return _FLEETS.setdefault(name, Fleet())


def _sums(
    each: Iterable[list[Family]], departed: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
) -> list[Family]:
    said: dict[str, tuple[str, str]] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for families in each:
        for name, kind, what, samples in families:
            said[name] = (kind, what)
            into = sums.setdefault(name, {})
            for sample, labels, value in samples:
                key = (sample, tuple(sorted(labels.items())))
                into[key] = into.get(key, 0.0 if kind == "gauge" else departed.get(key, 0.0)) + value
    return [
        (name, *said[name], [(sample, dict(labels), value) for (sample, labels), value in found.items()])
        for name, found in sums.items()
    ]


# ---- what a request says of itself ----


def ask_of(path: str, headers: Mapping[str, str], body: bytes) -> Ask:
    """How much a request asks for, and what it may share with others. One that cannot be read asks for
    nothing: the replica that gets it says what is wrong."""
    try:
        asked = json.loads(body) if body else None
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        return Ask()
    chat = path.endswith("/chat/completions")
    prompts = _prompts(asked.get("messages") if chat else asked.get("prompt"), chat)
    copies = _number(asked.get("n"), 1)
    limits = (asked.get("max_completion_tokens"), asked.get("max_tokens"))
    limit = next((found for given in limits if (found := _number(given, 0))), 0)
    new = limit or (CHAT_TOKENS if chat else COMPLETION_TOKENS)
    texts = copies * len(prompts)
    tokens = sum(len(prompt) for prompt in prompts) // CHARACTERS_PER_TOKEN + new * texts
    return Ask(tuple(_keys(asked, headers, prompts)), texts, tokens)


def _prompts(given: Any, chat: bool) -> list[bytes]:
    """Four bytes of each prompt for about a token of it, beginnings being alike where the prompts' are."""
    if chat:
        return (
            [b"\n".join(json.dumps(message, sort_keys=True).encode() for message in given)]
            if (isinstance(given, list))
            else []
        )
    if isinstance(given, str):
        return [given.encode("utf-8", "surrogatepass")]
    if not isinstance(given, list):
        return []
    if all(isinstance(id, int) for id in given):
        return [b"".join((id & 0xFFFFFFFF).to_bytes(4, "little") for id in given)]
    return [prompt for part in given for prompt in _prompts(part, False)]


def _keys(asked: dict[str, Any], headers: Mapping[str, str], prompts: list[bytes]) -> Iterator[bytes]:
    named = (headers.get(SESSION_HEADER), *(asked.get(name) for name in SESSION_NAMES))
    session = next((name for name in named if isinstance(name, str) and name), None)
    if session is not None:
        yield blake2b(session.encode("utf-8", "surrogatepass"), digest_size=16, person=b"session").digest()
    if prompts:
        model = asked.get("model")  # an adapter has keys and values of its own
        yield from reversed(list(_beginnings(prompts[0], model if isinstance(model, str) else "")))


def _beginnings(prompt: bytes, model: str) -> Iterator[bytes]:
    """A hash for each whole block, of the model and all that stands before its end."""
    whole = blake2b(model.encode("utf-8", "surrogatepass") + b"\0", digest_size=16, person=b"prompt")
    for begin in range(0, min(len(prompt) // BLOCK, MOST_BLOCKS) * BLOCK, BLOCK):
        whole.update(prompt[begin : begin + BLOCK])
        yield whole.copy().digest()


def _number(given: Any, otherwise: int) -> int:
    fits = isinstance(given, int) and not isinstance(given, bool) and 0 < given < 2**31
    return given if fits else otherwise
