"""Policies that are adapted, quantised or kept elsewhere."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mavis
from mavis.errors import DecodingError, PolicyError
from tests.decoding.steps import KINDS, LAM, ByHand, Inputs, MakeCritic, expect_tilted, processed, tilt_for


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "embed_tokens", "lm_head"]])
def test_an_adapted_policy_is_attached_to_as_it_is_used(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    either: dict[str, Any],
    targets: list[str],
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about adapted embeddings
        policy = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    critic = make_critic(policy, **either)
    for attached in (policy, policy.get_base_model()):
        with critic.attach(attached):
            expect_tilted(tilted_by_hand, policy, critic, processed(policy, prompts, tilt_for(critic)), prompts)
    steer: dict[str, Any] = {"critic": critic, "weights": [1.0, 0.4], "beta": 1.5, "do_sample": False}
    tilted = mavis.generate(policy, prompts, **steer, max_new_tokens=6)
    with policy.disable_adapter():
        assert not torch.equal(mavis.generate(policy, prompts, **steer, max_new_tokens=6), tilted)


@pytest.mark.parametrize("prompt", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_learnt_prompts_are_refused(llama: Any, make_critic: MakeCritic, prompts: Inputs, prompt: str) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, prompt)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about itself
        policy = peft.get_peft_model(copy.deepcopy(llama), config).eval()
        critic = make_critic(policy)
        with critic.attach(policy), pytest.raises(DecodingError, match="learnt prompts|inputs_embeds"):
            processed(policy, prompts, tilt_for(critic))


@pytest.mark.parametrize("kind", [KINDS["plain"], KINDS["conditioned memory"]], ids=["plain", "conditioned memory"])
def test_a_quantised_policy_is_read_like_any(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, kind: dict[str, Any]
) -> None:
    """Its weights are no tensors. Its scores depend on the whole batch, so its own states and scores are compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this elsewhere
        policy = torch.ao.quantization.quantize_dynamic(copy.deepcopy(llama), {torch.nn.Linear}, dtype=torch.qint8)
    critic = make_critic(policy, **kind)
    with critic.attach(policy):
        out = policy.generate(
            **prompts,
            do_sample=False,
            max_new_tokens=6,
            logits_processor=tilt_for(critic, top_k=None),
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            output_hidden_states=True,
        )
    states = torch.stack([step[-1][:, -1] for step in out.hidden_states], dim=1)
    inputs = critic.response_inputs(states)
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        tilt = critic.tilt_from_inputs(inputs[:, step], None, torch.tensor([LAM] * 3))
        torch.testing.assert_close(scores, (logits + tilt).log_softmax(-1), atol=1e-4, rtol=1e-4)
    trained_on_another = make_critic(llama)
    with pytest.warns(UserWarning, match="not the weights of the one this critic was trained on"):
        trained_on_another.attach(policy).detach()


@pytest.mark.parametrize("place", ["device map", "hooks", "offloaded", "on disk"])
def test_weights_may_be_kept_elsewhere(
    policy: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    either: dict[str, Any],
    place: str,
    tmp_path: Path,
) -> None:
    """Without a warning about other weights, and with the same table of tokens."""
    import accelerate

    critic = make_critic(policy, **either)
    if place == "device map":
        policy.save_pretrained(tmp_path)
        placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    elif place == "hooks":
        placed = accelerate.dispatch_model(copy.deepcopy(policy), {"": "cpu"}, force_hooks=True)
    elif place == "offloaded":
        placed = accelerate.cpu_offload(copy.deepcopy(policy), execution_device="cpu")
    else:
        placed = accelerate.disk_offload(copy.deepcopy(policy), tmp_path, execution_device="cpu")
    if "readout" not in either:
        assert torch.equal(make_critic(placed, **either).token_table, critic.token_table)
    with critic.attach(placed):
        expect_tilted(tilted_by_hand, policy, critic, processed(placed, prompts, tilt_for(critic)), prompts)


def test_a_policy_without_weights_is_refused(llama: Any, make_critic: MakeCritic) -> None:
    empty = copy.deepcopy(llama).to("meta")
    with pytest.raises(PolicyError, match="LlamaForCausalLM is on device 'meta', where there are no weights"):
        make_critic(empty)
    with pytest.warns(UserWarning, match="not the weights"), pytest.raises(PolicyError, match="is on device 'meta'"):
        make_critic(llama).attach(empty)
