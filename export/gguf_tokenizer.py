"""A tokenizer.json as a GGUF's vocabulary: pieces, kinds, and scores or merges.

llama.cpp has two algorithms that a BPE tokenizer.json may be. "llama" (sentencepiece): any two neighbours
whose joined text is a token merge, the best score first; it equals merging by rank exactly where the merges
are all ways to make each token, one token after the other. "gpt2" (bytes as letters): merges as they are,
after cutting by a pre-tokenizer that llama.cpp knows by name. What would give other ids is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from gristmill.quant.formats import gguf_pre_tokenizers
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of token in a GGUF
SPACE = "\u2581"
SPECIAL = {  # our names → GGUF's
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding",
    "sep_token": "seperator",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """pre: llama.cpp's name of the pre-tokenizer, for model "gpt2". special: id by GGUF's name.

    scores and space_prefix are for model "llama", merges for "gpt2".
    """

    model: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    pre: str = "default"
    space_prefix: bool = False
    chat_template: str | None = None

    def write(self, writer: Any) -> None:
        """Add it to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        if self.scores:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.space_prefix)
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(files: Mapping[str, bytes], size: int, eos_ids: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of these tokenizer files, filled up to the model's `size` with unused tokens.

    eos_ids: what ends a text; the first is written where the tokenizer names none. Raises GristmillError
    for a tokenizer that llama.cpp would read differently.
    """
    document = json.loads(files["tokenizer.json"])
    model = document["model"]
    if model.get("type") != "BPE":
        _refuse(f"its tokenizer is {model.get('type')}; expected byte pairs (BPE)")
    wrapped = Tokenizer.of_files(files)
    if wrapped.size > size:
        _refuse(f"its tokenizer has {wrapped.size} tokens and the model {size}")
    names = {token: text for text, token in wrapped.vocabulary().items()}
    tokens = tuple(names.get(i, f"[PAD{i}]") for i in range(size))
    added = {entry["id"]: bool(entry["special"]) for entry in document.get("added_tokens", [])}
    special, add_bos, add_eos = _special(wrapped, eos_ids)
    kinds = tuple(
        UNUSED if i not in names
        else UNKNOWN if special.get("unknown") == i and model.get("byte_fallback")
        else (CONTROL if added[i] else USER_DEFINED) if i in added
        else BYTE if model.get("byte_fallback") and _is_byte(names[i])
        else NORMAL
        for i in range(size)
    )  # fmt: skip
    if not model["merges"]:
        _refuse("its tokenizer has no merges, without which llama.cpp reads no byte pairs")
    common: dict[str, Any] = {
        "tokens": tokens,
        "kinds": kinds,
        "special": special,
        "add_bos": add_bos,
        "add_eos": add_eos,
    }
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    template = wrapped.chat_template
    if model.get("byte_fallback"):
        prefix, scores = _space_prefix(document), _scores(tokens, kinds, merges)
        return Vocabulary("llama", scores=scores, space_prefix=prefix, chat_template=template, **common)
    pre = gguf_pre_tokenizers.name_of(document)
    if pre is None:
        _refuse("llama.cpp has no pre-tokenizer that cuts text as this tokenizer does; known are "
                f"{', '.join(gguf_pre_tokenizers.PRE_TOKENIZERS)}")  # fmt: skip
    if document.get("normalizer") not in (None, {"type": "NFC"}):
        _refuse("its tokenizer rewrites text before cutting it, which llama.cpp does not")
    joined = tuple(f"{left} {right}" for left, right in merges)
    return Vocabulary("gpt2", merges=joined, pre=pre, chat_template=template, **common)


def _special(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> tuple[dict[str, int], bool, bool]:
    """Ids of the named tokens, and whether a text gets a BOS before it and an EOS after it."""
    known = tokenizer.vocabulary()
    named = {SPECIAL[n]: known[t] for n, t in tokenizer.special_tokens.items() if n in SPECIAL and t in known}
    if "eos" not in named and eos_ids:
        named["eos"] = eos_ids[0]
    around, inside = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    extra = len(around) - len(inside)
    before = next((n for n in range(extra + 1) if around[n : n + len(inside)] == inside), None)
    if before is None or before > 1 or extra - before > 1:
        _refuse("its tokenizer puts more around a text than one BOS and one EOS")
    if before:
        named["bos"] = around[0]
    if extra > before and around[-1] != named.setdefault("eos", around[-1]):
        _refuse("its tokenizer ends texts with another token than EOS")
    return named, bool(before), extra > before


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, by whatever spells that in a tokenizer.json."""
    normalizer, pre = document.get("normalizer"), document.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if pre is None and steps in ([prepend, replace], [replace]):
        return steps[0] == prepend
    if not steps and pre is not None and pre.get("type") == "Metaspace" and pre["replacement"] == SPACE:
        return bool(pre.get("prepend_scheme", "always") != "never")
    _refuse("its tokenizer rewrites text in a way that sentencepiece does not")


def _scores(
    tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[Sequence[str]]
) -> tuple[float, ...]:
    """Minus the rank of the first merge that makes a token; see the module for what must hold."""
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    usable = {text for text, kind in zip(tokens, kinds) if kind == NORMAL}
    pairs = {(left, right) for left, right in merges}
    for text in usable:
        ways = [(text[:i], text[i:]) for i in range(1, len(text))]
        possible = {way for way in ways if way[0] in usable and way[1] in usable}
        found = ranks.get(text, [])
        if possible - pairs or (found and max(found) - min(found) != len(found) - 1):
            _refuse(f"its merges do not make {text!r} in all ways that sentencepiece would")
    return tuple(-float(ranks[text][0]) if text in ranks else 0.0 for text in tokens)


def _refuse(reason: str) -> NoReturn:
    raise GristmillError(f"the tokenizer cannot be written as GGUF: {reason}")
