"""The adapters that a session holds, by the names that requests have for them."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.runtime.adapters.bind import bind, refuse_artifact
from gristmill.runtime.adapters.peft import read_adapter
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.slots import NO_ADAPTER

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

MOST_NAME = 200
ONLY_CPU = (
    "adapters at run time are for device 'cpu' in one process; load with it, or merge the adapter with "
    "`gristmill compile --lora`, which runs everywhere"
)


@dataclass(frozen=True)
class Held:
    """number: what the executor calls it, never that of another one; base: the model that PEFT noted."""

    name: str
    number: int
    path: Path
    base: str
    modules: int


class Adapters:
    """Adapters over the executor of `session`; they share its base weights and its slots."""

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}

    def after_fork(self) -> None:
        """In a child process: whoever held the lock is not here."""
        self._lock = threading.Lock()

    def load(self, name: str, path: str | Path) -> Held:
        """Reads the adapter in directory `path`. Raises GristmillError for one that does not fit."""
        if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME or not name.isprintable():
            raise GristmillError(
                f"an adapter's name is {name!r}, expected 1 to {MOST_NAME} printable characters"
            )
        executor: Any = self._session.executor
        if not hasattr(executor, "add_adapter"):
            raise GristmillError(ONLY_CPU)
        refuse_artifact(self._session.artifact)
        adapter = read_adapter(path)
        pairs = bind(adapter, self._session.program, self._session.artifact)
        with self._lock:
            if name in self._held:
                raise GristmillError(f"there is an adapter {name!r} already; unload it, or give another name")
            number = int(executor.add_adapter(pairs))
            held = Held(name, number, Path(path), adapter.base, len(adapter.pairs))
            self._held[name] = held
        return held

    def unload(self, name: str, in_use: Callable[[int], bool]) -> None:
        """Forgets an adapter. in_use: whether a slot has rows of that number.

        Raises GristmillError for an unknown one, and for one that is generating.
        """
        number = self.number(name)
        with self._lock:
            held = self._held.pop(name)
            if in_use(number):
                self._held[name] = held
                raise GristmillError(f"adapter {name!r} is generating; unload it when that has ended")
            executor: Any = self._session.executor
            executor.remove_adapter(number)

    def number(self, name: str | None) -> int:
        """The number of an adapter, NO_ADAPTER of no adapter. Raises GristmillError for an unknown one."""
        if name is None:
            return NO_ADAPTER
        held = self._held.get(name)
        if held is None:
            near = difflib.get_close_matches(name, self._held, n=2)
            known = ", ".join(self._held) or "none: load some with load_adapter(name, directory)"
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {known}"
            raise GristmillError(f"there is no adapter {name!r}; {hint}")
        return held.number

    def holds(self, number: int) -> bool:
        """Whether rows may have this number."""
        return number == NO_ADAPTER or any(held.number == number for held in list(self._held.values()))

    @property
    def all(self) -> dict[str, Held]:
        """What is held, by name, in the order of loading."""
        return dict(self._held)
