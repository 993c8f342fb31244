from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm.errors import ConfigError, DataError
from fastlm.model import ModelConfig, Transformer, load, load_classifier, save_model
from fastlm.model.adapter import LoRAConfig
from fastlm.model.classifier import document_start, pack
from fastlm.training import (
    Base,
    FinetuneConfig,
    TokenDataset,
    TrainingConfig,
    finetune,
    load_base,
    merge_adapter,
    prepare,
    steps_of,
)
from fastlm.training.classification import Classification, labels_of
from fastlm.training.examples import Conversation, ExampleOrder, Labelled, Preference
from fastlm.training.instruction import IGNORED, Instruction, answers_of, batch_of
from fastlm.training.log import read_log
from fastlm.training.preference import PreferenceTuning

TRAINING = TrainingConfig(
    steps=30, batch_size=8, optimizer="adamw", learning_rate=5e-3, embedding_learning_rate=5e-3, warmup_steps=3,
    checkpoint_seconds=1000, evaluations=3,
)  # fmt: skip
LORA = LoRAConfig(4, 8.0)


@pytest.fixture
def base(dataset: TokenDataset, tiny: ModelConfig, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(Transformer(tiny), tmp_path / "base", eos_token_id=dataset.eos_token_id)
    dataset.tokenizer.save(tmp_path / "base" / "tokenizer.json")
    return tmp_path / "base"


def reviews(count: int, seed: int = 0) -> list[Labelled]:
    """Texts whose label is one word in them."""
    rng = random.Random(seed)
    words = ["movie", "music", "story", "the", "배우", "and", "연기"]
    made = []
    for i in range(count):
        text = [rng.choice(words) for _ in range(rng.randint(1, 4))]
        text.insert(rng.randrange(len(text) + 1), "good" if i % 2 else "bad")
        made.append(Labelled(" ".join(text), "긍정" if i % 2 else "부정"))
    return made


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]


def stop_after(steps: int):
    calls = iter(range(1, 10_000))
    return lambda: next(calls) >= steps


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_classifier_learns_the_word_that_decides_and_is_loaded_from_its_directory(base, tmp_path, lora) -> None:
    out = tmp_path / "run"
    data = (reviews(200), reviews(60, seed=1))
    training = replace(TRAINING, steps=100)
    result = finetune(load_base(base), data, out, FinetuneConfig("classification", lora=lora), training)
    assert result.metrics["accuracy"] > 0.9
    assert result.metrics["macro_f1"] > 0.9
    assert (result.trained_parameters < result.parameters) == (lora is not None)
    names = {"adapter_config.json", "adapter_model.safetensors"} if lora else {"config.json", "model.safetensors"}
    assert names | {"tokenizer.json", "loss.png", "result.json"} <= {path.name for path in out.iterdir()}
    model = load_classifier(out)
    assert model.labels == ["긍정", "부정"]
    probabilities = model.predict(load_base(base).tokenizer, [example.text for example in data[1]])
    assert probabilities.sum(-1).allclose(torch.ones(60))
    right = [model.labels[i] == e.label for i, e in zip(probabilities.argmax(-1), data[1], strict=True)]
    assert sum(right) / 60 == pytest.approx(result.metrics["accuracy"])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("task", ["classification", "instruction"])
def test_a_run_stopped_at_any_step_goes_on_exactly(base: Path, tmp_path: Path, lora, task: str) -> None:
    data = (reviews(50), reviews(9, 1))
    if task == "instruction":
        data = tuple([Conversation.of(e.text, e.label) for e in part] for part in data)
    config, training = FinetuneConfig(task, lora=lora), replace(TRAINING, steps=9, accumulation=2)
    whole = finetune(load_base(base), data, tmp_path / "whole", config, training)
    for steps in (1, 3):
        stopped = finetune(load_base(base), data, tmp_path / "stopped", config, training, should_stop=stop_after(steps))
        assert stopped.interrupted
        assert not (tmp_path / "stopped" / "result.json").exists()
    assert finetune(load_base(base), data, tmp_path / "stopped", config, training).metrics == whole.metrics
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    with pytest.raises(ConfigError, match="holds a finished run"):
        finetune(load_base(base), data, tmp_path / "whole", config, training)


