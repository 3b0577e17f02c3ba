"""lm-evaluation-harness (EleutherAI) on an artifact: the model named "gristmill".

    python -m gristmill.integrations.lm_eval run --model gristmill --model_args artifact=story.grist \\
        --tasks lambada_openai,arc_easy

The harness has no plug-ins, so this module registers the model and hands over to its command line; in Python
importing it is enough before `lm_eval.simple_evaluate(model="gristmill", model_args={"artifact": ...})`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from gristmill.integrations import harness
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.scoring import score_continuations
from gristmill.runtime.session import Session, load

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if str(error.name).split(".")[0] not in ("lm_eval", "tqdm"):
        raise
    raise GristmillError(
        f"running the harness needs {error.name}; install it with `pip install 'gristmill[lm-eval]'`"
    ) from error

PROMPTS_PER_SLOT = 16  # that are generated in one go, between two ticks of the progress bar


@register_model("gristmill")
class GristmillLM(TemplateLM):
    """An artifact as the harness sees a model.

    artifact: its directory. threads, max_len, max_slots, draft: as for gristmill.load; the harness's
    batch_size (a number) stands for max_slots, its device cuda:0, which it assumes, for the CPU where there
    is no such. max_gen_toks: new tokens where a task does not say. A text
    without context, and every rolling text, is predicted behind one BOS.
    """

    def __init__(
        self,
        artifact: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        max_len: int | None = None,
        max_slots: int | None = None,
        draft: str | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        session: Session | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise GristmillError(f"model_args holds {', '.join(unknown)}, which the model gristmill has not")
        if (artifact is None) == (session is None):
            raise GristmillError("the model gristmill needs its artifact: --model_args artifact=DIRECTORY")
        if max_slots is None and str(batch_size or "").isdigit() and int(batch_size or 0) > 1:
            max_slots = int(batch_size or 0)
        self.session = session or load(
            str(artifact), _device(device), threads=threads, max_len=max_len, max_slots=max_slots, draft=draft
        )
        self._text = self.session.tokenizer
        self._max_gen_toks = max_gen_toks

    # ---- what the base class asks for ----

    @property
    def eot_token_id(self) -> int:
        eos = sorted(self.session.eos_ids)
        return eos[0] if eos else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        return harness.prefix_token(self._text, self.session.eos_ids)

    @property
    def max_length(self) -> int:
        return self.session.max_len

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        opened = self.session.artifact
        return str(opened.content_id) if opened else "gristmill"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return harness.encode(self._text, string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template, the only one there is."""
        return self._text.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return harness.chat_prompt(self._text, chat_history, add_generation_prompt)

    # ---- requests ----

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of each (key, context, continuation)."""
        most = self.session.max_len
        pairs = [(harness.cut_context(a, b, most), b) for _, a, b in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood") as bar:
            scores = score_continuations(self.session, pairs, on_done=bar.update)
        found = [(score.log_likelihood, score.greedy) for score in scores]
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each whole text."""
        owners: list[int] = []
        windows: list[tuple[Any, list[int], list[int]]] = []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = harness.encode(self._text, text, add_special_tokens=False)
            for context, continuation in harness.rolling_windows(
                ids, self.prefix_token_id, self.session.max_len
            ):
                owners.append(number)
                windows.append((None, context, continuation))
        sums = np.zeros(len(requests))
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        np.add.at(sums, owners, [log_likelihood for log_likelihood, _ in scores])
        for request, value in zip(requests, sums.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums.tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to its stop strings."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(number)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for numbers in alike.values():
                options = harness.generation_options(requests[numbers[0]].args[1], self._max_gen_toks)
                for some in _batches(numbers, PROMPTS_PER_SLOT * self.session.max_slots):
                    prompts = [self._prompt(requests[n].args[0], options) for n in some]
                    for n, result in zip(some, self.session.generate(prompts, **options), strict=True):
                        texts[n] = result.text
                        self.cache_hook.add_partial("generate_until", requests[n].args, result.text)
                    bar.update(len(some))
        return texts

    def _prompt(self, context: str, options: dict[str, Any]) -> list[int]:
        ids = harness.encode(self._text, context) or [self.prefix_token_id]
        return harness.cut_prompt(ids, self.session.max_len, options["max_new_tokens"])


def _device(given: str | None) -> str:
    """gristmill's name for a device of the harness."""
    if given is None or not given.startswith("cuda"):
        return given or "cpu"
    try:
        import torch
    except ModuleNotFoundError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _batches(numbers: Iterable[int], size: int) -> Iterable[list[int]]:
    left = iter(numbers)
    while batch := list(islice(left, size)):
        yield batch
