"""Greedy decoding with a KV cache beside transformers' `generate` on the same weights. Tokens are compared first.

The last case is what a server meets: requests of many lengths that come and go. Transformers pads them to batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fastlm.benchmarks.harness import Case

from fastlm.inference import Engine, SamplingParams, generate
from fastlm.model import ModelConfig, Transformer
from fastlm.model.huggingface_config import config_to_huggingface
from fastlm.tokenizer import Tokenizer

NEW_TOKENS = 64
MIXED = [(8 + 37 * i % 113, 8 + 29 * i % 89) for i in range(32)]  # tokens of prompt and tokens to generate
STATIC_BATCH = 8  # requests that transformers pads to one length


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

    engine = Engine(model, tokenizer, prefix_caching=False)  # each call computes its prompts anew
    mixed, new_tokens = [mixed_prompt(i) for i in range(len(MIXED))], [new for _, new in MIXED]
    yield Case(
        name=f"hidden {hidden_size}, {num_layers} layers, {len(MIXED)} requests of mixed lengths",
        ours=serve(engine, mixed, new_tokens),
        peers={"transformers, padded by 8": padded_batches(theirs, device)},
        check=check,
        work=sum(new_tokens),
        unit="tokens",
    )


def mixed_prompt(index: int) -> list[int]:
    return [(index * 7 + j * 13) % 256 for j in range(MIXED[index][0])]


def serve(engine: Engine, prompts: list[list[int]], new_tokens: list[int]) -> Callable[[], list[list[int]]]:
    """The most probable tokens after each prompt, all requests at once."""

    def run() -> list[list[int]]:
        for i, (prompt, new) in enumerate(zip(prompts, new_tokens, strict=True)):
            engine.add_request(i, prompt, SamplingParams(max_tokens=new, temperature=0, ignore_eos=True))
        tokens: list[list[int]] = [[] for _ in prompts]
        while engine.has_work:
            for piece in engine.step():
                assert isinstance(piece.request_id, int)
                assert piece.token_id is not None
                tokens[piece.request_id].append(piece.token_id)
        return tokens

    return run


def padded_batches(model: torch.nn.Module, device: str) -> Callable[[], list[list[int]]]:
    def run() -> list[list[int]]:
        tokens = []
        for first in range(0, len(MIXED), STATIC_BATCH):
            batch = range(first, first + STATIC_BATCH)
            longest, new = (max(MIXED[i][j] for i in batch) for j in range(2))
            ids = torch.tensor([[0] * (longest - MIXED[i][0]) + mixed_prompt(i) for i in batch], device=device)
            mask = torch.tensor([[int(j >= longest - MIXED[i][0]) for j in range(longest)] for i in batch])
            rows = generate_greedily(model, ids, mask.to(device), new)
            tokens += [row[: MIXED[i][1]] for i, row in zip(batch, rows, strict=True)]
        return tokens

    return run


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
    return lambda: generate_greedily(model, ids, torch.ones_like(ids), NEW_TOKENS)


@torch.inference_mode()
def generate_greedily(
    model: torch.nn.Module, ids: torch.Tensor, attention_mask: torch.Tensor, new_tokens: int
) -> list[list[int]]:
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=attention_mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[:, ids.shape[1] :].tolist()


def check(a: list[list[int]], b: list[list[int]]) -> None:
    assert a == b, "greedy tokens differ"
