"""Greedy decoding with a KV cache beside transformers' `generate` on the same weights. Tokens are compared first."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fastlm.benchmarks.harness import Case

from fastlm.inference import SamplingParams, generate
from fastlm.model import ModelConfig, Transformer
from fastlm.model.huggingface_config import config_to_huggingface
from fastlm.tokenizer import Tokenizer

NEW_TOKENS = 64


def cases(device: str) -> Iterable[Case]:
    import transformers

    tokenizer = Tokenizer({bytes([i]): i for i in range(256)}, pattern="gpt2", special_tokens={"<|endoftext|>": 256})
    for hidden_size, num_layers, batch in ((192, 4, 1), (192, 4, 8), (512, 8, 1)):
        config = ModelConfig(
            257, hidden_size, num_layers, hidden_size // 64, hidden_size // 64, 64, hidden_size * 3, 256
        )
        model = Transformer(config).to(device).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.05)
        theirs = hugging_face_model(transformers, config, model).to(device)
        prompts = [f"{i:04} Once upon a time" for i in range(batch)]
        yield Case(
            name=f"hidden {hidden_size}, {num_layers} layers, {batch} rows of {NEW_TOKENS} tokens",
            ours=ours(model, tokenizer, prompts),
            peers={"transformers": peer(theirs, tokenizer, prompts, device)},
            check=check,
            work=batch * NEW_TOKENS,
            unit="tokens",
        )


def hugging_face_model(transformers, config: ModelConfig, model: Transformer) -> torch.nn.Module:  # type: ignore[no-untyped-def]
    values = config_to_huggingface(config)
    values.pop("architectures")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    return theirs


def ours(model: Transformer, tokenizer: Tokenizer, prompts: list[str]) -> Callable[[], list[list[int]]]:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    return lambda: [c.token_ids for c in generate(model, tokenizer, prompts, params)]


def peer(
    model: torch.nn.Module, tokenizer: Tokenizer, prompts: list[str], device: str
) -> Callable[[], list[list[int]]]:
    assert tokenizer.eos_token_id is not None
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(p)] for p in prompts], device=device)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
                eos_token_id=None,
            )
        return out[:, ids.shape[1] :].tolist()

    return run


def check(a: list[list[int]], b: list[list[int]]) -> None:
    assert a == b, "greedy tokens differ"
