"""`gristmill run`: one text from --prompt or stdin, or a conversation at a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from gristmill.cli_options import ARTIFACT, DEVICE, HUGEPAGES, JSON, MAX_LEN, PIN, THREADS
from gristmill.cli_output import echo_json, note
from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.runtime.decoding.generate import Generation
    from gristmill.runtime.session import Session

RESULT_KEYS = (
    "text", "token_ids", "finish_reason", "prompt_tokens", "reused_tokens", "ttft_s", "decode_tok_s", "seed",
)  # fmt: skip


@click.command("run", no_args_is_help=True)
@ARTIFACT
@click.option("--prompt", help="The text to continue, or with --chat what the user says.")
@click.option(
    "--max-new-tokens", type=int, default=256, show_default=True, help="The most tokens to generate."
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token."
)
@click.option("--top-k", type=int, default=0, help="Draw from the K most likely tokens only.")
@click.option(
    "--top-p", type=float, default=1.0, help="Draw from the most likely tokens that together reach P."
)
@click.option(
    "--repetition-penalty", type=float, default=1.0, help="Above 1: tokens seen before become less likely."
)
@click.option("--seed", type=int, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end of the text.")
@click.option("--timeout", "timeout_s", type=float, help="End the text after this many seconds.")
@click.option("--no-lookup", is_flag=True, help="Do not propose tokens that stood earlier in the text.")
@click.option(
    "--draft", type=click.Path(), help="Artifact of a smaller model, same tokenizer, that proposes tokens."
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Use the model's chat template, or not; default: in a conversation, where the model has one.",
)
@click.option("--system", help="In a chat: the system message.")
@MAX_LEN
@DEVICE
@THREADS
@HUGEPAGES
@PIN
@JSON
def run_command(
    artifact: str, prompt: str | None, chat: bool | None, system: str | None, max_len: int | None,
    device: str, threads: int | None, hugepages: bool, pin: bool, draft: str | None, no_lookup: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Continue a text, or answer with --chat; without --prompt, the text comes from stdin.

    On a terminal and without --prompt it is a conversation: a chat where the model has a chat template, else
    a text that both write. Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists its commands.

    \b
    gristmill run story.grist --prompt "Once upon a time"
    gristmill run chat.grist --chat --prompt "Who are you?" --temperature 0.7 --top-p 0.9
    gristmill run chat.grist --system "Answer in one sentence."
    cat notes.txt | gristmill run story.grist --max-new-tokens 100
    """
    from gristmill.runtime.decoding.options import GenerationOptions
    from gristmill.runtime.session import load

    interactive = prompt is None and sys.stdin.isatty()
    if interactive and as_json:
        raise click.UsageError("--json needs --prompt, or a text on stdin")
    options["lookup"] = False if no_lookup else None
    GenerationOptions.of(**options)  # complains before the artifact is read
    text = prompt if prompt is not None or interactive else _read_stdin()
    session = load(
        artifact, device, threads=threads, max_len=max_len, max_slots=1, hugepages=hugepages, pin=pin,
        draft=draft,
    )  # fmt: skip
    if text is None:
        _converse(session, options, chat, system)
    elif as_json:
        result = session.generate(_prompt(session, text, bool(chat), system), **options)
        echo_json({key: getattr(result, key) for key in RESULT_KEYS})
    else:
        _stream(session, text, bool(chat), system, options)


def timing(done: Generation) -> str:
    """What a generation took, in a line."""
    reused = f" ({done.reused_tokens} reused)" if done.reused_tokens else ""
    return (
        f"{done.prompt_tokens}{reused} + {len(done.token_ids)} tokens, first after {done.ttft_s:.3f} s, "
        f"then {done.decode_tok_s:.1f} tok/s, ended by {done.finish_reason}"
    )


def _converse(session: Session, options: dict[str, Any], chat: bool | None, system: str | None) -> None:
    from gristmill.cli_chat import ChatHistory, TextHistory, converse

    chats = session.tokenizer.chat_template is not None if chat is None else chat
    if system and not chats:
        raise GristmillError(
            "--system needs a chat, and this model has no chat template or --no-chat was given"
        )
    history = ChatHistory(session, system) if chats else TextHistory(session)
    converse(session, history, options)


def _prompt(session: Session, text: str, chat: bool, system: str | None) -> str | list[int]:
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        return session.tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
    if system:
        raise GristmillError("--system needs --chat; without it the prompt is continued as it stands")
    return text


def _stream(session: Session, text: str, chat: bool, system: str | None, options: dict[str, Any]) -> None:
    from gristmill.runtime.report import memory_text

    stream = session.stream(_prompt(session, text, chat, system), **options)
    if sys.stdout.isatty() and not chat:
        click.secho(text, dim=True, nl=False)
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()
    note(memory_text(session.memory))
    note(timing(stream.result))


def _read_stdin() -> str:
    """The text on stdin, without the newline that ends a file."""
    try:
        text = click.get_binary_stream("stdin").read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise GristmillError(
            f"stdin is not UTF-8 text: byte {error.start} does not fit; convert it first"
        ) from error
    if not text:
        raise GristmillError(
            "stdin is empty; give --prompt TEXT, pipe a text in, or run at a terminal for a conversation"
        )
    return text[:-1] if text.endswith("\n") else text
