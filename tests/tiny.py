"""A one-layer model with random weights and a tokenizer of bytes: an artifact in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from gristmill.runtime import selftest
from gristmill.runtime.artifact_writer import ArtifactWriter
from gristmill.runtime.program import CacheSpec, Instruction, Limits, Program, RopeSpec, Segment, Value, View
from gristmill.runtime.session import Session, load
from gristmill.runtime.weights_file import TensorSpec

WIDTH, HEADS, HEAD = 16, 2, 8
BOS, EOS = 0, 1
VOCABULARY = 258
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(bos: bool = True) -> Tokenizer:
    """Ids: <s>, </s>, then the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS, **{character: i + 2 for i, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return tokenizer


def tiny_program(max_tokens: int = 16, max_slots: int = 4, max_len: int = 64, window: int = 0) -> Program:
    """embedding, attention with residual, head; all in f32."""
    qkv = (HEADS + 2) * HEAD
    sizes = [("T", WIDTH), ("T", WIDTH), ("T", qkv), ("T", HEADS * HEAD), ("T", WIDTH), ("R", WIDTH)]
    values, offset = [], 0
    for rows, width in sizes:
        values.append(Value(rows, width, offset))
        offset += -(-max_tokens * width * 4 // 64) * 64
    whole = [View(number, 0, width) for number, (_, width) in enumerate(sizes)]
    q, k, v = View(2, 0, HEADS * HEAD), View(2, HEADS * HEAD, HEAD), View(2, (HEADS + 1) * HEAD, HEAD)
    exact = {"act_group": 0}
    instructions = [
        Instruction("embedding", whole[0], attributes={"ids": "tokens"}, weight="embed"),
        Instruction("rms_norm", whole[1], {"in": whole[0]}, {"weight": "norm"}, {"eps": 1e-5}),
        Instruction("linear", whole[2], {"in": whole[1]}, attributes=exact, weight="qkv"),
        Instruction(
            "attention", whole[3], {"q": q, "k": k, "v": v},
            attributes={"cache": 0, "heads": HEADS, "scale": HEAD**-0.5, "rope": 0},
        ),
        Instruction("linear", whole[4], {"in": whole[3], "residual": whole[0]}, {}, exact, weight="out"),
        Instruction("gather_rows", whole[5], {"in": whole[4]}),
        Instruction("linear", View(-1, 0, VOCABULARY), {"in": whole[5]}, attributes=exact, weight="head"),
    ]  # fmt: skip
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "qkv": (qkv, WIDTH),
        "out": (WIDTH, HEADS * HEAD),
        "head": (VOCABULARY, WIDTH),
    }
    return Program(
        vocabulary=VOCABULARY,
        limits=Limits(max_tokens, max_slots, max_len, 4 * max_len),
        values=values,
        caches=[CacheSpec(1, HEAD, HEAD, "f32", "f32", window)],
        ropes=[RopeSpec("inv_freq", HEAD)],
        weights={key: [Segment(key, "f32", n, k)] for key, (n, k) in shapes.items()},
        instructions=instructions,
        arena_bytes=offset,
    )


def tiny_weights(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the program by its name in the weights file."""
    random = np.random.default_rng(seed)
    found = {
        f"{s.name}.weight": random.normal(0, 0.5, (s.n, s.k)).astype(np.float32)
        for segments in program.weights.values()
        for s in segments
    }
    found["norm"] = np.ones(WIDTH, np.float32)
    found["inv_freq"] = (10000.0 ** -(np.arange(HEAD // 2) * 2 / HEAD)).astype(np.float32)
    return found


def fill(
    writer: ArtifactWriter, seed: int = 0, tokenizer: bool = True, bos: bool = True, **shape: int
) -> dict[str, Any]:
    """Writes program, weights and tokenizer; returns the manifest's own fields."""
    program = tiny_program(**shape)
    weights = tiny_weights(program, seed)
    specs = [TensorSpec(name, "F32", array.shape) for name, array in weights.items()]
    out = writer.declare_weights(specs, {"model": f"tiny-{seed}"})
    for name, array in weights.items():
        out.write(name, array)
    writer.write_bytes("program.json", program.to_bytes())
    if tokenizer:
        config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
        writer.write_bytes("tokenizer.json", byte_tokenizer(bos).to_str().encode())
        writer.write_json("tokenizer_config.json", config)
    writer.write_json("generation_config.json", {"eos_token_id": [EOS, 299]})
    return {"quantization": {"method": "none"}, "source": {"name": f"tiny-{seed}"}, "bits_per_weight": 32.0}


def tiny_artifact(path: Path, seed: int = 0, **given: Any) -> Path:
    """A complete artifact at `path`, with a self-test and a made-up evaluation."""
    with ArtifactWriter(path) as writer:
        manifest = fill(writer, seed, **given)
        writer.write_json("selftest.json", selftest.record(load(writer.seal(manifest), threads=1)))
        writer.write_json("evaluation.json", {"perplexity": 4.0})
        return writer.commit(manifest)


class FakeExecutor:
    """Logits that depend on the tokens of a row's own slot up to its position; no arithmetic to get wrong."""

    weight_bytes = weight_bytes_per_token = kv_bytes = arena_bytes = 0
    threads = 1

    def __init__(
        self, max_tokens: int = 5, max_slots: int = 3, max_len: int = 40, vocabulary: int = VOCABULARY
    ):
        self.max_tokens, self.max_slots, self.max_len, self.vocabulary = (
            max_tokens,
            max_slots,
            max_len,
            vocabulary,
        )
        self.cache = np.zeros((max_slots, max_len), np.int64)
        self.batches: list[int] = []  # rows of each forward

    def forward(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        self.batches.append(len(tokens))
        self.cache[slots, positions] = tokens
        out = np.zeros((len(rows), self.vocabulary), np.float32)
        for i, row in enumerate(rows):
            seen = self.cache[slots[row], : positions[row] + 1]
            state = int((seen * (np.arange(len(seen)) + 7)).sum())
            out[i] = np.random.default_rng(state).normal(0, 2, self.vocabulary).astype(np.float32)
        out[:, EOS] -= 20
        return out

    def forward_hidden(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A row's hidden state lies near that of its token, so that a token said again looks like it."""
        logits = self.forward(tokens, positions, slots, rows)
        near = [np.random.default_rng(int(token)).normal(0, 1, WIDTH) for token in tokens[rows]]
        return logits, np.array(near, np.float32).reshape(-1, WIDTH) + logits[:, :WIDTH] / 8

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        self.cache[target, start:length] = self.cache[source, start:length]


def batches(session: Session) -> list[int]:
    """The rows of each forward of a fake session so far."""
    assert isinstance(session.executor, FakeExecutor)
    return session.executor.batches


def fake_session(tokenizer: bool = True, bos: bool = True, window: int = 0, **shape: int) -> Session:
    """A Session over a FakeExecutor."""
    from gristmill.runtime.tokenizer import Tokenizer as Wrapped

    executor = FakeExecutor(**shape)
    program = tiny_program(executor.max_tokens, executor.max_slots, executor.max_len, window)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    wrapped = Wrapped(byte_tokenizer(bos).to_str().encode(), config) if tokenizer else None
    return Session(None, program, executor, wrapped)


def resign(path: Path, **changes: Any) -> None:
    """Rewrites the manifest of `path` with `changes` and a hash that fits."""
    from gristmill.runtime.artifact import BLANK_HASH, manifest_hash

    manifest = {**json.loads((path / "manifest.json").read_text()), **changes, "manifest_sha256": BLANK_HASH}
    data = json.dumps(manifest, indent=1).encode()
    (path / "manifest.json").write_bytes(data.replace(BLANK_HASH.encode(), manifest_hash(data).encode(), 1))
