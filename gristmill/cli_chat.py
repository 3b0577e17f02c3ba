"""A conversation at a terminal: line in, answer out, the history kept.

Each turn's prompt is the whole history. The session keeps the rows of what it has seen, so a turn begins
where the last one ended. Ctrl-C ends an answer through its stream, at the end of the step under way: nothing
is torn in the middle. Editing of the line is readline's, where Python has it.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

import click

from gristmill.cli_output import note
from gristmill.cli_run import timing
from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.runtime.decoding.generate import Stream
    from gristmill.runtime.decoding.sequence import Generation
    from gristmill.runtime.session import Session

HELP = """\
/reset  forget the history and begin anew
/help   show this
/exit   end, as Ctrl-D does
Ctrl-C stops an answer; twice on an empty line it ends the program."""
ARROW = "> "
INTERRUPTED = 130


class History(Protocol):
    """What was said, and how a prompt is made of it."""

    greeting: str

    def prompt(self, line: str) -> list[int] | None:
        """The token ids for a new line behind the history; None where there is nothing to say."""

    def add(self, line: str, ids: list[int], answer: Generation) -> None:
        """Takes in a line, the prompt that it led to, and the answer."""

    def clear(self) -> None:
        """Forgets everything said."""


class ChatHistory:
    """Messages in the model's chat template."""

    greeting = "A chat"

    def __init__(self, session: Session, system: str | None):
        self._tokenizer = session.tokenizer
        self._begin = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._begin)

    def prompt(self, line: str) -> list[int] | None:
        if not line.strip():
            return None
        return self._tokenizer.encode_chat([*self._messages, {"role": "user", "content": line}])

    def add(self, line: str, ids: list[int], answer: Generation) -> None:
        self._messages += [
            {"role": "user", "content": line},
            {"role": "assistant", "content": answer.text},
        ]

    def clear(self) -> None:
        self._messages = list(self._begin)


class TextHistory:
    """One text that grows: what is typed goes behind it, and the model goes on."""

    greeting = "A text that goes on with every line you add (an empty line adds nothing)"

    def __init__(self, session: Session):
        self._tokenizer, self._eos = session.tokenizer, session.eos_ids
        self._ids: list[int] = []

    def prompt(self, line: str) -> list[int] | None:
        if not self._ids and not line:
            return None
        return self._ids + self._tokenizer.encode(line, add_special_tokens=not self._ids)

    def add(self, line: str, ids: list[int], answer: Generation) -> None:
        new = [token for token in answer.token_ids if token not in self._eos]
        if self._tokenizer.decode(ids + new) != self._tokenizer.decode(ids) + answer.text:
            new = self._tokenizer.encode(answer.text, add_special_tokens=False)  # ended by a stop string
        self._ids = ids + new

    def clear(self) -> None:
        self._ids = []


def converse(
    session: Session,
    history: History,
    options: dict[str, Any],
    read: Callable[[], str] | None = None,
) -> None:
    """Answers lines from `read` (raises EOFError at the end; default: the terminal's) until one says /exit.

    Exits the program with 130 after a Ctrl-C on an empty line that follows another one.
    """
    read = read or _line_reader()
    note(f"{history.greeting}; /help lists the commands.")
    interrupted = False
    while True:
        try:
            line = read()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            if interrupted and not _typed():
                raise click.exceptions.Exit(INTERRUPTED) from None
            interrupted = not _typed()
            if interrupted:
                note("Ctrl-C again, Ctrl-D or /exit ends.")
            continue
        interrupted = False
        if re.fullmatch(r"/[a-z]+", line.strip()):
            if _command(line.strip(), history):
                return
        else:
            interrupted = _turn(session, history, line, options)


def _command(name: str, history: History) -> bool:
    """Runs /name; whether it ends the conversation."""
    if name == "/reset":
        history.clear()
        note("The history is forgotten.")
    elif name == "/help":
        note(HELP)
    elif name != "/exit":
        note(f"There is no command {name}; /help lists those that there are.")
    return name == "/exit"


def _turn(session: Session, history: History, line: str, options: dict[str, Any]) -> bool:
    """One answer; whether Ctrl-C stopped it. What goes wrong is said in a line and leaves the history as it
    was."""
    try:
        ids = history.prompt(line)
        if ids is None:
            return False
        if len(ids) > session.max_len:
            note(
                f"The history has {len(ids)} tokens with this line, max_len is {session.max_len}: /reset "
                "forgets it and begins anew, --max-len makes more room."
            )
            return False
        stream = session.stream(ids, **options)
        with _stopped_by_control_c(stream):
            for piece in stream:
                click.echo(piece, nl=False)
    except GristmillError as error:
        note(f"error: {error}")
        return False
    click.echo()
    history.add(line, ids, stream.result)
    note(timing(stream.result))
    if len(ids) + len(stream.result.token_ids) > session.max_len:
        note(f"The history fills max_len = {session.max_len} tokens: /reset forgets it and begins anew.")
    return stream.result.finish_reason == "cancelled"


@contextmanager
def _stopped_by_control_c(stream: Stream) -> Iterator[None]:
    """The first Ctrl-C in the block ends the stream after its step, a second one interrupts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(number: int, frame: Any) -> None:
        # A flag that the scheduler reads: close() takes locks, which the interrupted code may hold.
        stream.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _line_reader() -> Callable[[], str]:
    """Reads a line of the terminal; the mark before it is on stderr where stdout goes elsewhere."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() edits lines and remembers them with it
    if sys.stdout.isatty():
        return lambda: input(ARROW)

    def read() -> str:
        click.echo(ARROW, nl=False, err=True)
        return input()

    return read


def _typed() -> bool:
    """Whether a line was interrupted that was not empty, as far as readline tells."""
    readline = sys.modules.get("readline")
    return bool(readline and readline.get_line_buffer())
