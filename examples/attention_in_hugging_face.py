"""Puts fastlm's attention into a Hugging Face model: the same logits, and the time of a training step with each.

python examples/attention_in_hugging_face.py --length 512
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers

from fastlm.compat.huggingface import register_attention


def step_seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    model(input_ids=ids, labels=ids).loss.backward()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    asked = parser.parse_args()

    register_attention()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(1000, (2, asked.length))
    logits, seconds = {}, {}
    for implementation in ("eager", "sdpa", "fastlm"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(input_ids=ids).logits
        seconds[implementation] = step_seconds(model, ids)
    for implementation, value in logits.items():
        apart = (value - logits["eager"]).abs().max()
        print(f"{implementation:7} {seconds[implementation] * 1e3:7.1f} ms a step, at most {apart:.1e} from eager")


if __name__ == "__main__":
    main()
