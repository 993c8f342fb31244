"""Hugging Face's config.json and our ModelConfig, each read from the other.

An architecture is a function that reads its config.json, with its own defaults. What is left unread and is not known to
say nothing about the arithmetic is refused by name: a model is run as it is described or not at all. Writing goes
through the same functions: a config.json is right if reading it gives back the config that was written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastlm.errors import ConfigError
from fastlm.model.config import MAX_LAYERS, ModelConfig, RopeScaling, require_positive_values
from fastlm.model.keys import Keys

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Keys that change nothing in evaluation: names, ids, training, and how the model is held in memory.
IGNORED = frozenset({
    "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "cache_implementation", "dtype", "embd_pdrop", "embed_dropout", "eos_token_id", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_range",
    "is_decoder", "label2id", "max_length", "model_type", "n_ctx", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "sep_token_id",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
})  # fmt: skip
IGNORED_PREFIXES = ("_", "summary_")
SLIDING, FULL = "sliding_attention", "full_attention"


def _activation(keys: Keys, name: str, default: str) -> Any:
    value = keys.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ConfigError(f"{name}={value!r} is not supported; it must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def _rope(values: dict[str, Any], key: str, theta: float, context_length: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from one dictionary of rope settings, found under `key`."""
    keys = Keys(values)
    keys.must_be("partial_rotary_factor", 1.0)
    kind = keys.get("rope_type", keys.get("type", "default"))
    keys.get("type")
    theta = keys.number("rope_theta", theta)
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", keys.number("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            keys.number("factor"),
            keys.number("low_freq_factor"),
            keys.number("high_freq_factor"),
            keys.integer("original_max_position_embeddings", context_length),
        )
    elif kind != "default":
        raise ConfigError(f"{key} of type {kind!r} is not supported; it must be one of default, linear, llama3")
    try:
        keys.refuse_unread()
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return theta, scaling


def _rotary(keys: Keys, context_length: int, *, theta: float = 10_000.0) -> dict[str, Any]:
    """rope_parameters as transformers 5 writes it, or rope_theta beside rope_scaling as earlier ones did."""
    theta = keys.number("rope_theta", theta)
    old, new = keys.dictionary("rope_scaling"), keys.dictionary("rope_parameters")
    theta, scaling = _rope(old or new, "rope_scaling" if old else "rope_parameters", theta, context_length)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _local_and_global_rotary(keys: Keys, context_length: int) -> dict[str, Any]:
    """Gemma 3's: one theta for layers with a window, and one, which may be scaled, for those without."""
    old, new = keys.dictionary("rope_scaling"), keys.dictionary("rope_parameters")
    if new.keys() - {SLIDING, FULL} or not all(isinstance(v, dict) for v in new.values()):
        raise ConfigError(f"rope_parameters must hold an object for each of {FULL} and {SLIDING}, not {new!r}")
    theta, local = keys.number("rope_theta", 1_000_000.0), keys.number("rope_local_base_freq", 10_000.0)
    theta, scaling = _rope({**new.get(FULL, {}), **old}, "rope_scaling", theta, context_length)
    local, of_local = _rope(new.get(SLIDING, {}), f"rope_parameters.{SLIDING}", local, context_length)
    if of_local is not None:
        raise ConfigError(f"rope_parameters.{SLIDING} of type {of_local.kind!r} is not supported")
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_theta": local}


def _sizes(keys: Keys, *, head_dim: int | None = None, num_layers: str = "num_hidden_layers") -> dict[str, Any]:
    hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    require_positive_values(hidden_size=hidden_size, num_attention_heads=num_heads)
    return {
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": keys.integer(num_layers),
        "num_heads": num_heads,
        "num_kv_heads": keys.integer("num_key_value_heads", num_heads),
        "head_dim": keys.integer("head_dim", head_dim or hidden_size // num_heads),
        "intermediate_size": keys.integer("intermediate_size"),
        "context_length": keys.integer("max_position_embeddings"),
    }


def _window(keys: Keys, window: int | None, slides: Callable[[int], bool], num_layers: int) -> dict[str, Any]:
    """The window and the layers without it: layer_types, or by default those for which `slides` is false."""
    types = keys.get("layer_types", [SLIDING if slides(i) else FULL for i in range(min(num_layers, MAX_LAYERS))])
    if not isinstance(types, list) or len(types) != num_layers or any(t not in (SLIDING, FULL) for t in types):
        raise ConfigError(f"layer_types must name {SLIDING} or {FULL} for each of {num_layers} layers")
    if SLIDING not in types:
        return {"sliding_window": None}
    if window is None:
        raise ConfigError(f"layer_types has {SLIDING}, but sliding_window is null")
    return {"sliding_window": window, "full_attention_layers": tuple(i for i, t in enumerate(types) if t == FULL)}


def _biases(keys: Keys) -> dict[str, bool]:
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "attention_output_bias": bias}


