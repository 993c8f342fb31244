"""lm-evaluation-harness with fastlm's engine as its model "fastlm", in one process.

The harness finds only models that were imported before it reads its arguments, so this module stands in for its
command:

    python -m fastlm.inference.lm_eval run --model fastlm --model_args model=gemma3-270m --tasks arc_easy

Needs `pip install lm_eval` (github.com/EleutherAI/lm-evaluation-harness, 0.4.9 or later).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from fastlm.errors import InferenceError
from fastlm.inference.llm import LLM
from fastlm.inference.outputs import Completion
from fastlm.inference.sampling_params import SamplingParams

AT_ONCE = 256  # requests that the engine gets together; it cuts them into steps itself
MAX_TOKENS = 256  # of an answer, when a task names no number
Request = tuple[Any, list[int], list[int]]  # the texts, and the ids of what is given and of what follows


@register_model("fastlm")
class FastLM(TemplateLM):
    """A model for the harness.

    Args:
        model: what `fastlm.LLM` takes: a name, a directory, a GGUF file, an id of the Hugging Face hub.
        device: where it is loaded to; "cpu" where there is no GPU.
        max_length: tokens of context; by default the model's.
        memory: bytes for keys and values, as for `fastlm.inference.Engine`.
        batch_size, max_batch_size: the harness gives them always; the engine forms its own batches.
    """

    def __init__(
        self,
        model: str,
        device: str | None = None,
        max_length: int | None = None,
        memory: int | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        super().__init__()
        if device is None or not torch.cuda.is_available():  # the harness asks for "cuda:0" unless told otherwise
            device = "cpu"
        logging.getLogger(__name__).info("%s is loaded to %s", model, device)
        self.llm = LLM(model, device=device, memory=memory)
        self.max_length = max_length or self.llm.context_length or 2048
        self._beginning = self.llm.tokenizer.settings.prefix_ids

    @property
    def eot_token_id(self) -> int:
        end = self.llm.tokenizer.eos_token_id
        if end is None:
            raise InferenceError("the tokenizer has no end-of-text token, which the harness needs")
        return end

    @property
    def prefix_token_id(self) -> int:
        return self._beginning[0] if self._beginning else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, after what the tokenizer says that texts begin with unless `add_special_tokens` is False."""
        ids = self.llm.tokenizer.encode(string, disallowed_special=())
        return ids if add_special_tokens is False else [*self._beginning, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of what follows, whether each of its tokens is the most probable one) for each request."""
        found: list[tuple[float, bool]] = []
        prompts = [(given + following)[-self.max_length :] for _, given, following in requests]
        starts = [
            max(0, len(ids) - max(1, len(following))) for ids, (_, _, following) in zip(prompts, requests, strict=True)
        ]
        params = [SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start) for start in starts]
        for (texts, _, following), completion in zip(requests, self._run(prompts, params, disable_tqdm), strict=True):
            if completion.prompt_logprobs is None:
                raise InferenceError(f"a text could not be scored: {completion.error}")
            entries = [e for e in completion.prompt_logprobs if e is not None][-len(following) :] if following else []
            result = sum(e.logprob for e in entries), all(e.logprob >= e.top[0][1] for e in entries)
            found.append(result)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows as long as the context, the first after the prefix token."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each text up to one of its task's stop strings: greedily, unless the task asks for a draw."""
        prompts, params = [], []
        for number, request in enumerate(requests):
            context, settings = request.args
            stop = settings.get("until") or []
            most = int(settings.get("max_gen_toks", MAX_TOKENS))
            draws = settings.get("do_sample", bool(settings.get("temperature")))
            prompts.append(self.tok_encode(context)[-(self.max_length - most) :])
            params.append(
                SamplingParams(
                    max_tokens=most,
                    temperature=float(settings.get("temperature", 1.0)) if draws else 0.0,
                    top_k=settings.get("top_k"),
                    top_p=settings.get("top_p"),
                    stop=tuple([stop] if isinstance(stop, str) else stop),
                    seed=number,
                )
            )
        texts = [completion.text for completion in self._run(prompts, params, disable_tqdm)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _run(self, prompts: list[list[int]], params: list[SamplingParams], disable_tqdm: bool) -> list[Completion]:
        done: list[Completion] = []
        with tqdm(total=len(prompts), disable=disable_tqdm) as progress:
            for i in range(0, len(prompts), AT_ONCE):
                done += self.llm.generate(prompts[i : i + AT_ONCE], params[i : i + AT_ONCE])
                progress.update(min(AT_ONCE, len(prompts) - i))
        return done


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
