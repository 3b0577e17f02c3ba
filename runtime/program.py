"""The Program: the contract between compiler and runtime.

A Program is a flat list of instructions over values. A value has a row count (``T`` = rows of the batch,
``R`` = rows whose logits are asked for), a width and a place in one arena; all values are float32. Weights
are lists of segments, concatenated along their output rows. The op table below is the one list of what an
instruction may be: the compiler builds from it, the listing prints from it, the executors' own tables are
tested against it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

from .errors import GristmillError

FORMAT = 1
NO_HIDDEN_STATES = (
    "this program has no hidden states to give: its last instruction is not the head, a linear that writes "
    "the logits"
)
LOGITS = -1  # the value id of the output, which lives in the caller's buffer
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu")
FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}  # formats without scales: bytes of a weight
BLOCK_BYTES = {"fp8": 64, "int8": 64, "int4": 32, "int3": 24, "int2": 16}  # with scales: of 64 columns
CACHE_TYPES = ("f32", "f16", "int8", "fp8", "int4")
CACHE_TILE = 16  # rows of a cache are kept in whole tiles, and columns of int8
CACHE_GROUP = 32  # columns of an int4 cache row that share a scale and an offset
POINTWISE_UNARY = (
    "neg", "exp", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "relu", "sqrt", "rsqrt", "square", "abs",
    "reciprocal",
)  # fmt: skip
POINTWISE_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")


@dataclass(frozen=True)
class View:
    """Columns [column, column + width) of a value."""

    value: int
    column: int
    width: int


@dataclass(frozen=True)
class Op:
    """One row of the op table: which fields an instruction has.

    A default of ``...`` means the field must be given.
    """

    views: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    weight: bool = False
    doc: str = ""


OPS: dict[str, Op] = {
    "embedding": Op(
        ("residual?",), (), {"ids": ..., "scale": 1.0, "offset": 0}, True,
        "scale * W[ids + offset] + residual",
    ),
    "rms_norm": Op(
        ("in", "residual?"), ("weight?",), {"eps": ...}, False,
        "x / sqrt(mean(x^2) + eps) * weight + residual",
    ),
    "layer_norm": Op(
        ("in", "residual?"), ("weight?", "bias?"), {"eps": ...}, False,
        "(x - mean(x)) / sqrt(var(x) + eps) * weight + bias + residual",
    ),
    "linear": Op(
        ("in", "residual?"), ("bias?", "order?"),
        {"activation": "none", "glu": False, "scale": 1.0, "softcap": 0.0, "act_group": ...}, True,
        "softcap(scale * activation(x[order] W^T + bias) [* up half]) + residual",
    ),
    "attention": Op(
        ("q", "k", "v"), ("q_norm?", "k_norm?", "sinks?"),
        {"cache": ..., "heads": ..., "scale": ..., "softcap": 0.0, "rope": -1, "hadamard": 0,
         "norm_eps": 0.0}, False,
        "append k, v at (slot, position); softmax(scale q K^T) V over what the position may see",
    ),
    "gather_rows": Op(("in",), (), {}, False, "out[r] = in[rows[r]]"),
    "pointwise": Op(("in*",), (), {"steps": ...}, False, "a small expression, column by column"),
}  # fmt: skip


@dataclass
class Instruction:
    """One step: ``views`` and ``vectors`` are named inputs, ``weight`` a key of Program.weights."""

    op: str
    out: View
    views: dict[str, View | list[View]] = field(default_factory=dict)
    vectors: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    weight: str | None = None

    def reads(self) -> Iterator[View]:
        """Every view this instruction reads."""
        for view in self.views.values():
            yield from view if isinstance(view, list) else (view,)

    def attribute(self, name: str) -> Any:
        """The attribute's value, or the op table's default."""
        return self.attributes.get(name, OPS[self.op].attributes[name])

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"op": self.op, "out": _view_json(self.out)}
        for name, view in self.views.items():
            out[name] = [_view_json(v) for v in view] if isinstance(view, list) else _view_json(view)
        out.update(self.vectors)
        if self.weight is not None:
            out["weight"] = self.weight
        defaults = OPS[self.op].attributes
        out.update({k: v for k, v in self.attributes.items() if defaults[k] is ... or defaults[k] != v})
        return out


@dataclass
class Value:
    """rows: "T" or "R"; width in columns; offset in bytes into the arena (set by the memory plan)."""

    rows: str
    width: int
    offset: int = 0


@dataclass(frozen=True)
class Segment:
    """One logical weight matrix [n, k]; ``group`` 0 = one scale for the whole row."""

    name: str
    format: str
    n: int
    k: int
    group: int = 0
    symmetric: bool = True

    @property
    def groups(self) -> int:
        return -(-self.k // self.group) if self.group else 1


@dataclass(frozen=True)
class CacheSpec:
    """One layer's cache; the types of keys and values are of CACHE_TYPES; window 0 = the whole context."""

    kv_heads: int
    k_dim: int
    v_dim: int
    k_dtype: str
    v_dtype: str
    window: int = 0

    def row_bytes(self) -> int:
        """Bytes of one position in one slot, scales included."""
        return self.kv_heads * (
            cache_row_bytes(self.k_dtype, self.k_dim) + cache_row_bytes(self.v_dtype, self.v_dim)
        )


