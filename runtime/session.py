"""A Session runs one artifact: rows in, logits out, and text generation on top of that.

session = gristmill.load("story.grist")
print(session.generate("Once upon a time", max_new_tokens=100).text)
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np

from gristmill.runtime import machine
from gristmill.runtime.adapters.held import ONLY_CPU, Adapters, Held
from gristmill.runtime.arguments import batch, int32, is_batch, within
from gristmill.runtime.artifact import (
    GENERATION_CONFIG,
    PROGRAM,
    TOKENIZER,
    Artifact,
    open_artifact,
    parse_json,
)
from gristmill.runtime.decoding.constrain import Constrainer, Constraint
from gristmill.runtime.decoding.draft import Draft
from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.decoding.generate import AsyncDriver, AsyncStream, Stream, generate_all, samples
from gristmill.runtime.decoding.options import GenerationOptions, refuse_unknown
from gristmill.runtime.decoding.sampling import Workspace
from gristmill.runtime.decoding.scheduler import Scheduler, Statistics
from gristmill.runtime.decoding.sequence import Generation, Prompt
from gristmill.runtime.devices import DEVICES, EXPORTS
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.exported import open_executor_of, open_export
from gristmill.runtime.footprint import refuse_malformed, refuse_too_large, smallest_ring
from gristmill.runtime.hidden import run_hidden
from gristmill.runtime.program import Program
from gristmill.runtime.slots import NO_ADAPTER, Slots
from gristmill.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gristmill.runtime.decoding.generate_beams import BeamText

MAX_WAITING = 4096
MOST_RANKS = 64  # of tensor_parallel
Result = TypeVar("Result")


class Executor(Protocol):
    """What a Session needs of the machinery below it; see runtime/cpu."""

    max_tokens: int
    max_slots: int
    max_len: int
    vocabulary: int
    threads: int
    kv_bytes: int
    arena_bytes: int
    weight_bytes: int
    weight_bytes_per_token: int

    def forward(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray
    ) -> np.ndarray: ...

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None: ...


class DrawingExecutor(Executor, Protocol):
    """An executor that can draw the next tokens itself; see runtime/cuda."""

    draws_tokens: bool

    def sample(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray, draws: Draws
    ) -> np.ndarray: ...


def load(
    path: str | Path,
    device: str = "cpu",
    threads: int | None = None,
    max_len: int | None = None,
    max_slots: int | None = None,
    hugepages: bool = False,
    pin: bool = False,
    max_waiting: int | None = None,
    draft: str | Path | None = None,
    tensor_parallel: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    **unknown: Any,
) -> Session:
    """Opens the artifact in directory `path`.

    device: "cpu", "cuda" for the current NVIDIA GPU, for which threads, hugepages and pin are not, or for a
    folder that was exported to ONNX, TorchScript or an AOTInductor package "onnx:cpu", "onnx:cuda",
    "torchscript" or "pt2:cpu".
    threads: default one for each physical core this process may use. max_len: positions per slot, default
    what the artifact was compiled for, at most what its model can address. max_slots: sequences at once,
    default 8 unless compiled otherwise. hugepages: copy the weights into huge pages instead of mapping the
    file, which takes time at the start and memory that no other process shares, and spares misses of the
    address translation. pin: all threads but the caller's stay on processors of their own. max_waiting:
    sequences that may wait for a slot before more are refused, default 4096. draft: the artifact of a smaller
    model with the same tokenizer, which proposes tokens: the same text in less time. tensor_parallel: so many
    processes share the model and its products, this one and others that it starts; on device "cpu" threads
    are then of all together, on "cuda" each process has a GPU of its own. adapters: folders of PEFT adapters
    by the names that requests have for them, see Session.load_adapter. Raises GristmillError for a damaged
    artifact and for what this machine or model cannot do.
    """
    known = (
        "device", "threads", "max_len", "max_slots", "hugepages", "pin", "max_waiting", "draft",
        "tensor_parallel", "adapters",
    )  # fmt: skip
    refuse_unknown(unknown, known, "load")
    if device == "pt2:cuda":
        raise GristmillError(
            "device 'pt2:cuda' is not supported: packages are for CPUs so far; load the folder with "
            "'pt2:cpu', or the artifact that it was exported from with 'cuda', which uses CUDA Graphs"
        )
    if device not in DEVICES:
        raise GristmillError(f"device {device!r} is not supported, expected one of {', '.join(DEVICES)}")
    found = DEVICES[device]
    if (threads is not None and not found.threads) or ((hugepages or pin) and not found.pages):
        what = "hugepages and pin" if found.threads else "threads, hugepages and pin"
        raise GristmillError(f"{what} are for device 'cpu'; leave them out with {device!r}")
    if adapters and not found.adapters:
        raise GristmillError(ONLY_CPU)
    how: dict[str, Any] = {
        "threads": threads, "max_len": max_len, "max_slots": max_slots, "hugepages": hugepages, "pin": pin,
    }  # fmt: skip
    ranks = _ranks(tensor_parallel, device, pin)
    session = _open(path, device, max_waiting, ranks=ranks, **how)
    for name, folder in (adapters or {}).items():
        session.load_adapter(name, folder)
    if draft is not None:
        how.update(max_len=session.max_len, max_slots=session.max_slots)
        session.draft_with(_open(draft, device, None, **how))
    return session


def _ranks(tensor_parallel: int | None, device: str, pin: bool) -> int:
    ranks = within("tensor_parallel", tensor_parallel, 1, MOST_RANKS)
    if ranks > 1 and not DEVICES[device].ranks:
        raise GristmillError(
            f"tensor_parallel is for devices 'cpu' and 'cuda', got {device!r}; leave it out"
        )
    if ranks > 1 and pin:
        raise GristmillError("pin is for one process, ranks would share processors; leave one of the two out")
    return ranks


def _open(
    path: str | Path,
    device: str,
    max_waiting: int | None,
    threads: int | None,
    max_len: int | None,
    max_slots: int | None,
    hugepages: bool,
    pin: bool,
    ranks: int = 1,
) -> Session:
    artifact = open_export(path, EXPORTS[device]) if device in EXPORTS else open_artifact(path)
    program_json = artifact.read(PROGRAM)
    program = Program.from_json(parse_json(program_json, PROGRAM))
    refuse_malformed(program)
    limits = program.limits
    max_len = within("max_len", max_len, limits.max_len, limits.max_position)
    max_slots = within("max_slots", max_slots, limits.max_slots, 65536)
    max_waiting = within("max_waiting", max_waiting, MAX_WAITING, 2**31 - 1)
    if device == "cuda" and ranks > 1:
        from gristmill.runtime.parallel import open_executor as open_ranks

        many = open_ranks(artifact, program, ranks, ranks, max_len, max_slots, hugepages=False, device=device)
        return Session(artifact, program, many, max_waiting=max_waiting)
    if device == "cuda":
        from gristmill.runtime.cuda import open_executor

        opened = open_executor(program, artifact.weights_path, max_len, max_slots)
        return Session(artifact, program, opened, max_waiting=max_waiting)
    cores = min(machine.usable_cpus(), native().default_threads())
    threads = within("threads", threads, cores, 1024)
    weights = artifact.weights_path
    copies = hugepages + (ranks > 1)
    copied = copies * weights.stat().st_size if copies else 0  # exported folders have weights of their own
    refuse_too_large(program, max_len, max_slots, copied, ranks)
    if device in EXPORTS:
        other = open_executor_of(device, artifact, program, threads, max_len, max_slots)
        return Session(artifact, program, other, max_waiting=max_waiting)
    if ranks > 1:
        from gristmill.runtime.parallel import open_executor as open_parallel

        shared = open_parallel(artifact, program, ranks, threads, max_len, max_slots, hugepages)
        return Session(artifact, program, shared, max_waiting=max_waiting)
    executor = native().Executor(
        program_json, str(weights), threads=threads, max_len=max_len, max_slots=max_slots,
        huge_pages=hugepages, pinned=pin,
    )  # fmt: skip
    return Session(artifact, program, executor, max_waiting=max_waiting)


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_sessions):
        session._after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Session:
    """An opened artifact with room for `max_slots` sequences; safe to use from several threads."""

    def __init__(
        self,
        artifact: Artifact | None,
        program: Program,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        max_waiting: int = MAX_WAITING,
    ):
        self.artifact, self.program, self.executor = artifact, program, executor
        self._given_tokenizer = tokenizer
        self._lock = threading.Lock()
        ring = smallest_ring(program, executor.max_len)
        self._slots = Slots(executor.max_slots, executor.max_len, ring, program.limits.max_tokens)
        self.adapters = Adapters(self)
        self._scheduler = Scheduler(self, max_waiting)
        self._async_driver = AsyncDriver(self)
        self._compiling = threading.Lock()
        self._compiled: tuple[tuple[str, Any], Constraint] | None = None
        _sessions.add(self)

    def _after_fork(self) -> None:
        """A thread of the parent may have held the lock; it is not in this process."""
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._slots.after_fork()
        self.adapters.after_fork()
        self._scheduler.after_fork()
        self._async_driver.after_fork()
        if "_constrainer" in self.__dict__:
            self._constrainer.after_fork()

    def close(self) -> None:
        """Ends the other processes of a tensor-parallel session, which otherwise end with it; nothing works
        afterwards. Of other sessions there is nothing to end."""
        end = getattr(self.executor, "close", None)
        if end is not None:
            end()

    @property
    def max_len(self) -> int:
        return self.executor.max_len

    @property
    def max_slots(self) -> int:
        return self.executor.max_slots

    @property
    def max_tokens(self) -> int:
        """The most rows of one forward."""
        return self.executor.max_tokens

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        return self.executor.vocabulary

    @property
    def threads(self) -> int:
        return self.executor.threads

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by use: weights are mapped and shared between processes, the rest is this session's."""
        executor = self.executor
        return {
            "weight_bytes": executor.weight_bytes,
            "kv_bytes": executor.kv_bytes,
            "arena_bytes": executor.arena_bytes,
        }

    def load_adapter(self, name: str, path: str | Path) -> Held:
        """Loads the PEFT adapter in directory `path`, to be asked for as `adapter=name` from now on.

        It stays beside the weights and changes the rows of who asks for it alone. Raises GristmillError for
        an adapter that does not fit the model or can only be merged, and on devices other than the CPU.
        """
        return self.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter. Raises GristmillError for an unknown one, and while a slot uses it."""
        self.adapters.unload(name, lambda number: not self._slots.forget_adapter(number))

    def draft_with(self, draft: Session | None) -> None:
        """Lets `draft`, which nothing else may use from now on, propose tokens. Raises GristmillError where
        its tokens or its slots are others."""
        self._scheduler.draft = None if draft is None else Draft(draft, self)

    @property
    def statistics(self) -> Statistics:
        """What this session has generated, and how: requests, tokens, reused prefixes, speculation, waits."""
        return replace(self._scheduler.statistics)

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be used; without a tokenizer prompts and results are token ids."""
        return self._given_tokenizer is not None or (
            self.artifact is not None and TOKENIZER in self.artifact.files
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded at first use."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        if self.artifact is None:
            raise GristmillError("this session has no tokenizer; give prompts as token ids")
        return Tokenizer.of(self.artifact)

    @cached_property
    def _workspace(self) -> Workspace:
        """Of all choices: one sequence chooses at a time."""
        return Workspace(self.vocabulary)

    @cached_property
    def _constrainer(self) -> Constrainer:
        if not self.has_tokenizer:
            raise GristmillError("constraints need a tokenizer, which this artifact does not hold")
        return Constrainer(self.tokenizer.backend.to_str().encode(), self.eos_ids, self.vocabulary)

    def _constraint(self, options: GenerationOptions) -> Constraint | None:
        """A constraint at its beginning, of the options that ask for one; compiled once while it is the
        latest."""
        asked = options.constraint
        if asked is None:
            return None
        with self._compiling:
            if self._compiled is None or self._compiled[0] != asked:
                self._compiled = (asked, self._constrainer.constraint(*asked))
            return self._compiled[1].copy()

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a text, from the model's generation_config.json."""
        if self.artifact is None or GENERATION_CONFIG not in self.artifact.files:
            return frozenset()
        found = self.artifact.json(GENERATION_CONFIG).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        return frozenset(i for i in ids if type(i) is int)

    def forward(self, tokens: Any, positions: Any, slots: Any, rows: Any = None) -> np.ndarray:
        """Runs a batch of rows and returns logits [R, vocabulary] f32 of the rows named by `rows` (default:
        all of them).

        tokens, positions, slots: [T] int32, T <= max_tokens: row t is token tokens[t] at positions[t] of
        slots[t], with the adapter that `slot` or `reset` gave it. A slot's rows continue it without gap or
        duplicate; a position before its end rolls it back. rows: [R] int32 indices of rows.
        """
        return self._run(*batch(tokens, positions, slots, rows), held=False)

    def tune(self, max_rows: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Times how products of up to `max_rows` rows are cut best on this device, and keeps that for the
        user's sessions that are opened later; yields each product and its config. Raises GristmillError on
        devices whose kernels need none.
        """
        own = getattr(self.executor, "tune", None)
        if own is None:
            raise GristmillError("this session's device has nothing to tune; load with device='cuda'")
        steps = own(max_rows)
        while True:
            with self._lock:
                found = next(steps, None)
            if found is None:
                return
            yield found[0], asdict(found[1])

    def reset(self, slot: int, adapter: str | None = None) -> None:
        """Forgets the sequence that `forward` put into `slot`; the next one there is with `adapter`."""
        number = self.adapters.number(adapter)
        with self._lock:
            self._slots.reset(slot, number)

    @contextmanager
    def slot(self, adapter: str | None = None) -> Iterator[int]:
        """An empty slot for `forward`, with an adapter's name for what is put there; waits for one, and
        forgets its sequence in the end."""
        slot = self._slots.take(lend=True, adapter=self.adapters.number(adapter))
        assert slot is not None
        try:
            yield slot
        finally:
            self._slots.give_back(slot)

    def generate(self, prompt: str | Sequence[Any], **options: Any) -> Any:
        """Continues `prompt`: text or token ids gives a Generation, a list of those gives a list of
        Generations; with n > 1 a list of n Generations takes the place of each.

        All run as one batch over the slots, together with what other threads generate; prompts beyond the
        slots wait in turn. on_text: called with a result's number (n for each prompt) and each new piece of
        its text. Options: see GenerationOptions. Raises GristmillError for an empty or too long prompt and
        for unknown options.
        """
        on_text = options.pop("on_text", None)
        if not (on_text is None or callable(on_text)):
            raise GristmillError(f"on_text is {on_text!r}, expected a function of a number and a text")
        chosen = GenerationOptions.of(**options)
        given = prompt if is_batch(prompt) else [prompt]
        prompts = [sample for one in given for sample in samples(self._prompt_ids(one), chosen)]
        found = generate_all(self, prompts, on_text)
        each = found if chosen.n == 1 else [found[i : i + chosen.n] for i in range(0, len(found), chosen.n)]
        return each if is_batch(prompt) else each[0]

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Stream:
        """Continues one prompt and yields its text in pieces that never split a character or a stop string.

        The stream returned has the attribute `result`, the Generation so far, and `close()` ends it early.
        """
        return Stream(self, self._one_prompt(prompt, options))

    def astream(self, prompt: str | Sequence[int], **options: Any) -> AsyncStream:
        """`stream` for `async for`, and `aclose()` for `close()`; many run side by side."""
        return AsyncStream(self, self._one_prompt(prompt, options))

    def beam_search(self, prompt: str | Sequence[int], **options: Any) -> list[BeamText]:
        """The most likely continuations that a search with `num_beams` beams finds, best first.

        Options: those of BeamOptions (num_beams, length_penalty, num_return_sequences, ...) and the general
        ones that `generate_beams` names. Raises GristmillError as `generate` does, and for more beams than
        slots.
        """
        from gristmill.runtime.decoding.generate_beams import generate_beams

        return generate_beams(self, prompt, **options)

    def contrastive_search(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Of the `top_k` likely next tokens always the one least like the text so far, by `penalty_alpha`.

        Options: see `generate_contrastive`. Raises GristmillError as `generate` does, for fewer slots than
        top_k and for artifacts without hidden states.
        """
        from gristmill.runtime.decoding.contrastive import CONTRASTIVE_OPTIONS, generate_contrastive

        refuse_unknown(options, CONTRASTIVE_OPTIONS, "contrastive search")
        return generate_contrastive(self, prompt, **options)

    def _one_prompt(self, prompt: str | Sequence[int], options: dict[str, Any]) -> Prompt:
        chosen = GenerationOptions.of(**options)
        if chosen.n > 1:
            raise GristmillError(f"n is {chosen.n}, a stream is of one sample; use generate, or more streams")
        return Prompt(self._prompt_ids(prompt), chosen)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        text = isinstance(prompt, str)
        ids = self.tokenizer.encode(prompt) if text else int32("a prompt", prompt).tolist()
        if not ids:
            raise GristmillError("the prompt is empty and the tokenizer adds no BOS; give text or token ids")
        if len(ids) > self.max_len:
            raise GristmillError(
                f"the prompt has {len(ids)} tokens, max_len is {self.max_len}; shorten it or load with more"
            )
        outside = [i for i in ids if not 0 <= i < self.vocabulary]
        if outside:
            raise GristmillError(
                f"the prompt holds token id {outside[0]}, expected 0 to {self.vocabulary - 1}"
            )
        return ids

    def _run(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        rows: np.ndarray,
        *,
        held: bool = True,
    ) -> np.ndarray:
        """`forward` after its arguments became arrays; `held`: on slots taken from self._slots."""
        return self._execute(self.executor.forward, tokens, positions, slots, rows, held)

    def _draw(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray, draws: Draws
    ) -> np.ndarray:
        """`_run` with an executor that `draws_tokens`: what comes back are tokens [R] int32, -1 where a row's
        logits are not finite."""
        sample = cast(DrawingExecutor, self.executor).sample
        return self._execute(partial(sample, draws=draws), tokens, positions, slots, rows, held=True)

    def _execute(
        self,
        execute: Callable[..., Result],
        tokens: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        rows: np.ndarray,
        held: bool,
    ) -> Result:
        self._check_batch(tokens, positions, slots, rows)
        with self._lock:
            ids, first, ends = self._slots.check(positions, slots, held)
            self._slots.begin(ids, first, ends)
            adapters = self._slots.adapters[slots]
            if (adapters != NO_ADAPTER).any():
                execute = partial(execute, adapters=adapters)
            result = execute(tokens, positions, slots, rows)
            self._slots.advance(ids, first, ends)
        return result

    def _copy_slot(
        self, source: int, target: int, length: int, start: int = 0, kept: Sequence[int] = ()
    ) -> bool:
        """Gives `target`, which the caller took, positions `start` to `length` of `source`: of a sequence on
        its way, or of a free slot that still keeps `kept`; False where it does not any more."""
        with self._lock:
            if kept and self._slots.kept(source) is not kept:
                return False
            self.executor.copy_slot(source, target, length, start)
            self._slots.copied(source, target, length)
        return True

    def _check_batch(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray
    ) -> None:
        count = len(tokens)
        if not len(positions) == len(slots) == count:
            raise GristmillError(
                f"{count} tokens, {len(positions)} positions and {len(slots)} slots, expected equally many"
            )
        if not 0 < count <= self.max_tokens:
            raise GristmillError(
                f"got {count} rows, expected 1 to max_tokens = {self.max_tokens}; split the batch"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            bad = tokens[(tokens < 0) | (tokens >= self.vocabulary)][0]
            raise GristmillError(f"token id {bad} is outside 0 to {self.vocabulary - 1}")
        if len(rows) > self.max_tokens or (len(rows) and (rows.min() < 0 or rows.max() >= count)):
            raise GristmillError(f"rows must be at most {self.max_tokens} indices from 0 to {count - 1}")

    def forward_hidden(
        self, tokens: Any, positions: Any, slots: Any, rows: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`forward`, and the hidden states [R, hidden] f32 of the same rows: what the head multiplies, which
        is the output of the last norm.

        An artifact compiled with --rotate has them turned and without the norm's weight. Raises
        GristmillError where the program has none to give, see Program.hidden.
        """
        return run_hidden(self, *batch(tokens, positions, slots, rows), held=False)


def native() -> Any:
    """The compiled executor module."""
    try:
        from gristmill.runtime.cpu import _native
    except ImportError as error:
        raise GristmillError(
            f"the CPU executor is not built ({error}); install with `pip install .`"
        ) from error
    return _native
