"""Tiny Hugging Face decoders with random weights, made without a network."""

from __future__ import annotations

from typing import Any

import torch

VOCAB_SIZE = 96
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """`name` is gpt2, llama, qwen3, gemma3 or mistral; windows are shorter than the tests' texts."""
    import transformers as hf

    if name == "gpt2":
        sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
        config = hf.GPT2Config(**sizes, **ENDS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    elif name == "llama":
        config = hf.LlamaConfig(**SIZES, **HEADS, **ENDS)
    elif name == "qwen3":
        config = hf.Qwen3Config(**SIZES, **HEADS, **ENDS, head_dim=16)
    elif name == "mistral":
        config = hf.MistralConfig(**SIZES, **HEADS, **ENDS, sliding_window=7)
    else:
        layers = ["sliding_attention", "full_attention"]
        options = {"sliding_window": 7, "layer_types": layers, "final_logit_softcapping": 20.0}
        config = hf.Gemma3TextConfig(**SIZES, **HEADS, **ENDS, head_dim=16, query_pre_attn_scalar=16, **options)
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # which begin as ones and zeros
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
            else:
                parameter.mul_(4.0)  # sharp enough for greedy choices that rounding does not move
    return model.to(dtype)
