"""llama.cpp through the low-level API of llama-cpp-python: what its server runs, without the server around it."""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import torch
from fastlm.benchmarks.harness import optional

BATCH_TOKENS = 512  # most tokens of a call, its own default


def llama_cpp() -> ModuleType | None:
    """The package, with its log turned off; None where it is not installed."""
    package = optional("llama_cpp")
    if package is not None and not hasattr(package, "_silenced"):
        package._silenced = package.llama_log_callback(lambda level, text, data: None)
        package.llama_log_set(package._silenced, ctypes.c_void_p(0))
    return package


class LlamaCpp:
    """A model and a context of `sequences` sequences of `length` tokens each; torch's number of threads."""

    def __init__(self, path: str, *, sequences: int = 1, length: int = 2048) -> None:
        api: Any = llama_cpp()
        self.api = api
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * length, sequences
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = api.llama_init_from_model(self._model, settings)
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._greedy = api.llama_sampler_init_greedy()

    @property
    def vocab_size(self) -> int:
        return self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self._model))

    def close(self) -> None:
        self.api.llama_sampler_free(self._greedy)
        self.api.llama_batch_free(self._batch)
        self.api.llama_free(self._context)
        self.api.llama_model_free(self._model)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """The most probable tokens after each prompt, all prompts read and continued together."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self._context), True)
        rows = [
            (sequence, position, token, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        found: list[list[int]] = [[] for _ in prompts]
        while True:
            for first in range(0, len(rows), BATCH_TOKENS):
                self._compute(rows[first : first + BATCH_TOKENS], found)
            if len(found[0]) == new_tokens:
                return found
            rows = [(i, len(prompts[i]) + len(tokens) - 1, tokens[-1], True) for i, tokens in enumerate(found)]

    def _compute(self, rows: list[tuple[int, int, int, bool]], found: list[list[int]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (sequence, position, token, draws) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, draws
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        if self.api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        for row, (sequence, _, _, draws) in enumerate(rows):
            if draws:
                found[sequence].append(self.api.llama_sampler_sample(self._greedy, self._context, row))
