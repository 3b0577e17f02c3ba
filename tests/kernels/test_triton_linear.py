"""The products in Triton against float64 on the weights that the stored bits stand for."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from compile_sm90 import Compiled, compile_launches
from interpreter import quantize_rows
from triton_device import DEVICE, ahead_of_time
from triton_matrices import FORMATS, random_matrix

from gristmill.kernels.reference import linear as reference
from gristmill.kernels.triton import linear as products
from gristmill.kernels.triton.dequantize import dequantize
from gristmill.kernels.triton.embedding import embedding
from gristmill.kernels.triton.linear import Plan, adds_floats, fastest, linear, plan, workspace_bytes
from gristmill.kernels.triton.linear_configs import (
    BUCKETS,
    TABLE,
    Config,
    bucket,
    candidates,
    choose,
    has_tiles,
)
from gristmill.kernels.triton.matrix import FLOATS, Matrix, merge, meta_matrix
from gristmill.kernels.triton.quantize import Quantized, quantize

GROUPS = (0, 32, 64, 128)
TOKENS = (1, 2, 3, 4, 5, 16, 17, 33)
# Some hundred products and sums near 1, each rounded to f32; with BFLOAT16 the results are rounded too.
FLOAT32: dict[str, Any] = {"rtol": 1e-5, "atol": 5e-5}
BFLOAT16: dict[str, Any] = {"rtol": 2**-7, "atol": 2**-9}
DECODE = (Config(2, 4), Config(8, 8), Config(4, 16, splits=2), Config(16, 32), Config(4, 4, splits=4))
TILES = (Config(16, 4, 16), Config(32, 8, 16), Config(16, 8, 32, splits=2), Config(64, 4, 16))


def move(m: Matrix) -> Matrix:
    parts = {name: getattr(m, name) for name in ("data", "scale", "zero")}
    return replace(m, **{name: part.to(DEVICE) for name, part in parts.items() if part is not None})


def strided(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random columns of a wider buffer."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, width + 16, generator=generator).to(dtype)
    return wide.to(DEVICE)[:, 8 : 8 + width]


def run(x: Tensor, segments: list[Matrix], p: Plan, width: int, dtype: torch.dtype, **rest: Any) -> Tensor:
    """linear() into columns of a wider buffer, whose other columns must stay what they are."""
    size = workspace_bytes(segments, p, rest.get("order") is not None, x.dtype)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)  # NaN where nothing was written
    wide = torch.full((len(x), width + 3), -7.0, dtype=dtype, device=DEVICE)
    linear(x, segments, wide[:, 1 : 1 + width], p=p, workspace=workspace, **rest)
    assert (wide[:, 0] == -7).all() and (wide[:, 1 + width :] == -7).all()
    return wide[:, 1 : 1 + width].cpu()


def multiplied(m: Matrix, weights: Tensor, p: Plan, config: Config) -> Tensor:
    """The weights [n, k] as the kernel multiplies them, in f64."""
    if not config.tokens or m.format == "f32" or (m.has_scales and not m.group):
        return weights
    return weights.to(p.multiply).double()


@dataclass(frozen=True)
class Case:
    tokens: int
    k: int
    parts: tuple[tuple[str, int, int, bool], ...]  # format, rows, group, symmetric
    configs: tuple[Config, ...]
    scale_type: str = "f16"
    x_type: torch.dtype = torch.bfloat16
    out_type: torch.dtype = torch.float32
    activation: str = "none"
    glu: bool = False
    bias: bool = False
    residual: bool = False
    order: bool = False
    scale: float = 1.0
    softcap: float = 0.0


def check(case: Case) -> None:
    made = [
        random_matrix(fmt, n, case.k, group, symmetric, i, case.scale_type)
        for i, (fmt, n, group, symmetric) in enumerate(case.parts)
    ]
    segments = [move(m) for m, _ in made]
    p = plan(segments, case.tokens, case.glu, case.configs)
    n = sum(m.n for m in segments)
    width = n // 2 if case.glu else n
    x = strided(case.tokens, case.k, case.x_type, 1)
    extra: dict[str, Tensor | None] = {
        "bias": strided(1, n, torch.float32, 2)[0] if case.bias else None,
        "residual": strided(case.tokens, width, case.x_type, 3) if case.residual else None,
        "order": torch.randperm(case.k).int().to(DEVICE) if case.order else None,
    }
    end: dict[str, Any] = {key: getattr(case, key) for key in ("activation", "glu", "scale", "softcap")}
    got = run(x, segments, p, width, case.out_type, **extra, **end)
    exact = [multiplied(m, w, p, c) for (m, w), c in zip(made, p.configs)]
    rounded = [c.tokens > 0 and m.format != "f32" for m, c in zip(segments, p.configs)]
    wanted = expected(x.cpu(), exact, rounded, p, extra, end)
    tolerance = FLOAT32 if case.out_type == torch.float32 else BFLOAT16
    torch.testing.assert_close(got.double(), wanted, **tolerance)


def expected(
    x: Tensor, weights: list[Tensor], rounded: list[bool], p: Plan, extra: dict[str, Any], end: dict[str, Any]
) -> Tensor:
    if extra["order"] is not None:
        x = x[:, extra["order"].cpu()]
    sums = [(x.to(p.multiply) if r else x).double() @ w.T for w, r in zip(weights, rounded)]
    y = torch.cat(sums, 1)
    one = torch.eye(y.shape[1], dtype=torch.float64)
    bias = None if extra["bias"] is None else extra["bias"].cpu().double()
    residual = None if extra["residual"] is None else extra["residual"].cpu().double()
    return reference.linear(y, [one], [bias], residual, **end)


def sampled(fmt: str, tokens: int) -> Case:
    """One of many cases, always the same for a format and a number of tokens."""
    r = random.Random(f"{fmt} {tokens}")
    group = 0 if fmt in FLOATS else r.choice(GROUPS)
    symmetric = not fmt.startswith("int") or r.random() < 0.5
    glu = r.random() < 0.4
    n = 2 * r.randint(1, 20) if glu else r.randint(1, 40)
    return Case(
        tokens, r.choice((8, 31, 64, 65, 100, 192, 257)), ((fmt, n, group, symmetric),), (r.choice(DECODE if
        tokens <= 4 else TILES),), r.choice(tuple(FLOATS)), r.choice(tuple(FLOATS.values())),
        r.choice((torch.float32, torch.float32, torch.bfloat16)), r.choice(tuple(reference.ACTIVATIONS)), glu,
        r.random() < 0.4, r.random() < 0.4, r.random() < 0.2, r.choice((1.0, 0.5)), r.choice((0.0, 0.0, 2.0)),
    )  # fmt: skip


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_products_are_exact_but_for_rounding(fmt: str, tokens: int) -> None:
    check(sampled(fmt, tokens))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2"])
def test_every_group_of_integers(fmt: str, group: int, symmetric: bool, tokens: int) -> None:
    config = Config(8, 4) if tokens == 1 else Config(16, 4, 16)
    check(Case(tokens, 300, ((fmt, 9, group, symmetric),), (config,)))


@pytest.mark.parametrize("act_group", [32, 64, 128])
@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "int2", "int8 tiles", "int4 tiles"])
def test_products_of_integers(fmt: str, act_group: int) -> None:
    """Activations rounded as by the interpreter of programs, sums that are exact."""
    r = random.Random(f"{fmt} {act_group}")
    fmt, *tiles = fmt.split()
    if tiles and not has_tiles(meta_matrix(fmt, 2, 64, act_group), act_group):
        pytest.skip("halves of what is stored together")
    for tokens, k in ((1, 300), (2, 257), (4, 31), (9, 130), (33, 100)):
        group = r.choice([g for g in GROUPS if g % act_group == 0])
        glu, symmetric = r.random() < 0.5, r.random() < 0.5
        n = 2 * r.randint(1, 9)
        m, weights = random_matrix(fmt, n, k, group, symmetric, tokens, r.choice(tuple(FLOATS)))
        many = tokens > 4  # the interpreter runs a program after the other: few of large tiles
        rows, step, of_x, splits = (
            r.choice(of) for of in ((8,) if many else (2, 8), (2, 16), (16,) if many else (1, 2), (1, 2))
        )
        config, segments = Config(rows, step, of_x, splits, integer=True), [move(m)]
        if tiles:
            config = Config(16, 0, 16, splits, integer=True)
        order = torch.randperm(k).int().to(DEVICE) if r.random() < 0.5 else None
        p = plan(segments, tokens, glu, [config], act_group=act_group)
        x = strided(tokens, k, torch.float32, tokens)
        end: dict[str, Any] = {"activation": "silu", "glu": glu, "scale": 0.5, "softcap": 3.0}
        got = run(x, segments, p, n // 2 if glu else n, torch.float32, order=order, **end)
        ordered = x.cpu() if order is None else x.cpu()[:, order.cpu()]
        rounded = torch.from_numpy(quantize_rows(ordered.numpy(), act_group))
        wanted = reference.linear(
            rounded @ weights.T, [torch.eye(n, dtype=torch.float64)], [None], None, **end
        )
        torch.testing.assert_close(got.double(), wanted, **FLOAT32)


def test_what_is_no_number_is_none_in_its_group_alone() -> None:
    x = torch.ones(1, 96, device=DEVICE)
    x[0, 40] = float("inf")
    to = Quantized(
        torch.full((1, 128), 7, dtype=torch.int8, device=DEVICE), torch.empty(1, 3, device=DEVICE), 32
    )
    quantize(x, to)
    assert to.scale.isfinite().tolist() == [[True, False, True]]
    assert to.q[0, :32].eq(127).all() and to.q[0, 96:].eq(0).all()


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
def test_every_epilogue(name: str, glu: bool) -> None:
    case = Case(
        2, 64, (("int4", 12, 32, True),), (Config(8, 4),), activation=name, glu=glu, bias=True, residual=True,
        scale=3.0, softcap=1.5,
    )  # fmt: skip
    for splits in (1, 2):
        check(replace(case, configs=(Config(8, 4, splits=splits),)))
        check(replace(case, tokens=6, configs=(Config(16, 4, 16, splits=splits),)))


@pytest.mark.parametrize("tokens", [2, 18])
@pytest.mark.parametrize("glu", [False, True])
def test_segments_of_several_formats(glu: bool, tokens: int) -> None:
    parts = (("int4", 6, 32, True), ("bf16", 11, 0, True), ("int8", 7, 0, False))
    configs = tuple(Config(16, 4, 0 if tokens < 5 else 16) for _ in parts)
    check(Case(tokens, 100, parts, configs, glu=glu, bias=True, residual=True, order=True, activation="silu"))
    splits = tuple(replace(config, splits=2) for config in configs)
    check(Case(tokens, 100, parts, splits, glu=glu, bias=True, activation="gelu"))


@pytest.mark.parametrize("fmt", ["int4", "fp8", "f16"])
def test_the_dense_path_is_a_product_of_rounded_weights(fmt: str) -> None:
    group = 0 if fmt == "f16" else 64
    m, weights = random_matrix(fmt, 10, 100, group)
    m = move(m)
    x, residual = strided(6, 100, torch.bfloat16, 1), strided(6, 5, torch.bfloat16, 2)
    p = plan([m], 6, True, [Config(0, 0, 64, dense=True)])
    got = run(x, [m], p, 5, torch.float32, residual=residual, activation="silu", glu=True)
    y = (x.cpu().double() @ weights.to(torch.bfloat16).double().T).to(torch.bfloat16).double()
    wanted = torch.nn.functional.silu(y[:, :5]) * y[:, 5:] + residual.cpu().double()
    torch.testing.assert_close(got.double(), wanted, rtol=2**-6, atol=2**-4)  # y is rounded to bf16


@pytest.mark.parametrize("residual", ["none", "apart", "out"])
@pytest.mark.parametrize("formats", [("bf16",), ("int4", "bf16", "f32")])
def test_dense_products_go_straight_into_the_result(formats: tuple[str, ...], residual: str) -> None:
    """Without sums in the workspace; f32 weights are no dense product and stand between such."""
    if residual != "none" and not adds_floats(DEVICE):
        pytest.skip("this torch adds no f32 to a product of 16-bit floats on a device")
    made = [random_matrix(fmt, 6 + i, 96, 32 if fmt == "int4" else 0) for i, fmt in enumerate(formats)]
    segments, n = [move(m) for m, _ in made], sum(m.n for m, _ in made)
    configs = [Config(16, 4, 16, dense=fmt != "f32") for fmt in formats]
    p = plan(segments, 5, configs=configs, straight=True)
    combined = plan(segments, 5, configs=configs)
    assert combined.partial and not p.partial
    sizes = [workspace_bytes(segments, each, False, torch.float32) for each in (combined, p)]
    assert sizes[0] - sizes[1] == -(-5 * n * 4 // 256) * 256
    x = strided(5, 96, torch.float32, 1)
    wide = torch.randn(5, n + 9, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    before, out = wide.clone(), wide[:, 4 : 4 + n]
    added = {"none": None, "apart": strided(5, n, torch.float32, 3), "out": out}[residual]
    workspace = torch.full((sizes[1],), 255, dtype=torch.uint8, device=DEVICE)
    exact = [multiplied(m, w, p, c) for (m, w), c in zip(made, configs)]
    extra = {"order": None, "bias": None, "residual": None if added is None else added.clone()}
    wanted = expected(x.cpu(), exact, [fmt != "f32" for fmt in formats], p, extra, {})
    linear(x, segments, out, p=p, workspace=workspace, residual=added)
    torch.testing.assert_close(out.cpu().double(), wanted, **FLOAT32)
    assert torch.equal(wide[:, :4], before[:, :4]) and torch.equal(wide[:, 4 + n :], before[:, 4 + n :])


@pytest.mark.parametrize("glu", [False, True])
def test_many_results_are_combined_as_few(glu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m = move(random_matrix("int4", 2 * 1100, 64, 32)[0])
    width = 1100 if glu else 2200
    x, residual = strided(2, 64, torch.float32, 1), strided(2, width, torch.float32, 2)
    p = plan([m], 2, glu, [Config(16, 4, 16, dense=True)])
    end: dict[str, Any] = {"residual": residual, "bias": strided(1, 2200, torch.float32, 3)[0], "glu": glu}
    few = run(x, [m], p, width, torch.float32, activation="silu", **end)
    monkeypatch.setattr(products, "MANY_RESULTS", 0)
    assert torch.equal(run(x, [m], p, width, torch.float32, activation="silu", **end), few)


@pytest.mark.parametrize("glu", [False, True])
def test_what_is_rounded_already_is_multiplied_as_it_lies(glu: bool) -> None:
    m = move(random_matrix("bf16", 12, 96)[0])
    x = strided(6, 96, torch.float32, 1)
    p = plan([m], 6, glu, [Config(16, 4, 16, dense=True)])
    assert workspace_bytes([m], p, False, torch.float32) > workspace_bytes([m], p, False, torch.bfloat16)
    width = 6 if glu else 12
    later = run(x, [m], p, width, torch.float32, activation="gelu", glu=glu)
    already = run(x.bfloat16(), [m], p, width, torch.float32, activation="gelu", glu=glu)
    assert torch.equal(already, later)


def test_fp8_weights_may_multiply_fp8_activations() -> None:
    m, weights = random_matrix("fp8", 20, 96)
    m, x = move(m), strided(7, 96, torch.bfloat16, 1)
    p = plan([m], 7, configs=[Config(16, 4, 16)], native_fp8=True)
    assert p.native_fp8
    got = run(x, [m], p, 20, torch.float32)
    scale = x.cpu().float().abs().amax(1, keepdim=True) / 448
    rounded = (x.cpu().float() / scale).to(torch.float8_e4m3fn).double() * scale
    torch.testing.assert_close(got.double(), rounded @ weights.T, **FLOAT32)
    assert not plan([move(random_matrix("fp8", 4, 96, 32)[0])], 7, native_fp8=True).native_fp8


@pytest.mark.parametrize(
    "tokens,config", [(3, Config(4, 4)), (3, Config(4, 4, splits=2)), (16, Config(16, 4, 16))]
)
@pytest.mark.parametrize("fmt", ["int4", "bf16"])
def test_a_row_does_not_depend_on_others(fmt: str, tokens: int, config: Config) -> None:
    m = move(random_matrix(fmt, 20, 130, 0 if fmt == "bf16" else 32)[0])
    x = strided(tokens, 130, torch.bfloat16, 1)
    p = plan([m], tokens, configs=[config])
    alone = torch.full_like(x, 1e4)
    alone[1] = x[1]
    first, again = (run(x, [m], p, 20, torch.float32) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[1], run(alone, [m], p, 20, torch.float32)[1])


def test_merging_is_stacking() -> None:
    made = [random_matrix("int4", n, 70, 32, False, n, s) for n, s in ((3, "f16"), (5, "f32"), (2, "f16"))]
    other = random_matrix("int4", 4, 70, 64)
    merged = merge([*(m for m, _ in made), other[0]])
    assert [m.n for m in merged] == [10, 4] and merged[0].scale is not None
    assert merged[0].scale.dtype == torch.float32
    out = torch.full((10, 70), torch.nan, device=DEVICE)
    dequantize(move(merged[0]), out)
    torch.testing.assert_close(out.cpu().double(), torch.cat([w for _, w in made]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantizing_is_exact(fmt: str) -> None:
    for group, symmetric in ((0, True), (32, True), (64, False), (128, True)):
        integer = fmt.startswith("int")
        m, weights = random_matrix(fmt, 5, 203, 0 if fmt in FLOATS else group, symmetric or not integer)
        out = torch.full((5, 210), torch.nan, device=DEVICE)
        dequantize(move(m), out[:, :203])
        assert torch.equal(out[:, :203].cpu(), weights.float())  # f16 scales: the products are exact in f32
        assert out[:, 203:].isnan().all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_embedding_looks_rows_up(fmt: str) -> None:
    group = 0 if fmt in FLOATS else 64
    made = [random_matrix(fmt, 6, 100, group, seed=1), random_matrix("f16", 5, 100, seed=2)]
    ids = torch.tensor([0, 9, 4, 3], dtype=torch.int32)
    residual = strided(4, 100, torch.float32, 3)
    out = torch.full((4, 101), torch.nan, device=DEVICE)
    segments = [move(m) for m, _ in made]
    embedding(ids.to(DEVICE), segments, out[:, :100], residual=residual, scale=2.5, offset=1)
    wanted = residual.cpu().double() + 2.5 * torch.cat([w for _, w in made])[ids.long() + 1]
    torch.testing.assert_close(out[:, :100].cpu().double(), wanted, **FLOAT32)
    assert out[:, 100].isnan().all()


def test_the_table_has_a_config_for_everything() -> None:
    for buckets in TABLE.values():
        assert tuple(buckets) == BUCKETS
        for tokens, config in buckets.items():
            assert (config.tokens == 0) == (tokens <= 4)
            sizes = (config.rows, config.chunks, config.warps, config.tokens or 1)
            assert all(size & (size - 1) == 0 for size in sizes)
    long = random_matrix("int4", 8, 8192, 128)[0]
    assert choose(long, 1).splits > 1 and choose(replace_rows(long, 8192), 1).splits == 1


def replace_rows(m: Matrix, n: int) -> Matrix:
    assert m.scale is not None
    return replace(m, n=n, data=m.data[:1].repeat(n, 1), scale=m.scale[:1].repeat(n, 1))


@pytest.mark.parametrize("tokens", [5, 64, 512])
def test_candidates_are_dense_where_the_table_may_be(tokens: int) -> None:
    """Weights in f32 are never rounded, nor a head dequantized whole; the kernel's own table is timed too."""
    large = meta_matrix("int4", 128256, 4096, 128)
    assert not any(c.dense for m in (meta_matrix("f32", 64, 64), large) for c in candidates(m, tokens))
    found = candidates(meta_matrix("bf16", 4096, 4096), tokens)
    assert found[0].dense and replace(found[0], dense=False) == TABLE["16"][bucket(tokens)] in found


