"""How byte-level tokenizers cut text before merging: the patterns of a tokenizer.json, and llama.cpp's names.

A GGUF names its pre-tokenizer (tokenizer.ggml.pre), and llama.cpp has the patterns in its code. What is in
this table is the same in both; a tokenizer that is not cannot be carried over, for other cuts give other ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """patterns: text is cut by each in turn. ignore_merges: a piece that is a token is not merged at all."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False


_PLAIN, _DIGITS = PreTokenizer((GPT2,)), PreTokenizer((DIGIT, GPT2))
_LLAMA3 = PreTokenizer((LLAMA3,), ignore_merges=True)
PRE_TOKENIZERS = {  # the first of equal ones is what is written
    "gpt-2": _PLAIN,
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA3,
    "qwen2": PreTokenizer((QWEN2,)),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True),
    "olmo": _PLAIN,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "deepseek-r1-qwen": PreTokenizer((QWEN2,)),
}


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of what a parsed tokenizer.json does before merging; None: it has none for it."""
    patterns = _patterns(tokenizer.get("pre_tokenizer"))
    if patterns is None:
        return None
    ignore = bool(tokenizer["model"].get("ignore_merges"))
    wanted = PreTokenizer(patterns, ignore)
    return next((name for name, known in PRE_TOKENIZERS.items() if known == wanted), None)


def to_json(pre: PreTokenizer) -> dict[str, Any]:
    """The pre_tokenizer entry of a tokenizer.json that cuts by these patterns."""
    *splits, last = pre.patterns
    steps = [_split(pattern) for pattern in splits]
    if last != GPT2:
        steps.append(_split(last))
    steps.append(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": last == GPT2}
    )
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _split(pattern: str) -> dict[str, Any]:
    if pattern == DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _patterns(pre: Any) -> tuple[str, ...] | None:
    """What a pre_tokenizer entry cuts by; None where it does anything that patterns do not say."""
    if not isinstance(pre, Mapping):
        return None
    if pre.get("type") == "Sequence":
        parts = [_patterns(part) for part in pre["pretokenizers"]]
        return None if any(part is None for part in parts) else tuple(p for part in parts for p in part or ())
    if pre.get("type") == "Digits" and pre.get("individual_digits"):
        return (DIGIT,)
    if pre.get("type") == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        pattern = pre["pattern"].get("Regex")
        return None if pattern is None else (pattern,)
    if pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space"):
        return (GPT2,) if pre.get("use_regex", True) else ()
    return None
