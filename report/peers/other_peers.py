"""Speed of CTranslate2, OpenVINO GenAI or ONNX Runtime GenAI, run by a Python of its own that has it.

Weights are int8 for CTranslate2, which has no int4 for CPUs, and else int4 in groups of 128, symmetric; all
compute with activations in int8. Prefill lasts to the first token, greedily chosen; token ids go in directly,
and what was computed for a prompt is not kept for the next one. CTranslate2 alone gives the logits of a text.

    python -m venv ct2 && ct2/bin/pip install ctranslate2 torch transformers
    ct2/bin/ct2-transformers-converter --model HF_DIR --output_dir CT2_DIR --quantization int8
    ct2/bin/python report/peers time ctranslate2 CT2_DIR

    python -m venv ov && ov/bin/pip install openvino-genai openvino-tokenizers optimum-intel nncf torch
    ov/bin/optimum-cli export openvino --model HF_DIR --task text-generation-with-past --weight-format int4 \\
        --group-size 128 --sym --ratio 1.0 OV_DIR
    ov/bin/python report/peers time openvino OV_DIR

    python -m venv ort && ort/bin/pip install onnxruntime-genai onnx onnx-ir torch transformers
    ort/bin/python -m onnxruntime_genai.models.builder -i HF_DIR -o ORT_DIR -p int4 -e cpu -c CACHE_DIR \\
        --extra_options block_size=128 prune_lm_head=true
    ort/bin/python report/peers time onnxruntime-genai ORT_DIR
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .peer_process import Engine, prompt_ids, speeds

# of (token ids, count): seconds from the start to each of `count` tokens that follow
Generate = Callable[[list[int], int], list[float]]


@dataclass(frozen=True)
class Loaded:
    """logits: (ids, file) writes [ids, vocabulary] f32 as .npy."""

    generate: Generate
    logits: Callable[[list[int], str], None] | None = None


def ctranslate2(model: Path, threads: int) -> Loaded:
    import ctranslate2 as library

    generator = library.Generator(str(model), compute_type="int8", intra_threads=threads)
    vocabulary = json.loads((model / "vocabulary.json").read_text())

    def generate(ids: list[int], count: int) -> list[float]:
        moments = [time.perf_counter()]

        def after_token(_: object) -> bool:
            moments.append(time.perf_counter())
            return False  # true would stop

        generator.generate_batch(
            [[vocabulary[i] for i in ids]], include_prompt_in_result=False, end_token=[], max_length=count,
            min_length=count, callback=after_token,
        )  # fmt: skip
        return since_first(moments)

    def logits(ids: list[int], out: str) -> None:
        import numpy as np

        found = generator.forward_batch([[vocabulary[i] for i in ids]])  # [1, ids, vocabulary]
        np.save(out, np.array(found.to(library.DataType.float32))[0])

    return Loaded(generate, logits)


def openvino(model: Path, threads: int) -> Loaded:
    """Without AMX it prefills fastest with activations in int8 (dynamic quantization), in groups as long as
    those of the weights; they are then f32 elsewhere. By default they are bf16 where the processor can.
    """
    import numpy as np
    import openvino_genai as library
    from openvino import Tensor

    scheduler = library.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 1 << 16  # the whole prompt at once
    pipeline = library.LLMPipeline(
        str(model), "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads,
        INFERENCE_PRECISION_HINT="f32", DYNAMIC_QUANTIZATION_GROUP_SIZE=128,
    )  # fmt: skip

    def generate(ids: list[int], count: int) -> list[float]:
        config = library.GenerationConfig(max_new_tokens=count, ignore_eos=True)
        found = pipeline.generate(Tensor(np.array([ids], np.int64)), config).perf_metrics.raw_metrics
        microseconds = itertools.accumulate([*found.m_times_to_first_token, *found.m_durations])
        return [passed / 1e6 for passed in microseconds]

    return Loaded(generate)


def onnxruntime_genai(model: Path, threads: int) -> Loaded:
    import numpy as np
    import onnxruntime_genai as library

    config = library.Config(str(model))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    loaded = library.Model(config)

    def generate(ids: list[int], count: int) -> list[float]:
        parameters = library.GeneratorParams(loaded)
        length = len(ids) + count
        parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = library.Generator(loaded, parameters)
        moments = [time.perf_counter()]
        generator.append_tokens(np.array(ids, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            moments.append(time.perf_counter())
        return since_first(moments)

    return Loaded(generate)


ENGINES: dict[str, tuple[str, Callable[[Path, int], Loaded]]] = {
    "ctranslate2": ("ctranslate2", ctranslate2),
    "openvino": ("openvino-genai", openvino),
    "onnxruntime-genai": ("onnxruntime-genai", onnxruntime_genai),
}  # the package that has the version, and what loads a model


def since_first(moments: list[float]) -> list[float]:
    return [moment - moments[0] for moment in moments[1:]]


def measure(generate: Generate, prompt: int, context: int, tokens: int) -> dict[str, Any]:
    """A prefill of `prompt`, and `tokens` decoded after `context` others and one; see peer_process."""
    first = generate(prompt_ids(prompt), 1)[0]
    times = generate(prompt_ids(max(context, 1)), tokens + 1)
    if len(times) != tokens + 1:
        raise RuntimeError(f"the peer gave {len(times)} tokens, expected {tokens + 1}")
    return speeds(prompt, first, [after - before for before, after in itertools.pairwise(times)])


def load(kind: str, model: Path, threads: int) -> Engine:
    package, open_model = ENGINES[kind]
    begin = time.perf_counter()
    loaded = open_model(model, threads)
    about = {
        "load_s": time.perf_counter() - begin,
        "bytes": sum(path.stat().st_size for path in model.rglob("*") if path.is_file()),
        "version": f"{package} {version(package)}",
    }

    def ask(prompt: int, context: int, tokens: int) -> dict[str, Any]:
        return measure(loaded.generate, prompt, context, tokens)

    return Engine(about, ask, loaded.logits)
