"""Whether the kernels' numbers are right: one layer beside transformers' own, on the same weights.

The reference shares nothing with the kernels: transformers' model in f32 on the device, its weights decoded
from the artifact's file by the quantizer's code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from random_artifact import RandomModel
from safetensors import safe_open
from torch import Tensor

from gpu.adapter import Decoder, Ids, random_ids
from gristmill.compiler.options import CompileOptions
from gristmill.quant import pack, rtn
from gristmill.quant.scheme import Scheme
from gristmill.runtime.program import FLOAT_BYTES, Segment

F32 = NDArray[np.float32]
# Of the largest logit. Beside float weights one row multiplies f32 activations, but over keys and values that
# the prompt's rows have left, which multiply bf16 ones, of 8 significant bits. Beside integers they are int8.
ONE_ROW, MANY_ROWS = 1e-2, 3e-2


def limits(format: str) -> tuple[float, float]:
    """Of the errors of many rows and of one row."""
    return MANY_ROWS, MANY_ROWS if format.startswith("int") else ONE_ROW


def reference_model(decoder: Decoder, weights: Path, config: dict[str, Any], device: torch.device) -> Any:
    """transformers' model with the values that the artifact's bytes stand for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    segments = [segment for group in decoder.program.weights.values() for segment in group]
    vectors = {v for i in decoder.program.instructions for v in i.vectors.values()}
    with safe_open(weights, framework="pt") as file:
        state = {f"{segment.name}.weight": decoded(file, segment) for segment in segments}
        state |= {name: file.get_tensor(name).float() for name in vectors}
    missing = set(dict(model.named_parameters())) - set(state)
    assert not missing, f"the artifact has no weights for {sorted(missing)}"
    model.load_state_dict(state, strict=True)
    return model


def decoded(file: Any, segment: Segment) -> Tensor:
    """The values [n, k] f32 of a stored matrix."""
    stored = file.get_tensor(f"{segment.name}.weight")
    if segment.format in FLOAT_BYTES:
        return torch.as_tensor(stored).float()
    arrays = {"weight": stored.numpy(), "scale": file.get_tensor(f"{segment.name}.scale").numpy()}
    scheme = Scheme(segment.format, segment.group, segment.symmetric)
    return torch.from_numpy(rtn.dequantize(pack.unpack(arrays, scheme, segment.k), scheme))


@torch.no_grad()
def reference_logits(model: Any, ids: Ids, device: torch.device) -> F32:
    """[len(ids), vocabulary]."""
    found: F32 = model(torch.from_numpy(ids.astype(np.int64))[None].to(device)).logits[0].cpu().numpy()
    return found


def error(got: F32, expected: F32) -> float:
    """The largest difference, of the largest logit."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def decoder_logits(decoder: Decoder, ids: Ids, prompt: int) -> tuple[F32, F32]:
    """Logits of a prompt's every position taken in at once, and of the others one by one."""
    many = decoder.forward(ids[:prompt], logits=prompt)
    single = [decoder.forward(ids[at : at + 1], at) for at in range(prompt, len(ids))]
    return many, np.concatenate(single)


def errors(
    model: RandomModel, options: CompileOptions, folder: Path, prompt: int, steps: int, device: torch.device
) -> tuple[float, float]:  # fmt: skip
    """Of a prompt's rows together and of single rows after it, each against the reference."""
    path = model.write_all(folder, [options]).popitem()[1]
    count = prompt + steps
    decoder = Decoder(path, device, max_len=count, max_slots=1, max_tokens=prompt)
    ids = random_ids(count, model.config["vocab_size"])
    many, single = decoder_logits(decoder, ids, prompt)
    reference = reference_model(decoder, path / "weights.safetensors", model.config, device)
    expected = reference_logits(reference, ids, device)
    return error(many, expected[:prompt]), error(single, expected[prompt:])
