"""From prompts to responses: what `mavis.generate` writes, as texts with what they spent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mavis
from mavis.critics import HiddenStateCritic, TrainedDecoding
from mavis.errors import DecodingError, PromptError
from mavis.policies import encode_prompts

HI = [{"role": "user", "content": "the dog"}]
TEMPLATE = "{% for m in messages %}{{ m.content }} . {% endfor %}{% if add_generation_prompt %}she {% endif %}"


@pytest.fixture
def critic(make_tiny_critic: Callable[..., HiddenStateCritic]) -> HiddenStateCritic:
    critic = make_tiny_critic()
    critic.decoding = TrainedDecoding(top_k=20, max_new_tokens=6)
    return critic


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


WEIGHTS = {"good": 1.0}


def test_responses_are_those_of_generate(tiny_policy: Any, tiny_tokenizer: Any, critic: HiddenStateCritic) -> None:
    prompts = ["the dog", "she said that"]
    torch.manual_seed(0)
    found = mavis.respond(tiny_policy, tiny_tokenizer, prompts, critic=critic, weights=WEIGHTS, beta=2.0, samples=3)
    torch.manual_seed(0)
    inputs = encode_prompts(tiny_tokenizer, prompts)
    shared = {"critic": critic, "weights": WEIGHTS, "beta": 2.0, "num_return_sequences": 3}
    ids = mavis.generate(tiny_policy, dict(inputs), **shared)
    written = ids[:, inputs["input_ids"].shape[1] :]
    assert [len(answers) for answers in found] == [3, 3]
    end = tiny_tokenizer.eos_token_id
    for response, row in zip([one for answers in found for one in answers], written.tolist(), strict=True):
        assert response.token_ids == row[: len(response.token_ids)]
        assert response.finished == (response.token_ids[-1] == end)
        assert response.finished or len(response.token_ids) == 6
        assert response.text.split() == tiny_tokenizer.decode(response.token_ids, skip_special_tokens=True).split()


def test_each_token_has_its_kl(tiny_policy: Any, tiny_tokenizer: Any, critic: HiddenStateCritic) -> None:
    [[response]] = mavis.respond(tiny_policy, tiny_tokenizer, ["the dog"], critic=critic, weights=WEIGHTS, beta=2.0)
    inputs = encode_prompts(tiny_tokenizer, ["the dog"])["input_ids"]
    expected = []
    with critic.attached_to(tiny_policy), torch.no_grad():
        for length in range(len(response.token_ids)):
            ids = torch.cat([inputs, torch.tensor([response.token_ids[:length]], dtype=torch.long)], dim=1)
            logprobs = torch.log_softmax(tiny_policy(ids).logits[:, -1].double(), dim=-1)
            tilted = mavis.MavisTilt(WEIGHTS, critic, beta=2.0)(ids, logprobs)
            expected.append(float((tilted.exp() * (tilted - logprobs).nan_to_num(neginf=0.0)).sum()))
    assert response.kl == pytest.approx(expected, abs=1e-5)
    assert response.spent == pytest.approx(sum(expected), abs=1e-4)


def test_a_conversation_is_answered_through_its_template(
    tiny_policy: Any, tiny_tokenizer: Any, chat_tokenizer: Any, critic: HiddenStateCritic
) -> None:
    shared = {"critic": critic, "weights": WEIGHTS, "beta": 2.0, "greedy": True}
    answered = mavis.respond(tiny_policy, chat_tokenizer, [HI], **shared)
    continued = mavis.respond(tiny_policy, tiny_tokenizer, ["the dog . she"], **shared)
    assert answered == continued


def test_the_assistants_turn_is_continued_only_if_asked(
    tiny_policy: Any, chat_tokenizer: Any, critic: HiddenStateCritic
) -> None:
    begun = [*HI, {"role": "assistant", "content": "he"}]
    with pytest.raises(PromptError, match="prompt ends with the assistant's 'he'"):
        mavis.respond(tiny_policy, chat_tokenizer, [begun], critic=critic, weights=WEIGHTS, beta=2.0)
    shared: dict[str, Any] = {"critic": critic, "weights": WEIGHTS, "beta": 2.0, "greedy": True}
    answered = mavis.respond(tiny_policy, chat_tokenizer, [begun], continue_final_message=True, **shared)
    chat_tokenizer.chat_template = None
    assert answered == mavis.respond(tiny_policy, chat_tokenizer, ["the dog . he"], **shared)


def test_every_prompt_may_have_its_weights(tiny_policy: Any, tiny_tokenizer: Any, critic: HiddenStateCritic) -> None:
    both = [{"good": 1.0}, {"brevity": 1.0}]
    shared: dict[str, Any] = {"critic": critic, "beta": 3.0, "greedy": True}
    together = mavis.respond(tiny_policy, tiny_tokenizer, ["the dog"] * 2, weights=both, **shared)
    for row, weights in zip(together, both, strict=True):
        [alone] = mavis.respond(tiny_policy, tiny_tokenizer, ["the dog"], weights=weights, **shared)
        assert row[0].token_ids == alone[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "the dog"}, "prompts is 'the dog', expected at least one prompt"),
        ({"prompts": []}, r"prompts is \[\], expected at least one prompt"),
        ({"max_new_tokens": None}, "max_new_tokens is None, expected a whole number ≥ 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number ≥ 1"),
        ({"samples": 0}, "samples is 0, expected a whole number ≥ 1"),
        ({"samples": 2, "greedy": True}, "samples is 2, but greedy decoding gives one response"),
    ],
)
def test_what_cannot_be_responded_to_is_refused(
    tiny_policy: Any, tiny_tokenizer: Any, critic: HiddenStateCritic, arguments: dict[str, Any], message: str
) -> None:
    prompts = arguments.pop("prompts", ["the dog"])
    with pytest.raises(DecodingError, match=message):
        mavis.respond(tiny_policy, tiny_tokenizer, prompts, critic=critic, weights=WEIGHTS, beta=1.0, **arguments)


def test_texts_for_a_chat_model_warn(tiny_policy: Any, chat_tokenizer: Any, critic: HiddenStateCritic) -> None:
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["."]})
    with pytest.warns(UserWarning, match="prompts are texts, but the policy is a chat model"):
        mavis.respond(tiny_policy, chat_tokenizer, ["the dog"], critic=critic, weights=WEIGHTS, beta=2.0)
    with pytest.warns(UserWarning, match="eos_token_id lacks the token that ends a turn"):
        mavis.respond(tiny_policy, chat_tokenizer, [HI], critic=critic, weights=WEIGHTS, beta=2.0)
