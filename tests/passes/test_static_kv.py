"""static_kv: attention gets its cache, and takes ropes and norms of heads inside."""

import pytest
import torch
from graphs import WIDTH, Rows, apply, canonical, inputs, only, ops
from torch import nn

from gristmill.compiler import interpret
from gristmill.passes import fuse_norm, fuse_rope, static_kv
from gristmill.passes.graph import arguments
from gristmill.passes.rule import Report

HEADS, KV, HEAD = 4, 2, 6


class Attention(Rows):
    """q, k, v from one linear, cut as ``layout`` says; ``twist`` changes what happens to them on the way."""

    def __init__(self, layout="blocks", twist=None, rope=False):
        super().__init__()
        self.kv = HEADS if layout == "neox" else KV
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * self.kv) * HEAD)
        self.q_norm, self.k_norm = nn.Parameter(torch.empty(HEAD)), nn.Parameter(torch.empty(HEAD))
        self.register_buffer("inv_freq", 10.0 ** -torch.arange(0, 1, 2 / HEAD))
        self.layout, self.twist, self.rope = layout, twist, rope

    def cut(self, rows):
        if self.layout == "neox":  # a head's q, k and v lie together
            return rows.view(1, -1, HEADS, 3 * HEAD).transpose(1, 2).chunk(3, -1)
        parts = rows.split([HEADS * HEAD, self.kv * HEAD, self.kv * HEAD], -1)
        return [x.view(1, -1, x.shape[-1] // HEAD, HEAD).transpose(1, 2) for x in parts]

    def norm(self, x, weight):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y if weight is None else weight * y

    def turn(self, x, positions):
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], -1)[:, None]
        half = torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1)
        return x * angles.cos() + half * angles.sin()

    def forward(self, tokens, positions):
        rows = self.qkv(self.rows(tokens))
        q, k, v = self.cut(rows)
        if self.twist in ("norms", "norms without weight", "one norm"):
            weight = self.twist != "norms without weight"
            q = self.norm(q, self.q_norm if weight else None)
            k = self.norm(k, self.k_norm if weight else None) if self.twist != "one norm" else k
        if self.rope:
            q, k = self.turn(q, positions), self.turn(k, positions) if self.twist != "one rope" else k
        if self.twist == "scaled heads":
            q = q * torch.arange(1.0, HEADS + 1)[:, None, None]
        out = torch.ops.gristmill.attention_heads(q, k, v, 0, 0.4, 5, 0.0, None)
        if self.twist == "kept as heads":
            return out.sum(2)
        out = out.flatten(2)
        return out + rows.mean(-1, keepdim=True) * rows[..., :1] if self.twist == "rows used again" else out


def prepared(**options):
    graph = canonical(Attention(**options))
    fuse_norm.run(graph, Report())
    fuse_rope.run(graph, Report())
    return graph


@pytest.mark.parametrize("options", [
    {}, {"rope": True}, {"twist": "norms"}, {"twist": "norms", "rope": True}, {"layout": "neox"},
    {"layout": "neox", "rope": True},
    {"layout": "neox", "twist": "rows used again"}, {"twist": "norms without weight"},
], ids=str)  # fmt: skip
def test_attention_gets_its_cache(options):
    graph = prepared(**options)
    report = apply(static_kv, graph)
    assert (report.hits, report.misses) == (1, [])
    left = ops(graph)
    assert left["gristmill.attention.default"] == 1
    assert not {"gristmill.attention_heads.default", "gristmill.rope.default", "aten.transpose.int"} & set(
        left
    )
    found = arguments(only(graph, "gristmill.attention.default"))
    kv_heads = HEADS if options.get("layout") == "neox" else KV
    assert (found["heads"], found["kv_heads"]) == (HEADS, kv_heads)
    assert (found["scale"], found["window"]) == (0.4, 5)
    assert (found["inv_freq"] is not None) == options.get("rope", False)
    assert (found["q_norm"] is not None) == ("norms" in options.get("twist", ""))


def test_scattered_columns_move_once_in_the_weight():
    graph = prepared(layout="neox")
    apply(static_kv, graph)
    weights = arguments(only(graph, "gristmill.linear.default"))["weights"]
    assert [w.name for w in weights] == ["p_qkv_weight_reordered"]
    assert ops(graph)["aten.slice.Tensor"] == 3


def test_rows_with_another_reader_keep_their_order():
    graph = prepared(layout="neox", twist="rows used again")
    apply(static_kv, graph)
    assert ops(graph)["gristmill.linear.default"] == 2


@pytest.mark.parametrize("options, reason", [
    ({"twist": "scaled heads"}, "q, k or v is not cut from rows by reshaping alone"),
    ({"twist": "one rope", "rope": True}, "q and k rotate differently"),
    ({"twist": "one norm"}, "q and k are normed differently"),
    ({"twist": "kept as heads"}, "the result goes to aten.sum.dim_IntList, expected heads flattened to rows"),
], ids=str)  # fmt: skip
def test_near_misses_stay(options, reason):
    graph = prepared(**options)
    report = apply(static_kv, graph)
    assert report.hits == 0
    assert [r for _, r in report.misses] == [reason]
    assert ops(graph)["gristmill.attention_heads.default"] == 1


def test_slots_do_not_see_each_other():
    graph = prepared(rope=True)
    static_kv.run(graph, Report())
    alone = interpret.run(graph, inputs())
    tokens = inputs()["tokens"]
    two = {
        "tokens": torch.cat([tokens, tokens], 1),
        "positions": torch.cat([torch.arange(13), torch.arange(13)])[None],
        "slots": torch.arange(2).repeat_interleave(13)[None],
    }
    both = interpret.run(graph, two)
    torch.testing.assert_close(both[:, :13], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(both[:, 13:], alone, rtol=0, atol=1e-6)
