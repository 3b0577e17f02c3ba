"""`gristmill run`: one text from --prompt or stdin, or a conversation at a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from gristmill.cli_generation import (
    CONTRASTIVE_TOP_K,
    beam_keywords,
    contrastive_keywords,
    generation_keywords,
    generation_options,
)
from gristmill.cli_options import (
    ADAPTER,
    ARTIFACT,
    DEVICE,
    HUGEPAGES,
    JSON,
    MAX_LEN,
    PIN,
    TENSOR_PARALLEL,
    THREADS,
)
from gristmill.cli_output import echo_json, note
from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.runtime.decoding.sequence import Generation
    from gristmill.runtime.session import Session

RESULT_KEYS = (
    "text", "token_ids", "score", "finish_reason", "prompt_tokens", "reused_tokens", "ttft_s", "decode_tok_s",
    "seed",
)  # fmt: skip
MOST_SLOTS = 8  # for several answers: more wait in turn


@click.command("run", no_args_is_help=True)
@ARTIFACT
@click.option("--prompt", help="The text to continue, or with --chat what the user says.")
@generation_options
@click.option("--beams", type=int, help="Beam search with so many beams.")
@click.option(
    "--length-penalty", type=float, help="With --beams: above 0 favours long texts.  [default: 1]"
)
@click.option(
    "--penalty-alpha", type=float, help="Contrastive search: 0 to 1, among the --top-k (4) likeliest tokens."
)
@click.option(
    "--draft", type=click.Path(), help="Artifact of a smaller model, same tokenizer, that proposes tokens."
)
@ADAPTER
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Use the model's chat template, or not; default: in a conversation, where the model has one.",
)
@click.option("--system", help="In a chat: the system message.")
@MAX_LEN
@DEVICE
@THREADS
@TENSOR_PARALLEL
@HUGEPAGES
@PIN
@JSON
def run_command(
    artifact: str, prompt: str | None, chat: bool | None, system: str | None, max_len: int | None,
    device: str, threads: int | None, tensor_parallel: int | None, hugepages: bool, pin: bool,
    draft: str | None, beams: int | None, length_penalty: float | None, penalty_alpha: float | None,
    adapter: dict[str, str], as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Continue a text, or answer with --chat; without --prompt, the text comes from stdin.

    On a terminal and without --prompt it is a conversation: a chat where the model has a chat template, else
    a text that both write. Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists its commands.

    \b
    gristmill run story.grist --prompt "Once upon a time"
    gristmill run chat.grist --chat --prompt "Who are you?" --temperature 0.7 --top-p 0.9
    gristmill run chat.grist --system "Answer in one sentence."
    gristmill run story.grist --prompt "Tom" --n 3 --temperature 1 --min-p 0.1
    gristmill run story.grist --prompt "Tom" --beams 4 --no-repeat-ngram 3
    gristmill run chat.grist --chat --prompt "A city, as JSON" --schema city.json
    gristmill run story.grist --adapter adapters/pirate --prompt "Once upon a time"
    gristmill run big.grist --draft small.grist --prompt "Once upon a time"
    cat notes.txt | gristmill run story.grist --max-new-tokens 100
    """
    from gristmill.runtime.session import load

    interactive = prompt is None and sys.stdin.isatty()
    searches = {"--beams": beams is not None, "--penalty-alpha": penalty_alpha is not None}
    _refuse_mixed(interactive, as_json, searches, length_penalty, draft, given)
    options = generation_keywords(given)
    text = prompt if prompt is not None or interactive else _read_stdin()
    session = load(
        artifact, device, threads=threads, max_len=max_len, max_slots=_slots(beams, penalty_alpha, given),
        hugepages=hugepages, pin=pin, draft=draft, tensor_parallel=tensor_parallel, adapters=adapter,
    )  # fmt: skip
    if adapter:
        options["adapter"] = next(iter(adapter))
    if text is None:
        _converse(session, options, chat, system)
        return
    ids = _prompt(session, text, bool(chat), system)
    if beams is not None:
        found: Any = session.beam_search(ids, **beam_keywords(options, beams, length_penalty))
        _show(found if given["n"] > 1 else found[0], as_json)
    elif penalty_alpha is not None:
        _show(session.contrastive_search(ids, **contrastive_keywords(options, penalty_alpha)), as_json)
    elif as_json or given["n"] > 1:
        _show(session.generate(ids, **options), as_json)
    else:
        _stream(session, text if not chat else None, ids, options)


