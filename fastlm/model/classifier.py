"""A transformer that gives each text a label: its decoder, the hidden states of the text pooled, a linear head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastlm._files import write_atomic
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.adapter import CONFIG_FILE, load_adapter, merge_lora, read_adapter_config
from fastlm.model.config import ModelConfig
from fastlm.model.huggingface import huggingface_content
from fastlm.model.huggingface_config import config_from_huggingface
from fastlm.model.huggingface_layout import from_ours, to_ours
from fastlm.model.loading import load
from fastlm.model.tensor_files import read_json_object, read_tensors, write_tensors
from fastlm.model.transformer import Decoder, Transformer
from fastlm.tokenizer import Tokenizer

Ids = Sequence[int] | np.ndarray
Pooling = Literal["mean", "last"]
LABELS_FILE = "labels.json"  # beside an adapter, whose own file has no place for them
POOLING_KEY = "fastlm_pooling"  # in config.json; transformers knows the last token alone
TOKENS_AT_ONCE = 4096  # that `predict` packs together


class SequenceClassifier(nn.Module):
    """Token ids of texts to logits of labels.

    Args:
        base: gives its decoder, which is shared, not copied; its output layer is left out.
        labels: names, in the order of the logits.
        pooling: the mean of a text's hidden states, or the last of them, which in a causal model has seen them all.
            With "last", the saved model is one of transformers' `…ForSequenceClassification`.
    """

    def __init__(self, base: Transformer, labels: Sequence[str], pooling: Pooling = "mean") -> None:
        super().__init__()
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise ConfigError(f"a classifier needs two or more different labels, not {', '.join(labels) or 'none'}")
        if pooling not in get_args(Pooling):
            raise ConfigError(f"pooling must be mean or last, not {pooling!r}")
        self.config: ModelConfig = base.config
        self.labels = list(labels)
        self.pooling = pooling
        self.model: Decoder = base.model
        self.score = nn.Linear(self.config.hidden_size, len(labels), bias=False, device=base.output_weight.device)
        nn.init.zeros_(self.score.weight)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`(tokens,)` int64, texts one after the other, `(texts + 1,)` int32 offsets -> logits `(texts, labels)`.

        Raises:
            ValueError: a text is empty or longer than the context.
        """
        lengths = cu_seqlens.diff().long()
        if not lengths.numel() or (lengths < 1).any():
            raise ValueError("every text needs at least one token")
        hidden = self.model(input_ids[None], cu_seqlens=cu_seqlens)[0]
        if self.pooling == "last":
            return self.score(hidden[cu_seqlens[1:].long() - 1])
        text = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths)
        sums = torch.zeros(len(lengths), hidden.shape[1], device=hidden.device).index_add(0, text, hidden.float())
        return self.score(sums / lengths[:, None])

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the classifier reads of each text: what begins a document, then as many as the context holds."""
        start = document_start(tokenizer)
        room = self.config.context_length - len(start)
        encoded = tokenizer.encode_batch(list(texts), disallowed_special=())
        return [(start + ids[:room]) or [0] for ids in encoded]

    @torch.no_grad()
    def predict(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
        """Probabilities `(texts, labels)`, fp32, in the order of `labels`."""
        encoded = self.encode(tokenizer, texts)
        parts = []
        for group in groups(encoded, TOKENS_AT_ONCE):
            ids, cu_seqlens = pack(group, self.score.weight.device)
            parts.append(self(ids, cu_seqlens).float().softmax(-1))
        return torch.cat(parts) if parts else torch.zeros(0, len(self.labels))


def document_start(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text: the tokenizer's own prefix, such as `<bos>`, or the end of the text before."""
    settings = tokenizer.settings
    if settings.prefix_ids or settings.bos_token or settings.eos_token or tokenizer.eos_token_id is None:
        return list(settings.prefix_ids)
    return [tokenizer.eos_token_id]