def cache_row_bytes(dtype: str, dim: int) -> int:
    """Bytes of one head's key or value, with what it is scaled by."""
    return {
        "f32": 4 * dim,
        "f16": 2 * dim,
        "int8": 8 + -(-dim // CACHE_TILE) * CACHE_TILE,  # scale and offset, f32
        "fp8": 4 + dim,  # scale, f32
        "int4": 4 * -(-dim // CACHE_GROUP) + (dim + 1) // 2,  # scale and offset of each group, f16
    }[dtype]


@dataclass(frozen=True)
class RopeSpec:
    """Frequencies by vector name; ``dims`` leading columns rotate; cos and sin times ``scale``."""

    inv_freq: str
    dims: int
    style: str = "half"
    scale: float = 1.0


@dataclass(frozen=True)
class Limits:
    """max_position: the most that ``load(max_len=)`` may ask for."""

    max_tokens: int = 512
    max_slots: int = 8
    max_len: int = 4096
    max_position: int = 4096


@dataclass
class Program:
    """See the module docstring; ``to_json`` and ``from_json`` are inverse."""

    vocabulary: int
    limits: Limits
    values: list[Value] = field(default_factory=list)
    caches: list[CacheSpec] = field(default_factory=list)
    ropes: list[RopeSpec] = field(default_factory=list)
    weights: dict[str, list[Segment]] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    arena_bytes: int = 0
    name: str = "decoder"

    @property
    def hidden(self) -> View | None:
        """What the head multiplies, of the rows R: the hidden states after the last norm. None where the last
        instruction is not a linear that writes the logits; until then nothing has overwritten its input."""
        last = self.instructions[-1] if self.instructions else None
        if last is None or last.op != "linear" or last.out.value != LOGITS:
            return None
        view = last.views["in"]
        assert isinstance(view, View), "a linear has one input"
        return view

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "vocabulary": self.vocabulary,
            "limits": asdict(self.limits),
            "arena_bytes": self.arena_bytes,
            "values": [asdict(v) for v in self.values],
            "caches": [asdict(c) for c in self.caches],
            "ropes": [asdict(r) for r in self.ropes],
            "weights": {key: [asdict(s) for s in segments] for key, segments in self.weights.items()},
            "instructions": [i.to_json() for i in self.instructions],
        }

    def to_bytes(self) -> bytes:
        """The bytes of program.json: one instruction a line, so that diff compares two programs."""
        document = self.to_json()
        lines = []
        for key, value in document.items():
            if isinstance(value, list) and value:
                body = ",\n".join("  " + json.dumps(item) for item in value)
                lines.append(f'"{key}": [\n{body}\n]')
            elif key == "weights":
                body = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                lines.append(f'"{key}": {{\n{body}\n}}')
            else:
                lines.append(f'"{key}": {json.dumps(value)}')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @staticmethod
    def from_json(document: Any) -> Program:
        """Build from parsed program.json.

        Raises GristmillError on anything unknown, missing or of the wrong type.

        The executor validates bounds and tensors itself before it runs anything; this reader serves listings
        and other tools.
        """
        if not isinstance(document, dict):
            raise GristmillError("program.json: expected an object; compile the model again")
        if document.get("format") != FORMAT:
            raise GristmillError(
                f"program.json: format {document.get('format')!r}, this version reads {FORMAT}; "
                "install the gristmill version that wrote it"
            )
        try:
            return Program(
                vocabulary=int(document["vocabulary"]),
                limits=_typed(Limits, document["limits"]),
                values=[_typed(Value, v) for v in document["values"]],
                caches=[_typed(CacheSpec, c) for c in document["caches"]],
                ropes=[_typed(RopeSpec, r) for r in document["ropes"]],
                weights={k: [_typed(Segment, s) for s in v] for k, v in document["weights"].items()},
                instructions=[_instruction(i, n) for n, i in enumerate(document["instructions"])],
                arena_bytes=int(document["arena_bytes"]),
                name=str(document["name"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, GristmillError):
                raise
            raise GristmillError(
                f"program.json: missing or malformed field ({error}); compile the model again"
            ) from None

    def listing(self) -> str:
        """The readable form: one line an instruction."""
        limits = "  ".join(f"{k}={v}" for k, v in asdict(self.limits).items())
        lines = [f"program {self.name}(tokens[T] i32, positions[T] i32, slots[T] i32, rows[R] i32)  {limits}"]
        lines += [f"  cache[{n}] {c}" for n, c in _runs([_cache_text(c) for c in self.caches])]
        lines += [
            f"  rope[{n}] @{r.inv_freq} dims={r.dims} {r.style}"
            + (f" scale={r.scale:g}" if r.scale != 1 else "")
            for n, r in enumerate(self.ropes)
        ]
        lines += ["  " + self._line(instruction) for instruction in self.instructions]
        return "\n".join(lines)

    def _line(self, instruction: Instruction) -> str:
        parts = []
        for name, view in instruction.views.items():
            views = view if isinstance(view, list) else [view]
            prefix = f"{name}=" if name == "residual" else ""
            parts += [prefix + self._view(v) for v in views]
        if instruction.weight is not None:
            formats = sorted({_format_text(s) for s in self.weights[instruction.weight]})
            parts.append(f"@{instruction.weight}:{'|'.join(formats)}")
        parts += [f"{name}=@{vector}" for name, vector in instruction.vectors.items()]
        attributes = {
            k: v for k, v in instruction.attributes.items() if v != OPS[instruction.op].attributes[k]
        }
        out = "logits" if instruction.out.value == LOGITS else self._view(instruction.out)
        text = f"{out} = {instruction.op} {', '.join(parts)}"
        if attributes:
            text += "  {" + ", ".join(f"{k}={_attribute_text(v)}" for k, v in attributes.items()) + "}"
        return text

    def _view(self, view: View) -> str:
        if view.value == LOGITS:
            return "logits"
        whole = view.column == 0 and view.width == self.values[view.value].width
        return f"%{view.value}" if whole else f"%{view.value}[{view.column}:{view.column + view.width}]"


def segment_row_bytes(segment: Segment) -> int:
    """Stored bytes of one weight row, scales and zeros included (f16 scales)."""
    if segment.format in FLOAT_BYTES:
        return segment.k * FLOAT_BYTES[segment.format]
    data = -(-segment.k // 64) * BLOCK_BYTES[segment.format]
    zero_bytes = segment.groups if segment.format == "int8" else -(-segment.groups // 2)
    return data + 2 * segment.groups + (0 if segment.symmetric else zero_bytes)


T = TypeVar("T")
FIELD_TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def _typed(kind: type[T], fields: dict[str, Any]) -> T:
    """kind(**fields), refusing values of other types than the dataclass declares."""
    for field_ in dataclass_fields(kind):  # type: ignore[arg-type]
        value, types = fields.get(field_.name), FIELD_TYPES[str(field_.type)]
        given = field_.name in fields
        if given and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise TypeError(f"{field_.name} is {value!r}, expected {field_.type}")
    return kind(**fields)


def _view_json(view: View) -> list[int]:
    return [view.value, view.column, view.width]


def _view(item: Any, where: str) -> View:
    if not (isinstance(item, list) and len(item) == 3 and all(type(x) is int for x in item)):
        raise GristmillError(
            f"program.json: {where}: expected [value, column, width], got {item!r}; compile the model again"
        )
    return View(*item)


def _instruction(item: dict[str, Any], index: int) -> Instruction:
    name = item.get("op")
    where = f"instruction {index} ({name})"
    if name not in OPS:
        raise GristmillError(
            f"program.json: {where}: unknown op; known: {', '.join(OPS)}; install a newer gristmill"
        )
    op = OPS[name]
    made = Instruction(name, _view(item.get("out"), where), weight=item.get("weight") if op.weight else None)
    for key in op.views:
        plain = key.rstrip("?*")
        given = item.get(plain)
        if given is None and not key.endswith("?"):
            raise GristmillError(f"program.json: {where}: missing input {plain!r}; compile the model again")
        if given is not None:
            made.views[plain] = [_view(v, where) for v in given] if key.endswith("*") else _view(given, where)
    known = {
        "op",
        "out",
        *(v.rstrip("?*") for v in op.views),
        *(v.rstrip("?") for v in op.vectors),
        *op.attributes,
    }
    unknown = set(item) - known - ({"weight"} if op.weight else set())
    if unknown:
        raise GristmillError(
            f"program.json: {where}: unknown field {sorted(unknown)[0]!r}; install a newer gristmill"
        )
    made.vectors = {
        v.rstrip("?"): item[v.rstrip("?")] for v in op.vectors if item.get(v.rstrip("?")) is not None
    }
    for key, default in op.attributes.items():
        if key in item:
            made.attributes[key] = item[key]
        elif default is ...:
            raise GristmillError(f"program.json: {where}: missing attribute {key!r}; compile the model again")
    return made


def _format_text(segment: Segment) -> str:
    if segment.format in FLOAT_BYTES:
        return segment.format
    group = f"g{segment.group}" if segment.group else "row"
    return f"{segment.format}.{group}" + ("" if segment.symmetric else ".asym")


def _cache_text(cache: CacheSpec) -> str:
    window = f" window={cache.window}" if cache.window else ""
    types = cache.k_dtype if cache.k_dtype == cache.v_dtype else f"{cache.k_dtype} + {cache.v_dtype}"
    return f"{cache.kv_heads} heads x ({cache.k_dim} + {cache.v_dim}) {types}{window}"


def _runs(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Equal neighbours are listed once: ("0..21", text)."""
    start = 0
    for i in range(1, len(texts) + 1):
        if i == len(texts) or texts[i] != texts[start]:
            yield (str(start) if i - start == 1 else f"{start}..{i - 1}"), texts[start]
            start = i


def _attribute_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
