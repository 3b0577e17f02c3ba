"""A folder that PEFT saved a LoRA adapter to: adapter_config.json and adapter_model.safetensors.

LoRA (Hu et al., arXiv 2106.09685): a linear with weight W [N, K] gains scale * B A, A [r, K], B [N, r];
scale = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353) gives
every row of the sum the norm m [N]. What changes the meaning of these tensors and is not known here is
refused by the name that PEFT has for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.runtime.adapters.tensors import Stored, map_tensors
from gristmill.runtime.errors import GristmillError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = frozenset({  # fields that this file goes by
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora",
    "init_lora_weights", "base_model_name_or_path",
})  # fmt: skip
WITHOUT_EFFECT = frozenset({  # fields that say how it was trained, or what the tensors show by themselves
    "auto_mapping", "revision", "task_type", "inference_mode", "peft_version", "target_modules",
    "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "lora_bias", "modules_to_save",
    "layers_to_transform", "layers_pattern", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config", "lora_dtype", "num_virtual_tokens", "token_dim",
    "num_transformer_submodules", "num_attention_heads", "num_layers",
})  # fmt: skip
# Other ways to begin change the base weights, to which such an adapter then belongs.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
PREFIX = "base_model.model."
_PARTS = "A|B|embedding_A|embedding_B|magnitude_vector"
_LORA = re.compile(rf"(.+)\.lora_({_PARTS})(?:\.default)?(\.weight|\.bias)?")


@dataclass(frozen=True)
class Pair:
    """What a module gains. embedding: a is [r, rows of the table], b [width, r]. bias: added with b's scale;
    magnitude: DoRA's m."""

    module: str
    a: Stored
    b: Stored
    scale: float
    embedding: bool = False
    bias: Stored | None = None
    magnitude: Stored | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter's folder. pairs: by module, as the model calls it; replaced: whole parameters that it
    brings, by the parameter's name; base: what PEFT says it was trained on."""

    path: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    replaced: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def base(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "")

    def hashes(self) -> dict[str, str]:
        """sha256 of both files, by name."""
        return {name: _hash(self.path / name) for name in (CONFIG, WEIGHTS)}

    def error(self, text: str) -> GristmillError:
        return GristmillError(f"adapter {self.path}: {text}")

    def wrong_shape(self, module: str, matrix: str, got: tuple[int, ...], expected: str) -> GristmillError:
        """For a matrix that does not fit its module."""
        trained = f" (trained on {self.base!r})" if self.base else ""
        return self.error(
            f"{matrix} of {module} has shape {list(got)}, expected {expected}; the adapter{trained} "
            "belongs to another base model"
        )


def read_adapter(path: str | Path) -> PeftAdapter:
    """Opens the adapter in directory `path`; its tensors stay in the file until they are asked for.

    Raises GristmillError where that is no LoRA adapter, and for what PEFT can do and is not supported.
    """
    root = Path(path)
    if not root.is_dir():
        what = "is a file" if root.exists() else "is missing"
        raise GristmillError(f"adapter {root} {what}; expected a folder that PEFT saved an adapter to")
    config = _config(root)
    if not (root / WEIGHTS).is_file():
        pickled = (root / "adapter_model.bin").is_file()
        remedy = "adapter_model.bin is a pickle, save it again as safetensors" if pickled else "copy it anew"
        raise GristmillError(f"adapter {root} has no {WEIGHTS}; {remedy}")
    _check_config(root, config)
    parts, replaced = _sorted(root, map_tensors(root / WEIGHTS))
    if not parts and not replaced:
        raise GristmillError(f"adapter {root}: {WEIGHTS} holds no tensor; was it saved before training?")
    pairs = {module: _pair(root, config, module, found) for module, found in parts.items()}
    return PeftAdapter(root, config, pairs, replaced)


def _config(root: Path) -> dict[str, Any]:
    file = root / CONFIG
    if not file.is_file():
        raise GristmillError(f"adapter {root} has no {CONFIG}; expected a folder as PEFT saves it")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise GristmillError(f"{file}: not valid JSON ({error}); copy it anew") from error
    if not isinstance(config, dict):
        raise GristmillError(f"{file} holds a {type(config).__name__}, expected an object; copy it anew")
    return config


