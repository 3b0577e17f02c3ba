"""Small random programs with their weights, for tests of the executors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.runtime.artifact_writer import ArtifactWriter
from gristmill.runtime.weights_file import TensorSpec

Array = NDArray[Any]
View = list[int]
ALIGNMENT = 64
DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8", "uint8": "U8", "int32": "I32"}


# ---- weights

RANGES = {"int8": (-127, 127, 0), "int4": (0, 15, 8), "int3": (0, 7, 4), "int2": (0, 3, 2)}
E4M3 = np.array(
    [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127]
)


@dataclass(frozen=True)
class Format:
    """How one matrix is stored; `group` 0 is the whole row."""

    name: str = "f32"
    group: int = 0
    symmetric: bool = True
    scale_dtype: str = "float16"

    @property
    def is_integer(self) -> bool:
        return self.name in RANGES


@dataclass
class Stored:
    """A matrix as its tensors, and the values they stand for."""

    tensors: dict[str, Array]
    values: Array  # [n, k] f64
    segment: dict[str, Any]


def bf16(w: Array) -> Array:
    """f32 -> the upper 16 bits, rounded to nearest even."""
    bits = w.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def pack_block(name: str, q: Array) -> Array:
    """The bytes of 64 columns q [64], bit by bit."""
    if name == "int8":
        return q.astype(np.int8)
    out = np.zeros({"int4": 32, "int3": 24, "int2": 16}[name], np.uint8)
    for column, value in enumerate(q.astype(int)):
        if name == "int4":
            out[column % 32] |= value << 4 * (column // 32)
            continue
        out[column % 16] |= (value & 3) << 2 * (column // 16)
        if name == "int3":
            out[16 + column // 8] |= value >> 2 << column % 8
    return out


def pack_rows(name: str, q: Array) -> Array:
    """q [n, k] in whole blocks, the last one filled up with the middle of the range."""
    padded = np.pad(q, ((0, 0), (0, -q.shape[1] % 64)), constant_values=RANGES[name][2])
    return np.stack([np.concatenate([pack_block(name, b) for b in row.reshape(-1, 64)]) for row in padded])


def store(name: str, w: Array, form: Format) -> Stored:
    n, k = w.shape
    group = 0 if form.group >= k else form.group
    segment = {"name": name, "format": form.name, "n": n, "k": k, "group": group, "symmetric": form.symmetric}
    if form.is_integer:
        return store_integer(name, w.astype(np.float64), form, group, segment)
    if form.name == "fp8":
        return store_fp8(name, w.astype(np.float64), form, group, segment)
    if form.name == "bf16":
        data = bf16(w)
        values = (data.astype(np.uint32) << 16).view(np.float32)
    else:
        data = w.astype({"f32": np.float32, "f16": np.float16}[form.name])
        values = data
    return Stored({f"{name}.weight": data}, values.astype(np.float64), segment)


def in_groups(w: Array, group: int) -> Array:
    """[n, k] as [n, groups, width], the last group filled up with zeros."""
    width = group or w.shape[1]
    return np.pad(w, ((0, 0), (0, -w.shape[1] % width))).reshape(len(w), -1, width)


def store_fp8(name: str, w: Array, form: Format, group: int, segment: dict[str, Any]) -> Stored:
    k, blocks = w.shape[1], in_groups(w, group)
    scale = (np.abs(blocks).max(2) / 448).astype(form.scale_dtype)
    wide = scale.astype(np.float64)[:, :, None]
    code = np.abs(np.abs(blocks / wide)[..., None] - E4M3).argmin(-1)
    values = (np.copysign(E4M3[code], blocks) * wide).reshape(len(w), -1)[:, :k]
    bits = (code | np.signbit(blocks) << 7).astype(np.uint8).reshape(len(w), -1)[:, :k]
    data = np.pad(bits, ((0, 0), (0, -k % 64)))
    return Stored({f"{name}.weight": data, f"{name}.scale": scale}, values, segment)


def store_integer(name: str, w: Array, form: Format, group: int, segment: dict[str, Any]) -> Stored:
    k, blocks = w.shape[1], in_groups(w, group)
    low, high, middle = RANGES[form.name]
    if form.symmetric:
        scale = np.abs(blocks).max(2) / (high - middle)
        zero = np.full(scale.shape, middle)
    else:
        least, most = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
        scale = (most - least) / (high - low)
        zero = np.clip(np.rint(low - least / np.where(scale > 0, scale, 1)), low, high).astype(int)
    stored_scale = scale.astype(form.scale_dtype)
    scale = stored_scale.astype(np.float64)
    q = np.clip(np.rint(blocks / np.where(scale > 0, scale, 1)[:, :, None]) + zero[:, :, None], low, high)
    values = ((q - zero[:, :, None]) * scale[:, :, None]).reshape(len(w), -1)[:, :k]
    tensors = {
        f"{name}.weight": pack_rows(form.name, q.reshape(len(w), -1)[:, :k]),
        f"{name}.scale": stored_scale,
    }
    if not form.symmetric:
        tensors[f"{name}.zero"] = zero.astype(np.int8) if form.name == "int8" else pack_zeros(zero)
    return Stored(tensors, values, segment)


def pack_zeros(zero: Array) -> Array:
    even = np.concatenate([zero, np.zeros((len(zero), zero.shape[1] % 2), int)], axis=1).astype(np.uint8)
    return even[:, 0::2] | even[:, 1::2] << 4


def write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    """Every tensor 64-byte aligned, gaps filled by named paddings, 64 bytes of padding at the end."""
    header: dict[str, Any] = {}
    chunks: list[bytes] = []
    at = 0

    def put(name: str, data: bytes, dtype: str, shape: list[int]) -> None:
        nonlocal at
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)

    for name, array in tensors.items():
        put(name, np.ascontiguousarray(array).tobytes(), DTYPES[array.dtype.name], list(array.shape))
        if gap := -at % ALIGNMENT:
            put(f"__pad_{len(header)}", bytes(gap), "U8", [gap])
    put(f"__pad_{len(header)}", bytes(ALIGNMENT), "U8", [ALIGNMENT])
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


# ---- programs


@dataclass
class Program:
    """A program under construction: `json` as in program.json, `matrices` what its weights stand for."""

    vocabulary: int
    max_tokens: int = 32
    max_slots: int = 4
    max_len: int = 64
    max_position: int = 4096
    seed: int = 0
    tensors: dict[str, Array] = field(default_factory=dict)
    matrices: dict[str, Array] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        limits = {
            name: getattr(self, name) for name in ("max_tokens", "max_slots", "max_len", "max_position")
        }
        self.json = {
            "format": 1,
            "name": "decoder",
            "vocabulary": self.vocabulary,
            "limits": limits,
            "arena_bytes": 0,
            "values": [],
            "caches": [],
            "ropes": [],
            "weights": {},
            "instructions": [],
        }

    def value(self, width: int, rows: str = "T") -> View:
        offset = self.json["arena_bytes"]
        self.json["values"].append({"rows": rows, "width": width, "offset": offset})
        self.json["arena_bytes"] = offset + -(-self.max_tokens * width * 4 // ALIGNMENT) * ALIGNMENT
        return [len(self.json["values"]) - 1, 0, width]

    def vector(self, name: str, values: Array) -> str:
        self.tensors[name] = values.astype(np.float32)
        return name

    def order(self, name: str, width: int) -> str:
        """A random permutation of columns."""
        self.tensors[name] = self.random.permutation(width).astype(np.int32)
        return name

    def gain(self, name: str, width: int) -> str:
        return self.vector(name, 1 + 0.1 * self.random.standard_normal(width))

    def weight(self, key: str, sizes: list[int], k: int, formats: list[Format]) -> str:
        """Random segments of `sizes` rows each, stacked."""
        parts = [
            store(f"{key}.{i}", self.random.standard_normal((n, k)) / math.sqrt(k), form)
            for i, (n, form) in enumerate(zip(sizes, formats, strict=True))
        ]
        for part in parts:
            self.tensors.update(part.tensors)
        self.json["weights"][key] = [part.segment for part in parts]
        self.matrices[key] = np.concatenate([part.values for part in parts])
        return key

    def add(self, op: str, **fields: Any) -> None:
        self.json["instructions"].append({"op": op, **fields})

    def text(self) -> bytes:
        return json.dumps(self.json).encode()

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "program.json").write_bytes(self.text())
        write_safetensors(directory / "weights.safetensors", self.tensors)
        return directory / "weights.safetensors"


def write_artifact(built: Program, out: Path, files: dict[str, Any], manifest: dict[str, Any]) -> Path:
    """As the compiler would have written it; files: beside the program and its weights, by name."""
    codes = {np.dtype(name): code for name, code in DTYPES.items()}
    with ArtifactWriter(out) as writer:
        specs = [TensorSpec(name, codes[a.dtype], a.shape) for name, a in built.tensors.items()]
        weights = writer.declare_weights(specs, {})
        for name, array in built.tensors.items():
            weights.write(name, np.ascontiguousarray(array))
        writer.write_bytes("program.json", built.text())
        for name, content in files.items():
            writer.write_json(name, content)
        manifest = {"quantization": {"method": "none"}} | manifest
        writer.seal(manifest)
        writer.commit(manifest)
    return out


@dataclass(frozen=True)
class Llama:
    """A decoder in the manner of llama, with the variations that programs allow."""

    vocabulary: int = 97
    hidden: int = 72
    intermediate: int = 104
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    k_dim: int = 18
    v_dim: int = 18
    rope_dims: int = 18
    rope_style: str = "half"
    form: Format = Format()
    embedding: Format = Format()
    act_group: int = 0
    cache: str = "f32"
    cache_v: str = ""  # like the keys unless given
    hadamard: int = 0
    window: int = 0
    softcap: float = 0.0
    final_softcap: float = 0.0
    qk_norm: bool = False
    sinks: bool = False
    bias: bool = False
    order: bool = False
    activation: str = "silu"
    max_tokens: int = 32
    max_position: int = 4096
    seed: int = 0


def llama(c: Llama) -> Program:
    p = Program(
        c.vocabulary,
        max_tokens=c.max_tokens,
        max_position=c.max_position,
        max_len=min(64, c.max_position),
        seed=c.seed,
    )
    p.json["ropes"].append(
        {
            "inv_freq": p.vector("inv_freq", 100.0 ** -(np.arange(0, c.rope_dims, 2) / c.rope_dims)),
            "dims": c.rope_dims,
            "style": c.rope_style,
            "scale": 1.0,
        }
    )
    x = p.value(c.hidden)
    p.add("embedding", ids="tokens", weight=p.weight("embed", [c.vocabulary], c.hidden, [c.embedding]), out=x)
    for i in range(c.layers):
        x = attention_block(p, c, f"layers.{i}", x)
        x = mlp_block(p, c, f"layers.{i}", x)
    last, normed = p.value(c.hidden, "R"), p.value(c.hidden, "R")
    p.add("gather_rows", **{"in": x, "out": last})
    p.add("rms_norm", **{"in": last, "weight": p.gain("norm", c.hidden), "eps": 1e-5, "out": normed})
    head = p.weight("head", [c.vocabulary], c.hidden, [c.form])
    p.add(
        "linear",
        **{
            "in": normed,
            "weight": head,
            "act_group": c.act_group,
            "softcap": c.final_softcap,
            "out": [-1, 0, c.vocabulary],
        },
    )
    return p


def attention_block(p: Program, c: Llama, name: str, x: View) -> View:
    layer = len(p.json["caches"])
    p.json["caches"].append(
        {
            "kv_heads": c.kv_heads,
            "k_dim": c.k_dim,
            "v_dim": c.v_dim,
            "k_dtype": c.cache,
            "v_dtype": c.cache_v or c.cache,
            "window": c.window,
        }
    )
    sizes = [c.heads * c.k_dim, c.kv_heads * c.k_dim, c.kv_heads * c.v_dim]
    normed, qkv, attended, out = (
        p.value(c.hidden),
        p.value(sum(sizes)),
        p.value(c.heads * c.v_dim),
        p.value(c.hidden),
    )
    p.add("rms_norm", **{"in": x, "weight": p.gain(f"{name}.norm", c.hidden), "eps": 1e-5, "out": normed})
    p.add(
        "linear",
        **{
            "in": normed,
            "weight": p.weight(f"{name}.qkv", sizes, c.hidden, [c.form] * 3),
            "act_group": c.act_group,
            "bias": p.gain(f"{name}.bias", sum(sizes)) if c.bias else None,
            "order": p.order(f"{name}.qkv.order", c.hidden) if c.order else None,
            "out": qkv,
        },
    )
    views = [[qkv[0], sum(sizes[:i]), sizes[i]] for i in range(3)]
    norms = {f"{w}_norm": p.gain(f"{name}.{w}_norm", c.k_dim) if c.qk_norm else None for w in "qk"}
    sinks = p.vector(f"{name}.sinks", p.random.standard_normal(c.heads)) if c.sinks else None
    p.add(
        "attention",
        q=views[0],
        k=views[1],
        v=views[2],
        out=attended,
        cache=layer,
        heads=c.heads,
        scale=c.k_dim**-0.5,
        softcap=c.softcap,
        rope=0,
        hadamard=c.hadamard,
        norm_eps=1e-6,
        sinks=sinks,
        **norms,
    )
    o = p.weight(f"{name}.o", [c.hidden], c.heads * c.v_dim, [c.form])
    p.add("linear", **{"in": attended, "weight": o, "act_group": c.act_group, "residual": x, "out": out})
    return out


def mlp_block(p: Program, c: Llama, name: str, x: View) -> View:
    normed, inner = p.value(c.hidden), p.value(c.intermediate)
    p.add("rms_norm", **{"in": x, "weight": p.gain(f"{name}.mlp_norm", c.hidden), "eps": 1e-5, "out": normed})
    gate_up = p.weight(f"{name}.gate_up", [c.intermediate] * 2, c.hidden, [c.form] * 2)
    p.add(
        "linear",
        **{
            "in": normed,
            "weight": gate_up,
            "act_group": c.act_group,
            "activation": c.activation,
            "glu": True,
            "order": p.order(f"{name}.gate_up.order", c.hidden) if c.order else None,
            "out": inner,
        },
    )
    down = p.weight(f"{name}.down", [c.hidden], c.intermediate, [c.form])
    p.add("linear", **{"in": inner, "weight": down, "act_group": c.act_group, "residual": x, "out": x})
    return x