def _slots(beams: int | None, penalty_alpha: float | None, given: dict[str, Any]) -> int:
    """The slots that the way to decode takes at once."""
    if beams is not None:
        return max(1, beams)
    return given["top_k"] or CONTRASTIVE_TOP_K if penalty_alpha is not None else min(given["n"], MOST_SLOTS)


def _refuse_mixed(
    interactive: bool, as_json: bool, searches: dict[str, bool], length_penalty: float | None,
    draft: str | None, given: dict[str, Any],
) -> None:  # fmt: skip
    """Raises UsageError for options that do not go together. searches: other ways to decode, by option."""
    asked = [name for name, used in searches.items() if used]
    if interactive and (as_json or asked or given["n"] != 1):
        name = "--json" if as_json else asked[0] if asked else "--n"
        raise click.UsageError(f"{name} needs --prompt, or a text on stdin")
    if given["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    if length_penalty is not None and "--beams" not in asked:
        raise click.UsageError("--length-penalty needs --beams")
    if len(asked) > 1 or (asked and draft is not None):
        raise click.UsageError(f"{asked[0]} does not go with {asked[1] if len(asked) > 1 else '--draft'}")


def _show(found: Any, as_json: bool) -> None:
    """Prints one result, or several in a list."""
    if as_json:
        echo_json([_plain(one) for one in found] if isinstance(found, list) else _plain(found))
        return
    results = found if isinstance(found, list) else [found]
    for number, result in enumerate(results, start=1):
        if len(results) > 1:
            click.secho(f"--- {number} of {len(results)}", dim=sys.stdout.isatty())
        click.echo(result.text)


def _plain(result: Any) -> dict[str, Any]:
    """A Generation or a BeamText as plain values."""
    found = {key: getattr(result, key) for key in RESULT_KEYS if hasattr(result, key)}
    logprobs = getattr(result, "logprobs", None)
    return found if logprobs is None else {**found, "logprobs": [choice._asdict() for choice in logprobs]}


def timing(done: Generation) -> str:
    """What a generation took, in a line."""
    reused = f" ({done.reused_tokens} reused)" if done.reused_tokens else ""
    return (
        f"{done.prompt_tokens}{reused} + {len(done.token_ids)} tokens, first after {done.ttft_s:.3f} s, "
        f"then {done.decode_tok_s:.1f} tok/s, ended by {done.finish_reason}"
    )


def _converse(session: Session, options: dict[str, Any], chat: bool | None, system: str | None) -> None:
    from gristmill.cli_chat import ChatHistory, TextHistory, converse

    chats = chat if chat is not None else session.tokenizer.chat_template is not None
    if system and not chats:
        raise GristmillError(
            "--system needs a chat, and this model has no chat template or --no-chat was given"
        )
    converse(session, ChatHistory(session, system) if chats else TextHistory(session), options)


def _prompt(session: Session, text: str, chat: bool, system: str | None) -> str | list[int]:
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        return session.tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
    if system:
        raise GristmillError("--system needs --chat; without it the prompt is continued as it stands")
    return text


def _stream(session: Session, shown: str | None, prompt: str | list[int], options: dict[str, Any]) -> None:
    """Prints a text as it comes, at a terminal behind the prompt."""
    from gristmill.runtime.report import memory_text

    stream = session.stream(prompt, **options)
    if shown and sys.stdout.isatty():
        click.secho(shown, dim=True, nl=False)
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()
    note(memory_text(session.memory))
    note(timing(stream.result))


def _read_stdin() -> str:
    """The text on stdin, without the newline that ends a file."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise GristmillError(
            f"stdin is not UTF-8 text: byte {error.start} does not fit; convert it first"
        ) from error
    if not text:
        raise GristmillError(
            "stdin is empty; give --prompt TEXT, pipe a text in, or run at a terminal for a conversation"
        )
    return text[:-1] if text.endswith("\n") else text
