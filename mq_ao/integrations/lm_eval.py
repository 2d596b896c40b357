"""lm-evaluation-harness: the model `mq-ao`, for saved programs of every backend and for float models.

`lm_eval --model mq-ao` needs to know of it: import this module, or run `python -m mq_ao.integrations.lm_eval` with the
arguments of `lm_eval`, or `mq-ao eval MODEL --tasks ...`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mq_ao.errors import MqAoError
from mq_ao.extras import needs

with needs("lm-evaluation-harness", "eval"):
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm

import torch

from mq_ao.evaluate import evaluate
from mq_ao.models import Sampling
from mq_ao.opening import WINDOW, is_program, open_any
from mq_ao.scoring import Scorer
from mq_ao.text import TokenizerCodec, TokenText
from mq_ao.writing import until, written

NAME = "mq-ao"
_NEW_TOKENS = 256
"""Tokens that a model writes where a task does not say."""


@register_model(NAME)
class MqAoLM(TemplateLM):
    """A float model or saved program under lm-evaluation-harness.

    A context is read once for all of its continuations, and only its last logits are computed, where the program's
    states can be handed on: programs for ExecuTorch keep theirs, and read it again.

    Args:
        pretrained: a saved .pt2, .ptn, .pte or .ptc program, "demo", a folder or a hub id.
        tokenizer: folder or hub id, where the model is not byte-level and brings none.
        batch_size: continuations of one context in a call.
        max_gen_toks: tokens that it writes where a task does not say.
        device: not looked at: a program runs where it was made for.
        max_batch_size: not looked at.

    Raises:
        MqAoError: the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        batch_size: int | str | None = None,
        max_gen_toks: int = _NEW_TOKENS,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        # A folder of any family generates once it is captured; a saved program has states or has none.
        self.opened = open_any(pretrained, tokenizer, states=not is_program(pretrained))
        self.codec = self.opened.needed_codec
        self.tokenizer = self.codec.tokenizer if isinstance(self.codec, TokenizerCodec) else None
        rows = 16 if batch_size in (None, "auto") else int(batch_size)
        if rows < 1:
            raise MqAoError(f"batch_size is {batch_size}: give a number from 1 on, or auto.")
        carried = getattr(self.opened.run, "carried", None)
        self._score = Scorer(self.opened.step, carried, self.opened.has_states, rows)
        self._max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; where there is none, the one that starts it."""
        end = self.codec.end_token
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token before the first of a text."""
        start = self.codec.start_token
        if start is None:
            raise MqAoError("the tokenizer has no token that starts or ends a text: lm-eval needs one.")
        return start

    @property
    def tokenizer_name(self) -> str:
        """See `lm_eval.api.model.LM`."""
        return str(getattr(self.tokenizer, "name_or_path", "") or "bytes").replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See `lm_eval.api.model.LM`."""
        text = self.codec.conversation(chat_history, answer=add_generation_prompt)
        if text is None:
            raise MqAoError("this model's tokenizer has no chat template: leave --apply_chat_template out.")
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """See `lm_eval.api.model.TemplateLM`; no special tokens are added, as lm-eval does not for causal models."""
        return self.codec.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores of (texts, context, continuation) requests, those of one context together."""
        order = sorted(range(len(requests)), key=lambda index: (len(requests[index][1]), requests[index][1]))
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as progress:
            for context, indices in groupby(order, key=lambda index: requests[index][1]):
                group = list(indices)
                for index, score in zip(group, self._score(context, [requests[i][2] for i in group]), strict=True):
                    found[index] = (score.log_likelihood, score.greedy)
                    self._keep("loglikelihood", requests[index][0], found[index])
                progress.update(len(group))
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """See `lm_eval.api.model.LM`: as `mq-ao eval`, a text of any length with the states of all before.

        A model without states starts anew every 1,024 tokens.
        """
        return list(self._rolling([request.args for request in requests], disable_tqdm))

    def _rolling(self, texts: Sequence[tuple[str]], silent: bool) -> Iterator[float]:
        for arguments in tqdm(texts, desc="Running loglikelihood_rolling requests", disable=silent):
            tokens = self.codec.encode(arguments[0])
            document = torch.tensor([self.prefix_token_id, *tokens])
            text = TokenText((document,), None)
            nats = evaluate(self.opened.step, text, window=self.opened.window, chunk=WINDOW).nats if tokens else 0.0
            self._keep("loglikelihood_rolling", arguments, -nats)
            yield -nats

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See `lm_eval.api.model.LM`.

        Raises:
            MqAoError: the model has no states, or a request has options that nobody knows.
        """
        if not self.opened.has_states:
            raise MqAoError(f"{self.opened.source} has no states, and cannot write text: leave such tasks out.")
        found = []
        for request in tqdm(requests, desc="Running generate_until requests", disable=disable_tqdm):
            context, options = request.args
            found.append("".join(self._written(context, dict(options))))
            self._keep("generate_until", request.args, found[-1])
        return found

    def _written(self, context: str, options: dict[str, Any]) -> Iterator[str]:
        stops = options.pop("until", [])
        count = int(options.pop("max_gen_toks", options.pop("max_tokens", self._max_gen_toks)))
        draws = options.pop("do_sample", None)
        temperature = float(options.pop("temperature", 0.0 if not draws else 1.0))
        rest = {name: options.pop(name) for name in ("top_k", "top_p", "seed") if name in options}
        if options:
            raise MqAoError(f"generation options {', '.join(sorted(options))} are not known.")
        sampling = Sampling(temperature if draws is not False else 0.0, **rest)
        prompt = self.codec.encode(context) or [self.prefix_token_id]
        pieces = written(self.opened, prompt, count, sampling)
        return until(pieces, [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop])

    def _keep(self, kind: str, request: Any, result: Any) -> None:
        """For lm-eval's cache of results."""
        self.cache_hook.add_partial(kind, request, result)


def results(
    model: MqAoLM, tasks: Sequence[str], include_path: Path | None, num_fewshot: int | None, limit: int | None
) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Runs tasks: by task and metric its value, and the standard error where lm-eval has one.

    Args:
        model: what is evaluated.
        tasks: their names, at least one.
        include_path: folder with more tasks.
        num_fewshot: examples before each question; None: as the task has it.
        limit: questions of each task at most.

    Raises:
        MqAoError: a task is not known.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    if unknown := [name for name in tasks if name not in known]:
        raise MqAoError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}: `lm_eval ls tasks` lists those it has, and "
            "--include-path FOLDER adds yours."
        )
    if not tasks:
        raise MqAoError("there is no task: name some, with commas between.")
    found = simple_evaluate(
        model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, bootstrap_iters=1000
    )
    assert found is not None
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Names of metrics are "acc,none", those of their errors "acc_stderr,none"."""
    found = {}
    for name, value in values.items():
        metric, _, _ = name.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = values.get(name.replace(metric, f"{metric}_stderr", 1))
            found[metric] = (value, error if isinstance(error, float) else None)
    return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
