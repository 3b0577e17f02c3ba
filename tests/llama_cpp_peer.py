"""What llama.cpp makes of a GGUF file, run by a Python that has llama-cpp-python (see test_llama_cpp).

python llama_cpp_peer.py generate GGUF PROMPT COUNT OUT.npz     f32 cache, greedy: prompt ids, ids, logits
python llama_cpp_peer.py tokenize GGUF TEXTS.json OUT.json      ids of each text, specials parsed
python llama_cpp_peer.py quantize GGUF OUT.gguf TYPE            by llama.cpp's own quantizer
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

FILE_TYPES = {"q8_0": 7, "q4_k_m": 15, "q6_k": 18}
F32 = 0


def generate(path: str, prompt: str, count: int, out: str) -> None:
    model = llama_cpp.Llama(
        path, n_ctx=512, logits_all=True, verbose=False, type_k=F32, type_v=F32, n_threads=2
    )
    ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
    found = list(ids)
    model.eval(ids)
    for _ in range(count):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(found[-1:])
    np.savez(out, prompt=ids, ids=found, logits=model.scores[: model.n_tokens])


def tokenize(path: str, texts: str, out: str) -> None:
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    found = [
        model.tokenize(t.encode(), add_bos=True, special=True) for t in json.loads(Path(texts).read_text())
    ]
    Path(out).write_text(json.dumps(found))


def quantize(path: str, out: str, kind: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[kind], 2
    if llama_cpp.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not quantize {path} to {kind}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["generate", path, prompt, count, out]:
            generate(path, prompt, int(count), out)
        case ["tokenize", path, texts, out]:
            tokenize(path, texts, out)
        case ["quantize", path, out, kind]:
            quantize(path, out, kind)
        case _:
            raise SystemExit(__doc__)
