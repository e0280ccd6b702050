"""Unless told otherwise, a tilt takes the candidates and the temperature that its critic was trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.critics import Calibration, CriticGroup, TrainedDecoding
from mavis.errors import DecodingError

MakeCritic = Callable[..., Any]
Inputs = dict[str, torch.Tensor]

TRAINED = TrainedDecoding(top_k=7, temperature=0.6, max_new_tokens=16)


def sampled(policy: Any, inputs: Inputs, critic: Any, **options: Any) -> list[list[int]]:
    torch.manual_seed(3)
    output = mavis.generate(
        policy, inputs, critic=critic, weights=[1.0, 0.5], beta=2.0, max_new_tokens=6, pad_token_id=0, **options
    )
    ids: list[list[int]] = output.tolist()
    return ids


def test_generate_samples_as_the_critic_was_trained(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    critic.decoding = TRAINED
    assert sampled(llama, prompts, critic) == sampled(llama, prompts, critic, top_k=7, temperature=0.6)
    assert sampled(llama, prompts, critic, top_k=None) == sampled(llama, prompts, critic, top_k=None, temperature=0.6)
    assert sampled(llama, prompts, critic, temperature=2.0) == sampled(llama, prompts, critic, top_k=7, temperature=2.0)


def test_a_step_is_cut_to_the_trained_candidates(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, tilted_by_hand: Callable[..., torch.Tensor]
) -> None:
    critic = make_critic(llama)
    critic.decoding = TRAINED
    tilt = mavis.MavisTilt([1.0, 0.5], critic, beta=2.0)
    with critic.attach(llama), torch.no_grad():
        scores = llama(**prompts, use_cache=False).logits[:, -1]
        got = tilt(prompts["input_ids"], scores)
    for row in range(3):
        ids, mask = prompts["input_ids"][row], prompts["attention_mask"][row]
        # Padding shifts no position here: the policy is asked without positions, so only the unpadded row is exact.
        if bool(mask.all()):
            expected = tilted_by_hand(llama, critic, ids, mask, [2.0, 1.0], 7, 0.6)
            torch.testing.assert_close(got[row].double() / 0.6, expected, atol=1e-5, rtol=0)
    assert (got.isfinite().sum(dim=1) == 7).all()


def test_an_attached_critic_is_asked_when_it_is_found(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    critic = make_critic(llama)
    critic.decoding = TRAINED
    tilt = mavis.MavisTilt([1.0, 0.5], beta=2.0)
    assert (tilt.top_k, tilt.temperature) == ("as_trained", "as_trained")
    with critic.attach(llama):
        llama.generate(**prompts, max_new_tokens=1, do_sample=False, pad_token_id=0, logits_processor=tilt)
    assert (tilt.top_k, tilt.temperature) == (7, 0.6)


def test_a_critic_that_does_not_say_is_given_every_token_at_temperature_1(llama: Any, make_critic: MakeCritic) -> None:
    tilt = mavis.MavisTilt([1.0, 0.5], make_critic(llama), beta=2.0)
    assert (tilt.top_k, tilt.temperature) == (None, 1.0)


def test_a_budget_is_met_without_saying_what_it_was_calibrated_for(llama: Any, make_critic: MakeCritic) -> None:
    critic = make_critic(llama)
    critic.calibration = Calibration([1.0, 2.0], [[0.5, 1.5], [0.25, 0.75], [0.3, 0.9]], 16, 7, 0.6)
    critic.decoding = TRAINED
    mavis.MavisTilt([1.0, 0.5], critic, target_kl=0.5)
    with pytest.raises(DecodingError, match="calibrated with top_k=7 and temperature=0.6, but the tilt has top_k=5"):
        mavis.MavisTilt([1.0, 0.5], critic, target_kl=0.5, top_k=5)


def test_critics_of_a_group_agree_or_the_user_says(llama: Any, make_critic: MakeCritic) -> None:
    one, two = make_critic(llama, ("a",)), make_critic(llama, ("b",))
    one.decoding = TRAINED
    assert mavis.MavisTilt([1.0, 0.5], [one, two], beta=2.0).top_k == 7  # the other one does not say
    two.decoding = TrainedDecoding(top_k=9, temperature=0.6)
    wrong = r"top_k is 'as_trained', but the critics were trained with 7 and 9\. Hint: pass top_k"
    with pytest.raises(DecodingError, match=wrong):
        mavis.MavisTilt([1.0, 0.5], CriticGroup([one, two]), beta=2.0)
    assert mavis.MavisTilt([1.0, 0.5], [one, two], beta=2.0, top_k=3).temperature == 0.6


def test_a_folder_remembers(llama: Any, make_critic: MakeCritic, tmp_path: Path) -> None:
    critic = make_critic(llama)
    critic.decoding = TRAINED
    critic.save_pretrained(tmp_path / "critic")
    assert mavis.Critic.from_pretrained(tmp_path / "critic").decoding == TRAINED
    assert mavis.Critic.describe(tmp_path / "critic").decoding == TRAINED


@pytest.mark.parametrize("wrong", ["as trained", "trained", ""])
def test_other_words_are_refused(llama: Any, make_critic: MakeCritic, wrong: str) -> None:
    with pytest.raises(DecodingError, match=f"top_k is '{wrong}', expected a whole number ≥ 1.*None .* 'as_trained'"):
        mavis.MavisTilt([1.0, 0.5], make_critic(llama), beta=2.0, top_k=wrong)  # type: ignore[arg-type]
    with pytest.raises(DecodingError, match=f"temperature is '{wrong}', expected a finite number > 0.* 'as_trained'"):
        mavis.MavisTilt([1.0, 0.5], make_critic(llama), beta=2.0, temperature=wrong)  # type: ignore[arg-type]


def test_a_critic_that_was_only_calibrated_is_used_as_it_was_calibrated(llama: Any, make_critic: MakeCritic) -> None:
    critic = make_critic(llama)
    critic.calibration = Calibration([1.0, 2.0], [[0.5, 1.5], [0.25, 0.75], [0.3, 0.9]], 16, 7, 0.6)
    tilt = mavis.MavisTilt([1.0, 0.5], critic, target_kl=0.5)
    assert (tilt.top_k, tilt.temperature) == (7, 0.6)


def test_a_budget_is_spent_over_the_length_that_is_asked_for(
    llama: Any, make_critic: MakeCritic, prompts: Inputs
) -> None:
    critic = make_critic(llama)
    critic.calibration = Calibration([1.0, 2.0, 4.0], [[0.5, 2.0, 8.0]] * 3, 16, None)
    critic.decoding = TrainedDecoding(max_new_tokens=16)

    def sampled_under(**options: Any) -> Any:
        torch.manual_seed(0)
        shared = {"critic": critic, "weights": [1.0, 0.0], "pad_token_id": 0, "output_scores": True}
        return mavis.generate(llama, prompts, return_dict_in_generate=True, **shared, **options)

    # The KL is taken to be proportional to the length, and here it is the square of beta.
    for length, beta in ((4, 4.0), (16, 2.0), (64, 1.0)):
        budget, fixed = (
            sampled_under(target_kl=2.0, max_new_tokens=length),
            sampled_under(beta=beta, max_new_tokens=length),
        )
        torch.testing.assert_close(budget.scores[0], fixed.scores[0], atol=1e-4, rtol=0)
    # Without a length, that of the training is generated.
    assert sampled_under(target_kl=2.0).sequences.shape[1] == 5 + 16
    # A length counted with the prompt is one, too.
    budget, fixed = sampled_under(target_kl=2.0, max_length=5 + 64), sampled_under(beta=1.0, max_length=5 + 64)
    torch.testing.assert_close(budget.scores[0], fixed.scores[0], atol=1e-4, rtol=0)


def test_the_default_strength_does_not_depend_on_the_length(llama: Any, make_critic: MakeCritic) -> None:
    critic = make_critic(llama)
    critic.calibration = Calibration([1.0, 2.0], [[0.5, 2.0]] * 3, 16, None)
    scores = torch.randn(1, 40)
    with critic.attach(llama), torch.no_grad():
        ids = torch.tensor([[1, 2, 3]])
        llama(ids)
        short, long = (mavis.MavisTilt([1.0, 0.0], critic, max_new_tokens=n)(ids, scores) for n in (4, 400))
    assert torch.equal(short, long)


def test_a_length_is_a_whole_number(llama: Any, make_critic: MakeCritic) -> None:
    with pytest.raises(DecodingError, match="max_new_tokens is 0, expected a whole number ≥ 1"):
        mavis.MavisTilt([1.0, 0.5], make_critic(llama), beta=2.0, max_new_tokens=0)
