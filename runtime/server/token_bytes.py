"""What bytes a single token stands for: log-probabilities name tokens that may be half a character."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from gristmill.runtime.tokenizer import Tokenizer

SPACE = "\u2581"  # of SentencePiece


class TokenBytes:
    """The bytes of token ids, by the decoder of the model's tokenizer: byte-level, SentencePiece's, or none,
    where a token is what it decodes to alone."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id)
        if token is None:  # an embedding may have more rows than the tokenizer has tokens
            return b""
        if token_id in self._added:
            return token.encode()
        if "ByteLevel" in self._decoders:
            return bytes(BYTE_OF[c] for c in token) if set(token) <= BYTE_OF.keys() else token.encode()
        if "ByteFallback" in self._decoders and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            return bytes.fromhex(token[3:5])
        if self._decoders & {"Metaspace", "Replace"}:
            return token.replace(SPACE, " ").encode()
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()

    @cached_property
    def _decoders(self) -> set[str]:
        return set(_types(json.loads(self._tokenizer.backend.to_str()).get("decoder")))

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.backend.get_added_tokens_decoder())


def _types(decoder: Any) -> list[str]:
    if not isinstance(decoder, dict):
        return []
    parts = [kind for part in decoder.get("decoders", []) for kind in _types(part)]
    return [str(decoder.get("type")), *parts]


def _byte_level() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: printable ones for themselves, the others
    from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_level()