def test_other_options_data_or_weights_do_not_continue_a_run(base: Path, tmp_path: Path) -> None:
    data = (reviews(50), reviews(9, 1))
    config = FinetuneConfig("classification")
    finetune(load_base(base), data, tmp_path / "run", config, TRAINING, should_stop=stop_after(2))
    for message, changed in (
        ("learning_rate 0.005, and this command asks for 0.001", (data, config, replace(TRAINING, learning_rate=1e-3))),
        ("pooling mean, and this command asks for last", (data, replace(config, pooling="last"), TRAINING)),
        ("unfinished run with data", ((reviews(49), data[1]), config, TRAINING)),
    ):
        with pytest.raises(ConfigError, match=message):
            finetune(load_base(base), changed[0], tmp_path / "run", changed[1], changed[2])
    with pytest.raises(ConfigError, match="unfinished run with base"):
        finetune(load_base(base, from_scratch=7), data, tmp_path / "run", config, TRAINING)


def test_accumulated_parts_give_the_gradients_of_the_whole_batch(base: Path, tmp_path: Path) -> None:
    """The parts' examples and answers differ in number and length, so each part must count by its share."""
    examples = reviews(40)
    conversations = [Conversation.of(e.text, e.label * (1 + i % 3)) for i, e in enumerate(examples)]
    weighted = FinetuneConfig("classification", class_weights=(1.0, 3.0))
    for config, data in ((weighted, examples), (FinetuneConfig("instruction"), conversations)):
        norms = []
        for parts in (1, 3):
            out = tmp_path / f"{config.task}-{parts}"
            training = replace(TRAINING, steps=1, batch_size=7, accumulation=1 if parts == 1 else 7)
            finetune(load_base(base), (data, data[:4]), out, config, training)
            norms.append(read_log(out / "log.jsonl")[0])
        assert norms[1]["loss"] == pytest.approx(norms[0]["loss"], rel=1e-5)
        assert norms[1]["gradient_norm"] == pytest.approx(norms[0]["gradient_norm"], rel=1e-4)


def test_class_weights_are_scikit_learns_and_weigh_the_loss(base: Path) -> None:
    start = load_base(base)
    data = [Labelled("a good one", "b")] * 9 + [Labelled("bad", "a")] * 3
    model = _classifier(start, data)
    objective = Classification(
        model, start.tokenizer, data, data, replace(TRAINING, batch_size=12), files=None, class_weights="balanced"
    )  # type: ignore[arg-type]
    assert objective.class_weights.tolist() == pytest.approx([12 / (2 * 3), 12 / (2 * 9)])
    with torch.no_grad():
        model.score.weight.normal_()
        [part] = objective.parts(0)
        expected = torch.nn.functional.cross_entropy(
            model(part.ids, part.cu_seqlens), part.labels, objective.class_weights
        )
        torch.testing.assert_close(objective.loss(part), expected)
    with pytest.raises(ConfigError, match="class weights must be 2 positive numbers"):
        Classification(model, start.tokenizer, data, data, TRAINING, files=None, class_weights=(1.0,))  # type: ignore[arg-type]


def _classifier(start: Base, data: list[Labelled]):
    from fastlm.model import SequenceClassifier

    return SequenceClassifier(start.model, labels_of(data))


def _instruction(start: Base, data: list[Conversation]) -> Instruction:
    training = replace(TRAINING, batch_size=1)
    return Instruction(start.model, start.tokenizer, data, [], training, files=None)  # type: ignore[arg-type]


def test_the_loss_of_an_answer_is_that_of_its_tokens_alone(base: Path) -> None:
    start = load_base(base)
    conversation = Conversation.of("Good?", "네, it is.")
    [answer] = answers_of(start.tokenizer, conversation)
    assert start.tokenizer.decode(answer.prompt[1:]) == "User: Good?\nAssistant:"
    assert answer.prompt[0] == document_start(start.tokenizer)[0]
    assert start.tokenizer.decode(answer.answer[:-1]) == " 네, it is."
    assert answer.answer[-1] == start.tokenizer.eos_token_id
    objective = _instruction(start, [conversation])
    [part] = objective.parts(0)
    assert [t for t in part.targets.tolist() if t != IGNORED] == answer.answer
    logits = start.model(torch.tensor([[*answer.prompt, *answer.answer]]))[0].log_softmax(-1)
    expected = -logits[len(answer.prompt) - 1 : -1][range(len(answer.answer)), answer.answer].mean()
    torch.testing.assert_close(objective.loss(part), expected, rtol=1e-5, atol=1e-5)


