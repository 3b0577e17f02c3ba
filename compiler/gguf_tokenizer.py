"""A GGUF's vocabulary as tokenizer files, with the ids that llama.cpp gives a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ..quant.formats import gguf_pre_tokenizers
from ..quant.formats.gguf_pre_tokenizers import PRE_TOKENIZERS
from ..runtime.errors import GristmillError
from .gguf_checkpoint import GgufHeader

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of token in a GGUF
SPACE = "\u2581"
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eos", "eot", "eom")  # tokens that end a text
DEFAULT_PRE = "gpt-2"  # of files from before the pre-tokenizer was named


def tokenizer_files(header: GgufHeader) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises GristmillError for a vocabulary that is neither sentencepiece nor byte pairs that are known here.
    """
    tokens = _strings(header, "tokens")
    count = len(tokens)
    kinds = _list(header, "token_type", count) or [NORMAL] * count
    model = header.metadata.get("tokenizer.ggml.model")
    if model == "llama":
        document = _sentencepiece(header, tokens, kinds)
    elif model == "gpt2":
        document = _byte_pairs(header, tokens, kinds)
    else:
        raise GristmillError(f"{header.path}: tokenizer {model!r} is not supported; expected llama or gpt2")
    document |= {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(i, text, kind) for i, (text, kind) in enumerate(zip(tokens, kinds))
                         if kind in (UNKNOWN, CONTROL, USER_DEFINED)],
        "post_processor": _around(header, tokens, model),
    }  # fmt: skip
    text = json.dumps(document, ensure_ascii=False)
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises plain Exception for whatever it cannot read
        raise GristmillError(f"{header.path}: its tokenizer cannot be used ({str(error)[:120]})") from None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **_named(header, tokens)}
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    ends = [i for i in (_id(header, name, count) for name in ENDS) if i is not None]
    generation = {"bos_token_id": _id(header, "bos", count), "eos_token_id": ends or None}
    files = {"tokenizer_config.json": config, "generation_config.json": generation}
    return {
        "tokenizer.json": text.encode(),
        **{n: json.dumps(v, indent=1).encode() for n, v in files.items()},
    }


def _sentencepiece(header: GgufHeader, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """Byte pairs that make each token in every way that its parts allow, the best score first."""
    scores = _list(header, "scores", len(tokens))
    if scores is None:
        raise GristmillError(f"{header.path}: its tokenizer has no scores; download it again")
    vocabulary = _vocabulary(header, tokens)
    parts = {text for text, kind in zip(tokens, kinds) if kind in (NORMAL, USER_DEFINED)}
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
    merges = [
        [tokens[i][:cut], tokens[i][cut:]]
        for i in ranked if kinds[i] == NORMAL
        for cut in range(1, len(tokens[i])) if tokens[i][:cut] in parts and tokens[i][cut:] in parts
    ]  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[dict[str, Any]] = [
        {**replace, "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
    ]
    steps += [
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    unknown = _id(header, "unknown", len(tokens))
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": True, "fuse_unk": True,
            "unk_token": None if unknown is None else tokens[unknown],
        },
    }  # fmt: skip


def _byte_pairs(header: GgufHeader, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    pre = header.metadata.get("tokenizer.ggml.pre", DEFAULT_PRE)
    if pre not in PRE_TOKENIZERS:
        raise GristmillError(
            f"{header.path}: pre-tokenizer {pre!r} is not known; expected one of {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [line.split(" ") for line in _strings(header, "merges")]
    if any(len(pair) != 2 for pair in merges):
        raise GristmillError(f"{header.path}: its merges are not pairs; download it again")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "normalizer": None,
        "pre_tokenizer": gguf_pre_tokenizers.to_json(PRE_TOKENIZERS[pre]),
        "decoder": byte_level,
        "model": {
            "type": "BPE", "vocab": _vocabulary(header, tokens), "merges": merges,
            "ignore_merges": PRE_TOKENIZERS[pre].ignore_merges,
        },
    }  # fmt: skip


def _vocabulary(header: GgufHeader, tokens: Sequence[str]) -> dict[str, int]:
    found = {text: i for i, text in enumerate(tokens)}
    if len(found) != len(tokens):
        raise GristmillError(f"{header.path}: its vocabulary names a token twice; download it again")
    return found


def _added(number: int, text: str, kind: int) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **plain, "special": kind != USER_DEFINED}


def _around(header: GgufHeader, tokens: Sequence[str], model: str) -> dict[str, Any] | None:
    """What puts BOS before a text and EOS after it; sentencepiece has a BOS unless told not to."""
    flags = {"bos": model == "llama", "eos": False}
    added = {n: header.metadata.get(f"tokenizer.ggml.add_{n}_token", flags[n]) for n in flags}
    ids = {n: _id(header, n, len(tokens)) for n in flags}
    missing = next((n for n in flags if added[n] and ids[n] is None), None)
    if missing:
        raise GristmillError(f"{header.path}: its tokenizer adds a token {missing!r} that it does not name")
    whole: list[Any] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pieces = {n: {"SpecialToken": {"id": tokens[i], "type_id": 0}} for n, i in ids.items() if i is not None}
    before, after = ([pieces[n]] if added[n] else [] for n in flags)
    single = before + whole + after
    if len(single) == 1:
        return None
    used = {tokens[i] for n, i in ids.items() if added[n] and i is not None}
    special = {t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in sorted(used)}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _named(header: GgufHeader, tokens: Sequence[str]) -> dict[str, str]:
    ids = {name: _id(header, key, len(tokens)) for name, key in NAMES.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None}


def _id(header: GgufHeader, name: str, count: int) -> int | None:
    found = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return found if type(found) is int and 0 <= found < count else None


def _strings(header: GgufHeader, name: str) -> list[str]:
    found = header.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise GristmillError(f"{header.path}: its tokenizer has no {name}; give a file with its vocabulary")
    return found


def _list(header: GgufHeader, name: str, count: int) -> list[Any] | None:
    """A list with an entry for each token; None where there is none."""
    found = header.metadata.get(f"tokenizer.ggml.{name}")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != count:
        raise GristmillError(
            f"{header.path}: its tokenizer's {name} do not fit its tokens; download it again"
        )
    return found
