"""gristmill: compile a decoder language model to a small artifact and run it.

    import gristmill
    gristmill.compile("path/to/model", "story.grist", weights="int4", group_size=128)
    session = gristmill.load("story.grist")
    print(session.generate("Once upon a time", max_new_tokens=100).text)

Importing this module loads neither numpy nor torch; the names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from gristmill.compiler.pipeline import CompileResult
    from gristmill.kernels.hook import attention as attention
    from gristmill.runtime.errors import GristmillError as GristmillError
    from gristmill.runtime.session import Session as Session
    from gristmill.runtime.session import load as load

__version__ = "0.1.0"
__all__ = ["GristmillError", "Session", "__version__", "attention", "compile", "export_checkpoint", "load"]

_HOMES = {
    "attention": "gristmill.kernels.hook",
    "load": "gristmill.runtime.session",
    "Session": "gristmill.runtime.session",
    "GristmillError": "gristmill.runtime.errors",
}


def compile(
    model: Any, out: str | PathLike[str], *, example: Any = None, tokenizer: Any = None, **options: Any
) -> CompileResult:
    """Compiles a model to the artifact directory `out`.

    model: a Hugging Face directory, a .gguf file, a hub name, a TorchScript file (.pt), or a torch.nn.Module:
    a decoder whose forward(tokens) or forward(tokens, positions), each int64 [1, T], gives logits
    [1, T, vocabulary] and which computes its attention by gristmill.attention or torch's
    scaled_dot_product_attention; see docs/frontends.md. For the last two, example: arguments of forward for
    one sequence (a tensor, tuple or dict), None: by its signature; tokenizer: a directory, a tokenizer.json
    or a tokenizer object, None: the artifact has none, takes token ids, and is made with gate=False.

    options: the fields of gristmill.compiler.options.CompileOptions, such as weights="int4", group_size=128,
    kv="int8", text="held_out.txt", force=True. Needs the extra [compile]. Raises GristmillError for what
    cannot be compiled.
    """
    from gristmill.compiler.options import CompileOptions
    from gristmill.runtime.errors import GristmillError

    progress, note = options.pop("progress", None), options.pop("note", None)
    chosen = CompileOptions.of(**options)
    try:
        from gristmill.compiler.frontends import source_of
        from gristmill.compiler.pipeline import compile_model

        source = source_of(model, example, tokenizer)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in ("torch", "transformers", "huggingface_hub"):
            raise
        raise GristmillError(
            f"compiling needs {error.name}; install it with `pip install 'gristmill[compile]'`"
        ) from error
    return compile_model(source, str(out), chosen, progress=progress, note=note)


def export_checkpoint(
    artifact: str | PathLike[str], out: str | PathLike[str], to: str, **options: Any
) -> Path:
    """Writes an artifact to `out`: a Hugging Face directory in the format `gptq`, `awq` or
    `compressed-tensors`, in which nothing is rounded again; a `gguf` file for llama.cpp; as `onnx` a
    directory that ONNX Runtime, ONNX Runtime GenAI and `load(out, device="onnx:cpu")` run; as
    `pt2` one with an AOTInductor package for libtorch and `load(out, device="pt2:cpu")`; or as `torchscript`
    (legacy) one for libtorch and `load(out, device="torchscript")`.

    options: checkpoint_format ("gptq" or "gptq_v2"); for gguf type (of gristmill.export.gguf_tensors.TYPES,
    such as "q4_0") and note, called with what is worth telling; for onnx plain (True: standard operators
    alone), kv ("f32"), activations ("int8", "f32", or "f16" for `load(out, device="onnx:cuda")`) and max_len;
    for pt2 device ("cpu"); force. Needs the extra [compile], [gguf] or [onnx]. Raises GristmillError for what
    the format cannot express.
    """
    from gristmill.runtime.errors import GristmillError

    try:
        if to == "gguf":
            from gristmill.export.gguf_file import export_gguf

            return export_gguf(str(artifact), str(out), **options)
        if to == "onnx":
            from gristmill.export.onnx_folder import export_onnx

            return export_onnx(str(artifact), str(out), **options)
        if to == "torchscript":
            from gristmill.export.torchscript_folder import export_torchscript

            return export_torchscript(str(artifact), str(out), **options)
        if to == "pt2":
            from gristmill.export.pt2_folder import export_pt2

            return export_pt2(str(artifact), str(out), **options)
        from gristmill.export.huggingface import export_checkpoint as export
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "gguf", "onnx"):
            raise
        extra = "compile" if error.name == "torch" else error.name
        raise GristmillError(
            f"exporting needs {error.name}; install it with `pip install 'gristmill[{extra}]'`"
        ) from error
    return export(str(artifact), str(out), to, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gristmill' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
