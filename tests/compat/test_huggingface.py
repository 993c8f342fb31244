"""When attention of a Hugging Face model needs a mask, and which."""

from __future__ import annotations

import pytest
import torch

from fastlm.compat.huggingface import attention_mask_or_none

masking_utils = pytest.importorskip("transformers.masking_utils")

WINDOW = masking_utils.sliding_window_causal_mask_function(5)


@pytest.mark.parametrize("sizes", [(7, 7, 0, 0), (1, 9, 8, 0), (3, 9, 6, 0), (3, 8, 10, 5)])
@pytest.mark.parametrize("function", [masking_utils.causal_mask_function, WINDOW])
def test_causal_layers_and_windows_need_no_mask(sizes: tuple[int, ...], function: object) -> None:
    every = torch.ones(2, 20, dtype=torch.bool)
    for mask in (None, every):
        assert attention_mask_or_none(2, *sizes, mask_function=function, attention_mask=mask, local_size=5) is None


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((4, 9, 2, 0), {}),  # a cache of fixed size, of which two are filled
        ((7, 7, 0, 0), {"attention_mask": torch.tensor([[True] * 7, [False] * 3 + [True] * 4])}),
        ((7, 7, 0, 0), {"allow_is_causal_skip": False}),
        ((7, 7, 0, 0), {"mask_function": WINDOW, "allow_is_causal_skip": False}),
        (
            (7, 7, 0, 0),
            {"mask_function": masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64))},
        ),
        ((7, 7, 0, 0), {"mask_function": masking_utils.sliding_window_bidirectional_mask_function(3), "local_size": 3}),
    ],
)
def test_other_masks_are_transformers_as_a_bias(sizes: tuple[int, ...], options: dict) -> None:
    bias = attention_mask_or_none(2, *sizes, dtype=torch.bfloat16, allow_is_bidirectional_skip=False, **options)
    expected = masking_utils.sdpa_mask(2, *sizes, **(options | {"allow_is_causal_skip": False}))
    assert bias is not None
    assert bias.dtype == torch.bfloat16
    assert torch.equal(bias == 0, expected)
    assert torch.equal(bias == -torch.inf, ~expected)


def test_layers_that_see_both_ways_need_no_mask_unless_in_a_window() -> None:
    both = masking_utils.bidirectional_mask_function
    options = {"mask_function": both, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert attention_mask_or_none(2, 7, 7, **options) is None
    assert attention_mask_or_none(2, 7, 7, **options, local_size=3) is not None
