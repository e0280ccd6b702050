"""`MavisTilt` is right in every way of generating: each row is tilted as if it were alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

from mavis import MavisTilt
from mavis.errors import DecodingError
from tests.decoding.steps import ByHand, Inputs, MakeCritic, follow


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "use_cache": False},
    ],
    ids=["greedy", "sampling", "returned sequences", "beams", "sampled beams", "no cache"],
)
@pytest.mark.parametrize("top_k", [7, None])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"memory": 6},
        {"composition": "conditioned"},
        {"memory": 6, "composition": "conditioned"},
        {"readout": "token"},
        {"readout": "candidates"},
        {"readout": "candidates", "hidden": 0},
        {"readout": "token", "composition": "conditioned"},
        {"readout": "candidates", "composition": "conditioned"},
    ],
    ids=[
        "plain",
        "memory",
        "conditioned",
        "conditioned memory",
        "token",
        "candidates",
        "linear candidates",
        "conditioned token",
        "conditioned candidates",
    ],
)
def test_every_row_of_a_ragged_batch_is_tilted_as_if_it_were_alone(
    policy: Any,
    make_critic: MakeCritic,
    prompts: Inputs,
    arguments: dict[str, Any],
    top_k: int | None,
    kind: dict[str, Any],
    tilted_by_hand: ByHand,
) -> None:
    critic = make_critic(policy, **kind)
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7], [-0.5, 1.0]])
    torch.manual_seed(0)
    with critic.attach(policy):
        keep = follow(policy, prompts, MavisTilt(weights, critic, beta=1.5, top_k=top_k), **arguments)
    copies = len(keep.seen[0][0]) // len(weights)
    for ids, logprobs in keep.seen:
        generated = ids.shape[1] - prompts["input_ids"].shape[1]
        for row in range(len(ids)):
            lam = (1.5 * weights[row // copies]).tolist()
            asked = prompts["attention_mask"][row // copies]
            mask = torch.cat([asked, torch.ones(generated, dtype=torch.long)])
            expected = tilted_by_hand(policy, critic, ids[row], mask, lam, top_k, prompt=int(asked.sum()))
            torch.testing.assert_close(logprobs[row].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_new_generation_begins_a_new_memory(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, tilted_by_hand: ByHand
) -> None:
    """Also where its prompt is what the last one ended with, where it is shorter, and where the batch is another."""
    critic = make_critic(llama, memory=6)
    first = {name: tensor[:1] for name, tensor in prompts.items()}
    with critic.attach(llama):
        tilt = MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=None)
        once = llama.generate(**first, do_sample=False, max_new_tokens=1, logits_processor=tilt)
        more = {"input_ids": once, "attention_mask": torch.cat([first["attention_mask"], torch.ones(1, 1).long()], 1)}
        for inputs in (first, more, first, prompts, more, first):
            keep = follow(llama, inputs, tilt, steps=3)
            for ids, logprobs in keep.seen:
                for row, mask in enumerate(inputs["attention_mask"]):
                    whole = torch.cat([mask, torch.ones(ids.shape[1] - len(mask), dtype=torch.long)])
                    expected = tilted_by_hand(llama, critic, ids[row], whole, [1.5, 0.6], None, prompt=int(mask.sum()))
                    torch.testing.assert_close(logprobs[row].double(), expected, atol=1e-4, rtol=1e-4)


def test_padding_that_looks_like_a_token_is_not_taken_for_one_by_the_memory(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand
) -> None:
    """Two rows with the same ids, of which one begins with padding, under beams that change places."""
    critic = make_critic(llama, memory=6)
    ids = torch.tensor([[0, 4, 5], [0, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    tilt = MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=None)
    with critic.attach(llama):
        keep = follow(llama, inputs, tilt, do_sample=False, num_beams=3)
    for seen, logprobs in keep.seen:
        for row in range(6):
            mask = torch.cat([inputs["attention_mask"][row // 3], torch.ones(seen.shape[1] - 3, dtype=torch.long)])
            expected = tilted_by_hand(llama, critic, seen[row], mask, [1.5, 0.6], None, prompt=3 - row // 3)
            torch.testing.assert_close(logprobs[row].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_critic_with_a_memory_that_missed_the_beginning_says_so(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama, memory=6)
    first = llama(**prompts, use_cache=True)
    longer = torch.cat([prompts["input_ids"], torch.tensor([[3], [4], [5]])], dim=1)
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    tilt = MavisTilt([1.0, 0.4], critic, beta=1.5)
    with critic.attach(llama):
        step = llama(
            input_ids=longer[:, -1:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True
        )
        with pytest.raises(DecodingError, match="recurrent memory does not cover every row"):
            tilt(longer, step.logits[:, -1])


def test_asking_twice_about_a_step_moves_no_memory(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama, memory=6)
    ids, keep = prompts["input_ids"], []
    with critic.attach(llama):
        cache = None
        mask = prompts["attention_mask"]
        for _ in range(3):
            step = llama(
                input_ids=ids if cache is None else ids[:, -1:],
                attention_mask=mask,
                past_key_values=cache if cache is not None else DynamicCache(config=llama.config),
                use_cache=True,
            )
            cache = step.past_key_values
            keep.append([critic.values(ids, None) for _ in range(3)])
            ids = torch.cat([ids, torch.full((3, 1), 7)], dim=1)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    for first, *others in keep:
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(keep[0][0], keep[1][0])


def test_a_conditioned_critic_warns_once_beyond_what_it_was_trained_on(llama: Any, make_critic: MakeCritic) -> None:
    critic = make_critic(llama, composition="conditioned")
    MavisTilt([2.0, 100.0], critic, beta=4.0)  # nobody knows what it was trained on
    critic.max_trained_lambda.fill_(8.0)
    MavisTilt([0.5, 0.5], critic, beta=8.0)
    with pytest.warns(UserWarning, match=r"lambda = beta · weights is \[4\.0, 5\.0\], .* sum of at most 8;"):
        tilt = MavisTilt([0.8, 1.0], critic, beta=5.0)
    with pytest.warns(UserWarning, match=r"is \[-1\.0, 2\.0\]"):
        MavisTilt([-1.0, 2.0], critic, beta=1.0)
    with critic.attach(llama), warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.generate(torch.tensor([[1, 5]]), max_new_tokens=3, logits_processor=tilt)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_that_are_padded_on_the_right_are_refused(
    policy: Any, make_critic: MakeCritic, prompts: Inputs, use_cache: bool
) -> None:
    right = {name: tensor.flip(1) for name, tensor in prompts.items()}
    critic = make_critic(policy)
    with critic.attach(policy), pytest.raises(DecodingError, match=r"padded on the right.*padding_side='left'"):
        policy.generate(
            **right, max_new_tokens=2, use_cache=use_cache, logits_processor=MavisTilt([1.0, 0.3], critic, beta=1.0)
        )


def test_a_row_in_a_ragged_batch_of_eight_has_the_scores_it_has_alone_to_1e_5(
    llama: Any, make_critic: MakeCritic
) -> None:
    # In double precision, so that what is left is the tilt's own rounding, not that of the policy's batched products.
    llama = copy.deepcopy(llama).double()
    critic = make_critic(llama)
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 9, 5, 12, 4, 7, 12, 2]
    ids = torch.randint(2, 40, (8, 12), generator=generator)
    mask = (torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]).long()
    weights = torch.rand(8, 2, generator=generator)
    with critic.attach(llama):
        together = follow(
            llama,
            {"input_ids": ids * mask, "attention_mask": mask},
            MavisTilt(weights, critic, beta=2.0, top_k=10),
            do_sample=False,
        )
        for row, length in enumerate(lengths):
            alone = follow(
                llama,
                {"input_ids": ids[row : row + 1, -length:], "attention_mask": mask[row : row + 1, -length:]},
                MavisTilt(weights[row], critic, beta=2.0, top_k=10),
                do_sample=False,
            )
            for (_, one), (_, many) in zip(alone.seen, together.seen, strict=True):
                torch.testing.assert_close(one[0], many[row], atol=1e-5, rtol=0)


def test_it_is_taken_bare_in_a_list_and_in_a_logits_processor_list(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        outputs = []
        for wrap in (lambda t: t, lambda t: [t], lambda t: LogitsProcessorList([t])):
            tilt = MavisTilt({"a": 0.8, "b": 0.2}, critic, beta=2.0, top_k=5)
            torch.manual_seed(0)
            outputs.append(
                llama.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=8, logits_processor=wrap(tilt))
            )
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_beams_score_is_the_log_probability_of_its_tokens_under_the_tilted_policy(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, tilted_by_hand: ByHand
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        out = llama.generate(
            **prompts,
            do_sample=False,
            num_beams=4,
            num_return_sequences=2,
            length_penalty=0.0,
            max_new_tokens=5,
            return_dict_in_generate=True,
            output_scores=True,
            logits_processor=MavisTilt([0.4, 0.6], critic, beta=2.0, top_k=6),
        )
    start = prompts["input_ids"].shape[1]
    for row, sequence in enumerate(out.sequences):
        mask = prompts["attention_mask"][row // 2]
        total = 0.0
        for step in range(5):
            seen = torch.cat([mask, torch.ones(step, dtype=torch.long)])
            logprobs = tilted_by_hand(llama, critic, sequence[: start + step], seen, [0.8, 1.2], 6)
            total += logprobs[sequence[start + step]].item()
        assert out.sequences_scores[row].item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_at_a_temperature_the_final_distribution_is_the_papers(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, temperature: float, tilted_by_hand: ByHand
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        out = llama.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            temperature=temperature,
            max_new_tokens=3,
            return_dict_in_generate=True,
            output_scores=True,
            logits_processor=MavisTilt([0.4, 0.6], critic, beta=2.0, top_k=6, temperature=temperature),
        )
    for row in range(3):
        expected = tilted_by_hand(
            llama, critic, prompts["input_ids"][row], prompts["attention_mask"][row], [0.8, 1.2], 6, temperature
        )
        torch.testing.assert_close(out.scores[0][row].double(), expected, atol=1e-5, rtol=1e-5)


def test_sampled_frequencies_are_the_exact_tilted_distribution(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand
) -> None:
    """A chi-square test on 20,000 first tokens; with a fixed seed it cannot flicker, with a fresh one it would raise a
    false alarm once in 100,000 runs."""
    critic = make_critic(llama)
    prompt = torch.tensor([[1, 7, 3]])
    expected = tilted_by_hand(llama, critic, prompt[0], torch.ones(3), [-0.4, 0.2], 6).exp()
    torch.manual_seed(1)
    with critic.attach(llama):
        out = llama.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            num_return_sequences=20_000,
            max_new_tokens=1,
            logits_processor=MavisTilt([-1.0, 0.5], critic, beta=0.4, top_k=6),
        )
    counts = torch.bincount(out[:, -1], minlength=40).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = ((counts[kept] - 20_000 * expected[kept]).square() / (20_000 * expected[kept])).sum()
    assert expected[kept].min() * 20_000 > 5
    assert statistic < 30.86  # the 1 − 1e-5 quantile of chi-square with five degrees of freedom


def test_bfloat16_policies_and_scores_keep_their_dtype(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    import copy

    policy = copy.deepcopy(llama).to(torch.bfloat16)
    critic = make_critic(policy)
    with critic.attach(policy):
        keep = follow(policy, prompts, MavisTilt([1.0, 0.2], critic, beta=2.0, top_k=5), do_sample=True)
        policy(**prompts)
        scores = torch.randn(3, 40).to(torch.bfloat16)
        tilted = MavisTilt([1.0, 0.2], critic, beta=2.0, top_k=5)(prompts["input_ids"], scores)
    assert tilted.dtype == torch.bfloat16
    for _, logprobs in keep.seen:
        torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(3), atol=1e-5, rtol=0)
