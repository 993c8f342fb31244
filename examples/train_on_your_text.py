"""Trains a tokenizer and a small transformer on a text file, then writes with them.

python examples/train_on_your_text.py notes.txt --steps 300 --prompt "The"
"""

from __future__ import annotations

import argparse

from fastlm import LLM, SamplingParams
from fastlm.training import PRESETS, Progress, TrainingConfig, prepare, train, transformer_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--out", default="run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--prompt", default="\n")
    asked = parser.parse_args()

    dataset = prepare([asked.text], f"{asked.out}-data", vocab_size=asked.vocab_size)
    preset = PRESETS["tiny"]
    model_config = transformer_config(dataset.tokenizer.vocab_size, preset)
    config = TrainingConfig(steps=asked.steps, batch_size=preset.batch_size)

    def show(now: Progress) -> None:
        print(f"\r{now.stage} {now.fraction:4.0%}  loss {now.loss:.2f}", end="", flush=True)

    result = train(model_config, config, dataset, asked.out, on_progress=show)
    print(f"\n{result.bits_per_byte:.2f} bits a byte on text it never saw")
    with LLM(asked.out) as llm:
        for piece in llm.stream([asked.prompt], SamplingParams(max_tokens=100, temperature=0.8)):
            print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
