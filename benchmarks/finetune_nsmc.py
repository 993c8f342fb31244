"""Sentiment of Korean film reviews: fine-tuned from a base of ours, trained from scratch, and by counting n-grams.

    fastlm train --data nsmc/reviews.txt --out base --minutes 30 --preset tiny --context-length 64 --batch-size 32 \\
        --vocab-size 6000
    python -m benchmarks.finetune_nsmc --data nsmc --base base

The first 20,000 reviews of train.tsv are learned, the 5,000 of valid.tsv are asked. All networks have one shape, one
tokenizer and one recipe: two epochs, batches of 32, AdamW at 1e-3 for all weights. The base has read reviews.txt, which
holds no review of valid.tsv and no label. The n-grams are scikit-learn's TF-IDF of 1 to 4 characters within words with
logistic regression, C chosen on a tenth of the training reviews.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastlm._files import write_atomic
from fastlm.model.adapter import LoRAConfig
from fastlm.training import FinetuneConfig, TrainingConfig, finetune, load_base, steps_of
from fastlm.training.config import fast_dtype
from fastlm.training.examples import Labelled, read_labelled

EPOCHS, BATCH_SIZE = 2, 32
RATE, LORA_RATE = 1e-3, 3e-3
CHOICES_OF_C = (0.3, 1.0, 3.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with train.tsv and valid.tsv")
    parser.add_argument("--base", required=True, help="run of fastlm train on the reviews")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "finetuning" / "nsmc.json")
    arguments = parser.parse_args()
    train = read_labelled(arguments.data / "train.tsv")[: arguments.examples]
    valid = read_labelled(arguments.data / "valid.tsv")
    result = json.loads((Path(arguments.base) / "result.json").read_text())
    report: dict[str, Any] = {
        "train": len(train),
        "valid": len(valid),
        "epochs": EPOCHS,
        "threads": torch.get_num_threads(),
        "base": {k: result[k] for k in ("parameters", "tokens", "seconds", "bits_per_byte")},
        "n-grams": n_grams(train, valid),
    }
    print("n-grams", report["n-grams"], flush=True)
    for name in ("from base", "from scratch", "LoRA from base"):
        runs = [network(name, arguments.base, train, valid, seed) for seed in range(arguments.seeds)]
        accuracies = [run["accuracy"] for run in runs]
        report[name] = {"runs": runs, "mean_accuracy": round(statistics.mean(accuracies), 4)}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, json.dumps(report, indent=1) + "\n")
    for name in ("from base", "from scratch", "LoRA from base"):
        print(f"{name:15} {100 * report[name]['mean_accuracy']:.2f} %")


def network(name: str, base: str, train: list[Labelled], valid: list[Labelled], seed: int) -> dict[str, Any]:
    started = time.monotonic()
    start = load_base(base, from_scratch=seed if name == "from scratch" else None)
    steps = steps_of(EPOCHS, len(train), BATCH_SIZE)
    training = TrainingConfig(
        steps=steps,
        batch_size=BATCH_SIZE,
        optimizer="adamw",
        learning_rate=RATE,
        embedding_learning_rate=RATE,
        warmup_steps=round(0.06 * steps),
        decay_fraction=1.0,
        dtype=fast_dtype(),
        evaluations=0,
        checkpoint_seconds=1000,
        seed=seed,
    )
    config = FinetuneConfig("classification")
    if name.startswith("LoRA"):
        config = replace(config, lora=LoRAConfig(16, 32.0))
        training = replace(training, learning_rate=LORA_RATE, embedding_learning_rate=LORA_RATE)
    with tempfile.TemporaryDirectory() as out:
        result = finetune(start, (train, valid), out, config, training)
    run = {
        "seed": seed,
        "accuracy": round(result.metrics["accuracy"], 4),
        "macro_f1": round(result.metrics["macro_f1"], 4),
        "trained_parameters": result.trained_parameters,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(name, run, flush=True)
    return run


def n_grams(train: list[Labelled], valid: list[Labelled]) -> dict[str, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    started = time.monotonic()
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=2, sublinear_tf=True)
    features = vectorizer.fit_transform([example.text for example in train])
    labels = [example.label for example in train]
    cut = len(train) * 9 // 10

    def held_out_accuracy(c: float) -> float:
        model = LogisticRegression(C=c, max_iter=1000).fit(features[:cut], labels[:cut])
        return float(model.score(features[cut:], labels[cut:]))

    best = max(CHOICES_OF_C, key=held_out_accuracy)
    model = LogisticRegression(C=best, max_iter=1000).fit(features, labels)
    accuracy = model.score(vectorizer.transform([e.text for e in valid]), [e.label for e in valid])
    return {"accuracy": round(float(accuracy), 4), "C": best, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