def test_each_answer_of_a_conversation_follows_what_the_model_is_asked_with(base: Path) -> None:
    start = load_base(base)
    messages = [
        {"role": "system", "content": "Brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long"},
    ]
    first, second = answers_of(start.tokenizer, Conversation(tuple(messages)))
    assert start.tokenizer.decode(first.prompt[1:]) == "Brief.\n\nUser: Hi\nAssistant:"
    assert start.tokenizer.decode(second.prompt[1:]).endswith("Assistant: Hello\nUser: Bye\nAssistant:")
    with pytest.raises(DataError, match="no message of the assistant"):
        answers_of(start.tokenizer, Conversation(tuple(messages[:2])))


def test_a_long_prompt_loses_its_beginning_and_keeps_its_answer(base: Path) -> None:
    start = load_base(base)
    data = [Conversation.of("very " * 200 + "last", "the answer")]
    objective = _instruction(start, data)
    [part] = objective.parts(0)
    assert len(part.ids) <= start.model.config.context_length
    kept = [t for t in part.targets.tolist() if t != IGNORED]
    assert start.tokenizer.decode(kept[:-1]) == " the answer"


def test_an_instruction_model_learns_its_answers_by_heart(base: Path, tmp_path: Path) -> None:
    from fastlm.inference import LLM, SamplingParams

    pairs = {"capital of Korea": "Seoul", "capital of France": "Paris", "수도는": "서울"}
    data = [Conversation.of(*pair) for pair in pairs.items()]
    training = replace(TRAINING, steps=150, batch_size=3)
    result = finetune(load_base(base), (data, data), tmp_path / "run", FinetuneConfig("instruction"), training)
    assert result.metrics["loss"] < 0.05
    with LLM(tmp_path / "run") as llm:
        for prompt, response in pairs.items():
            asked = llm.chat_prompt([{"role": "user", "content": prompt}])
            [completion] = llm.generate([asked.prompt], SamplingParams(max_tokens=20, temperature=0.0))
            assert completion.text == f" {response}"
            assert completion.finish_reason == "eos"


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_more_text_lowers_the_loss_of_a_language_model(base: Path, text_file: Path, tmp_path: Path, lora) -> None:
    start = load_base(base)
    data = prepare([text_file], tmp_path / "data", tokenizer=start.tokenizer)
    result = finetune(start, data, tmp_path / "run", FinetuneConfig("lm", lora=lora), replace(TRAINING, steps=40))
    first = losses(tmp_path / "run")[0]
    assert first > 5.5
    assert result.metrics["loss"] < first - (0.02 if lora else 1.0)  # an adapter cannot move the random embeddings
    assert load(tmp_path / "run").model.config == start.model.config


def test_text_of_another_tokenizer_is_refused(base: Path, text_file: Path, tmp_path: Path) -> None:
    other = prepare([text_file], tmp_path / "data", vocab_size=300)
    with pytest.raises(DataError, match="another tokenizer than the base's"):
        finetune(load_base(base), other, tmp_path / "run", FinetuneConfig("lm"), TRAINING)
    assert not (tmp_path / "run").exists()


def test_base_and_adapter_are_merged_on_request(base: Path, tmp_path: Path) -> None:
    config = FinetuneConfig("classification", lora=LORA)
    finetune(load_base(base), (reviews(50), []), tmp_path / "run", config, TRAINING)
    merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    rows = [[1, 2, 3], [7] * 20]
    with torch.no_grad():
        expected = load_classifier(tmp_path / "run")(*pack(rows))
        torch.testing.assert_close(load_classifier(tmp_path / "merged")(*pack(rows)), expected)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"] == {}


