"""Further options of `generate`: guidance, streams, chats, prompts in chunks, second turns, custom loops."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import TextIteratorStreamer, pipeline

import mavis
from mavis import HiddenStateCritic, MavisTilt
from mavis.errors import DecodingError
from tests.decoding.steps import KINDS, ByHand, Inputs, MakeCritic, expect_tilted, processed, tilt_for


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "negative",
    [None, torch.tensor([[1, 8, 8, 2, 6]]).repeat(3, 1), torch.tensor([[2, 9]]).repeat(3, 1)],
    ids=["last token", "as long as the prompts", "shorter"],
)
def test_guidance_is_part_of_the_reference(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    either: dict[str, Any],
    negative: torch.Tensor | None,
    use_cache: bool,
) -> None:
    """The state of the conditional pass is read, though the unconditional one comes last in each step."""
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 4, 2], [1, 7, 3, 3, 20], [2, 1, 30, 12, 8]])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    critic = make_critic(llama, **either)

    def guided(ids: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        prompt = len(asked)
        other = ids[:, prompt - 1 : prompt] if negative is None else negative[:1]
        with torch.no_grad():
            conditional = llama(ids).logits[0, -1].log_softmax(-1)
            unconditional = llama(torch.cat([other, ids[:, prompt:]], 1)).logits[0, -1].log_softmax(-1)
        return unconditional + 1.5 * (conditional - unconditional)

    with critic.attach(llama):
        seen = processed(
            llama, inputs, tilt_for(critic), guidance_scale=1.5, negative_prompt_ids=negative, use_cache=use_cache
        )
    expect_tilted(tilted_by_hand, llama, critic, seen, inputs, reference=guided)


def test_streams_pipelines_and_chats(
    tiny_policy: Any, tiny_tokenizer: Any, make_tiny_critic: Callable[..., HiddenStateCritic]
) -> None:
    critic = make_tiny_critic(scale=2.0)
    steer: dict[str, Any] = {"weights": {"good": 2.0}, "beta": 2.0, "top_k": None}
    text = "the little girl went to the park"
    inputs = dict(tiny_tokenizer([text], return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    expected = mavis.generate(tiny_policy, inputs, critic=critic, do_sample=False, max_new_tokens=8, **steer)
    plain = tiny_policy.generate(**inputs, do_sample=False, max_new_tokens=8)
    start = inputs["input_ids"].shape[1]
    response = tiny_tokenizer.decode(expected[0, start:], skip_special_tokens=True)
    assert not torch.equal(expected, plain)

    with critic.attach(tiny_policy):
        arguments = {"do_sample": False, "max_new_tokens": 8, "logits_processor": MavisTilt(critic=critic, **steer)}
        streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = threading.Thread(target=tiny_policy.generate, kwargs=inputs | arguments | {"streamer": streamer})
        thread.start()
        assert "".join(streamer) == response
        thread.join()

        pipe = pipeline("text-generation", model=tiny_policy, tokenizer=tiny_tokenizer)
        (answer,) = pipe(text, return_full_text=False, **arguments)
        assert answer["generated_text"].strip() == response

    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chat = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], return_tensors="pt", return_dict=True, add_generation_prompt=True
    )
    told = mavis.generate(tiny_policy, chat, critic=critic, do_sample=False, max_new_tokens=8, **steer)
    assert torch.equal(told, expected)


@pytest.mark.parametrize("chunk", [2, 3])
def test_prompts_may_be_read_in_chunks(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, chunk: int
) -> None:
    """A last chunk of one token cannot be told from the next step of a response, which only a memory has to know."""
    for kind in KINDS.values():
        critic = make_critic(llama, **kind)
        with critic.attach(llama):
            if chunk == 2 and "memory" in kind:
                with pytest.raises(DecodingError, match="must not end with a chunk of one token"):
                    processed(llama, prompts, tilt_for(critic), prefill_chunk_size=chunk)
            else:
                seen = processed(llama, prompts, tilt_for(critic), prefill_chunk_size=chunk)
                expect_tilted(tilted_by_hand, llama, critic, seen, prompts)


def test_a_second_turn_goes_on_from_the_cache_of_the_first(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    """What the user says next is part of the prompt, where a memory begins anew."""
    critic = make_critic(llama, **either)
    arguments = {"do_sample": False, "max_new_tokens": 4, "logits_processor": tilt_for(critic)}
    with critic.attach(llama):
        first = llama.generate(**prompts, **arguments, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6], [7, 8], [9, 9]])], dim=1)
        asked = prompts["attention_mask"]
        turn = {"input_ids": ids, "attention_mask": torch.cat([asked, asked.new_ones(3, 6)], dim=1)}
        seen = processed(llama, turn, tilt_for(critic), past_key_values=first.past_key_values)
    expect_tilted(tilted_by_hand, llama, critic, seen, turn)


def test_a_decoding_loop_of_the_callers_is_as_good_as_generates_own(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    def loop(model: Any, input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        return type(model)._sample(model, input_ids, **others)

    critic = make_critic(llama, **either)
    with critic.attach(llama):
        seen = processed(llama, prompts, tilt_for(critic), custom_generate=loop)
    expect_tilted(tilted_by_hand, llama, critic, seen, prompts)


def test_a_processor_that_runs_the_policy_itself_changes_nothing(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    class LooksElsewhere(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            llama(input_ids.flip(0))
            return scores

    critic = make_critic(llama, **either)
    with critic.attach(llama):
        seen = processed(llama, prompts, LooksElsewhere(), tilt_for(critic))
    expect_tilted(tilted_by_hand, llama, critic, seen, prompts)


def test_continuous_batching_is_refused(llama: Any, make_critic: MakeCritic) -> None:
    """It asks no processor, so the pass itself has to say so; `block_table` is what only its passes are given."""
    with make_critic(llama).attach(llama), pytest.raises(DecodingError, match="continuous batching.*detach the critic"):
        llama(torch.tensor([[1, 2]]), block_table=None)
