from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastlm.cli.app import app
from fastlm.errors import ConfigError, DataError
from fastlm.inference import LLM, SamplingParams
from fastlm.model import ModelConfig, Transformer, load, load_classifier, save_model
from fastlm.tokenizer import BpeTrainer
from tests.training.conftest import one_thread  # noqa: F401 (fixture)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    trainer = BpeTrainer(300, special_tokens=["<|endoftext|>"])
    tokenizer = trainer.train_from_iterator(["the movie was good and bad, 정말 좋았다 그리고 나빴다\n" * 50])
    torch.manual_seed(1)
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
            intermediate_size=32, context_length=48, qk_norm=True,
        )
    )  # fmt: skip
    save_model(model, tmp_path / "base", eos_token_id=tokenizer.eos_token_id)
    tokenizer.save(tmp_path / "base" / "tokenizer.json")
    return tmp_path / "base"


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.tsv"
    rows = [f"{i % 2}\tmovie {i} was {'good' if i % 2 else 'bad'}" for i in range(60)]
    path.write_text("label\ttext\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["finetune", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_file_of_labels_becomes_a_classifier(base: Path, reviews: Path, tmp_path: Path) -> None:
    options = ["--base", base, "--data", reviews, "--task", "classification", "--out", tmp_path / "run", "--lr", 0.01]
    said = json.loads(run(*options, "--epochs", 15, "--json"))
    assert said["task"] == "classification"
    assert not said["interrupted"]
    assert said["metrics"]["accuracy"] > 0.8
    assert load_classifier(tmp_path / "run").labels == ["0", "1"]
    with pytest.raises(ConfigError, match="holds a finished run"):
        run(*options, "--epochs", 15)
    text = run(*options, "--epochs", 1, "--overwrite")
    assert "validation: loss" in text
    assert "accuracy" in text


def test_an_adapter_is_written_merged_and_generates(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"question": f"say {i}", "answer": "good"} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    run(
        "--base", base, "--data", data, "--task", "instruction", "--out", out, "--lora", 2, "--merge", "--steps", 3,
        "--prompt-column", "question", "--response-column", "answer",
    )  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4.0, str(base))
    ids = torch.randint(0, 300, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(load(out).model(ids), load(out / "merged").model(ids), rtol=1e-4, atol=1e-4)
    result = CliRunner().invoke(app, ["generate", "--checkpoint", str(out), "--prompt", "say", "--max-tokens", "3"])
    assert result.exit_code == 0, result.output


def test_pairs_of_sentences_in_two_columns_of_a_table_are_learned_as_a_translation(base: Path, tmp_path: Path) -> None:
    pairs = {"좋았다": "good", "나빴다": "bad", "정말 좋았다": "was good", "정말 나빴다": "was bad"}
    for name, rows in (("train.tsv", list(pairs.items()) * 8), ("valid.tsv", list(pairs.items()))):
        (tmp_path / name).write_text("ko\ten\n" + "".join(f"{ko}\t{en}\n" for ko, en in rows), encoding="utf-8")
    options = ["--base", base, "--data", tmp_path / "train.tsv", "--valid", tmp_path / "valid.tsv", "--lr", 0.02]
    options += ["--task", "instruction", "--prompt-column", "ko", "--response-column", "en", "--epochs", 30]
    said = json.loads(run(*options, "--out", tmp_path / "run", "--json"))
    assert said["steps"] == 60
    assert said["metrics"]["loss"] < 0.2  # what is learned is asked
    with LLM(tmp_path / "run", memory=4 << 20) as llm:
        prompts = [llm.chat_prompt([{"role": "user", "content": ko}]).prompt for ko in pairs]
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
    assert [answer.text.strip() for answer in answers] == list(pairs.values())


def test_text_goes_on_training_the_base(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the movie was good and bad, 정말 좋았다\n" * 200, encoding="utf-8")
    out = tmp_path / "run"
    said = json.loads(
        run("--base", base, "--data", tmp_path / "text.txt", "--task", "lm", "--out", out, "--steps", 3, "--json")
    )
    assert said["metrics"].keys() == {"loss", "bits_per_byte", "perplexity"}
    assert load(out).model.config == load(base).model.config


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--epochs", 1, "--steps", 2], ConfigError, "one of --epochs, --steps and --minutes"),
        (["--merge"], ConfigError, "give --lora"),
        (["--lora", 0], ConfigError, "rank of LoRA"),
        (["--class-weights", "a,b"], ConfigError, "--class-weights 'a,b'"),
        (["--text-column", "review"], DataError, "line 2: no 'review', but 'label', 'text'"),
        (["--labels", "0,2"], DataError, "label '1' is none of"),
        (["--data", "missing.tsv"], DataError, "missing.tsv does not exist"),
        (["--max-length", 1], ConfigError, "max_length must be at least 2"),
    ],
)
def test_options_and_data_that_make_no_sense_are_one_line_and_leave_nothing(
    base: Path, reviews: Path, tmp_path: Path, options: list, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(
            "--base", base, "--data", reviews, "--task", "classification", "--out", tmp_path / "run", *options
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
