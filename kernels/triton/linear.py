"""Products with weight matrices and what follows them, on the device.

One linear is one kernel for each format among its segments (`matrix.merge` joins neighbours), plus a gather
where the columns are ordered, plus one that combines where k is split or a gated pair has two formats. All
memory comes from the caller: `workspace_bytes` says how much for a Plan. Beside integer weights activations
are quantized to int8 where the plan says so, and multiplied as integers; many rows are multiplied as they
were before, as 16-bit floats, by cuBLAS: straight into the result where nothing but a residual follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dequantize import constants, dequantize
from .epilogue import combine_kernel
from .handover import FLOAT_GROUP, NOTHING, Handover, Prepared, is_whole
from .linear_configs import Config, candidates, choose, quads
from .linear_decode import decode_kernel
from .linear_integer import constants as integer_constants
from .linear_integer import integer_kernel, integer_tile_kernel
from .linear_tensor_cores import quantize_fp8_kernel, tensor_core_kernel
from .matrix import Matrix
from .overlap import options
from .quantize import Quantized, quantize, room

ALIGNMENT = 256  # of the pieces of a workspace
COMBINED = 256  # columns that a program combines, half as many of a gated pair
MANY_RESULTS = 1 << 21  # from here on a program combines 1,024: as many as a GPU holds at once have work
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Plan:
    """How a linear runs for one number of tokens: a config for each segment, all with the same splits.

    multiply: the type that tensor cores multiply, torch.bfloat16 or torch.float16. native_fp8: fp8 weights of
    whole rows multiply e4m3 activations on the tensor cores. act_group: columns of int8 activations that
    share a scale, 0 where no config multiplies those.
    """

    tokens: int
    configs: tuple[Config, ...]
    partial: bool  # sums go through the workspace and are combined
    multiply: torch.dtype = torch.bfloat16
    native_fp8: bool = False
    act_group: int = 0


def plan(
    segments: Sequence[Matrix],
    tokens: int,
    glu: bool = False,
    configs: Sequence[Config] | None = None,
    multiply: torch.dtype = torch.bfloat16,
    native_fp8: bool = False,
    act_group: int = 0,
    straight: bool = False,
) -> Plan:
    """A Plan with the given configs, or the table's.

    act_group: as the program has it, 0 for floats; straight: out is f32 and nothing follows but a residual in
    f32, and that only where `adds_floats`.
    """
    chosen = list(configs) if configs else [choose(s, tokens, act_group, multiply) for s in segments]
    assert len(chosen) == len(segments), f"{len(segments)} segments need as many configs, got {len(chosen)}"
    splits = max(config.splits for config in chosen)
    if splits > 1:
        chosen = [_with_splits(config, splits) for config in chosen]
    native = native_fp8 and all(
        s.format == "fp8" and not s.group and s.k % 16 == 0 and c.tokens and not c.dense
        for s, c in zip(segments, chosen)
    )
    dense = any(config.dense for config in chosen)
    partial = splits > 1 or (glu and len(segments) > 1) or (dense and not straight)
    group = act_group if any(c.integer for c in chosen) else 0
    return Plan(tokens, tuple(chosen), partial, multiply, native, group)


@functools.cache
def adds_floats(device: torch.device) -> bool:
    """Whether this torch adds an f32 residual within a product of 16-bit floats; some refuse to on a GPU."""
    if device.type != "cuda":
        return True
    ones, sums = (torch.ones(16, 16, dtype=t, device=device) for t in (torch.bfloat16, torch.float32))
    try:
        _multiply(ones, ones, sums, sums)
    except RuntimeError:
        return False
    return bool((sums == 17).all())


def _with_splits(config: Config, splits: int) -> Config:
    return replace(config, splits=splits, dense=False)


class _Workspace:
    """Pieces of one buffer, one after the other; without a buffer it only counts."""

    def __init__(self, buffer: Tensor | None) -> None:
        self.buffer, self.used = buffer, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        start, self.used = self.used, self.used + -(-count // ALIGNMENT) * ALIGNMENT
        if self.buffer is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        have = self.buffer.numel()
        assert self.used <= have, (
            f"the workspace has {have} bytes, needs {self.used} or more: workspace_bytes()"
        )
        return self.buffer[start : start + count].view(dtype).view(shape)


@dataclass(frozen=True)
class _Pieces:
    """What one linear keeps in the workspace."""

    ordered: Tensor | None  # [tokens, k], x[order]
    partial: Tensor | None  # [splits, tokens, n] f32
    fp8: Tensor | None  # [tokens, k] uint8
    fp8_scale: Tensor | None  # [tokens] f32
    x16: Tensor | None  # [tokens, k], x as cuBLAS multiplies it, where x is not so already
    dense: Tensor | None  # [n, k], a segment as cuBLAS multiplies it
    quantized: Quantized | None


def _pieces(segments: Sequence[Matrix], p: Plan, order: bool, x_dtype: torch.dtype, w: _Workspace) -> _Pieces:
    k, n, t = segments[0].k, sum(segment.n for segment in segments), p.tokens
    dense = [s for s, c in zip(segments, p.configs) if c.dense]
    tallest = max((s.n for s in dense if s.data.dtype != p.multiply), default=0)
    floats = not all(config.integer for config in p.configs)
    quantized = _take_quantized(k, p, w)
    return _Pieces(
        w.take((t, k), x_dtype) if order and floats else None,
        w.take((p.configs[0].splits, t, n), torch.float32) if p.partial else None,
        w.take((t, k), torch.uint8) if p.native_fp8 else None,
        w.take((t,), torch.float32) if p.native_fp8 else None,
        w.take((t, k), p.multiply) if dense and (order or x_dtype != p.multiply) else None,
        w.take((tallest, k), p.multiply) if tallest else None,
        quantized,
    )


def _take_quantized(k: int, p: Plan, w: _Workspace) -> Quantized | None:
    if not p.act_group:
        return None
    q, scale = (w.take(*part) for part in room(p.tokens, k, p.act_group))
    return Quantized(q, scale, p.act_group)


def workspace_bytes(segments: Sequence[Matrix], p: Plan, order: bool, x_dtype: torch.dtype) -> int:
    """Bytes of workspace, uint8 and aligned to 256 bytes, that `linear` needs; order: whether it gets one."""
    counted = _Workspace(None)
    _pieces(segments, p, order, x_dtype, counted)
    return counted.used


def prepared_input(
    segments: Sequence[Matrix], p: Plan, space: Tensor | None, normed: bool = False, eps: float = 0.0
) -> Prepared:
    """What kernels ahead of the product leave for it in ``space``, uint8, `prepared_bytes()` of it.

    normed: there is a norm with ``eps`` in between, whose division is left to the product.
    """
    return _prepared(segments[0].k, p, _Workspace(space), normed, eps)


def prepared_bytes(segments: Sequence[Matrix], p: Plan, normed: bool) -> int:
    counted = _Workspace(None)
    _prepared(segments[0].k, p, counted, normed, 0.0)
    return counted.used


def _prepared(k: int, p: Plan, w: _Workspace, normed: bool, eps: float) -> Prepared:
    quantized = _take_quantized(k, p, w)
    group = group_of(p)
    floats = w.take((p.tokens, k), torch.float32) if quantized is None else None
    squares = w.take((p.tokens, -(-k // group)), torch.float32) if normed else None
    return Prepared(quantized, floats, squares, eps)


def group_of(p: Plan) -> int:
    """Columns of a product's input that are prepared together."""
    return p.act_group or FLOAT_GROUP