def pack(rows: Sequence[Ids], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of ids one after the other, `(tokens,)` int64, and their offsets, `(rows + 1,)` int32."""
    ids = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
    lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int32)
    return ids.to(device), lengths.cumsum(0, dtype=torch.int32).to(device)


def groups(rows: Sequence[Ids], tokens: int) -> Iterator[list[Ids]]:
    """Consecutive rows of at most `tokens` ids together, or one longer row."""
    group: list[Ids] = []
    size = 0
    for row in rows:
        if group and size + len(row) > tokens:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row)
    if group:
        yield group


def save_classifier(model: SequenceClassifier, directory: str | Path, *, eos_token_id: int | None = None) -> None:
    """Writes config.json and model.safetensors, each whole or not at all.

    Raises:
        ConfigError: no architecture of transformers has the model's combination of options.
        CheckpointError: the weights are quantized.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(_tensors(model), directory / "model.safetensors")
    write_atomic(
        directory / "config.json", json.dumps(_content(model, eos_token_id), indent=2, ensure_ascii=False) + "\n"
    )


def _tensors(model: SequenceClassifier) -> dict[str, Tensor]:
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.dtype == torch.uint8 for tensor in tensors.values()):
        raise CheckpointError("the weights are quantized; load the model with dtype=torch.float32 to save it")
    score = tensors.pop("score.weight").contiguous()
    return {**from_ours(tensors, huggingface_content(model.config)["model_type"]), "score.weight": score}


def _content(model: SequenceClassifier, eos_token_id: int | None) -> dict[str, Any]:
    content = huggingface_content(model.config, eos_token_id=eos_token_id)
    content["architectures"] = [
        name.replace("ForCausalLM", "ForSequenceClassification").replace("LMHeadModel", "ForSequenceClassification")
        for name in content["architectures"]
    ]
    content["pad_token_id"] = eos_token_id
    return {**content, **_labels(model)}


def write_labels(model: SequenceClassifier, directory: Path) -> None:
    """What an adapter of a classifier needs beside PEFT's files."""
    write_atomic(directory / LABELS_FILE, json.dumps(_labels(model), indent=2, ensure_ascii=False) + "\n")


def _labels(model: SequenceClassifier) -> dict[str, Any]:
    return {
        "id2label": {str(i): label for i, label in enumerate(model.labels)},
        "label2id": {label: i for i, label in enumerate(model.labels)},
        POOLING_KEY: model.pooling,
    }


def is_classifier(directory: Path) -> bool:
    """Whether a directory holds a classifier, whole or as an adapter."""
    for name in (CONFIG_FILE, "config.json"):
        if (directory / name).is_file():
            content = read_json_object(directory / name)
            return content.get("task_type") == "SEQ_CLS" or "ForSequenceClassification" in str(
                content.get("architectures")
            )
    return False


def load_classifier(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> SequenceClassifier:
    """The classifier in a directory that `save_classifier` or `fastlm finetune` wrote, or transformers.

    With a `dtype`, weights are converted to it, quantized ones of an adapter's base too.

    Raises:
        CheckpointError: a file is missing or corrupt, or it holds no classifier.
    """
    directory = Path(directory)
    if (directory / CONFIG_FILE).is_file():
        content = read_adapter_config(directory)
        base = load(str(content.get("base_model_name_or_path")), dtype=dtype).model
        if not isinstance(base, Transformer):
            raise CheckpointError(f"the base of {directory} is no transformer")
        model = _classifier_of(base, read_json_object(directory / LABELS_FILE), directory / LABELS_FILE)
        whole = load_adapter(model, directory)
        merge_lora(model)
        _set_head(model, whole, directory)
    else:
        content = read_json_object(directory / "config.json")
        try:
            config = config_from_huggingface({k: v for k, v in content.items() if k != POOLING_KEY})
        except ConfigError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from None
        model = _classifier_of(Transformer(config), content, directory / "config.json")
        read_classifier_weights(model, directory)
    return model.to(device, dtype).eval()


def read_classifier_weights(model: SequenceClassifier, directory: Path) -> None:
    """Copies the weights in `directory` into a classifier of the same config. Raises CheckpointError."""
    tensors = read_tensors(directory / "model.safetensors")
    _set_head(model, tensors, directory)
    tensors.pop("score.weight")
    model_type = str(read_json_object(directory / "config.json").get("model_type"))
    ours = to_ours(tensors, model_type, model.config)
    try:
        model.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in ours.items()})
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise CheckpointError(f"{directory} does not fit its config.json: {reason}") from None


def _classifier_of(base: Transformer, content: dict[str, Any], path: Path) -> SequenceClassifier:
    names = content.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise CheckpointError(f"{path} names no labels (id2label): it is not of a classifier")
    try:
        return SequenceClassifier(
            base, [str(names[str(i)]) for i in range(len(names))], content.get(POOLING_KEY, "last")
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _set_head(model: SequenceClassifier, tensors: dict[str, Tensor], directory: Path) -> None:
    weight = tensors.get("score.weight")
    if weight is None or weight.shape != model.score.weight.shape:
        raise CheckpointError(f"{directory} has no weights score.weight of shape {tuple(model.score.weight.shape)}")
    with torch.no_grad():
        model.score.weight.copy_(weight)
