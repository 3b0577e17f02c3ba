"""From a transformers config to a graph over rows, without reading a weight.

The model is built with parameters that are allocated and never touched. Attention leaves it as one opaque op,
``gristmill::attention_heads``; everything else works row by row, so the rows of a batch may belong to
different sequences.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.graph import EXAMPLE_ROWS, Lazy, Traced
from ..runtime.errors import GristmillError
from .checkpoint import Checkpoint
from .exports import Export
from .names import parameter_sources, require
from .quantized import QuantizedCheckpoint

NAME = "gristmill"
# transformers' builders of masks that our attention implements; "packed" says that sequences of a batch do
# not see each other
WINDOW = "sliding_window_overlay"
KNOWN_MASKS = {
    "causal_mask_function", WINDOW, "and_masks", "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
}  # fmt: skip


class _Wrapper(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def trace(
    config: Any, checkpoint: Checkpoint | QuantizedCheckpoint, max_len: int, export: Export | None = None
) -> Traced:
    """Export the decoder of ``config`` over [1, T] rows; its weights stay in ``checkpoint`` until asked for.

    export: one that remembers, see exports.py. Raises GristmillError when the model cannot be traced or the
    checkpoint lacks one of its weights.
    """
    model = _build(config)
    limit = _freeze_ropes(model, max_len)
    program, masks = (export or _export)(model)
    _refuse_masks(masks, program)
    traced = _lift(program, model, config, checkpoint)
    traced.max_position = limit
    return traced


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    extra = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name != "position_ids"]
    if attention_mask is not None or extra:
        strange = "a mask of its own" if attention_mask is not None else f"the tensor {extra[0]!r}"
        raise GristmillError(f"{type(module).__name__} brings {strange} to attention, which is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = int(getattr(module, "layer_idx", 0) or 0)
    out = torch.ops.gristmill.attention_heads(
        query, key, value, layer, scale, int(sliding_window or 0), float(softcap or 0.0), s_aux
    )
    return out, None


def _build(config: Any) -> torch.nn.Module:
    """The model with allocated, untouched float32 parameters.

    transformers writes into configs, hence the deep copy.
    """
    import transformers
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    AttentionInterface.register(NAME, _attention)
    transformers.logging.set_verbosity_error()
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.float32)
        model.tie_weights()
    except Exception as error:  # any part of a model's construction may refuse its configuration
        raise GristmillError(f"the model cannot be built from its config ({first_line(error)})") from error
    return model.eval()


def _freeze_ropes(model: torch.nn.Module, max_len: int) -> int | None:
    """Rotary frequencies that depend on the longest position of a batch are fixed to what max_len asks for.

    longrope has two sets (arXiv 2402.13753); dynamic scaling leaves the original set up to the trained
    length. Returns the number of positions that the choice holds for, None when there was none to make.
    """
    limits = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            if any(k in ("longrope", "dynamic") for k in kind.values()):
                raise GristmillError(
                    f"rope types {sorted(set(kind.values()))} per layer type are not supported; "
                    "expected fixed ones"
                )
        elif kind == "longrope":
            limits.append(_freeze_longrope(module, max_len))
        elif kind is not None and "dynamic" in kind:
            limits.append(_freeze_dynamic(module, max_len))
    return min((n for n in limits if n is not None), default=None)


def _freeze_dynamic(module: Any, max_len: int) -> int:
    limit = int(module.max_seq_len_cached)
    if max_len > limit:
        raise GristmillError(
            f"dynamic rope scaling beyond {limit} positions is not supported; give --max-len {limit}"
        )
    module.rope_type = "default"
    return limit


def _freeze_longrope(module: Any, max_len: int) -> int | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = int(module.config.rope_parameters["original_max_position_embeddings"])
    module.rope_type = "default"
    if max_len <= original:
        return original
    inv_freq, module.attention_scaling = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, None, seq_len=original + 1
    )
    module.inv_freq = inv_freq.float()
    return None


def _export(model: torch.nn.Module) -> tuple[torch.export.ExportedProgram, list[Any]]:
    """The model's graph, and the mask functions that it asked for and did not get."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    masks: list[Any] = []

    def no_mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> None:
        masks.append(mask_function)

    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, no_mask)
    rows = torch.export.Dim("T", min=2, max=1 << 20)
    example = (torch.ones(1, EXAMPLE_ROWS, dtype=torch.long), torch.arange(EXAMPLE_ROWS)[None])
    shapes = {"tokens": {1: rows}, "positions": {1: rows}}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(_Wrapper(model), example, dynamic_shapes=shapes, strict=False)
            return exported.run_decompositions({}), masks
    except GristmillError:
        raise
    except Exception as error:  # the exporter raises whatever the model's code raises
        raise GristmillError(
            f"{type(model).__name__} cannot be traced ({first_line(error)}); see the README for the families"
        ) from error


