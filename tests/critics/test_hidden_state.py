"""The hidden-state critic: its values, its attachment to a policy, its folder."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import mavis
from mavis import HiddenStateCritic
from mavis.critics import Calibration
from mavis.errors import CriticError, PolicyError
from mavis.policies.token_embeddings import token_embeddings
from tests.factories import tiny_llama


def llama(vocabulary: int = 30, hidden: int = 16, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    return tiny_llama(seed, vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=1, **options)


def random_critic(policy: Any, objectives: list[str] | None = None) -> HiddenStateCritic:
    critic = HiddenStateCritic.for_policy(
        policy, objectives or ["positive", "dialogue"], hidden=8, rank=4, composition="independent"
    )
    with torch.no_grad():
        critic.heads.outer.normal_()
        critic.heads.bias.normal_()
    critic.set_normalisation(torch.tensor([[0.0, 10.0], [2.0, 30.0]])[:, : len(critic.objectives)])
    critic.calibration = Calibration([1.0, 2.0], [[0.5, 2.0], [0.4, 1.6], [0.3, 1.2]], 16, None)
    return critic


def first_step(critic: HiddenStateCritic, states: torch.Tensor) -> torch.Tensor:
    """The inputs of the heads at the first step of responses: (B, I)."""
    return critic.response_inputs(states[:, None])[:, 0]


@pytest.fixture
def policy() -> Any:
    return llama()


# Values


def test_untrained_critic_predicts_and_tilts_zero(policy: Any) -> None:
    critic = HiddenStateCritic.for_policy(policy, ["a", "b"])
    states = torch.randn(3, 16)
    assert (critic.values_from_inputs(first_step(critic, states), None) == 0).all()
    assert (critic.tilt_from_inputs(first_step(critic, states), None, torch.ones(3, 2)) == 0).all()


def test_values_are_v_plus_the_product_of_a_and_the_token_vector(policy: Any) -> None:
    critic = random_critic(policy)
    states = torch.randn(3, 16)
    normed = (states - states.mean(1, keepdim=True)) / (states.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    vectors = critic.projection(token_embeddings(policy))
    inner = nn.functional.silu(normed @ critic.heads.inner + critic.heads.inner_bias)
    for m in range(2):
        out = inner[:, m * 8 : (m + 1) * 8] @ critic.heads.outer[m] + critic.heads.bias[m]
        by_hand = out[:, :4] @ vectors.T + out[:, 4:]
        torch.testing.assert_close(
            critic.values_from_inputs(first_step(critic, states), None)[:, :, m], by_hand, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("candidates", [None, torch.tensor([[3, 9, 0, 28], [1, 1, 2, 5], [29, 4, 7, 8]])])
def test_tilt_is_the_sum_of_values_weighted_by_lambda(policy: Any, candidates: torch.Tensor | None) -> None:
    critic = random_critic(policy)
    states, lam = torch.randn(3, 16), torch.tensor([[1.0, -2.0], [0.0, 0.5], [4.0, 0.0]])
    values = critic.values_from_inputs(first_step(critic, states), candidates)
    torch.testing.assert_close(
        critic.tilt_from_inputs(first_step(critic, states), candidates, lam),
        torch.einsum("bkm,bm->bk", values, lam),
        atol=1e-5,
        rtol=1e-5,
    )
    if candidates is not None:
        everything = critic.values_from_inputs(first_step(critic, states), None)
        torch.testing.assert_close(values, everything.gather(1, candidates[..., None].expand(-1, -1, 2)))


def test_independent_critic_refuses_lambda(policy: Any) -> None:
    critic, lam = random_critic(policy), torch.ones(2, 2)
    inputs = first_step(critic, torch.zeros(2, 16))
    for method in (critic.values_from_inputs, critic.kl_to_come_from_inputs):
        with pytest.raises(CriticError, match="composition is 'independent'.*composition='conditioned'"):
            method(inputs, None, lam)
    with critic.attached_to(policy):
        ids = torch.zeros(2, 3, dtype=torch.long)
        policy(ids)
        with pytest.raises(CriticError, match="composition is 'independent'"):
            critic.values(ids, None, lam)


def test_attached_critic_reads_the_policys_last_hidden_state(policy: Any) -> None:
    critic = random_critic(policy)
    ids = torch.randint(0, 30, (2, 5))
    with critic.attach(policy):
        out = policy(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(
            critic.values(ids, None), critic.values_from_inputs(first_step(critic, out.hidden_states[-1][:, -1]), None)
        )
        # a shorter prefix of the same pass is matched by its position
        torch.testing.assert_close(
            critic.values(ids[:, :3], None),
            critic.values_from_inputs(first_step(critic, out.hidden_states[-1][:, 2]), None),
        )


def test_rewards_are_normalised_by_reference_rollouts_that_differ(policy: Any) -> None:
    critic = random_critic(policy)
    torch.testing.assert_close(
        critic.normalise(torch.tensor([[1.0, 20.0]])), torch.zeros(1, 2, dtype=torch.float64), atol=1e-12, rtol=0
    )
    with pytest.raises(CriticError, match="objective 'dialogue' gives every one of the 3 reference responses the same"):
        critic.set_normalisation(torch.tensor([[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]]))


# Attachment


def test_no_hooks_are_left_after_detaching_or_an_exception(policy: Any) -> None:
    def hooks() -> int:
        return len(policy._forward_pre_hooks) + len(policy.get_output_embeddings()._forward_pre_hooks)

    critic = random_critic(policy)
    with critic.attach(policy):
        assert hooks() == 2
    assert hooks() == 0
    critic.attach(policy)
    critic.detach()
    critic.detach()
    assert hooks() == 0
    attachment = critic.attach(policy)
    attachment.detach()
    assert hooks() == 0
    with pytest.raises(RuntimeError, match="boom"), critic.attach(policy):
        raise RuntimeError("boom")
    assert hooks() == 0
    assert critic.attached_policy is None


def test_stale_attachment_does_not_end_a_newer_one(policy: Any) -> None:
    critic = random_critic(policy)
    old = critic.attach(policy)
    critic.detach()
    critic.attach(policy)
    old.detach()
    assert critic.attached_policy is policy
    critic.detach()


def test_critic_serves_one_policy_at_a_time(policy: Any) -> None:
    critic = random_critic(policy)
    with (
        critic.attach(policy),
        pytest.raises(CriticError, match=r"already attached to a policy.*Hint: call critic.detach"),
    ):
        critic.attach(policy)


def test_critic_of_a_deleted_policy_can_be_attached_again() -> None:
    import gc

    first, second = llama(), llama()
    critic = random_critic(first)
    critic.attach(first)
    del first
    gc.collect()
    with critic.attach(second):
        assert critic.attached_policy is second


@pytest.mark.parametrize("shape", [{"hidden": 32}, {"vocabulary": 31}])
def test_policy_of_another_shape_is_refused(policy: Any, shape: dict[str, int]) -> None:
    with pytest.raises(CriticError, match="hidden size 16 and 30 tokens, but policy .* has hidden size"):
        random_critic(policy).attach(llama(**shape))


def test_other_weights_warn_and_other_precision_does_not(policy: Any) -> None:
    critic = random_critic(policy)
    tuned = copy.deepcopy(policy)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.add_(0.01)
    with pytest.warns(UserWarning, match="has the shape but not the weights"), critic.attach(tuned):
        pass
    with warnings.catch_warnings(), critic.attach(copy.deepcopy(policy).to(torch.bfloat16)):
        warnings.simplefilter("error")


def test_policy_without_output_embedding_is_refused(policy: Any) -> None:
    with pytest.raises(PolicyError, match=r"LlamaModel has no output embedding.*Hint: .*AutoModelForCausalLM"):
        HiddenStateCritic.for_policy(policy.model, ["a"])
    with pytest.raises(PolicyError, match="has no output embedding"):
        random_critic(policy).attach(policy.model)


@pytest.mark.parametrize(
    ("objectives", "options", "message"),
    [
        ([], {}, r"objectives is \[\], expected at least one name"),
        (["a", "b", "a"], {}, r"objectives is \['a', 'b', 'a'\]"),
        (["a", ""], {}, "objectives is"),
        (["a"], {"hidden": 0}, "hidden is 0, expected a whole number ≥ 1"),
        (["a"], {"rank": -2}, "rank is -2"),
    ],
)
def test_invalid_arguments_are_refused(
    policy: Any, objectives: list[str], options: dict[str, int], message: str
) -> None:
    with pytest.raises(CriticError, match=message):
        HiddenStateCritic.for_policy(policy, objectives, **options)


# Saving and loading


def test_saved_and_loaded_critic_has_the_same_values(policy: Any, tmp_path: Path) -> None:
    critic = random_critic(policy)
    critic.save_pretrained(tmp_path / "critic")
    assert sorted(p.name for p in (tmp_path / "critic").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = mavis.Critic.from_pretrained(tmp_path / "critic")
    assert isinstance(loaded, HiddenStateCritic)
    assert loaded.objectives == critic.objectives
    assert loaded.calibration == critic.calibration
    assert loaded.fingerprint == critic.fingerprint
    ids = torch.randint(0, 30, (2, 5))
    values = []
    for one in (critic, loaded):
        with one.attach(policy):
            policy(input_ids=ids)
            values.append(one.values(ids, None))
    assert torch.equal(values[0], values[1])
    raw = torch.randn(4, 2)
    assert torch.equal(critic.normalise(raw), loaded.normalise(raw))


def test_saving_replaces_a_critic_and_nothing_else(policy: Any, tmp_path: Path) -> None:
    critic = random_critic(policy)
    critic.save_pretrained(tmp_path / "critic")
    critic.save_pretrained(str(tmp_path / "critic"))
    assert [p.name for p in tmp_path.iterdir()] == ["critic"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(CriticError, match="exists and is not a critic"):
        critic.save_pretrained(precious)
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_failed_save_leaves_the_old_critic(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = random_critic(policy)
    critic.save_pretrained(tmp_path / "critic")
    before = (tmp_path / "critic" / "model.safetensors").read_bytes()

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mavis.critics.io.save.save_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        critic.save_pretrained(tmp_path / "critic")
    assert (tmp_path / "critic" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["critic"]


def test_broken_folders_are_refused(policy: Any, tmp_path: Path) -> None:
    good = tmp_path / "good"
    random_critic(policy).save_pretrained(good)

    def broken(name: str, damage: Any) -> Path:
        import shutil

        shutil.copytree(good, tmp_path / name)
        damage(tmp_path / name)
        return tmp_path / name

    def edit(change: Any) -> Any:
        def apply(folder: Path) -> None:
            config = json.loads((folder / "config.json").read_text())
            change(config)
            (folder / "config.json").write_text(json.dumps(config))

        return apply

    def halve(name: str) -> Any:
        return lambda folder: (folder / name).write_bytes(
            (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
        )

    def pickle_instead(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    cases = [
        (tmp_path / "nowhere", "which does not exist. Hint: train a critic first"),
        (broken("no-config", lambda f: (f / "config.json").unlink()), "has no config.json, so it is not a critic"),
        (broken("half-config", halve("config.json")), "config.json' is damaged"),
        (broken("half-weights", halve("model.safetensors")), "model.safetensors' is corrupt or truncated"),
        (broken("no-weights", lambda f: (f / "model.safetensors").unlink()), "has no model.safetensors"),
        (
            broken("pickle", pickle_instead),
            "pytorch_model.bin, which is never read because loading a pickle can run code",
        ),
        (
            broken("foreign", lambda f: (f / "config.json").write_text('{"model_type": "llama"}')),
            "is not the config of a critic",
        ),
        (broken("kind", edit(lambda c: c.update(kind="hiden_state"))), "did you mean 'hidden_state'"),
        (broken("format", edit(lambda c: c.update(format=99))), "has critic format 99; this version reads up to 2"),
        (broken("missing", edit(lambda c: c.pop("policy"))), "config.json' is corrupt or truncated"),
        (broken("sizes", edit(lambda c: c["settings"].update(hidden=9))), "heads.inner is [16, 18] by config.json"),
    ]
    for folder, message in cases:
        with pytest.raises(CriticError) as caught:
            mavis.Critic.from_pretrained(folder)
        assert message in str(caught.value)
        assert "Hint: " in str(caught.value)


def test_a_kind_names_one_class_of_critics() -> None:
    with pytest.raises(CriticError, match="kind is 'hidden_state' in .*, but HiddenStateCritic is saved and loaded"):

        class Impostor(HiddenStateCritic):
            kind = "hidden_state"
