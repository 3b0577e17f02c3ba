"""fuse_rope: cos and sin tables become frequencies."""

import pytest
import torch
from graphs import WIDTH, Rows, apply, canonical, ops

from gristmill.passes import fuse_rope
from gristmill.passes.graph import arguments

HEADS, HEAD = 3, 8
assert HEADS * HEAD == WIDTH


def rotate_half(x):
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def rotate_pairs(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Rope(Rows):
    """One head-shaped tensor, rotated as transformers does; ``wrong`` says how it differs from a rotation."""

    def __init__(self, style="half", dims=HEAD, scale=1.0, wrong=None):
        super().__init__()
        self.register_buffer("inv_freq", 10.0 ** -torch.arange(0, 1, 2 / dims))
        self.style, self.dims, self.scale, self.wrong = style, dims, scale, wrong

    def tables(self, tokens, positions):
        angles = (tokens if self.wrong == "tokens" else positions)[..., None].float() * self.inv_freq
        if self.wrong == "squared":
            angles = angles * angles
        angles = torch.cat([angles, angles], -1) if self.style != "pairs" else angles.repeat_interleave(2, -1)
        sin = angles.sin() * (2 if self.wrong == "sine" else 1) * self.scale
        return (angles.cos() * self.scale)[:, None], sin[:, None]

    def forward(self, tokens, positions):
        x = self.rows(tokens).view(1, -1, HEADS, HEAD).transpose(1, 2)
        cos, sin = self.tables(tokens, positions)
        if self.style == "glm":  # tables in halves, heads in pairs
            cos, sin = (t[..., : self.dims // 2].repeat_interleave(2, -1) for t in (cos, sin))
        rotate = rotate_half if self.style == "half" else rotate_pairs
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        turned = turned * cos + rotate(turned) * sin
        out = torch.cat([turned, rest], -1) if self.dims < HEAD else turned
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("style, dims, scale", [
    ("half", HEAD, 1.0), ("half", 4, 1.0), ("half", HEAD, 1.25), ("pairs", HEAD, 1.0),
    ("glm", HEAD, 1.0), ("glm", 4, 1.0),
])  # fmt: skip
def test_rotation(style, dims, scale):
    graph = canonical(Rope(style, dims, scale))
    report = apply(fuse_rope, graph)
    assert (report.hits, report.misses) == (1, [])
    left = ops(graph)
    assert left.pop("gristmill.rope.default") == 1
    reshapes = {"aten.view.default", "aten._unsafe_view.default", "aten.transpose.int"}
    assert set(left) <= reshapes | {"gristmill.embedding.default"}
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.gristmill.rope.default)
    found = arguments(node)
    assert found["style"] == ("half" if style == "half" else "interleaved")
    assert found["scale"] == pytest.approx(scale)
    torch.testing.assert_close(graph.weights["rope_0"].load(), 10.0 ** -torch.arange(0, 1, 2 / dims))


@pytest.mark.parametrize("wrong, reason", [
    ("tokens", "cos depends on more than the positions"),
    ("squared", "cos and sin are not rotations by position"),
    ("sine", "cos and sin are not rotations by position"),
])  # fmt: skip
def test_near_misses_stay(wrong, reason):
    graph = canonical(Rope(wrong=wrong))
    report = apply(fuse_rope, graph)
    assert report.hits == 0
    assert "gristmill.rope.default" not in ops(graph)
    assert len(report.misses) == 1
    assert report.misses[0][1].startswith(reason)


class Two(Rope):
    def forward(self, tokens, positions):
        return super().forward(tokens, positions) + super().forward(tokens + 1 - 1, positions)


def test_equal_tables_are_one_weight():
    graph = canonical(Two())
    assert apply(fuse_rope, graph).hits == 2
    assert [name for name in graph.weights if name.startswith("rope_")] == ["rope_0"]
