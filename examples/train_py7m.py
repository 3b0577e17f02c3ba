"""Train py7m, the 7 M parameter Llama that `make compile` compiles: Python source from the standard library.

The corpus is the standard library of the interpreter that runs this (PSF licence, comes with every CPython);
files whose name hashes to a bucket below 8 of 256 are held out. The learning rate follows a cosine over
wall-clock time, so that a run on a busy machine, or one that was paused, still ends with a small step. The
weights with the lowest held-out loss so far are in OUT, as a Hugging Face directory.

\b
    python train_py7m.py OUT --minutes 120                          from scratch, tokenizer included
    python train_py7m.py OUT --minutes 120 --resume-from py7m       continue; the tokenizer is taken along
"""
from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_BUCKETS = 8  # of 256
EVALUATION_WINDOWS, EVALUATION_LENGTH = 64, 512


@dataclass(frozen=True)
class Plan:
    """One run: `batch` rows of `sequence` tokens a step, peak learning rate, seconds between evaluations."""

    sequence: int
    batch: int
    lr: float
    warmup: int
    every: float
    seed: int


def corpus() -> tuple[list[str], list[str]]:
    """(training texts, held-out texts), split by a hash of each file's name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held: list[str] = []
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "lib2to3", "idlelib"} & set(path.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if 200 <= len(text) <= 400_000:
            bucket = hashlib.sha256(str(path.relative_to(library)).encode()).digest()[0]
            (held if bucket < HELD_OUT_BUCKETS else train).append(text)
    return train, held


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts in a row, each behind an end-of-text token: [tokens] int64."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(0)
        ids += encoding.ids
    return torch.tensor(ids)


def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-5))


def optimizer_of(model: LlamaForCausalLM, lr: float) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices alone."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per predicted token of ids [B, S]; products in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def windows(source: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(source) - length, (count,), generator=generator)
    return torch.stack([source[i:i + length] for i in starts.tolist()])


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, held: torch.Tensor) -> float:
    """Held-out loss over windows that are the same at every call."""
    model.eval()
    rows = windows(held, EVALUATION_WINDOWS, EVALUATION_LENGTH, torch.Generator().manual_seed(1))
    losses = [loss_of(model, part).item() for part in rows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, record: dict[str, object]) -> None:
    """Write the directory next to its place, then swap it in."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    wrapped.save_pretrained(fresh)
    (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    if out.exists():
        os.rename(out, old)
    os.rename(fresh, out)
    shutil.rmtree(old, ignore_errors=True)


def rate(step: int, warmup: int, passed: float) -> float:
    """Share of the peak learning rate: a linear warm-up by steps, a cosine to 2 % by time."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * passed)))


def steps(model: LlamaForCausalLM, data: torch.Tensor, plan: Plan,
          seconds: float) -> Iterator[tuple[int, float, float]]:
    """Train until the time is over; yields (step, training loss, share of time passed) after every step."""
    optimizer, start = optimizer_of(model, plan.lr), time.time()
    generator = torch.Generator().manual_seed(plan.seed)
    step, passed = 0, 0.0
    while passed < 1:
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * rate(step, plan.warmup, passed)
        loss = loss_of(model, windows(data, plan.batch, plan.sequence, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, passed = step + 1, (time.time() - start) / seconds
        yield step, loss.item(), passed


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, plan: Plan, seconds: float) -> None:
    texts, held_texts = corpus()
    data, held = encode(tokenizer, texts), encode(tokenizer, held_texts)
    best = evaluate(model, held)
    click.echo(f"{len(data)} tokens to train on, {len(held)} held out, loss at the start {best:.4f}")
    start = last = time.time()
    for step, loss, passed in steps(model, data, plan, seconds):
        if time.time() - last < plan.every and passed < 1:
            continue
        held_loss, seen = evaluate(model, held), step * plan.batch * plan.sequence
        click.echo(f"{step} {time.time() - start:.0f} s loss {loss:.3f} held out {held_loss:.4f} "
                   f"{seen / (time.time() - start):.0f} tok/s")
        if held_loss < best:
            best = held_loss
            record = {"held_out_loss": best, "tokens": seen, "steps": step, "plan": asdict(plan)}
            save(model, tokenizer, out, record)
        last = time.time()


def seconds_left(minutes: float | None, until: str | None) -> float:
    """Seconds of training: `minutes`, or up to the next time that it is HH:MM in UTC."""
    if until is None:
        return (minutes or 120) * 60
    now = datetime.now(timezone.utc)
    hour, minute = (int(part) for part in until.split(":"))
    return (now.replace(hour=hour, minute=minute, second=0) - now).total_seconds() % 86400


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--resume-from", type=click.Path(path_type=Path, exists=True),
              help="HF directory to continue from.")
@click.option("--minutes", type=float, help="Length of the run (120).")
@click.option("--until", metavar="HH:MM", help="End of the run in UTC, instead of --minutes.")
@click.option("--sequence", default=512, show_default=True, help="Tokens in a row.")
@click.option("--batch", default=4, show_default=True, help="Rows in a step.")
@click.option("--lr", default=1.5e-3, show_default=True, help="Peak learning rate.")
@click.option("--warmup", default=100, show_default=True, help="Steps.")
@click.option("--every", default=180.0, show_default=True, help="Seconds between evaluations.")
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, resume_from: Path | None, minutes: float | None, until: str | None, threads: int,
         **plan: float) -> None:
    torch.set_num_threads(threads)
    chosen = Plan(**plan)  # type: ignore[arg-type]
    torch.manual_seed(chosen.seed)
    if resume_from:
        tokenizer = Tokenizer.from_file(str(resume_from / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(resume_from, dtype=torch.float32)
    else:
        tokenizer, model = train_tokenizer(corpus()[0]), new_model()
    train(model, tokenizer, out, chosen, seconds_left(minutes, until))


if __name__ == "__main__":
    main()
