"""Tokenizers that come as sentencepiece models: converted with equal ids, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gristmill.compiler.gate import default_text
from gristmill.compiler.tokenizer_files import tokenizer_files
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.tokenizer import Tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece")


def save_sentencepiece(directory: Path, kind: str) -> None:
    """A Llama-style directory whose tokenizer exists as tokenizer.model alone."""
    (directory / "text.txt").write_text(default_text("prose"), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=400,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))


def test_bpe_is_converted_with_equal_ids(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path, "bpe")
    files = tokenizer_files(tmp_path, [default_text("prose"), default_text("code")])
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    converted = Tokenizer(files["tokenizer.json"])
    for text in ("A ferry leaves at six.", "    four spaces first", "tab\there, 123", "unseen: žluť 漢字"):
        ids = converted.encode(text, add_special_tokens=False)
        assert ids == original.encode(text)
        assert converted.decode(ids) == text


def test_a_conversion_with_other_ids_is_refused(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path, "unigram")  # the Llama class reads it as byte pairs
    with pytest.raises(GristmillError, match="other ids for .*; add a tokenizer.json"):
        tokenizer_files(tmp_path, [default_text("prose")])


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="no tokenizer; expected tokenizer.json"):
        tokenizer_files(tmp_path, [])
