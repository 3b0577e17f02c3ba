"""The tokenizer of an artifact: copied, or converted when the model only has an older form."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from ..runtime.errors import GristmillError

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
SENTENCEPIECE = "tokenizer.model"
SPACE = "\u2581"  # how sentencepiece writes a space


def tokenizer_files(directory: Path, samples: list[str]) -> dict[str, bytes]:
    """File name → bytes for the artifact.

    ``samples``: texts on which a conversion must give the same ids as the original.

    Raises GristmillError when there is no tokenizer, or its conversion differs.
    """
    files = {name: (directory / name).read_bytes() for name in COPIED if (directory / name).is_file()}
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = _converted(directory, samples)
    return files


def _converted(directory: Path, samples: list[str]) -> bytes:
    older = [n for n in (SENTENCEPIECE, "vocab.json") if (directory / n).is_file()]
    if not older:
        raise GristmillError(
            f"{directory}: no tokenizer; expected tokenizer.json "
            f"(or {SENTENCEPIECE}, or vocab.json and merges.txt)"
        )
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(
            directory, use_fast=True, trust_remote_code=False, local_files_only=True
        )
        text = str(fast.backend_tokenizer.to_str())
    except Exception as error:  # conversion fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise GristmillError(
            f"{directory}/{older[0]}: cannot be converted to tokenizer.json ({reason}); add a tokenizer.json"
        ) from None
    if older[0] == SENTENCEPIECE:
        text = _proven(directory / SENTENCEPIECE, text, samples)
    return text.encode()


def _proven(model: Path, converted: str, samples: list[str]) -> str:
    """The spelling of the conversion whose ids equal sentencepiece's own on every line of the samples."""
    try:
        import sentencepiece
    except ImportError:
        raise GristmillError(
            f"{model}: converting it needs the package sentencepiece; pip install sentencepiece"
        ) from None
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lines = [line for sample in samples for line in sample.splitlines() if line.strip()]
    expected = [original.encode(line) for line in lines]
    differing = ""
    for text in (converted, _with_plain_spaces(converted)):
        tokenizer = Tokenizer.from_str(text)
        found = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
        if found == expected:
            return text
        differing = next(line for line, a, b in zip(lines, expected, found, strict=True) if a != b)
    raise GristmillError(
        f"{model}: its conversion gives other ids for {differing[:40]!r}; "
        "add a tokenizer.json made for this model"
    )


def _with_plain_spaces(converted: str) -> str:
    """The conversion with a space put before every text, also before one that begins with spaces."""
    document = json.loads(converted)
    document["pre_tokenizer"] = None
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    document["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    return json.dumps(document, ensure_ascii=False)
