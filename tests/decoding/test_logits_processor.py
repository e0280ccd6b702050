"""What `MavisTilt` promises inside `generate`, and what it refuses."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import mavis
from mavis import HiddenStateCritic, MavisTilt
from mavis.errors import CriticError, DecodingError, WeightsError

MakeCritic = Callable[..., HiddenStateCritic]
ByHand = Callable[..., torch.Tensor]
Inputs = dict[str, torch.Tensor]


class Ban(LogitsProcessor):
    """Forbid some tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


class Keep(LogitsProcessor):
    """Remember what passes by."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append((input_ids, scores))
        return scores


def follow(policy: Any, inputs: Inputs, tilt: MavisTilt, steps: int = 6, **arguments: Any) -> Keep:
    keep = Keep()
    policy.generate(
        **inputs, top_k=0, max_new_tokens=steps, logits_processor=LogitsProcessorList([tilt, keep]), **arguments
    )
    return keep


# Right in every way of generating


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
        with pytest.raises(DecodingError, match="the critic has a memory, but not of every row"):
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


# Rows without a tilt, bans, inputs


def test_rows_whose_lambda_is_zero_are_the_reference_bit_for_bit(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        llama(**prompts)
        scores = torch.randn(3, 40)
        mixed = MavisTilt([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], critic, beta=2.0, top_k=5)
        out = mixed(prompts["input_ids"], scores)
        assert torch.equal(out[0], scores[0])
        assert torch.equal(out[2], scores[2])
        assert not torch.equal(out[1], scores[1])
        per_row = MavisTilt([1.0, 0.5], critic, beta=[0.0, 0.0, 3.0], top_k=5)(prompts["input_ids"], scores)
        assert torch.equal(per_row[:2], scores[:2])
        assert torch.equal(MavisTilt([1.0, 0.5], critic, beta=0.0)(prompts["input_ids"], scores), scores)


def test_beta_zero_generates_exactly_what_the_plain_policy_does(
    policy: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(policy)
    torch.manual_seed(5)
    plain = policy.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=10)
    torch.manual_seed(5)
    with critic.attach(policy):
        tilted = policy.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            max_new_tokens=10,
            logits_processor=MavisTilt({"a": 1.0}, critic, beta=0.0, top_k=3),
        )
    assert torch.equal(plain, tilted)


def test_tokens_that_an_earlier_processor_banned_stay_banned_and_are_no_candidates(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, tilted_by_hand: ByHand
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        banned = tuple(range(0, 40, 2))
        keep = Keep()
        llama.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            max_new_tokens=4,
            logits_processor=[Ban(*banned), MavisTilt([1.0, 1.0], critic, beta=2.0, top_k=8), keep],
        )
    for ids, logprobs in keep.seen:
        assert (logprobs[:, list(banned)] == -torch.inf).all()
        assert ((logprobs > -torch.inf).sum(1) == 8).all()
        mask = torch.cat([prompts["attention_mask"][1], torch.ones(ids.shape[1] - 5, dtype=torch.long)])
        expected = tilted_by_hand(llama, critic, ids[1], mask, [2.0, 2.0], 8, banned=banned)
        torch.testing.assert_close(logprobs[1].double(), expected, atol=1e-4, rtol=1e-4)


def test_fewer_allowed_tokens_than_candidates_leave_no_probability_on_the_others(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama):
        llama(**prompts)
        scores = torch.full((3, 40), -torch.inf)
        scores[:, [4, 11]] = torch.randn(3, 2)
        out = MavisTilt([1.0, 1.0], critic, beta=2.0, top_k=8)(prompts["input_ids"], scores)
    assert torch.equal(out > -torch.inf, scores > -torch.inf)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(3))


def test_inputs_are_not_changed(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    for top_k in (5, None):
        for weights in ([1.0, 0.5], [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]):
            with critic.attach(llama):
                llama(**prompts)
                scores, ids = torch.randn(3, 40), prompts["input_ids"].clone()
                before = scores.clone()
                MavisTilt(weights, critic, beta=2.0, top_k=top_k, record_kl=True)(ids, scores)
                assert torch.equal(scores, before)
                assert torch.equal(ids, prompts["input_ids"])


def test_permuting_objectives_with_their_weights_changes_nothing(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama, ("a", "b", "c"))
    swapped = make_critic(llama, ("c", "a", "b"))
    order = [2, 0, 1]
    with torch.no_grad():
        swapped.heads.outer.copy_(critic.heads.outer[order])
        swapped.heads.bias.copy_(critic.heads.bias[order])
        swapped.heads.inner.copy_(critic.heads.inner.unflatten(1, (3, 16))[:, order].flatten(1))
        swapped.heads.inner_bias.copy_(critic.heads.inner_bias.view(3, 16)[order].reshape(48))
    swapped.token_table.copy_(critic.token_table)
    scores, outputs = torch.randn(3, 40), []
    for one, weights in (
        (critic, [0.2, 0.5, -0.3]),
        (swapped, [-0.3, 0.2, 0.5]),
        (swapped, {"a": 0.2, "b": 0.5, "c": -0.3}),
    ):
        with one.attach(llama):
            llama(**prompts)
            outputs.append(MavisTilt(weights, one, beta=2.0, top_k=6)(prompts["input_ids"], scores))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs[1], outputs[2])


# KL


@pytest.mark.parametrize(("top_k", "temperature"), [(5, 1.0), (None, 1.0), (7, 1.4), (12, 0.6)])
def test_recorded_kl_is_the_brute_force_sum_with_bans_and_truncation(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, top_k: int | None, temperature: float
) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt(
        [[0.5, 0.5], [0.0, 0.0], [1.0, -1.0]], critic, beta=1.5, top_k=top_k, temperature=temperature, record_kl=True
    )
    before, after = Keep(), Keep()
    with critic.attach(llama):
        llama.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            temperature=temperature,
            max_new_tokens=4,
            logits_processor=[Ban(3, 17), before, tilt, after],
        )
    assert tilt.kl.shape == (3, 4)
    for step, ((_, received), (_, returned)) in enumerate(zip(before.seen, after.seen, strict=True)):
        reference = torch.log_softmax(received.double() / temperature, -1)
        ours = torch.log_softmax(returned.double() / temperature, -1)
        for row in range(3):
            terms = [
                (p.exp() * (p - q)).item() for p, q in zip(ours[row], reference[row], strict=True) if p > -torch.inf
            ]
            assert tilt.kl[row, step].item() == pytest.approx(sum(terms), abs=2e-5)
    assert torch.equal(tilt.kl[1], torch.zeros(4))


def test_kl_starts_anew_with_every_generation_and_is_refused_where_it_was_not_recorded(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt([1.0, 1.0], critic, beta=1.0, record_kl=True)
    with pytest.raises(DecodingError, match="nothing was generated"):
        _ = tilt.kl
    with critic.attach(llama):
        for steps in (3, 5, 5):
            llama.generate(**prompts, do_sample=False, max_new_tokens=steps, logits_processor=tilt)
            assert tilt.kl.shape == (3, steps)
    with pytest.raises(DecodingError, match="record_kl is False"):
        _ = MavisTilt([1.0, 1.0], critic, beta=1.0).kl


# Which critic, which states


def test_without_a_critic_it_takes_the_one_attached_to_the_policy_that_generates(
    make_critic: MakeCritic, llama: Any, prompts: Inputs
) -> None:
    import copy

    other = copy.deepcopy(llama)
    mine, theirs = make_critic(llama, seed=1), make_critic(other, seed=2)
    with mine.attach(llama), theirs.attach(other):
        for policy, critic in ((llama, mine), (other, theirs), (llama, mine)):
            named = policy.generate(
                **prompts, do_sample=False, max_new_tokens=6, logits_processor=MavisTilt({"a": 1.0}, critic, beta=3.0)
            )
            found = policy.generate(
                **prompts, do_sample=False, max_new_tokens=6, logits_processor=MavisTilt({"a": 1.0}, beta=3.0)
            )
            assert torch.equal(named, found)


def test_one_tilt_serves_another_prompt_and_another_batch(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt([1.0, 0.5], critic, beta=2.0)
    single = {name: tensor[1:2] for name, tensor in prompts.items()}
    with critic.attach(llama):
        for inputs in (prompts, single, prompts):
            fresh = MavisTilt([1.0, 0.5], critic, beta=2.0)
            used = llama.generate(**inputs, do_sample=False, max_new_tokens=5, logits_processor=tilt)
            assert torch.equal(
                used, llama.generate(**inputs, do_sample=False, max_new_tokens=5, logits_processor=fresh)
            )


def test_threads_on_one_policy_do_not_read_each_others_states(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    singles = [{name: tensor[row : row + 1] for name, tensor in prompts.items()} for row in range(3)]

    def run(row: int) -> torch.Tensor:
        tilt = MavisTilt([1.0, row / 2], critic, beta=2.0)
        return llama.generate(**singles[row], do_sample=False, max_new_tokens=24, logits_processor=tilt)

    with critic.attach(llama):
        expected = [run(row) for row in range(3)]
        results: dict[int, torch.Tensor] = {}
        threads = [
            threading.Thread(target=lambda r=row: results.__setitem__(r, run(r))) for row in range(3) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for row in range(3):
        assert torch.equal(results[row], expected[row])


def test_scores_that_no_caught_forward_pass_made_are_refused(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt([1.0, 0.5], critic, beta=2.0)
    scores, ids = torch.randn(3, 40), prompts["input_ids"]
    with critic.attach(llama):
        with pytest.raises(DecodingError, match="no forward pass of its policy was caught in this thread"):
            tilt(ids, scores)
        llama(**prompts)
        tilt(ids, scores)
        with pytest.raises(DecodingError, match="for 3 rows at position 5.* at positions 0 to 4"):
            tilt(torch.cat([ids, ids[:, :1]], 1), scores)
        with pytest.raises(DecodingError, match="for 2 rows at position 4"):
            tilt(ids[:2], scores[:2])
        with pytest.raises(DecodingError, match="not the ones that the latest forward pass"):
            tilt(ids.flip(0), scores)
        llama(inputs_embeds=torch.randn(3, 5, 32))
        with pytest.raises(DecodingError, match="no forward pass"):
            tilt(ids, scores)


def test_a_tilt_whose_critic_is_attached_to_no_policy_or_another_one_is_refused(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    import copy

    critic = make_critic(llama)
    arguments = {"do_sample": False, "max_new_tokens": 3}
    with pytest.raises(CriticError, match="attached to no policy.*Hint: call critic.attach"):
        llama.generate(**prompts, **arguments, logits_processor=MavisTilt([1.0, 0.5], critic, beta=2.0))
    with pytest.raises(CriticError, match="critic is None, and no critic is attached"):
        llama.generate(**prompts, **arguments, logits_processor=MavisTilt([1.0, 0.5], beta=2.0))
    other = copy.deepcopy(llama)
    with critic.attach(other):
        with pytest.raises(DecodingError, match="no forward pass of its policy"):
            llama.generate(**prompts, **arguments, logits_processor=MavisTilt([1.0, 0.5], critic, beta=2.0))
        with pytest.raises(CriticError, match="attached to another policy"):
            mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.5], beta=2.0, **arguments)
    with critic.attach(llama), make_critic(llama, seed=1).attach(llama):
        with pytest.raises(CriticError, match="2 critics are attached"):
            llama.generate(**prompts, **arguments, logits_processor=MavisTilt([1.0, 0.5], beta=2.0))


# Weights by row


def test_rows_of_weights_serve_groups_of_equal_prompts_only(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    four = {name: tensor[[0, 0, 1, 2]] for name, tensor in prompts.items()}
    arguments = {"do_sample": False, "max_new_tokens": 3}
    with critic.attach(llama):
        with pytest.raises(WeightsError, match="row 1 would serve batch rows 2 to 3, but their prompts differ"):
            llama.generate(**four, **arguments, logits_processor=MavisTilt([[1.0, 0.0], [0.0, 1.0]], critic, beta=1.0))
        with pytest.raises(WeightsError, match="2 rows, but the batch has 3, which is no multiple"):
            llama.generate(
                **prompts, **arguments, logits_processor=MavisTilt([[1.0, 0.0], [0.0, 1.0]], critic, beta=1.0)
            )
        tilt = MavisTilt([[1.0, 0.0], [0.0, 1.0]], critic, beta=1.0)
        pairs = {name: tensor[[0, 0, 1, 1]] for name, tensor in prompts.items()}
        llama.generate(**pairs, **arguments, logits_processor=tilt)
        with pytest.raises(WeightsError, match="prompts differ"):  # also when an earlier generation was right
            llama.generate(**four, **arguments, logits_processor=tilt)


# Mistakes


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"helpfull": 1.0},
            "weights names objective 'helpfull', but the critic has: helpful, short. Hint: did you mean",
        ),
        ({}, "weights is empty, but the critic has: helpful, short"),
        ([], r"weights is \[\], expected weights for: helpful, short"),
        ([1.0], "has 2 objectives: helpful, short"),
        ([1.0, 2.0, 3.0], "has 2 objectives: helpful, short"),
        (torch.ones(2, 2, 2), r"weights has shape \(2, 2, 2\)"),
        ({"helpful": float("nan")}, "weights for objective 'helpful' is nan, expected a finite number"),
        ([0.0, float("inf")], "weights for objective 'short' is inf, expected a finite number"),
        ({"helpful": "much"}, "expected numbers"),
        ([[1.0, 0.0], [1.0]], "expected 2 numbers"),
        ([{"helpful": 1.0}, [0.0, 1.0]], "do not mix forms"),
        ("helpful", "weights is 'helpful', expected weights for"),
        (None, "weights is None, expected weights for"),
    ],
)
def test_bad_weights_are_refused_where_the_tilt_is_built(
    llama: Any, make_critic: MakeCritic, weights: Any, message: str
) -> None:
    critic = make_critic(llama, ("helpful", "short"))
    with pytest.raises(WeightsError, match=message):
        MavisTilt(weights, critic, beta=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -1.0}, "beta is -1.0, expected a finite number ≥ 0.*inverse of the β of DPO"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": [1.0, float("inf")]}, "beta is inf"),
        ({"beta": "strong"}, "beta is 'strong'"),
        ({"beta": 1.0, "target_kl": 2.0}, "beta is 1.0 and target_kl is 2.0; both set the strength"),
        ({"target_kl": 0.0}, "target_kl is 0.0, expected nats > 0"),
        ({"target_kl": 2.0}, "target_kl is 2.0, and the critic carries no calibration"),
        ({}, "beta and target_kl are not given, and the critic carries no calibration"),
        ({"beta": 1.0, "top_k": 0}, "top_k is 0, expected a whole number ≥ 1, None or"),
        ({"beta": 1.0, "top_k": 2.5}, "top_k is 2.5"),
        ({"beta": 1.0, "temperature": 0.0}, "temperature is 0.0, expected a number > 0"),
    ],
)
def test_bad_strengths_and_settings_are_refused(
    llama: Any, make_critic: MakeCritic, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DecodingError, match=message):
        MavisTilt([1.0, 0.5], make_critic(llama), **arguments)


def test_more_candidates_than_tokens_are_refused_when_the_vocabulary_is_known(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    with critic.attach(llama), pytest.raises(DecodingError, match="top_k is 41, but the policy has 40 tokens"):
        follow(llama, prompts, MavisTilt([1.0, 0.5], critic, beta=1.0, top_k=41), do_sample=False)


def test_scores_of_another_vocabulary_are_refused(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    with pytest.raises(CriticError, match="critic knows 40 tokens, but scores has 41"):
        MavisTilt([1.0, 0.5], make_critic(llama), beta=1.0)(prompts["input_ids"], torch.randn(3, 41))


def test_weights_and_beta_with_different_numbers_of_rows_are_refused(llama: Any, make_critic: MakeCritic) -> None:
    with pytest.raises(WeightsError, match="weights has 2 rows but beta has 3"):
        MavisTilt([[1.0, 0.5], [0.0, 1.0]], make_critic(llama), beta=[1.0, 2.0, 3.0])


# Strengths that were measured


def test_a_budget_holds_only_for_what_it_was_measured_with(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    from mavis.critics import Calibration

    critic = make_critic(llama)
    critic.calibration = Calibration([1.0, 2.0, 4.0], [[0.5, 2.0, 8.0]] * 3, 16, top_k=7, temperature=0.8)
    measured = {"top_k": 7, "temperature": 0.8}
    arguments = {"do_sample": False, "max_new_tokens": 6}
    by_kl = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.0], target_kl=2.0, **measured, **arguments)
    by_default = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.0], **measured, **arguments)
    by_beta = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.0], beta=2.0, **measured, **arguments)
    assert torch.equal(by_kl, by_beta)
    assert torch.equal(by_default, by_beta)
    for other in ({"top_k": 40}, {"top_k": 7}):
        with pytest.raises(DecodingError, match="calibrated with top_k=7 and temperature=0.8, but the tilt has top_k="):
            MavisTilt([1.0, 0.0], critic, target_kl=2.0, **other)
        with pytest.warns(UserWarning, match="beta is not given; the critic was calibrated with top_k=7"):
            MavisTilt([1.0, 0.0], critic, **other)


def test_steps_after_a_responses_end_spend_nothing(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    import copy

    policy = copy.deepcopy(llama)
    critic = make_critic(policy)
    ends = [5, 9, 20, 30, 33]
    policy.generation_config.eos_token_id = ends
    tilt = MavisTilt([0.3, 0.1], critic, beta=0.3, top_k=None, record_kl=True)
    torch.manual_seed(2)
    with critic.attach(policy):
        inputs = {name: tensor.repeat_interleave(8, 0) for name, tensor in prompts.items()}
        out = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=12, logits_processor=tilt)
    responses = out[:, prompts["input_ids"].shape[1] :]
    is_end = torch.isin(responses, torch.tensor(ends))
    after = (is_end.cumsum(1) - is_end.long()) > 0
    assert after.any()
    assert (tilt.kl[after] == 0).all()
    assert (tilt.kl[~after] > 0).all()


def test_feeding_a_response_back_is_a_new_generation(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    tilt = MavisTilt([1.0, 0.5], critic, beta=1.0, record_kl=True)
    with critic.attach(llama):
        out = llama.generate(**prompts, do_sample=False, max_new_tokens=4, logits_processor=tilt)
        mask = torch.cat([prompts["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
        llama.generate(input_ids=out, attention_mask=mask, do_sample=False, max_new_tokens=3, logits_processor=tilt)
    assert tilt.kl.shape == (3, 3)


def test_a_processor_that_asks_the_output_embedding_itself_changes_nothing(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    class Lens(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            llama.lm_head(torch.randn(3, 1, 32))
            return scores

    critic = make_critic(llama)
    with critic.attach(llama):
        outputs = [
            llama.generate(
                **prompts,
                do_sample=False,
                max_new_tokens=6,
                logits_processor=[*before, MavisTilt([1.0, 0.5], critic, beta=2.0)],
            )
            for before in ([], [Lens()])
        ]
    assert torch.equal(outputs[0], outputs[1])


# What a value model keeps


@pytest.mark.parametrize("readout", ["token", "candidates"])
def test_what_a_value_model_has_read_is_let_go_of_when_the_generation_is_over(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, readout: str
) -> None:
    critic: Any = make_critic(llama, readout=readout)
    tilt = MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=7)
    with critic.attach(llama):
        out = llama.generate(
            **prompts, do_sample=False, max_new_tokens=3, logits_processor=tilt, return_dict_in_generate=True
        )
        kept = critic._reader._thread.kept
        assert (
            kept.length == prompts["input_ids"].shape[1] + 2
        )  # no candidate, and not the last token, which none follows
        del out
        assert critic._reader._thread.kept is None


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("objectives", [1, 2])
def test_a_step_is_the_papers(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, temperature: float, objectives: int
) -> None:
    """Divide by T, keep the top k, add β Σ_m w_m V_m of every candidate read after the prefix, and normalise."""
    critic: Any = make_critic(llama, ("a", "b")[:objectives], readout="candidates", hidden=0)
    weights, beta, top_k = [0.8, 0.2][:objectives], 2.0, 6
    tilt = MavisTilt(weights, critic, beta=beta, top_k=top_k, temperature=temperature)
    torch.manual_seed(0)
    with critic.attach(llama):
        keep = follow(llama, prompts, tilt, do_sample=True, temperature=temperature)
    for ids, processed in keep.seen:
        generated = ids.shape[1] - prompts["input_ids"].shape[1]
        for row, asked in enumerate(prompts["attention_mask"]):
            prefix = ids[row][torch.cat([asked, torch.ones(generated, dtype=torch.long)]).bool()]
            with torch.no_grad():
                scores = llama(prefix[None]).logits[0, -1] / temperature
                kept, candidates = scores.topk(top_k)
                values = torch.stack(
                    [
                        critic.heads(
                            torch.nn.functional.layer_norm(
                                critic.trunk(torch.cat([prefix, token[None]])[None]).last_hidden_state[0, -1], (16,)
                            )
                        )[:, 0]
                        for token in candidates
                    ]
                )
                probs = (kept + beta * (values @ torch.tensor(weights))).softmax(-1)
            ours = (processed[row] / temperature).softmax(-1)
            torch.testing.assert_close(ours[candidates], probs, atol=1e-6, rtol=1e-5)
            assert float(ours.sum()) == pytest.approx(1.0)
