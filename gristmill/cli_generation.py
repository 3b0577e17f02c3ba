"""The options of `gristmill run` that say how a text goes on; see GenerationOptions for what they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gristmill.runtime.errors import GristmillError

CONTRASTIVE_TOP_K = 4

def _bias(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[int, float]:
    """ID=BIAS texts as a mapping."""
    found = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not ID=BIAS, such as 50=-5 or 50=-inf") from error
    return found


_OPTIONS = (
    click.option(
        "--max-new-tokens", type=int, default=256, show_default=True, help="The most tokens to generate."
    ),
    click.option("--min-new-tokens", type=int, default=0, help="Do not end before so many tokens."),
    click.option(
        "--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token."
    ),
    click.option("--top-k", type=int, default=0, help="Draw from the K most likely tokens only."),
    click.option(
        "--top-p", type=float, default=1.0, help="Draw from the most likely tokens that together reach P."
    ),
    click.option(
        "--min-p", type=float, default=0.0, help="Draw from tokens at least P times as likely as the first."
    ),
    click.option(
        "--typical-p", type=float, default=1.0, help="Draw from the most typical tokens that reach P."
    ),
    click.option(
        "--repetition-penalty", type=float, default=1.0, help="Above 1: tokens seen before are less likely."
    ),
    click.option("--presence-penalty", type=float, default=0.0, help="Against tokens that the answer has."),
    click.option("--frequency-penalty", type=float, default=0.0, help="The same, for each time it has them."),
    click.option("--no-repeat-ngram", type=int, default=0, help="No N tokens in a row come twice."),
    click.option(
        "--logit-bias", metavar="ID=BIAS", multiple=True, callback=_bias,
        help="Added to a token's logit, -inf forbids it; may be given several times.",
    ),
    click.option("--seed", type=int, help="Same seed, same text."),
    click.option("--stop", multiple=True, help="End before this text; may be given several times."),
    click.option(
        "--stop-id", "stop_ids", type=int, multiple=True, help="End with this token id; the same."
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on past the end of the text."),
    click.option("--regex", help="The whole answer matches this regular expression."),
    click.option("--choice", "choices", multiple=True, help="The answer is one of these texts."),
    click.option("--schema", type=click.Path(), help="File with the JSON Schema that the answer follows."),
    click.option("--n", type=int, default=1, help="So many answers; with --beams the N best."),
    click.option(
        "--logprobs", type=int, help="With --json: log-probabilities, also of the N likeliest tokens."
    ),
    click.option("--timeout", "timeout_s", type=float, help="End the text after this many seconds."),
    click.option("--no-lookup", is_flag=True, help="Do not propose tokens that stood earlier in the text."),
)  # fmt: skip


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, in their order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def generation_keywords(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of Session.generate for the values of these options. Raises GristmillError for values that
    cannot be, before any artifact is read."""
    from gristmill.runtime.decoding.options import GenerationOptions

    keywords = dict(given)
    keywords["lookup"] = False if keywords.pop("no_lookup") else None
    if keywords["schema"] is not None:
        keywords["schema"] = _read_schema(keywords["schema"])
    GenerationOptions.of(**keywords)
    return keywords


def beam_keywords(keywords: dict[str, Any], beams: int, length_penalty: float | None) -> dict[str, Any]:
    """Keywords of beam search for those of Session.generate, without what they leave as it is."""
    found = _changed(keywords)
    found.update(num_beams=beams, num_return_sequences=found.pop("n", 1))
    return found if length_penalty is None else {**found, "length_penalty": length_penalty}


def contrastive_keywords(keywords: dict[str, Any], penalty_alpha: float) -> dict[str, Any]:
    """Keywords of contrastive search for those of Session.generate."""
    return {"top_k": CONTRASTIVE_TOP_K, **_changed(keywords), "penalty_alpha": penalty_alpha}


def _changed(keywords: dict[str, Any]) -> dict[str, Any]:
    """Those that are not as by default; lookup is for speed alone."""
    from gristmill.runtime.decoding.options import GenerationOptions

    chosen, default = GenerationOptions.of(**keywords), GenerationOptions()
    values = {name: getattr(chosen, name) for name in keywords if name != "lookup"}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _read_schema(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise GristmillError(f"the schema {path} cannot be read: {why}") from error