def _llama(keys: Keys) -> dict[str, Any]:
    sizes = _sizes(keys)
    return {
        **sizes,
        **_rotary(keys, sizes["context_length"]),
        **_biases(keys),
        "mlp_bias": keys.flag("mlp_bias"),
        "activation": _activation(keys, "hidden_act", "silu"),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
    }


def _exaone(keys: Keys) -> dict[str, Any]:
    sizes = _sizes(keys, num_layers=keys.present("num_layers", "num_hidden_layers"))
    return {
        **sizes,
        **_rotary(keys, sizes["context_length"], theta=500_000.0),
        **_biases(keys),
        "mlp_bias": keys.flag("mlp_bias"),
        "activation": _activation(keys, keys.present("activation_function", "hidden_act"), "silu"),
        "norm_eps": keys.number(keys.present("layer_norm_epsilon", "rms_norm_eps"), 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
    }


def _mistral(keys: Keys) -> dict[str, Any]:
    sizes = _sizes(keys)
    return {
        **sizes,
        **_rotary(keys, sizes["context_length"]),
        "sliding_window": keys.nullable_integer("sliding_window", 4096),
        "activation": _activation(keys, "hidden_act", "silu"),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    sizes = _sizes(keys)
    keys.must_be("partial_rotary_factor", 1.0)
    keys.get("original_max_position_embeddings")  # for longrope, which is refused by name
    return {
        **sizes,
        **_rotary(keys, sizes["context_length"]),
        "sliding_window": keys.nullable_integer("sliding_window"),
        "activation": _activation(keys, "hidden_act", "silu"),
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
    }


def _qwen(keys: Keys, *, qk_norm: bool) -> dict[str, Any]:
    sizes = _sizes(keys, head_dim=128 if qk_norm else None)
    window = keys.nullable_integer("sliding_window", 4096)
    used = keys.flag("use_sliding_window") and window is not None
    first = keys.integer("max_window_layers", 28)
    return {
        **sizes,
        **_rotary(keys, sizes["context_length"]),
        **_window(keys, window if used else None, lambda i: used and i >= first, sizes["num_layers"]),
        **(_biases(keys) if qk_norm else {"qkv_bias": True}),
        "qk_norm": qk_norm,
        "activation": _activation(keys, "hidden_act", "silu"),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
    }


def _exaone4(keys: Keys) -> dict[str, Any]:
    sizes = _sizes(keys)
    window = keys.nullable_integer("sliding_window", 4096)
    if _window(keys, window, lambda i: window is not None, sizes["num_layers"])["sliding_window"] is not None:
        raise ConfigError(
            f"sliding_window={window} is not supported in exaone4, whose layers without one then have no positions"
        )
    keys.get("sliding_window_pattern")
    return {
        **sizes,
        **_rotary(keys, sizes["context_length"]),
        "norm_placement": "after",
        "qk_norm": True,
        "activation": _activation(keys, "hidden_act", "silu"),
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
    }


def _gemma_family(keys: Keys) -> dict[str, Any]:
    keys.must_be("use_bidirectional_attention", False)
    return {
        **_sizes(keys, head_dim=256),
        **_biases(keys),
        "norm_weight_offset": 1.0,
        "scale_embeddings": True,
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
    }


def _scalar(keys: Keys, head_dim: int) -> float | None:
    scalar = keys.number("query_pre_attn_scalar", 256)
    return None if scalar == head_dim else scalar


def _gemma(keys: Keys) -> dict[str, Any]:
    values = _gemma_family(keys)
    acts = {_activation(keys, k, "gelu_pytorch_tanh") for k in ("hidden_act", "hidden_activation")}
    if not acts <= {"gelu", "gelu_tanh"}:  # early files say "gelu" and mean the approximation
        raise ConfigError(f"hidden_act={keys.get('hidden_act')!r} is not supported; it must be 'gelu_pytorch_tanh'")
    return {**values, **_rotary(keys, values["context_length"]), "activation": "gelu_tanh"}


def _gemma2(keys: Keys) -> dict[str, Any]:
    values = _gemma_family(keys)
    keys.get("hidden_act")  # older files have it beside hidden_activation, which alone counts
    return {
        **values,
        **_rotary(keys, values["context_length"]),
        **_window(keys, keys.nullable_integer("sliding_window", 4096), lambda i: i % 2 == 0, values["num_layers"]),
        "norm_placement": "around",
        "activation": _activation(keys, "hidden_activation", "gelu_pytorch_tanh"),
        "query_pre_attn_scalar": _scalar(keys, values["head_dim"]),
        "attention_softcap": keys.nullable_number("attn_logit_softcapping", 50.0),
        "logit_softcap": keys.nullable_number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    values = _gemma_family(keys)
    keys.get("hidden_act")
    if keys.nullable_number("attn_logit_softcapping") is not None:
        raise ConfigError(f"attn_logit_softcapping={keys.get('attn_logit_softcapping')!r} is not supported in gemma3")
    every = keys.integer(keys.present("sliding_window_pattern", "_sliding_window_pattern"), 6)
    require_positive_values(sliding_window_pattern=every)
    window = keys.nullable_integer("sliding_window", 4096)
    values |= {
        **_local_and_global_rotary(keys, values["context_length"]),
        **_window(keys, window, lambda i: (i + 1) % every != 0, values["num_layers"]),
        "norm_placement": "around",
        "qk_norm": True,
        "activation": _activation(keys, "hidden_activation", "gelu_pytorch_tanh"),
        "query_pre_attn_scalar": _scalar(keys, values["head_dim"]),
        "logit_softcap": keys.nullable_number("final_logit_softcapping"),
    }
    if values["sliding_window"] is None:
        values["rope_local_theta"] = None
    return values


def _gpt2(keys: Keys) -> dict[str, Any]:
    hidden_size, num_heads = keys.integer("n_embd"), keys.integer("n_head")
    require_positive_values(n_embd=hidden_size, n_head=num_heads)
    keys.must_be("scale_attn_weights", True)
    return {
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": keys.integer("n_layer"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "intermediate_size": keys.integer("n_inner", 4 * hidden_size),
        "context_length": keys.integer("n_positions"),
        "positions": "learned",
        "norm": "layer_norm",
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": _activation(keys, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
    }


READERS: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "llama": _llama,
    "qwen3": lambda keys: _qwen(keys, qk_norm=True),
    "qwen2": lambda keys: _qwen(keys, qk_norm=False),
    "mistral": _mistral,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "exaone4": _exaone4,
    "exaone": _exaone,
    "phi3": _phi3,
}
CLASSES = {  # what is written; a model of another type is one of these too
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "exaone4": "Exaone4ForCausalLM",
}


def config_from_huggingface(content: dict[str, Any]) -> ModelConfig:
    """Reads a config.json.

    Raises:
        ConfigError: the architecture is unknown, a key is missing or of the wrong type, or sets what we do not have.
    """
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise ConfigError(f"model_type {model_type!r} is not supported; it must be one of {', '.join(READERS)}")
    keys = Keys(content)
    if keys.get("quantization_config") is not None:
        raise ConfigError(
            "quantization_config is not supported; use the weights before quantization, or a GGUF file of the model"
        )
    config = ModelConfig(**READERS[model_type](keys))
    keys.refuse_unread(IGNORED, IGNORED_PREFIXES)
    return config


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The config.json, without token ids, with which transformers builds the same model.

    Raises:
        ConfigError: no architecture of transformers has this combination of options.
    """
    if config.rope_scaling is not None and config.rope_scaling.kind == "factors":
        raise ConfigError("transformers has no rope scaling by given factors, so the model cannot be saved for it")
    for model_type, class_name in CLASSES.items():
        content = _gpt2_content(config) if model_type == "gpt2" else _content(config, model_type)
        content = {"architectures": [class_name], "model_type": model_type, **content}
        try:
            if config_from_huggingface(content) == config:
                return content
        except ConfigError:
            continue
    raise ConfigError("no architecture of transformers has this combination of options, so the model cannot be saved")


def _content(config: ModelConfig, model_type: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context_length,
        }
    content: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,  # transformers before 5 reads these two, later ones the third
        "rope_scaling": None if config.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_parameters": rope,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "attention_dropout": 0.0,
    }
    if model_type not in ("qwen2", "mistral", "exaone4"):
        content["attention_bias"] = config.qkv_bias
    if model_type == "llama":
        content["mlp_bias"] = config.mlp_bias
    if model_type in ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"):
        content["sliding_window"] = config.sliding_window
    if model_type in ("qwen2", "qwen3"):
        content["use_sliding_window"] = config.sliding_window is not None
    if model_type == "exaone4":
        content |= {"sliding_window": None, "layer_types": [FULL] * config.num_layers}
    if model_type in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        content["layer_types"] = [FULL if config.window(i) is None else SLIDING for i in range(config.num_layers)]
    if model_type in ("gemma2", "gemma3_text"):
        scalar = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
        content |= {
            "hidden_activation": content.pop("hidden_act"),
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    if model_type == "gemma3_text":
        local = 10_000.0 if config.rope_local_theta is None else config.rope_local_theta
        content["rope_local_base_freq"] = local
        content["rope_parameters"] = {FULL: rope, SLIDING: {"rope_theta": local, "rope_type": "default"}}
    return content


def _gpt2_content(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.context_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
