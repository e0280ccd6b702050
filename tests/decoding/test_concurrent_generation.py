"""Several generations at once: threads on one policy, and critics on several policies."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch

from tests.decoding.steps import LAM, ByHand, Inputs, MakeCritic, Seen, expect_tilted, processed, tilt_for


def test_threads_on_one_policy_have_a_memory_each(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    critic = make_critic(llama, **either)
    ways: list[tuple[Inputs, dict[str, Any]]] = [
        (prompts, {"do_sample": False, "num_beams": 2}),
        (prompts, {"do_sample": False, "use_cache": False}),
        ({name: tensor[1:2] for name, tensor in prompts.items()}, {"do_sample": False}),
        ({name: tensor[2:] for name, tensor in prompts.items()}, {"do_sample": False}),
    ]
    results: dict[int, Seen] = {}
    with critic.attach(llama):
        shared = tilt_for(critic)
        threads = [
            threading.Thread(
                target=lambda n=n: results.update(
                    {n: processed(llama, ways[n][0], shared, max_new_tokens=12, **ways[n][1])}
                )
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for n, (inputs, _) in enumerate(ways):
        expect_tilted(tilted_by_hand, llama, critic, results[n], inputs)


def test_two_critics_on_two_policies_and_two_on_one(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    """Two tilts of one policy act one after the other: the second takes the first's distribution for the reference."""
    other = copy.deepcopy(llama)
    mine, second, theirs = (
        make_critic(llama, **either),
        make_critic(llama, seed=1, **either),
        make_critic(other, **either),
    )
    with mine.attach(llama), theirs.attach(other), second.attach(llama):
        for policy, critic in ((llama, mine), (other, theirs), (llama, second)):
            expect_tilted(tilted_by_hand, policy, critic, processed(policy, prompts, tilt_for(critic)), prompts)
        seen = processed(llama, prompts, tilt_for(mine, top_k=None), tilt_for(second, top_k=None))
    for ids, logprobs in seen:
        for row, asked in enumerate(prompts["attention_mask"]):
            mask = torch.cat([asked, asked.new_ones(ids.shape[1] - len(asked))])
            expected = None
            for critic in (mine, second):
                expected = tilted_by_hand(
                    llama, critic, ids[row], mask, LAM, None, prompt=int(asked.sum()), reference=expected
                )
            torch.testing.assert_close(logprobs[row].double(), expected, atol=1e-4, rtol=1e-4)