def test_tuning_takes_the_fastest_that_runs() -> None:
    from triton.runtime.errors import OutOfResources

    matrix = random_matrix("int4", 64, 256, 128)[0]
    configs = candidates(matrix, 16)
    assert len(set(configs)) == len(configs) > 10

    def time(config: Config) -> float:
        if config.warps > 4:
            raise OutOfResources(1, 0, "registers")
        return 1.0 if config == configs[3] else 2.0

    assert configs[3].warps == 4 and fastest(configs, time) == configs[3]


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_launches("triton_linear_launches")


@ahead_of_time
def test_all_table_entries_compile_for_sm_90(compiled: list[Compiled]) -> None:
    assert len({kernel.kernel for kernel in compiled}) == 10
    wrong = [kernel.summary() for kernel in compiled if not kernel.fits()]
    assert not wrong, "\n".join(wrong)


@ahead_of_time
def test_decoding_loads_wide_and_stays_in_registers(compiled: list[Compiled]) -> None:
    decoding = [k for k in compiled if k.kernel == "decode_kernel" and k.launch.endswith(" one row")]
    decoding = [k for k in decoding if "handed over" not in k.launch]  # which waits for others at its end
    assert decoding
    for kernel in decoding:
        loop = kernel.ptx
        wide = ".v4.b32" if "f16" in kernel.launch or "f32" in kernel.launch else ".v2.b32"
        assert f"ld.global.L1::evict_first.L2::cache_hint{wide}" in loop, kernel.summary()
        assert loop.count("bar.sync") <= 4, (
            kernel.summary()
        )  # no layout goes through shared memory but the sums'


@ahead_of_time
def test_many_rows_go_through_tensor_cores(compiled: list[Compiled]) -> None:
    tiles = [k for k in compiled if k.kernel == "tensor_core_kernel" and "f32" not in k.launch]
    assert tiles
    for kernel in tiles:
        assert "wgmma" in kernel.ptx or "mma.sync" in kernel.ptx, kernel.summary()
