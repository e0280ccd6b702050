"""Attention masks of prefixes and candidates."""

from __future__ import annotations

import pytest
import torch

from mavis.critics.trunk.kv_cache import StepMask, prefix_mask


def test_mask_shows_earlier_tokens_and_the_candidate_itself() -> None:
    """Two tokens after one of padding; the last is read, and two candidates with a window of two."""
    seen = prefix_mask(torch.tensor([[False, True, True]]), 2, 2, None, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]
    seen = prefix_mask(torch.tensor([[False, True, True]]), 3, 2, 2, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],  # padding sees itself, and nobody sees it
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("window", [None, 1, 2, 5])
def test_growing_mask_equals_one_built_from_scratch(window: int | None) -> None:
    mask = StepMask(window)
    for length in range(4, 150):
        is_token = torch.arange(length) >= torch.tensor([0, 3])[:, None]
        candidates = 3 if length < 40 else 1
        for new in (1, 0):
            expected = prefix_mask(is_token, new, candidates, window, torch.float32)
            assert torch.equal(mask.mask(is_token, new, candidates, torch.float32), expected)
        if length == 20:
            mask.select(torch.tensor([0, 1]))
