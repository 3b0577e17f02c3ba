"""The ops a fused graph is made of, declared to torch with their references.

Importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import attention as _attention
from .reference import linear as _linear
from .reference import norms as _norms
from .reference import pointwise as _pointwise

_library = torch.library.Library("gristmill", "DEF")
# An op's overload → its reference, for who needs gradients, which the registered ops do not give.
REFERENCES: dict[Any, Callable[..., Any]] = {}


def _define(schema: str, reference: Any) -> None:
    _library.define(schema)
    name = schema.split("(")[0]
    _library.impl(name, reference, "CompositeExplicitAutograd")
    REFERENCES[getattr(torch.ops.gristmill, name).default] = reference


_define(
    "embedding(Tensor ids, Tensor weight, Tensor? residual=None, float scale=1.0, int offset=0) -> Tensor",
    _linear.embedding,
)
_define("rms_norm(Tensor x, Tensor? weight, Tensor? residual, float eps) -> Tensor", _norms.rms_norm)
_define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps) -> Tensor",
    _norms.layer_norm,
)
_define(
    "linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual=None, str activation='none', "
    "bool glu=False, float scale=1.0, float softcap=0.0) -> Tensor",
    _linear.linear,
)
_define(
    "rope(Tensor x, Tensor positions, Tensor inv_freq, str style, float scale) -> Tensor", _attention.rope
)
_define(
    "attention_heads(Tensor q, Tensor k, Tensor v, int layer, float scale, int window, float softcap, "
    "Tensor? sinks) -> Tensor",
    _attention.attention_heads,
)
_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor slots, Tensor? inv_freq, Tensor? "
    "q_norm, Tensor? k_norm, Tensor? sinks, int heads, int kv_heads, float scale, int window, float "
    "softcap, str rope_style, float rope_scale, float norm_eps) -> Tensor",
    _attention.attention,
)
_define("pointwise(Tensor[] inputs, str steps) -> Tensor", _pointwise.pointwise)
_define("gather_rows(Tensor x, Tensor rows) -> Tensor", lambda x, rows: x[:, rows])


@torch.library.register_fake("gristmill::attention_heads")
def _attention_heads_fake(
    q: Any, k: Any, v: Any, layer: int, scale: float, window: int, softcap: float, sinks: Any
) -> Any:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _attention_heads_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.rest = [*inputs[:3], inputs[7]], inputs[3:7]
    ctx.save_for_backward(*tensors)


def _attention_heads_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Computed once more with gradients: for modules that train with the op they are compiled with."""
    tensors: list[Any] = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
    with torch.enable_grad():
        q, k, v, sinks = tensors
        layer, scale, window, softcap = ctx.rest
        out = _attention.attention_heads(q, k, v, layer, scale, window, softcap, sinks)
    wanted = [t for t in tensors if t is not None]
    found = iter(torch.autograd.grad(out, wanted, gradient))
    gradients = [None if t is None else next(found) for t in tensors]
    return (*gradients[:3], None, None, None, None, gradients[3])


torch.library.register_autograd(
    "gristmill::attention_heads", _attention_heads_backward, setup_context=_attention_heads_inputs
)
