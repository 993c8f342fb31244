"""Teaches Gemma 3 270M to tell good from bad reviews by a LoRA adapter, and asks it about one it has not seen.

pip install "fastlm[gemma]"
python examples/finetune_gemma.py reviews.tsv --steps 100

The file has the columns label and text.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from fastlm import Tokenizer
from fastlm.model import load_classifier
from fastlm.model.adapter import LoRAConfig
from fastlm.training import FinetuneConfig, Progress, TrainingConfig, finetune, load_base
from fastlm.training.examples import Labelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path)
    parser.add_argument("--base", default="gemma3-270m")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ask", default="이 영화는 정말 재미있었다")
    asked = parser.parse_args()

    with asked.reviews.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        examples = [Labelled(row["text"], row["label"]) for row in rows]
    train, valid = examples[:-200], examples[-200:]

    def show(now: Progress) -> None:
        print(f"\r{now.stage} {now.fraction:4.0%}  loss {now.loss:.2f}", end="", flush=True)

    config = FinetuneConfig("classification", lora=LoRAConfig(rank=8, alpha=16), max_length=64)
    training = TrainingConfig(
        steps=asked.steps, batch_size=16, optimizer="adamw", learning_rate=5e-4, embedding_learning_rate=5e-4
    )
    base = load_base(asked.base, keep_quantized=True)
    result = finetune(base, (train, valid), asked.out, config, training, on_progress=show)
    print(f"\n{result.trained_parameters:,} numbers were trained; {result.metrics}")

    model = load_classifier(asked.out).eval()
    chances = model.predict(Tokenizer.from_file(asked.out / "tokenizer.json"), [asked.ask])[0].tolist()
    print(asked.ask, {label: round(p, 2) for label, p in zip(model.labels, chances, strict=True)})


if __name__ == "__main__":
    main()
