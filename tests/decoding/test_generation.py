"""`mavis.generate` sets the tilt and `generate` to agree, whatever the policy's own configuration says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

import mavis
from mavis import HiddenStateCritic, MavisTilt
from mavis.errors import CriticError, DecodingError, WeightsError

MakeCritic = Callable[..., HiddenStateCritic]
Inputs = dict[str, torch.Tensor]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_gives_what_the_bare_processor_gives_with_both_sides_set(
    policy: Any, make_critic: MakeCritic, prompts: Inputs, temperature: float
) -> None:
    critic = make_critic(policy)
    torch.manual_seed(0)
    with critic.attach(policy):
        bare = policy.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            temperature=temperature,
            max_new_tokens=8,
            logits_processor=MavisTilt({"a": 1.0}, critic, beta=2.0, top_k=9, temperature=temperature),
        )
    torch.manual_seed(0)
    whole = mavis.generate(
        policy, prompts, critic=critic, weights={"a": 1.0}, beta=2.0, top_k=9, temperature=temperature, max_new_tokens=8
    )
    assert torch.equal(bare, whole)


@pytest.mark.parametrize("how", [{"do_sample": True}, {"do_sample": False}, {"do_sample": False, "num_beams": 3}])
def test_what_the_policys_own_configuration_would_still_do_is_set_aside(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, how: dict[str, Any]
) -> None:
    noisy = copy.deepcopy(llama)
    noisy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=2,
        top_p=0.5,
        min_p=0.2,
        typical_p=0.6,
        epsilon_cutoff=0.01,
        eta_cutoff=0.01,
        repetition_penalty=1.8,
        no_repeat_ngram_size=2,
        renormalize_logits=True,
        pad_token_id=0,
        bos_token_id=1,
    )
    before = noisy.generation_config.to_dict()
    outputs = []
    for policy in (llama, noisy):
        torch.manual_seed(0)
        critic = make_critic(policy)
        outputs.append(
            mavis.generate(policy, prompts, critic=critic, weights=[1.0, 0.3], beta=2.0, max_new_tokens=12, **how)
        )
    assert torch.equal(outputs[0], outputs[1])
    assert noisy.generation_config.to_dict() == before


def test_a_penalty_that_the_call_names_is_applied_before_the_tilt(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    common = {"do_sample": False, "max_new_tokens": 12}
    named = mavis.generate(
        llama, prompts, critic=critic, weights=[1.0, 0.3], beta=0.5, repetition_penalty=3.0, **common
    )
    plain = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.3], beta=0.5, **common)
    with critic.attach(llama):
        bare = llama.generate(
            **prompts,
            repetition_penalty=3.0,
            logits_processor=MavisTilt([1.0, 0.3], critic, beta=0.5),
            **common,
        )
    assert torch.equal(named, bare)
    assert not torch.equal(named, plain)


def test_further_processors_run_before_the_tilt(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    class OnlySix(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([6]), 0.0)

    for given in ([OnlySix()], OnlySix()):
        given = given if isinstance(given, list) else [given]
        out = mavis.generate(
            llama,
            prompts,
            critic=make_critic(llama),
            weights=[1, 1],
            beta=2.0,
            max_new_tokens=3,
            logits_processor=given,
        )
        assert (out[:, 5:] == 6).all()


def test_it_attaches_the_critic_for_the_call_only_and_also_lets_go_after_an_error(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.3], beta=2.0, max_new_tokens=2)
    assert critic.attached_policy is None
    with pytest.raises(DecodingError, match="top_k is 400"):
        mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.3], beta=2.0, top_k=400, max_new_tokens=2)
    assert critic.attached_policy is None
    assert not llama._forward_pre_hooks
    assert not llama.get_output_embeddings()._forward_pre_hooks
    with critic.attach(llama):
        mavis.generate(llama, prompts, weights=[1.0, 0.3], beta=2.0, max_new_tokens=2)
        assert critic.attached_policy is llama


def test_ids_alone_are_taken_and_other_arguments_reach_generate(llama: Any, make_critic: MakeCritic) -> None:
    out = mavis.generate(
        llama,
        torch.tensor([[1, 5, 9]]),
        critic=make_critic(llama),
        weights=[1.0, 0.3],
        beta=2.0,
        max_new_tokens=4,
        num_return_sequences=3,
        return_dict_in_generate=True,
        attention_mask=torch.ones(1, 3, dtype=torch.long),
    )
    assert out.sequences.shape == (3, 7)


def test_a_generation_config_of_the_callers_is_read_for_all_but_the_distribution(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    config = GenerationConfig(max_new_tokens=4, top_p=0.1, do_sample=False, pad_token_id=0)
    critic = make_critic(llama)
    given = mavis.generate(llama, prompts, critic=critic, weights=[1.0, 0.3], beta=2.0, generation_config=config)
    named = mavis.generate(
        llama, prompts, critic=critic, weights=[1.0, 0.3], beta=2.0, do_sample=False, max_new_tokens=4
    )
    assert torch.equal(given, named)
    assert config.top_p == 0.1


def test_mistakes_are_named(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    with pytest.raises(CriticError, match="no critic is attached"):
        mavis.generate(llama, prompts, weights=[1.0, 0.3], beta=2.0)
    with pytest.raises(WeightsError, match="names objective 'c'"):
        mavis.generate(llama, prompts, critic=critic, weights={"c": 1.0}, beta=2.0)
    with pytest.raises(DecodingError, match="attention_mask is given twice"):
        mavis.generate(
            llama, prompts, critic=critic, weights=[1.0, 0.3], beta=2.0, attention_mask=prompts["attention_mask"]
        )


def test_threads_may_share_a_critic_that_nobody_attached(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    import threading

    critic = make_critic(llama)
    arguments = {"critic": critic, "weights": [1.0, 0.3], "beta": 2.0, "do_sample": False}
    expected = {n: mavis.generate(llama, prompts, max_new_tokens=n, **arguments) for n in (2, 12, 24)}
    results: list[bool] = []

    def run(length: int) -> None:
        results.append(
            torch.equal(mavis.generate(llama, prompts, max_new_tokens=length, **arguments), expected[length])
        )

    threads = [threading.Thread(target=run, args=(length,)) for length in (2, 12, 24, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert critic.attached_policy is None


def test_inputs_that_no_response_could_follow_are_refused(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    steer: dict[str, Any] = {"critic": make_critic(llama), "weights": [1.0, 0.3], "beta": 2.0}
    right = {name: tensor.flip(1) for name, tensor in prompts.items()}
    with pytest.raises(DecodingError, match=r"padded on the right.*padding_side='left'"):
        mavis.generate(llama, right, **steer)
    for text in ("Once upon a time", ["Once", "upon"]):
        with pytest.raises(DecodingError, match=rf"inputs is a {type(text).__name__}, expected the tokenizer"):
            mavis.generate(llama, text, **steer)


def test_what_has_no_neutral_value_is_refused_by_name(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    policy = copy.deepcopy(llama)
    policy.generation_config.top_h = 0.4
    with pytest.raises(DecodingError, match="generation_config.top_h is 0.4"):
        mavis.generate(policy, prompts, critic=make_critic(policy), weights=[1.0, 0.3], beta=2.0)
