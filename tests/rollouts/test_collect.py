"""Sampling shard by shard: what is on disk, what is sampled again and what never is."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.critics import HiddenStateCritic
from mavis.errors import ConfigError, DataError, ObjectiveError
from mavis.rewards import score
from mavis.rollouts import RolloutPlan, RolloutSettings, SampledResponses, collect
from mavis.rollouts.sampler import GenerateSampler

MODULE = sys.modules["mavis.rollouts.collect"]  # the package's attribute of that name is the function
MakeCritic = Callable[..., HiddenStateCritic]

PROMPTS = ["once upon a time", "the dog", "she said", "the little old man ran", "he was"]
SETTINGS = RolloutSettings(max_new_tokens=16, top_k=12, shard_size=4, seed=3)
COLUMNS = {"prompt", "response", "prompt_ids", "response_ids", "weights", "beta", "kl", "rewards"}


def tilted_plan(rows: int = 10, beta: float = 2.0) -> RolloutPlan:
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]], dtype=torch.float64)
    return RolloutPlan(prompts, weights[torch.arange(rows) % 3], torch.full((rows,), beta, dtype=torch.float64))


def columns(shards: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for shard in shards:
        for name, values in shard[:].items():
            found.setdefault(name, []).extend(values)
    return found


class CountsForwards:
    """Counts how often a policy is called while the block runs."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.count = policy, 0

    def __enter__(self) -> CountsForwards:
        self.hook = self.policy.register_forward_pre_hook(self._on_forward)
        return self

    def _on_forward(self, *_: object) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.fixture
def run(tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any) -> Callable[..., Any]:
    """`collect` on the tiny policy, by plan and folder."""

    def call(plan: RolloutPlan, folder: Path, settings: RolloutSettings = SETTINGS, **options: Any) -> Any:
        objectives = options.pop("objectives", tiny_objectives)
        policy = options.pop("policy", tiny_policy)
        return collect(policy, tiny_tokenizer, objectives, plan, folder, settings, **options)

    return call


def test_the_rows_are_the_plans_in_its_order(run: Any, make_tiny_critic: MakeCritic, tmp_path: Path) -> None:
    plan = tilted_plan()
    rows = columns(run(plan, tmp_path, critic=make_tiny_critic()))
    assert set(rows) == COLUMNS
    assert rows["prompt"] == plan.prompts
    assert rows["weights"] == plan.weights.tolist()
    assert rows["beta"] == plan.betas.tolist()


def test_the_shards_on_disk_are_what_was_yielded(run: Any, make_tiny_critic: MakeCritic, tmp_path: Path) -> None:
    import datasets

    shards = list(run(tilted_plan(), tmp_path, critic=make_tiny_critic()))
    assert [len(shard) for shard in shards] == [4, 4, 2]
    for index, shard in enumerate(shards):
        stored = datasets.load_from_disk(str(tmp_path / f"shard-{index:05d}"))
        assert stored.to_dict() == shard.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "plan.json",
        *(f"shard-{index:05d}" for index in range(3)),
    ]


def test_each_shard_is_on_disk_when_it_is_yielded(run: Any, tmp_path: Path) -> None:
    for index, _ in enumerate(run(RolloutPlan.reference(PROMPTS, 2), tmp_path)):
        assert (tmp_path / f"shard-{index:05d}" / "state.json").is_file()
        assert not (tmp_path / f"shard-{index + 1:05d}").exists()


