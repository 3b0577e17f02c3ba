"""The GPTQModel side of compare_quantizers.py, run by a Python of its own (it brings its own torch).

    python -m venv gptq && gptq/bin/pip install gptqmodel
    gptq/bin/python benchmarks/gptqmodel_peer.py MODEL OUT IDS.npy BITS GROUP

Quantizes with its defaults and act-order (desc_act) on token ids [samples, length].
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))

import numpy as np
import torch


def quantize(model: str, out: str, ids: str, bits: int, group: int) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = torch.from_numpy(np.load(ids)).long()
    config = QuantizeConfig(bits=bits, group_size=group, sym=True, desc_act=True)
    loaded = GPTQModel.load(model, config, device="cpu")
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    loaded.quantize(samples, batch_size=1)
    loaded.save(out)


if __name__ == "__main__":
    match sys.argv[1:]:
        case [model, out, ids, bits, group]:
            quantize(model, out, ids, int(bits), int(group))
        case _:
            raise SystemExit(__doc__)
