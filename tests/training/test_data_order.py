from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.errors import ConfigError, DataError
from fastlm.model import ModelConfig, RNNConfig, Transformer
from fastlm.tokenizer import BpeTrainer
from fastlm.training import MixedDataset, TokenDataset, TrainingConfig, evaluate, prepare, train
from fastlm.training.data import TokenSplit, WindowSampler, document_offsets


def counting(n: int) -> TokenSplit:
    return TokenSplit([np.arange(n, dtype=np.uint32)], n)


def test_a_batch_depends_on_the_seed_and_the_step_alone() -> None:
    split = counting(1000)
    forward = WindowSampler(split, 16, 4, seed=3)
    batches = [forward.batch(step) for step in range(40)]
    for step in (39, 0, 17, 38):
        inputs, targets = WindowSampler(split, 16, 4, seed=3).batch(step)
        assert inputs.equal(batches[step][0])
        assert targets.equal(batches[step][1])
    assert not WindowSampler(split, 16, 4, seed=4).batch(0)[0].equal(batches[0][0])


def test_targets_are_the_tokens_after_the_inputs() -> None:
    inputs, targets = WindowSampler(counting(500), 16, 8, seed=0).batch(5)
    assert targets.equal(inputs + 1)
    assert inputs.diff().eq(1).all()


@pytest.mark.parametrize("tokens", [17, 18, 33, 160, 161, 1000])
def test_an_epoch_reads_each_window_once_and_the_next_epoch_in_another_order(tokens: int) -> None:
    sampler = WindowSampler(counting(tokens), 16, 1, seed=1)
    epochs = [
        [int(sampler.batch(epoch * sampler.windows + i)[0][0, 0]) for i in range(sampler.windows)] for epoch in (0, 1)
    ]
    for starts in epochs:
        assert sorted(np.diff(sorted(starts)).tolist()) == [16] * (sampler.windows - 1)
        assert max(starts) + 16 < tokens
    assert sampler.windows >= max(1, (tokens - 1) // 16 - 1)
    if sampler.windows > 3:
        assert epochs[0] != epochs[1]


def test_a_context_longer_than_the_data_is_refused_with_both_numbers() -> None:
    WindowSampler(counting(17), 16, 1, seed=0).batch(0)
    with pytest.raises(DataError, match="16 tokens: too few for a context of 16"):
        WindowSampler(counting(16), 16, 1, seed=0)


def datasets(tmp_path: Path, sizes: tuple[int, ...]) -> list[TokenDataset]:
    tokenizer = BpeTrainer(280, special_tokens=["<|endoftext|>"]).train_from_iterator(["some text " * 50])
    made = []
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text("".join(f"text {i} " for _ in range(size)) + "\n")
        made.append(prepare([tmp_path / f"{i}.txt"], tmp_path / f"d{i}", tokenizer=tokenizer))
    return made


def test_a_mixture_holds_its_weights_and_reads_each_part_in_its_own_order(tmp_path: Path) -> None:
    parts = datasets(tmp_path, (300, 900))
    mixed = MixedDataset(parts, [3.0, 1.0])
    sampler = mixed.sampler(16, 4, seed=5)
    rows = torch.cat([sampler.batch(step)[0] for step in range(250)])
    digits = {int(parts[i].tokenizer.encode(str(i))[0]): i for i in range(2)}
    source = [digits[next(t for t in row.tolist() if t in digits)] for row in rows]
    assert source.count(0) == 750
    assert 0 < source[:40].count(1) < 25  # mixed, not one after the other
    alone = parts[1].sampler(16, 1, seed=6)
    mine = rows[[i for i, s in enumerate(source) if s == 1]]
    assert mine.equal(torch.cat([alone.batch(i)[0] for i in range(250)]))
    assert mixed.sampler(16, 4, seed=5).batch(249)[0].equal(rows[-4:])
    assert len(mixed.valid) == sum(len(part.valid) for part in parts)
    assert mixed.fingerprint != MixedDataset(parts, [1.0, 1.0]).fingerprint


def test_mixtures_that_make_no_sense_are_refused(tmp_path: Path, dataset: TokenDataset) -> None:
    parts = datasets(tmp_path, (300, 300))
    with pytest.raises(ConfigError, match="a positive weight for each of 2 datasets"):
        MixedDataset(parts, [1.0])
    with pytest.raises(ConfigError, match="a positive weight for each of 2 datasets"):
        MixedDataset(parts, [1.0, 0.0])
    with pytest.raises(DataError, match="made with another tokenizer than"):
        MixedDataset([parts[0], dataset], [1.0, 1.0])


def test_documents_of_a_stream_are_found_in_its_rows() -> None:
    rows = torch.tensor([[5, 0, 7, 7], [0, 0, 3, 3], [4, 4, 4, 0]])
    assert document_offsets(rows, eos_token_id=0).tolist() == [0, 1, 4, 5, 8, 11, 12]


def test_rows_of_documents_have_the_losses_of_each_document_by_itself(tmp_path: Path) -> None:
    rows = [" ".join(f"w{i * j % 17}" for j in range(1 + i % 9)) for i in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(dict.fromkeys(rows)))
    dataset = prepare([tmp_path / "a.txt"], tmp_path / "out", vocab_size=280, by_line=True)
    model = Transformer(
        ModelConfig(
            vocab_size=280, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
            intermediate_size=32, context_length=64,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stream = torch.from_numpy(dataset.train.read(0, 193))
    inputs, targets = stream[:-1].view(3, 64), stream[1:].view(3, 64)
    offsets = document_offsets(inputs, dataset.eos_token_id)
    packed = model.loss(inputs, targets, "none", cu_seqlens=offsets).flatten()
    for a, b in itertools.pairwise(offsets.tolist()):
        alone = model.loss(inputs.flatten()[None, a:b], targets.flatten()[None, a:b], "none")[0]
        torch.testing.assert_close(packed[a:b], alone, rtol=1e-5, atol=1e-5)
    result = evaluate(model, dataset.valid, dataset.eos_token_id, separate_documents=True)
    ids = dataset.valid.read(0, len(dataset.valid))
    starts = [*np.flatnonzero(ids == dataset.eos_token_id), len(ids)]
    nats = 0.0
    for a, b in itertools.pairwise(starts):  # each of them fits a window, but for the two that a window cuts
        document = torch.from_numpy(ids[a:b])[None]
        nats += model.loss(document[:, :-1], document[:, 1:], "sum").item()
    assert result.loss * result.tokens == pytest.approx(nats, rel=0.02)
    assert result.tokens == len(ids) - len(starts) + 1


def test_a_run_that_keeps_documents_apart_trains_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"line {i} of the text" for i in range(400)))
    dataset = prepare([tmp_path / "a.txt"], tmp_path / "data", vocab_size=280, by_line=True)
    model = ModelConfig(
        vocab_size=280, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
        context_length=32,
    )  # fmt: skip
    config = TrainingConfig(steps=20, batch_size=4, warmup_steps=2, separate_documents=True)
    result = train(model, config, dataset, tmp_path / "run")
    assert result.bits_per_byte is not None
    assert result.bits_per_byte < 4
    with pytest.raises(ConfigError, match="cannot keep the documents of a row apart"):
        train(RNNConfig(280, 16, 1, 32, "gru"), config, dataset, tmp_path / "rnn")