def test_a_response_ends_with_its_first_end_token_or_at_the_longest_length(
    run: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = columns(run(RolloutPlan.reference(PROMPTS * 8, 2), tmp_path))
    end = tiny_tokenizer.eos_token_id
    ended = [end in ids for ids in rows["response_ids"]]
    assert any(ended)
    assert not all(ended)
    for ids, has_end in zip(rows["response_ids"], ended, strict=True):
        assert ids.count(end) == has_end
        assert ids[-1] == end if has_end else len(ids) == SETTINGS.max_new_tokens
    for row in range(len(ended)):  # decoded in its place, so that no space between prompt and response is lost
        whole = tiny_tokenizer.decode([*rows["prompt_ids"][row], *rows["response_ids"][row]], skip_special_tokens=True)
        assert tiny_tokenizer.decode(rows["prompt_ids"][row], skip_special_tokens=True) + rows["response"][row] == whole
        assert "</s>" not in rows["response"][row]


def test_every_end_token_of_the_policy_counts(run: Any, tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    full_stop = tiny_tokenizer.convert_tokens_to_ids("good")
    before = tiny_policy.generation_config.eos_token_id
    tiny_policy.generation_config.eos_token_id = [before, full_stop]
    try:
        rows = columns(run(RolloutPlan.reference(PROMPTS * 8, 2), tmp_path))
    finally:
        tiny_policy.generation_config.eos_token_id = before
    assert any(ids[-1] == full_stop for ids in rows["response_ids"])
    assert all(full_stop not in ids[:-1] for ids in rows["response_ids"])


def test_prompt_ids_are_the_prompt_without_its_padding(run: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = columns(run(RolloutPlan.reference(PROMPTS, 2), tmp_path))
    assert rows["prompt_ids"] == [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.mark.parametrize("top_k", [5, None])
def test_kl_has_one_entry_per_response_token(
    run: Any, make_tiny_critic: MakeCritic, tmp_path: Path, top_k: int | None
) -> None:
    settings = RolloutSettings(max_new_tokens=16, top_k=top_k, shard_size=20)
    rows = columns(run(tilted_plan(20), tmp_path, settings, critic=make_tiny_critic()))
    assert [len(kl) for kl in rows["kl"]] == [len(ids) for ids in rows["response_ids"]]
    assert all(0 <= step < 20 for kl in rows["kl"] for step in kl)
    assert all(sum(kl) > 0 for kl in rows["kl"])


def test_rewards_are_the_objectives_own_in_their_order(run: Any, tiny_objectives: Any, tmp_path: Path) -> None:
    rows = columns(run(RolloutPlan.reference(PROMPTS, 2), tmp_path))
    assert rows["rewards"] == score(tiny_objectives, rows["prompt"], rows["response"]).tolist()
    assert [reward for reward, _ in rows["rewards"]] == [text.split().count("good") for text in rows["response"]]


def test_the_reference_policy_costs_no_kl(run: Any, tmp_path: Path) -> None:
    assert not any(step for kl in columns(run(RolloutPlan.reference(PROMPTS, 2), tmp_path))["kl"] for step in kl)


def test_rows_without_a_tilt_are_the_reference_policys_own(
    run: Any, make_tiny_critic: MakeCritic, tmp_path: Path
) -> None:
    plan = RolloutPlan.reference(PROMPTS, 2)
    plain = columns(run(plan, tmp_path / "plain"))
    passed = columns(run(plan, tmp_path / "passed", critic=make_tiny_critic()))
    assert plain == passed


def test_a_row_is_the_same_whether_its_neighbours_are_tilted_or_not(
    run: Any, make_tiny_critic: MakeCritic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first row draws the first number of every step, so with one seed it does not depend on the rows after it.
    monkeypatch.setattr(MODULE, "shard_seed", lambda *_: 0)
    critic, plan = make_tiny_critic(), tilted_plan(4)
    others_plain = RolloutPlan(plan.prompts, plan.weights, plan.betas * torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tilted = columns(run(plan, tmp_path / "tilted", critic=critic))
    mixed = columns(run(others_plain, tmp_path / "mixed", critic=critic))
    assert mixed["response_ids"][0] == tilted["response_ids"][0]
    assert mixed["kl"][0] == pytest.approx(tilted["kl"][0], abs=1e-6)
    assert not any(step for kl in mixed["kl"][1:] for step in kl)


def test_only_beta_times_the_weights_matters(
    run: Any, make_tiny_critic: MakeCritic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "shard_seed", lambda *_: 0)
    plan, critic = tilted_plan(), make_tiny_critic()
    halved = RolloutPlan(plan.prompts, plan.weights / 2, plan.betas * 2)
    one, other = (columns(run(p, tmp_path / name, critic=critic)) for p, name in ((plan, "a"), (halved, "b")))
    for name in COLUMNS - {"weights", "beta"}:
        assert one[name] == other[name]


def test_per_row_weights_sample_what_generate_samples_with_a_mapping_per_prompt(
    run: Any,
    tiny_policy: Any,
    tiny_tokenizer: Any,
    make_tiny_critic: MakeCritic,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MODULE, "shard_seed", lambda *_: 11)
    plan, critic = tilted_plan(4), make_tiny_critic()
    settings = RolloutSettings(max_new_tokens=16, top_k=7, temperature=0.8, shard_size=4)
    rows = columns(run(plan, tmp_path, settings, critic=critic))
    torch.manual_seed(11)
    output = mavis.generate(
        tiny_policy,
        tiny_tokenizer(plan.prompts, return_tensors="pt", padding=True, return_token_type_ids=False),
        critic=critic,
        weights=[dict(zip(critic.objectives, row, strict=True)) for row in plan.weights.tolist()],
        beta=plan.betas,
        top_k=7,
        temperature=0.8,
        max_new_tokens=16,
    )
    longest = max(map(len, rows["prompt_ids"]))
    for ids, sampled in zip(rows["response_ids"], output[:, longest:].tolist(), strict=True):
        assert sampled[: len(ids)] == ids
        assert not any(sampled[len(ids) :])  # padding


def test_a_truncated_reference_samples_from_its_candidates_and_pays_for_the_rest(
    run: Any, tiny_policy: Any, tmp_path: Path
) -> None:
    settings = RolloutSettings(max_new_tokens=12, top_k=3, temperature=1.5, shard_size=8)
    rows = columns(run(RolloutPlan.reference(PROMPTS * 2, 2), tmp_path, settings, truncate_reference=True))
    for prompt, response, kl in zip(rows["prompt_ids"], rows["response_ids"], rows["kl"], strict=True):
        logits = tiny_policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 1.5
        best = logits.softmax(-1).topk(3)
        assert all(token in ids for token, ids in zip(response, best.indices.tolist(), strict=True))
        assert kl == pytest.approx((-best.values.sum(-1).log()).tolist(), abs=1e-5)


def test_without_truncation_tokens_beyond_the_candidates_are_sampled_too(
    run: Any, tiny_policy: Any, tmp_path: Path
) -> None:
    settings = RolloutSettings(max_new_tokens=12, top_k=3, shard_size=20)
    rows = columns(run(RolloutPlan.reference(PROMPTS * 4, 2), tmp_path, settings))
    outside = 0
    for prompt, response in zip(rows["prompt_ids"], rows["response_ids"], strict=True):
        best = tiny_policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].topk(3).indices.tolist()
        outside += sum(token not in ids for token, ids in zip(response, best, strict=True))
    assert outside


def test_a_second_call_asks_the_policy_nothing(
    run: Any, tiny_policy: Any, make_tiny_critic: MakeCritic, tmp_path: Path
) -> None:
    plan, critic = tilted_plan(), make_tiny_critic()
    with CountsForwards(tiny_policy) as first:
        sampled = columns(run(plan, tmp_path, critic=critic))
    with CountsForwards(tiny_policy) as second:
        read = columns(run(plan, tmp_path, critic=critic))
    assert first.count > 0
    assert second.count == 0
    assert read == sampled


@pytest.mark.parametrize("tilted", [False, True])
def test_a_shard_that_was_lost_is_sampled_again_identically(
    run: Any, tiny_policy: Any, make_tiny_critic: MakeCritic, tmp_path: Path, tilted: bool
) -> None:
    plan = tilted_plan() if tilted else RolloutPlan.reference(PROMPTS * 2, 2)
    options = {"critic": make_tiny_critic()} if tilted else {"truncate_reference": True}
    sampled = columns(run(plan, tmp_path, **options))
    shutil.rmtree(tmp_path / "shard-00001")
    torch.rand(5)  # the caller's own random numbers have nothing to do with it
    with CountsForwards(tiny_policy) as again:
        assert columns(run(plan, tmp_path, **options)) == sampled
    assert 0 < again.count <= SETTINGS.max_new_tokens + 1


def test_a_run_that_breaks_off_in_the_middle_goes_on_to_the_same_rollouts(
    run: Any, make_tiny_critic: MakeCritic, tmp_path: Path
) -> None:
    plan, critic = tilted_plan(), make_tiny_critic()
    unbroken = columns(run(plan, tmp_path / "unbroken", critic=critic))
    broken = run(plan, tmp_path / "broken", critic=critic)
    next(broken)
    broken.close()
    assert not (tmp_path / "broken" / "shard-00001").exists()
    assert columns(run(plan, tmp_path / "broken", critic=critic)) == unbroken


def test_sampling_leaves_the_callers_random_numbers_alone(run: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(run(RolloutPlan.reference(PROMPTS, 2), tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_shards_with_the_same_rows_are_not_the_same_responses(run: Any, tmp_path: Path) -> None:
    shards = list(run(RolloutPlan.reference(PROMPTS[:4] * 3, 2), tmp_path))
    assert len({json.dumps(shard["response_ids"][:]) for shard in shards}) == 3


def test_another_seed_gives_other_responses(run: Any, tmp_path: Path) -> None:
    plan = RolloutPlan.reference(PROMPTS, 2)
    other = RolloutSettings(max_new_tokens=16, top_k=12, shard_size=4, seed=4)
    assert columns(run(plan, tmp_path / "a"))["response"] != columns(run(plan, tmp_path / "b", other))["response"]


def test_a_critic_that_was_not_attached_is_not_attached_afterwards(
    run: Any, make_tiny_critic: MakeCritic, tmp_path: Path
) -> None:
    critic = make_tiny_critic()
    list(run(tilted_plan(), tmp_path, critic=critic))
    assert critic.attached_policy is None


def test_a_critic_that_was_attached_stays_attached(
    run: Any, tiny_policy: Any, make_tiny_critic: MakeCritic, tmp_path: Path
) -> None:
    critic = make_tiny_critic()
    detached = columns(run(tilted_plan(), tmp_path / "a", critic=critic))
    with critic.attach(tiny_policy):
        attached = columns(run(tilted_plan(), tmp_path / "b", critic=critic))
        assert critic.attached_policy is tiny_policy
    assert attached == detached


# What goes wrong


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"plan": RolloutPlan.reference(PROMPTS[::-1], 2)}, "plan"),
        ({"settings": RolloutSettings(max_new_tokens=16, top_k=12, shard_size=4, seed=9)}, "settings.seed"),
        ({"settings": RolloutSettings(max_new_tokens=16, top_k=None, shard_size=4, seed=3)}, "settings.top_k"),
        ({"objectives": {"good": len, "short": len}}, "objectives"),
        ({"truncate_reference": True}, "truncate_reference"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_says_what_differs(
    run: Any, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    arguments: dict[str, Any] = {"plan": RolloutPlan.reference(PROMPTS, 2), "settings": SETTINGS}
    before = columns(run(**arguments, folder=tmp_path))
    with pytest.raises(DataError, match=rf"holds rollouts with different {re.escape(named)}\. Hint: name a new output"):
        list(run(**(arguments | change), folder=tmp_path))
    assert columns(run(**arguments, folder=tmp_path)) == before


def test_a_folder_of_another_critic_is_refused(run: Any, make_tiny_critic: MakeCritic, tmp_path: Path) -> None:
    list(run(tilted_plan(), tmp_path, critic=make_tiny_critic()))
    with pytest.raises(DataError, match="holds rollouts with different critic"):
        list(run(tilted_plan(), tmp_path, critic=make_tiny_critic(seed=1)))


def test_a_folder_of_another_policy_is_refused(run: Any, make_other_policy: Any, tmp_path: Path) -> None:
    list(run(RolloutPlan.reference(PROMPTS, 2), tmp_path))
    with pytest.raises(DataError, match="holds rollouts with different policy"):
        list(run(RolloutPlan.reference(PROMPTS, 2), tmp_path, policy=make_other_policy()))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "no state", "fewer rows"])
def test_a_damaged_shard_is_an_error_that_names_it(run: Any, tmp_path: Path, damage: str) -> None:
    import datasets

    plan = RolloutPlan.reference(PROMPTS * 2, 2)
    sampled = columns(run(plan, tmp_path))
    shard = tmp_path / "shard-00001"
    if damage == "fewer rows":
        fewer = datasets.load_from_disk(str(shard), keep_in_memory=True).select(range(2))
        shutil.rmtree(shard)
        fewer.save_to_disk(str(shard))
    elif damage == "no state":
        (shard / "state.json").unlink()
    else:
        for path in shard.glob("*.arrow"):
            path.write_bytes(path.read_bytes()[: 0 if damage == "emptied" else path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"shard .*shard-00001' cannot be read.* Hint: delete that folder") as raised:
        list(run(plan, tmp_path))
    assert "\n" not in str(raised.value)
    shutil.rmtree(shard)
    assert columns(run(plan, tmp_path)) == sampled


def test_an_objective_that_returns_nan_says_for_which_response(run: Any, tmp_path: Path) -> None:
    def sometimes(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float("nan") if index == 2 else 0.0 for index in range(len(responses))]

    with pytest.raises(ObjectiveError, match=r"objective 'brevity' scored response 2 \('.*'\) as nan"):
        list(
            run(
                RolloutPlan.reference(PROMPTS, 2),
                tmp_path,
                objectives={"good": lambda p, r: [0] * 4, "brevity": sometimes},
            )
        )
    assert not list(tmp_path.glob("shard-*"))


def test_an_objective_that_returns_too_few_rewards_is_named(run: Any, tmp_path: Path) -> None:
    objectives = {"good": lambda p, r: [0.0] * (len(r) - 1), "brevity": lambda p, r: [0.0] * len(r)}
    with pytest.raises(ObjectiveError, match="objective 'good' returned 3 rewards for 4 responses"):
        list(run(RolloutPlan.reference(PROMPTS, 2), tmp_path, objectives=objectives))


def test_an_objective_that_breaks_loses_no_shard_that_was_finished(
    run: Any, tiny_policy: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    calls = []

    def breaks(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        calls.append(len(responses))
        if len(calls) == 5:  # the calls between are the check that rewards do not depend on the batch
            raise RuntimeError("out of order")
        return tiny_objectives["good"](prompts, responses)

    plan = RolloutPlan.reference(PROMPTS * 2, 2)
    objectives = {"good": breaks, "brevity": tiny_objectives["brevity"]}
    with pytest.raises(ObjectiveError, match="objective 'good' raised RuntimeError: out of order"):
        list(run(plan, tmp_path, objectives=objectives))
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-00000"]
    assert columns(run(plan, tmp_path, objectives=objectives)) == columns(run(plan, tmp_path / "unbroken"))
    assert calls == [4, 4, 2, 2, 4, *[1] * 4, 4, 2]  # alone, none of the four responses raises


def test_an_objective_that_depends_on_the_batch_is_refused_with_the_first_shard(run: Any, tmp_path: Path) -> None:
    def relative(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [len(response) / max(map(len, responses)) for response in responses]

    objectives = {"relative": relative, "brevity": lambda p, r: [0.0] * len(r)}
    with pytest.raises(ObjectiveError, match="objective 'relative' .* depends on what else is scored"):
        list(run(RolloutPlan.reference(PROMPTS * 4, 2), tmp_path, objectives=objectives))
    assert not list(tmp_path.glob("shard-*"))


def test_more_candidates_than_tokens_are_refused_before_anything_is_written(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_k is 1000, but the policy has 61 tokens"):
        list(run(RolloutPlan.reference(PROMPTS, 2), tmp_path, RolloutSettings(top_k=1000)))
    assert not list(tmp_path.iterdir())


class WithoutKl(GenerateSampler):
    """Draws what `generate` draws, but does not know the KL."""

    def draw(self, *arguments: Any, **named: Any) -> SampledResponses:
        return replace(super().draw(*arguments, **named), kl=None)


@pytest.mark.parametrize("top_k", [12, None])
def test_where_a_sampler_does_not_know_the_kl_the_policy_reads_the_responses_again(
    run: Any, make_tiny_critic: MakeCritic, tmp_path: Path, top_k: int | None
) -> None:
    plan, settings = tilted_plan(40), replace(SETTINGS, top_k=top_k, shard_size=40)
    plan.weights[::5] = 0.0
    known, unknown = (
        columns(run(plan, tmp_path / name, settings, critic=make_tiny_critic(), sampler=sampler))
        for name, sampler in (("known", GenerateSampler()), ("unknown", WithoutKl()))
    )
    assert unknown["response_ids"] == known["response_ids"]
    for row, (found, expected) in enumerate(zip(unknown["kl"], known["kl"], strict=True)):
        assert found == pytest.approx(expected, abs=1e-5)
        assert any(found) == bool(row % 5)


def test_a_sampler_says_what_it_cannot_sample_from_before_anything_is_on_disk(run: Any, tmp_path: Path) -> None:
    class Refuses(GenerateSampler):
        def check(self, policy: Any, critic: Any) -> None:
            raise ConfigError("no.", "another.")

    with pytest.raises(ConfigError, match="no"):
        list(run(RolloutPlan.reference(PROMPTS, 2), tmp_path / "rollouts", sampler=Refuses()))
    assert not (tmp_path / "rollouts").exists()
