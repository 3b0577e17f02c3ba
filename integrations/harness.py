"""What lm-evaluation-harness asks of a model, in token ids and plain values: everything of the adapter in
`lm_eval` that can be said without the library.

Contexts that are too long lose their beginning, as the harness does it for every model. A text for a rolling
log-likelihood is cut into windows as long as the slots; each token is predicted once, the last window's with
as much context as it has room for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.runtime.tokenizer import Tokenizer

MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first counts
WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "n": 1, "use_cache": True}
FOR_DRAWING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
NOT_FOR_TASKS = {"n", "logprobs", "stop", "max_new_tokens"}


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool | None = None) -> list[int]:
    """The ids of `text`; by default with the tokenizer's BOS unless the text begins with it (as one from a
    chat template does)."""
    if add_special_tokens is None:
        bos = tokenizer.special_tokens.get("bos_token")
        add_special_tokens = not (bos and text.startswith(bos))
    return tokenizer.encode(text, add_special_tokens)


def prefix_token(tokenizer: Tokenizer, eos_ids: frozenset[int]) -> int:
    """The token that stands before a text without context: BOS, else the one that ends texts."""
    for name in ("bos_token", "eos_token"):
        token = tokenizer.special_tokens.get(name)
        found = tokenizer.backend.token_to_id(token) if token is not None else None
        if found is not None:
            return int(found)
    if tokenizer.prefix_ids or eos_ids:
        return (tokenizer.prefix_ids or sorted(eos_ids))[0]
    raise GristmillError(
        "this model has no token to begin or end a text with, so texts without context cannot be scored"
    )


def cut_context(context: Sequence[int], continuation: Sequence[int], max_len: int) -> list[int]:
    """The end of `context` that fits before `continuation`, whose last token is never put in."""
    room = max_len + 1 - len(continuation)
    if room < 1:
        raise GristmillError(
            f"a continuation of {len(continuation)} tokens leaves no room for context, max_len is {max_len}; "
            "give a larger max_len"
        )
    return list(context[-room:])


def rolling_windows(ids: Sequence[int], prefix: int, max_len: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs of at most max_len + 1 tokens that predict each of `ids` once.

    >>> rolling_windows([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], prefix=99, max_len=4)[0]
    ([99], [0, 1, 2, 3])
    >>> rolling_windows([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], prefix=99, max_len=4)[1:]
    [([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    """
    tokens = [prefix, *ids]  # token i + 1 of these is id i
    found = []
    for start in range(0, len(ids), max_len):
        end = min(start + max_len, len(ids))
        begin = max(0, end - max_len)
        found.append((tokens[begin : start + 1], tokens[start + 1 : end + 1]))
    return found


def generation_options(given: Mapping[str, Any], default_max_new_tokens: int) -> dict[str, Any]:
    """Keywords of Session.generate for a task's generation_kwargs. Raises GristmillError for one that would
    change the text and is not supported."""
    left = dict(given)
    until = left.pop("until", None) or []
    lengths = [left.pop(name, None) for name in MAX_NEW_TOKENS]
    options: dict[str, Any] = {
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "max_new_tokens": next((int(n) for n in lengths if n is not None), default_max_new_tokens),
    }
    do_sample = left.pop("do_sample", None)
    if do_sample and left.get("temperature") is None:
        left["temperature"] = 1.0  # as for transformers
    if do_sample is False or not left.get("temperature"):
        for name in FOR_DRAWING:
            left.pop(name, None)
    if "no_repeat_ngram_size" in left:
        left["no_repeat_ngram"] = left.pop("no_repeat_ngram_size")
    known = {field.name for field in fields(GenerationOptions)} - NOT_FOR_TASKS
    for name, value in left.items():
        if name in known:
            options[name] = value
        elif name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]:
            raise GristmillError(
                f"the task generates with {name}={value!r}, which gristmill does not support; override it "
                f"with --gen_kwargs (supported: {', '.join(sorted(known))})"
            )
    return options


def cut_prompt(ids: list[int], max_len: int, max_new_tokens: int) -> list[int]:
    """The end of a prompt that leaves room for the new tokens (the last of which is never put in)."""
    room = max_len + 1 - max_new_tokens
    if room < 1:
        raise GristmillError(
            f"{max_new_tokens} new tokens leave no room for a prompt, max_len is {max_len}; "
            "give a larger max_len or a smaller max_gen_toks"
        )
    return ids[-room:]


def chat_prompt(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], add_generation_prompt: bool = True
) -> str:
    """The chat template's text; without generation prompt it ends with the last message's content, which the
    model is to go on with."""
    text = tokenizer.chat(messages, add_generation_prompt)
    if add_generation_prompt:
        return text
    content = str(messages[-1]["content"]).strip()
    if content not in text:
        raise GristmillError("the chat template changes the last message, so the model cannot go on with it")
    return text[: text.rindex(content) + len(content)]
