"""Text to token ids and back as the model's tokenizer.json says; ids equal transformers'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from gristmill.runtime.artifact import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS_MAP,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Artifact,
    parse_json,
)
from gristmill.runtime.errors import GristmillError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer; `encode` adds what tokenizer.json's post-processor adds (BOS, mostly)."""

    def __init__(
        self, tokenizer_json: bytes, config: Mapping[str, Any] | None = None, chat_template: str | None = None
    ):
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the Rust library raises plain Exception for whatever it cannot read
            raise GristmillError(f"{TOKENIZER} cannot be read: {_first_line(error)}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self._config = dict(config or {})
        self._template = chat_template if chat_template is not None else _template_of(self._config)

    @staticmethod
    def of(artifact: Artifact) -> Tokenizer:
        """The tokenizer stored in `artifact`."""
        if TOKENIZER not in artifact.files:
            raise GristmillError(f"{artifact.path} holds no tokenizer; give prompts as token ids")
        known = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE)
        return Tokenizer.of_files({name: artifact.read(name) for name in known if name in artifact.files})

    @staticmethod
    def of_files(files: Mapping[str, bytes]) -> Tokenizer:
        """The tokenizer in these files of a model or an artifact, by their names."""
        named = [(n, files[n]) for n in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG) if n in files]
        configs = [parse_json(data, name) for name, data in named]
        config = {key: value for found in configs for key, value in found.items() if value is not None}
        template = files[CHAT_TEMPLATE].decode("utf-8", "replace") if CHAT_TEMPLATE in files else None
        return Tokenizer(files[TOKENIZER], config, template)

    @property
    def size(self) -> int:
        """The number of ids, added tokens included; the model's vocabulary may be wider."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self.backend.get_vocab(with_added_tokens=True))

    @property
    def special_tokens(self) -> dict[str, str]:
        """Named special tokens as text: bos_token, eos_token, ..."""
        found = {name: _token_text(self._config.get(name)) for name in SPECIAL_TOKENS}
        return {name: text for name, text in found.items() if text is not None}

    @property
    def prefix_ids(self) -> list[int]:
        """The ids that stand before every text (BOS, mostly; empty where the tokenizer adds none)."""
        return self._ids("", add_special_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`."""
        if not isinstance(text, str):
            raise GristmillError(f"a prompt is {type(text).__name__}, expected text or a list of token ids")
        return self._ids(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids that no token has are left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        """The token with this id as it stands in the vocabulary, or None."""
        return self.backend.id_to_token(token_id) if token_id >= 0 else None

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, a Jinja text; None where it has none."""
        return self._template

    def chat(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """The prompt for `messages` ({"role", "content"} each) by the model's chat template."""
        from gristmill.runtime.chat_template import render

        if self._template is None:
            raise GristmillError(
                "this model has no chat template; give a plain prompt instead (without --chat)"
            )
        conversation = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        if not conversation:
            raise GristmillError("a chat needs at least one message")
        given = {**self.special_tokens, "add_generation_prompt": add_generation_prompt, **values}
        return render(self._template, conversation, given)

    def encode_chat(self, messages: Iterable[Mapping[str, Any]], **values: Any) -> list[int]:
        """The ids of `chat(messages)`; the template writes the special tokens itself."""
        return self.encode(self.chat(messages, **values), add_special_tokens=False)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # see __init__
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise GristmillError(
                    "the text holds a lone surrogate, which is not a character; expected valid text"
                ) from error
            raise GristmillError(f"the tokenizer cannot encode the text: {_first_line(error)}") from error


class StreamDecoder:
    """Ids one at a time to pieces of text that never split a character; the pieces joined are the text of all
    ids.

    A token's text depends on its neighbours (a leading space, bytes of one character), so each piece is the
    difference of two decodings of a short window: with and without the new ids. A decoding that ends in
    U+FFFD waits for the next id.
    """

    CONTEXT = 6  # ids of the prompt that the window begins with

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_ids[-self.CONTEXT :])
        self._read = len(self._window)  # ids of the window whose text is out already

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come; often empty in the middle of a character."""
        self._window.append(token_id)
        piece = self._difference()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return piece

    def flush(self) -> str:
        """What was held back; after the last id."""
        piece = self._difference()
        self._read = len(self._window)
        return piece

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._window[: self._read], self._skip)
        return self._tokenizer.decode(self._window, self._skip)[len(before) :]


def _token_text(token: Any) -> str | None:
    if isinstance(token, Mapping):  # an AddedToken written as an object
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template_of(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates by name
        by_name = {
            entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)
        }
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
