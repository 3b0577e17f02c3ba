"""llama.cpp itself runs what is exported, and what its quantizer writes is read.

Needs llama-cpp-python in this interpreter, or in the one that LLAMA_CPP_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import LLAMA3, LONGROPE, YARN
from gguf_cases import OPTIONS, SMALL, byte_pairs, made
from test_formats_in import difference

import gristmill
from gristmill.compiler.gate import default_text

PEER = Path(__file__).with_name("llama_cpp_peer.py")
PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
FLOAT_TOLERANCE = 1e-5  # of the largest logit, measured: 4e-7 to 1e-6
HALF_TOLERANCE = 5e-3  # llama.cpp rounds activations to f16 beside f16 weights; measured 0.2e-3 and 1.7e-3
BLOCK_TOLERANCE = 3e-2  # and to int8 beside blocks, which we do not here; measured 0.006 to 0.012
TEXTS = [
    "Once upon a time", "  two  spaces\n\n\tand a tab", "12345 cats' 3.14", "unseen: žluť 漢字 🙂",
    "def f(x):\n    return x + 1  # it's\n", "",
]  # fmt: skip


def peer(*arguments: Any) -> None:
    command = [PYTHON, str(PEER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module", autouse=True)
def llama_cpp() -> None:
    found = subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True)
    if found.returncode:
        pytest.skip(f"{PYTHON} has no llama-cpp-python; LLAMA_CPP_PYTHON names another interpreter")


def compare(artifact: Path, source: Path, prompt: str, count: int, tolerance: float) -> bool:
    """Hold logits within the tolerance; whether llama.cpp's greedy ids are ours."""
    out = source.with_suffix(".npz")
    peer("generate", source, prompt, count, out)
    found = np.load(out)
    ids, begin = found["ids"].astype(np.int32), len(found["prompt"])
    session = gristmill.load(artifact, threads=2)
    assert session.tokenizer.encode(prompt) == found["prompt"].tolist()
    rows = np.arange(len(ids), dtype=np.int32)
    logits = np.asarray(session.executor.forward(ids, rows, np.zeros_like(rows), rows))
    assert difference(logits, found["logits"]) < tolerance
    done = session.generate(prompt, max_new_tokens=count, ignore_eos=True)
    return bool(done.token_ids == ids[begin:].tolist())


def exported(artifact: Path, folder: Path, **options: Any) -> Path:
    return gristmill.export_checkpoint(artifact, folder / "out.gguf", "gguf", **options)


@pytest.mark.parametrize("weights", ["f32", "f16"])
def test_stories(weights: str, stories260k: Path, tmp_path: Path) -> None:
    """200 greedy tokens; the smallest distance of the two best logits on the way is 0.004, in f16 0.013."""
    gristmill.compile(stories260k, tmp_path / "a", weights=weights, kv="f32", gate=False)
    source = exported(tmp_path / "a", tmp_path)
    tolerance = FLOAT_TOLERANCE if weights == "f32" else HALF_TOLERANCE
    assert compare(tmp_path / "a", source, "Once upon a time", 200, tolerance)
    same_ids(tmp_path / "a", source, TEXTS, tmp_path)


def same_ids(artifact: Path, source: Path, texts: list[str], folder: Path) -> None:
    (folder / "texts.json").write_text(json.dumps(texts))
    peer("tokenize", source, folder / "texts.json", folder / "ids.json")
    tokenizer = gristmill.load(artifact).tokenizer
    for text, ids in zip(texts, json.loads((folder / "ids.json").read_text()), strict=True):
        assert tokenizer.encode(text) == ids, text


def test_the_example(py7m: Path, tmp_path: Path) -> None:
    gristmill.compile(py7m, tmp_path / "a", weights="f32", gate=False, max_tokens=256)
    source = exported(tmp_path / "a", tmp_path)
    assert compare(tmp_path / "a", source, "import os\n", 200, FLOAT_TOLERANCE)
    same_ids(tmp_path / "a", source, [*TEXTS, default_text("code")[:5000]], tmp_path)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": YARN, "head_dim": 40, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 24}),
        ("phi3", {"rope_parameters": LONGROPE | {"short_factor": [1.0 + 0.1 * i for i in range(16)],
                                                 "long_factor": [2.0 + 0.5 * i for i in range(16)]},
                  "original_max_position_embeddings": 64, "pad_token_id": 0}),
    ],
    ids=["llama3-biases", "yarn-tied", "qwen2", "qwen3", "phi3-longrope"],
)  # fmt: skip
def test_families(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    artifact = made(tmp_path, family, {"weights": "f32", "max_tokens": 128}, **SMALL | changes)
    assert compare(artifact, exported(artifact, tmp_path), "def f(x): 12\n", 60, FLOAT_TOLERANCE)


def test_rotated_weights(tmp_path: Path) -> None:
    options = {"weights": "f32", "rotate": True, "max_tokens": 128}
    artifact = made(tmp_path, "llama", options, **SMALL)
    assert compare(artifact, exported(artifact, tmp_path), "def f(x): 12\n", 60, FLOAT_TOLERANCE)


@pytest.mark.parametrize("options", [{"group_size": 64}, {"group_size": 32, "asymmetric": True}])
def test_blocks(options: dict[str, Any], py7m: Path, tmp_path: Path) -> None:
    options |= {"activations": "f32", "kv": "f32", "max_tokens": 256}
    gristmill.compile(py7m, tmp_path / "a", gate=False, **options)
    compare(tmp_path / "a", exported(tmp_path / "a", tmp_path), "import os\n", 100, BLOCK_TOLERANCE)


@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k", "q8_0"])
def test_files_of_its_own_quantizer(kind: str, py7m: Path, tmp_path: Path) -> None:
    gristmill.compile(py7m, tmp_path / "f", weights="f32", gate=False)
    peer("quantize", exported(tmp_path / "f", tmp_path), tmp_path / "q.gguf", kind)
    options = OPTIONS | {"activations": "f32", "kv": "f32", "max_tokens": 256}
    gristmill.compile(tmp_path / "q.gguf", tmp_path / "a", **options)
    compare(tmp_path / "a", tmp_path / "q.gguf", "import os\n", 100, BLOCK_TOLERANCE)


def test_byte_pairs_with_digits(tmp_path: Path) -> None:
    artifact = made(tmp_path, options={"weights": "f16"}, **SMALL)
    byte_pairs(digits=True).save(str(tmp_path / "m" / "tokenizer.json"))
    gristmill.compile(tmp_path / "m", artifact, force=True, **OPTIONS | {"weights": "f16"})
    same_ids(artifact, exported(artifact, tmp_path), TEXTS, tmp_path)
