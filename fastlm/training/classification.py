"""Labels of texts: the objective that trains a classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastlm.errors import ConfigError, DataError
from fastlm.model.classifier import TOKENS_AT_ONCE, SequenceClassifier, groups, pack
from fastlm.tokenizer import Tokenizer
from fastlm.training.config import TrainingConfig
from fastlm.training.distributed import World
from fastlm.training.examples import ExampleOrder, Labelled, spread
from fastlm.training.metrics import accuracy, macro_f1
from fastlm.training.model_files import ModelFiles
from fastlm.training.objective import Objective, Score, check_divisible

PARTIAL_EXAMPLES = 500

ClassWeights = Literal["balanced"] | tuple[float, ...] | None


class Batch(NamedTuple):
    ids: Tensor  # (tokens,) int64
    cu_seqlens: Tensor
    labels: Tensor  # (texts,) int64
    total_weight: float  # of the whole step's labels


class Classification(Objective[Batch]):
    """Cross-entropy of the label, each class by its weight."""

    partial_size = PARTIAL_EXAMPLES

    def __init__(
        self,
        model: SequenceClassifier,
        tokenizer: Tokenizer,
        train: Sequence[Labelled],
        valid: Sequence[Labelled],
        config: TrainingConfig,
        *,
        files: ModelFiles,
        class_weights: ClassWeights = None,
        max_length: int | None = None,
        world: World | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model: SequenceClassifier = model
        self.files = files
        self.world = world or World()
        self.accumulation = config.accumulation
        check_divisible(config, self.world)
        self.device = device
        self.rows, self.labels = _encoded(model, tokenizer, train, max_length)
        self.valid_rows, self.valid_labels = _encoded(model, tokenizer, valid, max_length)
        self.class_weights = _class_weights(class_weights, self.labels, len(model.labels)).to(device)
        self.order = ExampleOrder(len(train), config.batch_size, config.seed)
        self.validation_size = len(valid)
        self.tokens_per_step = config.batch_size * sum(map(len, self.rows)) // len(self.rows)

    def parts(self, step: int) -> list[Batch]:
        indices = self.order.batch(step)
        total = self.class_weights[self.labels[indices]].sum().item()
        chunks = [chunk.tolist() for chunk in np.array_split(self.world.mine(indices), self.accumulation)]
        return [
            Batch(*pack([self.rows[i] for i in chunk], self.device), self.labels[chunk].to(self.device), total)
            for chunk in chunks
        ]

    def loss(self, part: Batch) -> Tensor:
        logits = self.model(part.ids, part.cu_seqlens).float()
        losses = functional.cross_entropy(logits, part.labels, self.class_weights, reduction="sum")
        return losses / part.total_weight

    @torch.no_grad()
    def evaluate(self, size: int, should_stop: Callable[[], bool] | None = None) -> Score | None:
        chosen = spread(len(self.valid_rows), size)
        logits = []
        for group in groups([self.valid_rows[i] for i in chosen], TOKENS_AT_ONCE):
            if should_stop is not None and should_stop():
                return None
            logits.append(self.model(*pack(group, self.device)).float().cpu())
        expected, scores = self.valid_labels[chosen], torch.cat(logits)
        predicted = scores.argmax(-1)
        metrics = {
            "loss": functional.cross_entropy(scores, expected).item(),
            "accuracy": accuracy(predicted, expected),
            "macro_f1": macro_f1(predicted, expected, len(self.model.labels)),
        }
        return Score(1.0 - metrics["accuracy"], metrics, len(chosen) < len(self.valid_rows))


def labels_of(train: Sequence[Labelled], given: Sequence[str] | None = None) -> list[str]:
    """The names of the classes in order: those given, or all that occur; by number where all are numbers.

    Raises:
        DataError: a label that is not among those given, or fewer than two different ones.
    """
    found = {example.label for example in train}
    if given is not None:
        strange = sorted(found - set(given))
        if strange:
            raise DataError(f"label {strange[0]!r} is none of {', '.join(given)}")
        return list(given)
    if len(found) < 2:
        raise DataError(f"every example has the label {next(iter(found))!r}; a classifier needs two or more")
    numbers = all(label.removeprefix("-").isdecimal() for label in found)
    return sorted(found, key=int) if numbers else sorted(found)


def _encoded(
    model: SequenceClassifier, tokenizer: Tokenizer, examples: Sequence[Labelled], max_length: int | None
) -> tuple[list[np.ndarray], Tensor]:
    number = {label: i for i, label in enumerate(model.labels)}
    strange = next((example.label for example in examples if example.label not in number), None)
    if strange is not None:
        raise DataError(f"label {strange!r} is none of those that the model learns: {', '.join(model.labels)}")
    rows = model.encode(tokenizer, [example.text for example in examples])
    return [np.array(row[:max_length], dtype=np.int32) for row in rows], torch.tensor(
        [number[example.label] for example in examples], dtype=torch.int64
    )


def _class_weights(wanted: ClassWeights, labels: Tensor, num_labels: int) -> Tensor:
    """`(num_labels,)` fp32. "balanced": examples / (labels · examples of the label), as in scikit-learn."""
    if wanted is None:
        return torch.ones(num_labels)
    if wanted == "balanced":
        counts = Counter(labels.tolist())
        return torch.tensor([len(labels) / (num_labels * max(1, counts[i])) for i in range(num_labels)])
    if len(wanted) != num_labels or not all(weight > 0 for weight in wanted):
        raise ConfigError(f"class weights must be {num_labels} positive numbers, one for each label, not {wanted}")
    return torch.tensor(wanted)
