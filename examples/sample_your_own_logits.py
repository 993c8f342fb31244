"""Draws tokens from logits that come from anywhere, here from counts of which letter follows which in a text.

python examples/sample_your_own_logits.py --text "banana bandana" --temperature 0.7
"""

from __future__ import annotations

import argparse

import torch

from fastlm.ops import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="the theme of the thesis is that these things then thin out ")
    parser.add_argument("--length", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    letters = sorted(set(asked.text))
    number = {letter: i for i, letter in enumerate(letters)}
    counts = torch.zeros(len(letters), len(letters))
    for before, after in zip(asked.text, asked.text[1:] + asked.text[0], strict=True):
        counts[number[before], number[after]] += 1
    logits = counts.log()  # log of a count; -inf where nothing was seen, which is never drawn

    at = number[asked.text[0]]
    written = [letters[at]]
    for position in range(asked.length):
        drawn = sample(
            logits[at : at + 1], temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed, position=position
        )
        at = int(drawn.ids)
        written.append(letters[at])
    print("".join(written))


if __name__ == "__main__":
    main()
