"""RNN, LSTM and GRU language models with the transformer's interface, to compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastlm.errors import ConfigError
from fastlm.model.config import require_positive
from fastlm.nn import LinearCrossEntropyLoss

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class RNNConfig:
    """A recurrent language model; the output layer is the embedding table. `cell` is "rnn", "lstm" or "gru"."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int  # tokens of one training window; generation has no limit
    cell: str = "lstm"

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "num_layers", "context_length")
        if self.cell not in CELLS:
            raise ConfigError(f"cell must be one of {', '.join(CELLS)}, not {self.cell!r}")

    def to_dict(self, eos_token_id: int | None = None) -> dict[str, Any]:
        return {
            "model_type": f"fastlm_{self.cell}",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "max_position_embeddings": self.context_length,
            "eos_token_id": eos_token_id,
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> RNNConfig:
        try:
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                context_length=config["max_position_embeddings"],
                cell=str(config["model_type"]).removeprefix("fastlm_"),
            )
        except KeyError as error:
            raise ConfigError(f"config.json lacks {error.args[0]!r}") from None


class RNNState:
    """What the network remembers of each row: hidden (and, in an LSTM, cell) state, `(num_layers, batch, hidden_size)`.

    `capacity` is None: the memory does not grow, so there is no longest sequence.
    """

    capacity = None

    def __init__(self, tensors: tuple[Tensor, ...], lengths: Tensor) -> None:
        self.tensors = tensors
        self.lengths = lengths

    def row(self, index: int) -> RNNState:
        """The state of one row, sharing memory."""
        return RNNState(tuple(t[:, index : index + 1] for t in self.tensors), self.lengths[index : index + 1])

    def select(self, rows: list[int]) -> RNNState:
        """The states of some rows, in that order, in memory of their own."""
        return RNNState(tuple(t[:, rows] for t in self.tensors), self.lengths[rows])

    def replace(self, tensors: tuple[Tensor, ...], num_tokens: int) -> None:
        for mine, new in zip(self.tensors, tensors, strict=True):
            mine.copy_(new)
        self.lengths += num_tokens

    def clear(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()
        self.lengths.zero_()


class RNNLanguageModel(nn.Module):
    """Embedding, Elman, LSTM or GRU layers, output layer tied to the embedding.

    Elman 1990 (RNN); Hochreiter and Schmidhuber 1997 (LSTM); Cho et al. 2014 (GRU).
    """

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rnn = CELLS[config.cell](config.hidden_size, config.hidden_size, config.num_layers, batch_first=True)
        self.loss_function = LinearCrossEntropyLoss()
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)

    @property
    def output_weight(self) -> Tensor:
        return self.embed_tokens.weight

    def hidden_states(self, input_ids: Tensor, cache: RNNState | None = None) -> Tensor:
        """`(batch, seq)` int64 -> `(batch, seq, hidden_size)`; with `cache`, goes on from its state and updates it."""
        hidden = self.embed_tokens(input_ids)
        if cache is None:
            return self.rnn(hidden)[0]
        state = tuple(t.contiguous() for t in cache.tensors)
        out, new = self.rnn(hidden, state if len(state) > 1 else state[0])
        cache.replace(new if isinstance(new, tuple) else (new,), input_ids.shape[1])
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """What `hidden_states` gave, `(..., hidden_size)` -> `(..., vocab_size)`."""
        return nn.functional.linear(hidden, self.output_weight)

    def forward(self, input_ids: Tensor, cache: RNNState | None = None) -> Tensor:
        """`(batch, seq)` int64 -> logits `(batch, seq, vocab_size)`."""
        return self.logits(self.hidden_states(input_ids, cache))

    def loss(self, input_ids: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """Next-token cross-entropy in nats; `targets` `(batch, seq)`, -100 where none counts.

        A scalar, or like `targets` with reduction="none".
        """
        return self.loss_function(self.hidden_states(input_ids), self.output_weight, targets, reduction)

    def new_cache(self, batch_size: int) -> RNNState:
        c = self.config
        shape = (c.num_layers, batch_size, c.hidden_size)
        count = 2 if c.cell == "lstm" else 1
        zeros = tuple(torch.zeros(shape, device=self.embed_tokens.weight.device) for _ in range(count))
        return RNNState(zeros, torch.zeros(batch_size, dtype=torch.int64))