def _check_config(root: Path, config: dict[str, Any]) -> None:
    file = root / CONFIG
    if config.get("peft_type") != "LORA":
        raise GristmillError(
            f"{file}: peft_type {config.get('peft_type')!r} is not supported, expected 'LORA'; merge it with "
            "PEFT's merge_and_unload and compile the model that this gives"
        )
    for name, value in config.items():
        if name not in READ and name not in WITHOUT_EFFECT and value:
            raise GristmillError(
                f"{file}: {name} is {str(value)[:60]}, which is not supported; merge the adapter with PEFT's "
                "merge_and_unload and compile the model that this gives"
            )
    begun = config.get("init_lora_weights")
    if not (begun is None or isinstance(begun, bool) or begun in PLAIN_INITS):
        raise GristmillError(
            f"{file}: init_lora_weights {begun!r} has changed the base model's weights; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes it one of the original weights"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise GristmillError(f"{file}: {name} is {config[name]!r}, expected an object")


def _sorted(
    root: Path, tensors: Mapping[str, Stored]
) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """The parts of every module's pair by their names in PEFT, and whole parameters."""
    parts: dict[str, dict[str, Stored]] = {}
    replaced: dict[str, Stored] = {}
    for key, stored in tensors.items():
        name = key.removeprefix(PREFIX)
        found = _LORA.fullmatch(name)
        if found:
            module, part, last = found.group(1), found.group(2), found.group(3)
            parts.setdefault(module, {})["bias" if (part, last) == ("B", ".bias") else part] = stored
        elif "lora_" in name or "original_module" in name or "." not in name:
            raise GristmillError(
                f"adapter {root}: tensor {key} is not supported; expected lora_A and lora_B of linears and "
                "embeddings, and whole parameters"
            )
        else:
            replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = stored
    return parts, replaced


def _pair(root: Path, config: dict[str, Any], module: str, parts: dict[str, Stored]) -> Pair:
    embedding = "embedding_A" in parts or "embedding_B" in parts
    first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for part in (first, second):
        if part not in parts:
            raise GristmillError(f"adapter {root}: {module} has no lora_{part}; copy the adapter anew")
    strange = parts.keys() - {first, second, "bias", "magnitude_vector"}
    dora = "magnitude_vector" in parts
    if strange or dora != bool(config.get("use_dora")):
        what = f"lora_{min(strange)} too" if strange else f"{'a' if dora else 'no'} lora_magnitude_vector"
        raise GristmillError(f"adapter {root}: {module} has {what}, which {CONFIG} does not say")
    a, b = parts[first], parts[second]
    for part, stored in ((first, a), (second, b)):
        if len(stored.shape) != 2 or 0 in stored.shape:
            raise GristmillError(
                f"adapter {root}: lora_{part} of {module} has shape {list(stored.shape)}, expected a matrix"
            )
    rank, scale = _scale(root, config, module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise GristmillError(
            f"adapter {root}: {module} has ranks {a.shape[0]} (lora_{first}) and {b.shape[1]} "
            f"(lora_{second}), {CONFIG} says {rank}"
        )
    return Pair(module, a, b, scale, embedding, parts.get("bias"), parts.get("magnitude_vector"))


def _scale(root: Path, config: dict[str, Any], module: str) -> tuple[int, float]:
    """A module's rank and what its product is multiplied by."""
    rank = _of_module(root, config, "rank_pattern", module, config.get("r", 8))
    alpha = _of_module(root, config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise GristmillError(f"{root / CONFIG}: r is {rank!r}, expected an integer from 1")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise GristmillError(f"{root / CONFIG}: lora_alpha is {alpha!r}, expected a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(root: Path, config: dict[str, Any], name: str, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's name fits, as in PEFT."""
    for pattern, value in (config.get(name) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise GristmillError(f"{root / CONFIG}: {name} has {pattern!r}: {error}") from error
    return default


def find_name(name: str, known: Mapping[str, Any]) -> str | None:
    """The one of `known` that is `name` but for what stands before it: checkpoints and models differ in the
    prefix of the decoder inside. None where there is none, or more than one."""
    if name in known:
        return name
    longer = [k for k in known if k.endswith(f".{name}")]
    shorter = sorted((k for k in known if name.endswith(f".{k}")), key=len)
    return longer[0] if len(longer) == 1 else shorter[-1] if shorter and not longer else None


def refuse_not_finite(adapter: PeftAdapter, module: str, values: np.ndarray) -> None:
    """Raises GristmillError where a matrix has NaNs or infinities."""
    if not np.isfinite(values).all():
        raise adapter.error(f"{module} has values that are not finite; the file is damaged")


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
