"""Tiny random models of transformers, one for each feature that ours must share."""

from __future__ import annotations

import torch
import transformers as hf

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
WINDOW = 5  # shorter than the sequences of the tests
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {**LINEAR, "rope_theta": 10_000.0},
}

# name -> (configuration, model, arguments)
MODELS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "llama with one key head": (hf.LlamaConfig, hf.LlamaForCausalLM, {"num_key_value_heads": 1}),
    "llama tied": (hf.LlamaConfig, hf.LlamaForCausalLM, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama with biases": (hf.LlamaConfig, hf.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": (hf.LlamaConfig, hf.LlamaForCausalLM, {"head_dim": 16}),
    "llama 3 scaling": (hf.LlamaConfig, hf.LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama linear scaling": (hf.LlamaConfig, hf.LlamaForCausalLM, {"rope_parameters": {**LINEAR, "rope_theta": 1e3}}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": WINDOW}),
    "mistral without window": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": None}),
    "qwen 2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
    "qwen 2 with window": (
        hf.Qwen2Config,
        hf.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen 3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen 3 tied, with biases": (
        hf.Qwen3Config,
        hf.Qwen3ForCausalLM,
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, {"head_dim": 16}),
    "gemma 2": (
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma 2 untied, without caps": (
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma 3": (
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 9, "num_hidden_layers": 7},
    ),
    "gemma 3 with scaling": (
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "rope_parameters": GEMMA3_ROPE,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gpt-2": (hf.GPT2Config, hf.GPT2LMHeadModel, {}),
    "gpt-2 with exact gelu": (
        hf.GPT2Config,
        hf.GPT2LMHeadModel,
        {"activation_function": "gelu", "n_inner": 100, "tie_word_embeddings": False},
    ),
    "exaone 3": (hf.AutoConfig, hf.AutoModelForCausalLM, {"model_type": "exaone"}),
    "exaone 4": (
        hf.Exaone4Config,
        hf.Exaone4ForCausalLM,
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "rope_parameters": LLAMA3},
    ),
    "phi 3": (hf.Phi3Config, hf.Phi3ForCausalLM, {"sliding_window": WINDOW}),
}


def tiny(name: str, **changes: object) -> torch.nn.Module:
    """A model of transformers with every weight random, in fp32 and evaluation mode."""
    config_class, model_class, arguments = MODELS[name]
    values = {**(GPT2 if name.startswith("gpt-2") else SIZES), **arguments, **changes}
    if name == "exaone 3":
        model = model_class.from_config(config_class.for_model(**values))
    else:
        model = model_class(config_class(**values))
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=2 * parameter.shape[-1] ** -0.5) if parameter.ndim == 2 else parameter.uniform_(
                0.5, 1.5
            )
    return model