def test_labels_that_do_not_fit_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    good = reviews(10)
    with pytest.raises(DataError, match="label '중립' is none of those that the model learns: 긍정, 부정"):
        finetune(
            load_base(base), (good, [Labelled("x", "중립")]), tmp_path / "a", FinetuneConfig("classification"), TRAINING
        )
    with pytest.raises(DataError, match="label '긍정' is none of 0, 1"):
        finetune(
            load_base(base), (good, []), tmp_path / "b", FinetuneConfig("classification", labels=("0", "1")), TRAINING
        )
    with pytest.raises(DataError, match="every example has the label 'x'"):
        labels_of([Labelled("a", "x")] * 3)
    assert labels_of([Labelled("a", "10"), Labelled("a", "9"), Labelled("a", "-1")]) == ["-1", "9", "10"]
    with pytest.raises(DataError, match="these are no examples for the task instruction"):
        finetune(load_base(base), (good, []), tmp_path / "c", FinetuneConfig("instruction"), TRAINING)
    with pytest.raises(DataError, match="no examples to learn from"):
        finetune(load_base(base), ([], []), tmp_path / "d", FinetuneConfig("classification"), TRAINING)
    assert not any((tmp_path / name).exists() for name in "abcd")


def test_every_epoch_reads_each_example_once_in_an_order_of_its_own() -> None:
    order = ExampleOrder(10, 4, seed=3)
    read = [i for step in range(5) for i in order.batch(step)]
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10] != read[10:]
    assert ExampleOrder(10, 4, seed=3).batch(3) == read[12:16]
    assert steps_of(2, 1000, 32) == 62


def test_metrics_are_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    from fastlm.training.metrics import accuracy, macro_f1

    for _ in range(20):
        expected, predicted = torch.randint(0, 4, (30,)), torch.randint(0, 5, (30,)).clamp(max=3)
        assert accuracy(predicted, expected) == pytest.approx(sklearn.accuracy_score(expected, predicted))
        f1 = sklearn.f1_score(expected, predicted, labels=range(5), average="macro", zero_division=0)
        assert macro_f1(predicted, expected, 5) == pytest.approx(f1)


def test_rows_of_a_batch_do_not_see_one_another(base: Path) -> None:
    start = load_base(base)
    rows = [(torch.randint(0, 300, (n,)).int().numpy(),) * 2 for n in (3, 9, 1)]
    batch = batch_of(rows, 1, "cpu")
    together = start.model.loss(batch.ids[None], batch.targets[None], "none", cu_seqlens=batch.cu_seqlens)[0]
    alone = [start.model.loss(b.ids[None], b.targets[None], "none")[0] for b in (batch_of([r], 1, "cpu") for r in rows)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


PREFERENCES = [Preference(f"say {i}", "good", "bad") for i in range(12)]


def test_the_loss_of_preferences_is_the_papers(base: Path) -> None:
    start = load_base(base)
    training = replace(TRAINING, batch_size=3)
    objective = PreferenceTuning(start.model, start.tokenizer, PREFERENCES, [], training, files=None, beta=0.3)  # type: ignore[arg-type]
    [part] = objective.parts(0)
    torch.testing.assert_close(objective.loss(part), torch.tensor(2.0).log())  # the model is as it was

    def logprob(model: Transformer, prompt: str, answer: str) -> torch.Tensor:
        [row] = answers_of(start.tokenizer, Conversation.of(prompt, answer))
        logits = model(torch.tensor([[*row.prompt, *row.answer]]))[0].log_softmax(-1)
        return logits[len(row.prompt) - 1 : -1][range(len(row.answer)), row.answer].sum()

    before = load_base(base).model
    with torch.no_grad():
        for parameter in start.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    expected = 0.0
    for i in objective.order.batch(0):
        example = PREFERENCES[i]
        gains = [
            logprob(start.model, example.prompt, answer) - logprob(before, example.prompt, answer)
            for answer in (example.chosen, example.rejected)
        ]
        expected -= torch.nn.functional.logsigmoid(0.3 * (gains[0] - gains[1])) / 3
    torch.testing.assert_close(objective.loss(part), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_preferred_answers_become_likelier_and_a_stopped_run_goes_on_exactly(base: Path, tmp_path: Path, lora) -> None:
    config = FinetuneConfig("preference", lora=lora)
    data = (PREFERENCES, PREFERENCES[:4])
    result = finetune(load_base(base), data, tmp_path / "whole", config, TRAINING)
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["loss"] < 0.69
    assert finetune(load_base(base), data, tmp_path / "run", config, TRAINING, should_stop=stop_after(7)).interrupted
    finetune(load_base(base), data, tmp_path / "run", config, TRAINING)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