def takes_prepared(p: Plan) -> bool:
    """Whether `linear` multiplies what was prepared: all of it as int8, or for few rows all of it as f32."""
    return all(c.integer for c in p.configs) or all(_is_decode(c) for c in p.configs)


def can_hand_over(p: Plan, n: int, glu: bool, group: int) -> bool:
    """Whether `linear` with n columns of out can prepare the next product's input by such groups."""
    if not all(c.integer or _is_decode(c) for c in p.configs):
        return False
    if not p.partial and len(p.configs) > 1:  # kernels of their own, none of which sees all columns
        return False
    rows = COMBINED if p.partial else p.configs[0].rows
    columns = rows // 2 if glu else rows
    return (columns % group if p.partial else group % columns) == 0 and is_whole(group, n)


def counters(p: Plan, n: int, group: int) -> int:
    """Counters of the handover of n columns."""
    tokens = p.configs[0].tokens
    return -(-n // group) * (-(-p.tokens // tokens) if tokens else 1)


def _is_decode(config: Config) -> bool:
    return not (config.tokens or config.dense or config.integer)


@triton.jit
def gather_columns_kernel(x, ldx, order, out, k, BLOCK: tl.constexpr):
    """out[t, j] = x[t, order[j]]."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(order + column, column < k, 0)
    tl.store(out + token * k + column, tl.load(x + token * ldx + source), column < k)


@dataclass(frozen=True)
class _Epilogue:
    """out and what is done to a sum before it gets there."""

    out: Tensor
    bias: Tensor | None
    residual: Tensor | None
    activation: str
    glu: bool
    scale: float
    softcap: float

    def arguments(self, first: int = 0, n: int | None = None) -> dict[str, object]:
        """Of the output columns [first, first + n)."""
        last = None if n is None else first + n
        residual = None if self.residual is None else self.residual[:, first:last]
        out = self.out[:, first:last]
        return {
            "bias": None if self.bias is None else self.bias[first:],
            "residual": residual, "ldr": 0 if residual is None else residual.stride(0),
            "out": out, "ldo": out.stride(0), "factor": self.scale, "softcap": self.softcap or 1.0,
            "ACTIVATION": self.activation, "SOFTCAP": self.softcap != 0,
        }  # fmt: skip


def linear(
    x: Tensor,
    segments: Sequence[Matrix],
    out: Tensor,
    *,
    p: Plan,
    workspace: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    order: Tensor | None = None,
    activation: str = "none",
    glu: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    given: Prepared | None = None,
    then: Handover | None = None,
) -> None:
    """out = softcap(scale * activation(x[:, order] W^T + bias) [* up half]) + residual.

    x [T, k], residual and out [T, n], or n / 2 with `glu`: floats of any type whose last dimension has stride
    1; out may be the residual. segments: W from top to bottom; p: their plan for T tokens; bias [n] of any
    float type; order [k] int32, a permutation; workspace: uint8, `workspace_bytes()` of it; given: x as
    kernels ahead prepared it, if they did; then: what to prepare for the next product. T > 4 rounds x to
    `p.multiply`, except beside f32 weights and where it is multiplied as int8; what is of that type already,
    cuBLAS multiplies as it lies. Launches only: no allocation, no synchronization.
    """
    n = sum(segment.n for segment in segments)
    wanted = (p.tokens, n // 2 if glu else n)
    assert tuple(x.shape) == (p.tokens, segments[0].k), f"x: {tuple(x.shape)} for {p}"
    assert tuple(out.shape) == wanted, f"out: expected {wanted}, got {tuple(out.shape)}"
    assert all(t is None or t.stride(-1) == 1 for t in (x, out, residual)), "columns must be contiguous"
    space = _Workspace(workspace if workspace is not None else x.new_empty(0, dtype=torch.uint8))
    pieces = _pieces(segments, p, order is not None, x.dtype, space)
    end = _Epilogue(out, bias, residual, activation, glu, scale, softcap)
    if given is None:
        given = Prepared(pieces.quantized)
        if pieces.quantized is not None:
            quantize(x, pieces.quantized, order)
    elif given.floats is not None:
        x = given.floats
    if order is not None and pieces.ordered is not None:
        grid = (triton.cdiv(x.shape[1], 1024), p.tokens)
        gather_columns_kernel[grid](x, x.stride(0), order, pieces.ordered, x.shape[1], BLOCK=1024)
        x = pieces.ordered
    if pieces.fp8 is not None:
        quantize_fp8_kernel[(p.tokens,)](x, x.stride(0), pieces.fp8, pieces.fp8_scale, x.shape[1], BLOCK=1024)
        x = pieces.fp8
    x16 = x
    if pieces.x16 is not None:
        x16 = pieces.x16.copy_(x)
    first = 0
    for segment, config in zip(segments, p.configs):
        if config.dense:
            _dense_product(x16, segment, first, p, pieces, end)
        else:
            _product(x, segment, first, config, p, pieces, end, given, then)
        first += segment.n
    if pieces.partial is not None:
        _combine(pieces.partial, end, then)


def _product(
    x: Tensor, m: Matrix, first: int, config: Config, p: Plan, pieces: _Pieces, end: _Epilogue,
    given: Prepared, then: Handover | None,
) -> None:  # fmt: skip
    """One segment, whose rows begin at `first`."""
    partial = pieces.partial
    glu = end.glu and partial is None
    n_out = m.n // 2 if glu else m.n
    where = (
        end.arguments(first, None if glu else m.n)
        if partial is None
        else {
            **_Epilogue(end.out, None, None, "none", False, 1.0, 0.0).arguments(),
            "work": partial[0, :, first:],
        }
    )
    tiles = triton.cdiv(n_out, config.rows // 2 if glu else config.rows)
    arguments = {
        "work": None, "work_width": 0 if partial is None else partial.shape[2], **where, "scale": m.scale,
        "zero": m.zero, "groups": m.groups, "tokens": p.tokens, "n_out": n_out, "GLU": glu,
        "ROWS": config.rows, "num_warps": config.warps,
    }  # fmt: skip
    around = given.arguments() | (then.arguments() if then and partial is None else NOTHING)
    if config.integer:
        assert given.quantized is not None
        _integer_product(m, config, tiles, given.quantized, arguments | around)
        return
    steps = triton.cdiv(m.chunks, config.chunks * config.splits)
    arguments |= {
        **constants(m), "x": x, "ldx": x.stride(0), "data": m.data, "stride": m.data.stride(0), "k": m.k,
        "chunks": m.chunks, "split_chunks": steps * config.chunks, "CHUNKS": config.chunks,
    }  # fmt: skip
    if not config.tokens:
        decode_kernel[(tiles, config.splits)](
            **arguments, **around, TOKENS=triton.next_power_of_2(p.tokens), **options()
        )
        return
    dtype = tl.float32 if m.format == "f32" else _TYPES[p.multiply]
    grid = (triton.cdiv(p.tokens, config.tokens), tiles, config.splits)
    tensor_core_kernel[grid](
        **arguments, x_scale=pieces.fp8_scale, DTYPE=tl.float8e4nv if p.native_fp8 else dtype,
        TOKENS=config.tokens, num_stages=config.stages,
    )  # fmt: skip


def _integer_product(
    m: Matrix, config: Config, tiles: int, x: Quantized, arguments: dict[str, object]
) -> None:
    grid = (tiles, config.splits, triton.cdiv(len(x.q), config.tokens))
    groups = x.scale.shape[1]
    arguments = {
        **arguments, **integer_constants(m), "xs": x.scale, "x_groups": groups, "X_GROUP": x.group,
        "TOKENS": config.tokens, **options(),
    }  # fmt: skip
    if not config.chunks:
        integer_tile_kernel[grid](
            **arguments, xq=x.q, ldx=x.q.stride(0), data=m.data, stride=m.data.stride(0),
            split_groups=triton.cdiv(groups, config.splits), num_stages=config.stages,
        )  # fmt: skip
        return
    words, x_words, count = m.data.view(torch.int32), x.q.view(torch.int32), quads(m)
    steps = triton.cdiv(count, config.chunks * config.splits)
    integer_kernel[grid](
        **arguments, xq=x_words, ldx=x_words.stride(0), words=words, stride=words.stride(0), quads=count,
        split_quads=steps * config.chunks, QUADS=config.chunks, maxnreg=config.registers or None,
    )  # fmt: skip


def _dense_product(x: Tensor, m: Matrix, first: int, p: Plan, pieces: _Pieces, end: _Epilogue) -> None:
    """A segment by cuBLAS, dequantized to 16 bits where it is not stored so: into the partial sums in f32, or
    straight into out."""
    weights, last = m.data, first + m.n
    if weights.dtype != p.multiply:
        assert pieces.dense is not None
        weights = pieces.dense[: m.n]
        dequantize(m, weights)
    if pieces.partial is not None:
        _multiply(x, weights, None, pieces.partial[0, :, first:last])
        return
    residual = None if end.residual is None else end.residual[:, first:last]
    _multiply(x, weights, residual, end.out[:, first:last])


def _multiply(x: Tensor, weights: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """out = x weights^T + residual; x, weights: 16-bit floats, out, residual: f32, the latter may be out."""
    assert out.dtype == torch.float32 and (residual is None or residual.dtype == out.dtype), "not in f32"
    if residual is not None and residual.data_ptr() == out.data_ptr():
        residual = out  # which torch would else copy onto itself
    if not x.is_cuda:  # the CPU has no product of two types
        x, weights = x.float(), weights.float()
        if residual is None:
            torch.mm(x, weights.t(), out=out)
        else:
            torch.addmm(residual, x, weights.t(), out=out)
    elif residual is None:
        torch.mm(x, weights.t(), out_dtype=out.dtype, out=out)
    else:
        torch.addmm(residual, x, weights.t(), out_dtype=out.dtype, out=out)


def _combine(partial: Tensor, end: _Epilogue, then: Handover | None) -> None:
    splits, tokens, width = partial.shape
    n_out = end.out.shape[1]
    block = 1024 if tokens * n_out >= MANY_RESULTS else COMBINED // 2 if end.glu else COMBINED
    combine_kernel[(triton.cdiv(n_out, block), tokens)](
        partial, splits, width, tokens=tokens, n_out=n_out, GLU=end.glu, BLOCK=block, **end.arguments(),
        **(then.arguments() if then else NOTHING), **options(),
    )  # fmt: skip


def tune(
    matrix: Matrix, tokens: int, x_dtype: torch.dtype, multiply: torch.dtype = torch.bfloat16,
    glu: bool = False, time: Callable[[Callable[[], None]], float] | None = None, act_group: int = 0,
) -> Config:  # fmt: skip
    """The fastest candidate for a matrix, or gated pair, by medians with a cold L2 cache.

    time: seconds, or any unit, of a call; None: on the current CUDA device. Allocates and synchronizes: for
    the executor to call ahead of time and to remember what it returns.
    """
    device = matrix.data.device
    x = torch.randn(tokens, matrix.k, device=device).to(x_dtype)
    out = torch.empty(tokens, matrix.n // 2 if glu else matrix.n, dtype=x_dtype, device=device)
    clock = time or _median
    return fastest(
        candidates(matrix, tokens, glu, act_group),
        lambda config: clock(_call(matrix, x, out, config, multiply, glu, act_group)),
    )


def _median(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, quantiles=[0.5]))


def fastest(configs: Sequence[Config], time: Callable[[Config], float]) -> Config:
    """The config with the least time; what the device or its compiler refuses does not count."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    times: dict[Config, float] = {}
    for config in configs:
        try:
            times[config] = time(config)
        except (OutOfResources, CompilationError, PTXASError, torch.OutOfMemoryError):
            continue
    assert times, "no candidate runs on this device"
    return min(times, key=lambda config: times[config])


def _call(
    matrix: Matrix, x: Tensor, out: Tensor, config: Config, multiply: torch.dtype, glu: bool,
    act_group: int = 0,
) -> Callable[[], None]:  # fmt: skip
    straight = not glu and out.dtype == torch.float32
    p = plan([matrix], len(x), glu, [config], multiply, act_group=act_group, straight=straight)
    size = workspace_bytes([matrix], p, False, x.dtype)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    return lambda: linear(x, [matrix], out, p=p, workspace=workspace, glu=glu)