def _refuse_masks(masks: list[Any], program: torch.export.ExportedProgram) -> None:
    """Only causal masks and sliding windows; a window that only the mask knows would be lost with it."""
    parts = [part for mask in masks for part in _mask_parts(mask)]
    strange = {_builder(part) for part in parts} - KNOWN_MASKS
    if strange:
        raise GristmillError(
            f"attention mask {sorted(strange)[0]!r} is not supported; expected causal or sliding window"
        )
    masked = {cell.cell_contents for p in parts if _builder(p) == WINDOW for cell in p.__closure__}
    op = torch.ops.gristmill.attention_heads.default
    calls = program.graph_module.graph.find_nodes(op="call_function", target=op)
    used = {call.args[5] for call in calls} - {0}
    if masks and masked != used:
        raise GristmillError(
            f"the model masks windows of {sorted(masked)} but its attention says {sorted(used)}; "
            "expected the same"
        )


def _builder(part: Any) -> str:
    """The name of the function that made (or is) a mask function."""
    return str(part.__qualname__.split(".")[0])


def _mask_parts(function: Any) -> Iterator[Any]:
    """The mask functions that a transformers mask closure is made of, itself first."""
    yield function
    for cell in function.__closure__ or ():
        held = cell.cell_contents if isinstance(cell.cell_contents, tuple | list) else (cell.cell_contents,)
        for part in held:
            if callable(part) and hasattr(part, "__qualname__"):
                yield from _mask_parts(part)


def _lift(
    program: torch.export.ExportedProgram,
    model: torch.nn.Module,
    config: Any,
    checkpoint: Checkpoint | QuantizedCheckpoint,
) -> Traced:
    """Placeholders of the exported graph → weights by name; buffers are small and kept."""
    graph = program.graph_module.graph
    signature = program.graph_signature
    aliases = _aliases(model)
    sources = parameter_sources(model, checkpoint)
    weights: dict[str, Lazy] = {}
    turned = _turned_weights(model)
    _refuse_untied(aliases, sources, checkpoint)
    for node in graph.find_nodes(op="placeholder"):
        name = _target(signature, node)
        if name is None:
            continue
        if name in aliases or name in sources:
            source = require(sources, aliases.get(name, (name,)))
            extent = tuple(node.meta["val"].shape)
            weights[node.name] = _stored(checkpoint, source, extent, name in turned)
        else:
            weights[node.name] = constant(program, node)
    return Traced(graph, weights, config)


def _target(signature: Any, node: fx.Node) -> str | None:
    """The model's name of the parameter or buffer that a placeholder stands for; None for an input."""
    kinds = (
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
        signature.inputs_to_lifted_tensor_constants,
    )
    names = (kind[node.name] for kind in kinds if node.name in kind)
    return next((name.removeprefix("model.") for name in names), None)


def _refuse_untied(
    aliases: dict[str, tuple[str, ...]], sources: dict[str, str], checkpoint: Checkpoint | QuantizedCheckpoint
) -> None:
    """A checkpoint may hold a tied tensor twice, but not with two values."""
    for names in aliases.values():
        stored = [sources[name] for name in names if name in sources]
        for other in stored[1:]:
            if not checkpoint.same(stored[0], other):
                raise GristmillError(
                    f"config.json ties {stored[0]!r} to {other!r}, but they differ in the checkpoint; "
                    'set "tie_word_embeddings": false in config.json'
                )


def _stored(
    checkpoint: Checkpoint | QuantizedCheckpoint, source: str, shape: tuple[int, ...], turned: bool
) -> Lazy:
    """``turned``: the model keeps [inputs, outputs]; what is quantized is always [outputs, inputs]."""
    quantized = checkpoint.quantized(source) if isinstance(checkpoint, QuantizedCheckpoint) else None
    turned = turned and quantized is not None
    stored = checkpoint.shape(source)
    if (stored[::-1] if turned else stored) != shape:
        raise GristmillError(
            f"tensor {source!r} has shape {list(stored)}, the config asks for {list(shape)}; "
            "config.json and weights do not belong together"
        )
    lazy = Lazy(stored, (source,), lambda: checkpoint.read(source), "checkpoint", quantized=quantized)
    return replace(lazy.turned(), origin="checkpoint") if turned else lazy


def _turned_weights(model: torch.nn.Module) -> set[str]:
    """Parameters that GPT-2's Conv1D keeps as [inputs, outputs]."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def held_tensor(program: torch.export.ExportedProgram, name: str) -> Tensor:
    """A parameter, buffer or constant of an exported program, by the name that its signature has."""
    stored: Any = program.state_dict.get(name)
    found: Any = program.constants[name] if stored is None else stored
    return found.detach()


def constant(program: torch.export.ExportedProgram, node: fx.Node) -> Lazy:
    """The buffer or constant that a placeholder stands for, kept as it is now."""
    signature = program.graph_signature
    name = (
        signature.inputs_to_buffers.get(node.name) or signature.inputs_to_lifted_tensor_constants[node.name]
    )
    value = held_tensor(program, name).clone()
    return Lazy(tuple(value.shape), (name.removeprefix("model."),), lambda: value, "constant")


def _aliases(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter name → all names of the same (tied) parameter, that one first."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {n: (n, *(o for o in group if o != n)) for group in groups.values() for n in group}


def first_line(error: BaseException) -> str:
    """The first line that an error says, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
