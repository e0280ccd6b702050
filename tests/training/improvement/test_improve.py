"""The improvement loop: what it yields and writes, and that interruptions change nothing."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from mavis.critics import Critic, HiddenStateCritic
from mavis.errors import ConfigError, CriticError, DataError, ObjectiveError
from mavis.evaluation import EvaluationSettings, evaluate
from mavis.policies.fingerprint import Fingerprint
from mavis.rollouts import RolloutSettings
from mavis.training import ImprovementSettings, improve
from mavis.training.improvement.features import Features
from mavis.training.improvement.fit import FitReport, FitSettings, fit
from mavis.training.improvement.report import MIXTURES, IterationReport

PROMPTS = ["once upon a time", "the dog", "she said", "the little old man ran", "he was"]
SETTINGS = ImprovementSettings(
    composition="independent",
    iterations=3,
    rollouts=24,
    beta=1.5,
    calibration_samples=2,
    sampling=RolloutSettings(max_new_tokens=8, top_k=20, shard_size=16),
    fit=FitSettings(epochs=2, batch_size=8),
)


class Stop(BaseException):
    """Interrupts a run."""


@pytest.fixture
def new_critic(tiny_policy: Any) -> Callable[..., HiddenStateCritic]:
    def make(*objectives: str, **options: Any) -> HiddenStateCritic:
        names = objectives or ("good", "brevity")
        return HiddenStateCritic.for_policy(
            tiny_policy, names, **({"hidden": 8, "rank": 4, "composition": "independent"} | options)
        )

    return make


@pytest.fixture
def start(tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any) -> Callable[..., Any]:
    """`improve` on the tiny policy, not yet run."""

    def call(critic: HiddenStateCritic, folder: Path, settings: ImprovementSettings = SETTINGS, **options: Any) -> Any:
        objectives = options.pop("objectives", tiny_objectives)
        prompts = options.pop("prompts", PROMPTS)
        return improve(tiny_policy, tiny_tokenizer, critic, objectives, prompts, folder, settings, **options)

    return call


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HiddenStateCritic, list[IterationReport], Path]:
    """An uninterrupted run, to compare the others with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    critic = HiddenStateCritic.for_policy(tiny_policy, ("good", "brevity"), hidden=8, rank=4, composition="independent")
    reports = list(improve(tiny_policy, tiny_tokenizer, critic, tiny_objectives, PROMPTS, folder, SETTINGS))
    return critic, reports, folder


def assert_same(critic: HiddenStateCritic, other: HiddenStateCritic) -> None:
    assert critic.objectives == other.objectives
    assert critic.calibration == other.calibration
    state = other.state_dict()
    assert list(critic.state_dict()) == list(state)
    for name, tensor in critic.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def without_folder(reports: Sequence[IterationReport]) -> list[IterationReport]:
    return [replace(report, critic="") for report in reports]


def assert_same_run(
    critic: HiddenStateCritic,
    reports: Sequence[IterationReport],
    folder: Path,
    uninterrupted: tuple[HiddenStateCritic, list[IterationReport], Path],
) -> None:
    assert_same(critic, uninterrupted[0])
    assert_same(Critic.from_pretrained(folder / "critic"), Critic.from_pretrained(uninterrupted[2] / "critic"))  # type: ignore[arg-type]
    assert without_folder(reports) == without_folder(uninterrupted[1])


# Results and files


def test_a_quantised_policy_is_trained_on_like_any(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    """The weight of its output embedding is no tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this elsewhere
        policy = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(tiny_policy), {torch.nn.Linear}, dtype=torch.qint8
        )
    critic = HiddenStateCritic.for_policy(policy, tuple(tiny_objectives), hidden=8, rank=4, composition="independent")
    prompts = [*PROMPTS, *PROMPTS]
    *_, report = improve(policy, tiny_tokenizer, critic, tiny_objectives, prompts, tmp_path / "run", SETTINGS)
    assert report.iteration == SETTINGS.iterations - 1
    settings = EvaluationSettings(
        divisions=1, betas=(1.0,), samples=2, reference_samples=4, speed_repeats=1, sampling=SETTINGS.sampling
    )
    measured = evaluate(policy, tiny_tokenizer, critic, tiny_objectives, PROMPTS[:2], tmp_path / "measured", settings)
    assert measured is not None
    assert measured.speed["tilted"]["ratio"] > 0


def test_one_report_per_iteration(uninterrupted: Any) -> None:
    critic, reports, folder = uninterrupted
    assert [report.iteration for report in reports] == [0, 1, 2]
    for report in reports:
        assert report.rollouts == SETTINGS.rollouts
        for metrics in (report.rewards, report.kl, report.goal, report.explained):
            assert list(metrics) == ["good", "brevity"]
        for name in critic.objectives:
            goal = report.rewards[name] - report.kl[name] / SETTINGS.beta
            assert report.goal[name] == pytest.approx(goal)
        assert len(report.losses) == SETTINGS.fit.epochs + 1
        assert Path(report.critic) == folder / f"iteration-{report.iteration}" / "critic"
        stored = json.loads((folder / f"iteration-{report.iteration}" / "report.json").read_text())
        assert IterationReport(**stored) == report


def test_improve_is_lazy(start: Any, new_critic: Any, tmp_path: Path, uninterrupted: Any) -> None:
    run = start(new_critic(), tmp_path)
    assert not list(tmp_path.iterdir())
    assert without_folder([next(run)]) == without_folder(uninterrupted[1][:1])
    assert (tmp_path / "iteration-0" / "critic" / "config.json").is_file()
    assert not (tmp_path / "iteration-1").exists()
    assert not (tmp_path / "critic").exists()


def test_the_reference_rollouts_set_the_scale(uninterrupted: Any) -> None:
    critic, reports, folder = uninterrupted
    for mean in reports[0].rewards.values():
        assert mean == pytest.approx(0.0, abs=1e-6)
    import datasets

    raw = [
        rewards
        for path in sorted((folder / "iteration-0" / "rollouts").glob("shard-*"))
        for rewards in datasets.load_from_disk(str(path))["rewards"]
    ]
    std, mean = torch.std_mean(torch.tensor(raw, dtype=torch.float64), dim=0)
    torch.testing.assert_close(critic.reward_mean, mean)
    torch.testing.assert_close(critic.reward_std, std)


def test_later_rollouts_are_divided_equally_among_single_objectives(uninterrupted: Any) -> None:
    import datasets

    for iteration in (1, 2):
        rows = [
            (weights, beta)
            for path in sorted((uninterrupted[2] / f"iteration-{iteration}" / "rollouts").glob("shard-*"))
            for shard in [datasets.load_from_disk(str(path))]
            for weights, beta in zip(shard["weights"], shard["beta"], strict=True)
        ]
        assert rows.count(([1.0, 0.0], SETTINGS.beta)) == rows.count(([0.0, 1.0], SETTINGS.beta)) == 12


def test_iterations_do_not_sample_the_same_responses(uninterrupted: Any) -> None:
    import datasets

    first, second = (
        datasets.load_from_disk(str(uninterrupted[2] / f"iteration-{iteration}" / "rollouts" / "shard-00000"))[
            "response"
        ][:]
        for iteration in (1, 2)
    )
    assert first != second


def test_the_saved_critic_equals_the_trained_one_and_is_calibrated(uninterrupted: Any) -> None:
    critic, _, folder = uninterrupted
    assert_same(Critic.from_pretrained(folder / "critic"), critic)  # type: ignore[arg-type]
    assert critic.calibration is not None
    assert critic.calibration.max_new_tokens == 8
    assert critic.calibration.top_k == 20
    assert Critic.from_pretrained(folder / "iteration-2" / "critic").calibration is None


def test_no_calibration_where_none_is_asked_for(
    start: Any, make_tiny_critic: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    critic = make_tiny_critic()
    critic.calibration = uninterrupted[0].calibration  # of other heads
    list(start(critic, tmp_path, replace(SETTINGS, iterations=1, calibration_samples=0)))
    assert critic.calibration is None
    assert Critic.from_pretrained(tmp_path / "critic").calibration is None


def test_a_calibrated_critic_is_calibrated_again(
    start: Any, make_tiny_critic: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    critic = make_tiny_critic()
    critic.calibration = old = uninterrupted[0].calibration
    list(start(critic, tmp_path, replace(SETTINGS, iterations=1)))
    assert critic.calibration is not None
    assert critic.calibration.kl != old.kl


def test_the_policy_stays_bit_for_bit_and_keeps_no_hook(
    start: Any, new_critic: Any, tiny_policy: Any, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_policy.state_dict().items()}
    critic = new_critic()
    list(start(critic, tmp_path, replace(SETTINGS, iterations=2)))
    for name, tensor in tiny_policy.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for module in tiny_policy.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert not tiny_policy.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in tiny_policy.parameters())
    assert critic.attached_policy is None


def test_the_callers_random_state_has_no_effect(
    start: Any, new_critic: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1234)
    critic = new_critic()
    assert_same_run(critic, list(start(critic, tmp_path)), tmp_path, uninterrupted)


def test_another_seed_is_another_run(start: Any, new_critic: Any, uninterrupted: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, iterations=1, sampling=replace(SETTINGS.sampling, seed=1))
    (report,) = start(new_critic(), tmp_path, settings)
    assert report.losses != uninterrupted[1][0].losses


def test_zeta_defaults_to_one_over_beta(start: Any, new_critic: Any, uninterrupted: Any, tmp_path: Path) -> None:
    critic = new_critic()
    reports = list(start(critic, tmp_path / "same", replace(SETTINGS, zeta=1 / SETTINGS.beta)))
    assert without_folder(reports) == without_folder(uninterrupted[1])
    assert_same(critic, uninterrupted[0])
    *_, free = start(new_critic(), tmp_path / "free", replace(SETTINGS, zeta=0.0, iterations=2, calibration_samples=0))
    assert free.losses != uninterrupted[1][1].losses


def test_progress_counts_up_to_the_total_of_every_stage(start: Any, new_critic: Any, tmp_path: Path) -> None:
    reported: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        reported.setdefault(stage, []).append((done, total))

    list(start(new_critic(), tmp_path, progress=progress))
    assert list(reported) == [
        *(f"iteration {i}: {stage}" for i in range(3) for stage in ("rollouts", "replay", "fit")),
        "calibration",
    ]
    for counts in reported.values():
        assert counts[0][0] == 0
        assert counts[-1][0] == counts[-1][1]
        assert sorted(counts) == counts
    assert reported["iteration 1: rollouts"] == [(0, 24), (16, 24), (24, 24)]


def test_learning_raises_reward_and_goal_of_each_objective(start: Any, new_critic: Any, tmp_path: Path) -> None:
    settings = ImprovementSettings(
        composition="independent",
        iterations=2,
        rollouts=400,
        beta=2.0,
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=8, top_k=30, shard_size=200),
        fit=FitSettings(epochs=6, batch_size=32, learning_rate=1e-2),
    )
    first, second = start(new_critic(), tmp_path, settings)
    for name in ("good", "brevity"):
        assert first.explained[name] > 0.3
        # Rewards are in standard deviations over 200 rollouts: their mean errs by 0.07.
        assert second.rewards[name] > 0.5
        assert second.goal[name] > first.goal[name] + 0.2
        assert 0 < second.kl[name] < 5


@pytest.mark.parametrize("composition", ["independent", "conditioned"])
def test_later_iterations_relabel_every_earlier_rollout_with_a_policy_of_their_own(
    start: Any, new_critic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composition: Any
) -> None:
    given: list[tuple[Features, torch.Tensor]] = []

    def listening(critic: Any, features: Any, *others: Any, held_out: torch.Tensor, **options: Any) -> FitReport:
        given.append((features.local_rollouts, held_out))
        assert options["on_policy"] == 24  # the first; relabelled rollouts come after them
        return fit(critic, features, *others, held_out=held_out, **options)

    monkeypatch.setattr(sys.modules["mavis.training.improvement.stages"], "fit", listening)
    list(start(new_critic(composition=composition), tmp_path / "reuse", replace(SETTINGS, composition=composition)))
    assert [len(features) for features, _ in given] == [24, 48, 72]
    (first, held_first), (second, held_second), (third, held_third) = given
    own = slice(24)
    for again, before, held, held_before in (
        (slice(24, 48), first, held_second, held_first),
        (slice(24, 48), first, held_third, held_first),
        (slice(48, 72), second, held_third, held_second),
    ):
        features = second if held is held_second else third
        length = min(before.action_ids.shape[1], features.action_ids.shape[1])
        assert torch.equal(features.action_ids[again, :length], before.action_ids[own, :length])
        assert torch.equal(features.rewards[again], before.rewards[own])
        assert torch.equal(held[again], held_before[own])  # what chose an epoch is never trained on
        if composition == "independent":
            assert torch.equal(features.lam[again], 1.5 * torch.eye(2).repeat(12, 1))
            assert torch.equal(features.is_evaluated[again], torch.eye(2).bool().repeat(12, 1))
    if composition == "conditioned":
        strengths = torch.stack([third.lam[rows].sum(1) for rows in (own, slice(24, 48), slice(48, 72))])
        assert (strengths >= 1.5 / 6 - 1e-6).all()
        assert (strengths <= 1.5 * 8 / 3 + 1e-6).all()
        assert len(strengths.flatten().unique()) == 72
    given.clear()
    list(start(new_critic(), tmp_path / "own", replace(SETTINGS, reuse=False)))
    assert [len(features) for features, _ in given] == [24, 24, 24]


def test_a_single_objective_is_enough(start: Any, new_critic: Any, tiny_objectives: Any, tmp_path: Path) -> None:
    critic = new_critic("good")
    reports = list(start(critic, tmp_path, objectives={"good": tiny_objectives["good"]}))
    assert [list(report.rewards) for report in reports] == [["good"]] * 3
    assert critic.calibration is not None
    assert len(critic.calibration.kl) == 1


def test_a_constant_in_the_raw_rewards_moves_their_mean_and_nothing_else(
    start: Any, new_critic: Any, tiny_objectives: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    moved = {
        name: lambda prompts, responses, objective=objective: [r + 4096.0 for r in objective(prompts, responses)]
        for name, objective in tiny_objectives.items()
    }
    critic = new_critic()
    reports = list(start(critic, tmp_path, objectives=moved))
    torch.testing.assert_close(critic.reward_mean, uninterrupted[0].reward_mean + 4096, rtol=0, atol=1e-9)
    torch.testing.assert_close(critic.reward_std, uninterrupted[0].reward_std)
    for name, tensor in critic.state_dict().items():
        if name != "reward_mean":
            torch.testing.assert_close(tensor, uninterrupted[0].state_dict()[name], rtol=1e-4, atol=1e-5)
    for report, other in zip(reports, uninterrupted[1], strict=True):
        assert report.losses == pytest.approx(other.losses, abs=1e-5)


# Interruption and resumption


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_a_new_process_resumes_after_any_iteration(
    start: Any, new_critic: Any, uninterrupted: Any, tmp_path: Path, iterations: int
) -> None:
    run = start(new_critic(), tmp_path)
    for _ in range(iterations):
        next(run)
    run.close()
    critic = new_critic()
    assert_same_run(critic, list(start(critic, tmp_path)), tmp_path, uninterrupted)


@pytest.mark.parametrize("same_object", [False, True])
def test_interrupted_at_every_progress_report_it_ends_as_an_uninterrupted_run(
    start: Any, new_critic: Any, uninterrupted: Any, tmp_path: Path, same_object: bool
) -> None:
    critic, breaks, seen = new_critic(), 0, set()

    def stop_at_news(stage: str, done: int, total: int) -> None:
        if (stage, done) not in seen:
            seen.add((stage, done))
            raise Stop

    for _ in range(60):
        critic = critic if same_object else new_critic()
        try:
            reports = list(start(critic, tmp_path, progress=stop_at_news))
            break
        except Stop:
            breaks += 1
            assert critic.attached_policy is None
    # Two shards each to sample and two epochs; then two shards to replay, and those of all earlier iterations again.
    assert breaks == 3 * (3 + 3) + (3 + 5 + 7) + 4
    assert_same_run(critic, reports, tmp_path, uninterrupted)


def test_interrupted_by_an_objective_it_resumes_without_resampling_finished_shards(
    start: Any,
    new_critic: Any,
    tiny_objectives: Any,
    uninterrupted: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["mavis.rollouts.collect"], "check_batch_independence", lambda *_: None)
    scored: list[int] = []

    def fails_now_and_then(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        scored.append(len(responses))
        if len(scored) in (2, 4, 6):
            raise Stop
        return tiny_objectives["good"](prompts, responses)

    objectives = {"good": fails_now_and_then, "brevity": tiny_objectives["brevity"]}
    for _ in range(3):
        with pytest.raises(Stop):
            list(start(new_critic(), tmp_path, objectives=objectives))
    critic = new_critic()
    reports = list(start(critic, tmp_path, objectives=objectives))
    assert_same_run(critic, reports, tmp_path, uninterrupted)
    calibration = [10, 16, 14]  # cut to the candidates only, then tilted
    assert scored == [16, 8, 8, 16, 16, 8, 8, 16, 8, *calibration]


def test_a_finished_run_says_that_it_is_reused_and_refuses_a_changed_objective(
    start: Any, new_critic: Any, tiny_objectives: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list(start(new_critic("good"), tmp_path, objectives={"good": tiny_objectives["good"]}))
    assert "reused" not in capsys.readouterr().err
    list(start(new_critic("good"), tmp_path, objectives={"good": tiny_objectives["good"]}))
    assert f"finished run in {tmp_path} reused\n" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds rewards of other objectives: 'good' has changed since"):
        list(start(new_critic("good"), tmp_path, objectives={"good": lambda p, r: [float(len(text)) for text in r]}))


def test_a_finished_run_is_loaded_without_calling_the_policy(
    start: Any, new_critic: Any, tiny_policy: Any, uninterrupted: Any
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the policy was called")

    critic = new_critic()
    hook = tiny_policy.register_forward_pre_hook(never)
    try:
        reports = list(start(critic, uninterrupted[2]))
    finally:
        hook.remove()
    assert_same_run(critic, reports, uninterrupted[2], uninterrupted)


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from mavis.critics import HiddenStateCritic
from mavis.rollouts import RolloutSettings
from mavis.training.improvement.fit import FitSettings
from mavis.training import ImprovementSettings, improve

policy = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
calls = 0

def good(prompts, responses):
    global calls
    calls += 1
    if calls == (2 + 3) + 1 + 3 + 1:  # two shards and the check of the first; then a shard, its check and a shard
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(response.split().count("good")) for response in responses]

def brevity(prompts, responses):
    return [-float(len(response.split())) for response in responses]

good.version = brevity.version = "tiny"  # as those that resume
critic = HiddenStateCritic.for_policy(policy, ("good", "brevity"), hidden=8, rank=4, composition="independent")
objectives, settings, prompts = {"good": good, "brevity": brevity}, eval(sys.argv[3]), eval(sys.argv[4])
for _ in improve(policy, tokenizer, critic, objectives, prompts, sys.argv[2], settings):
    pass
"""


def test_a_process_killed_during_rollouts_loses_no_finished_shard(
    tiny_folder: Path, tiny_tokenizer: Any, tiny_objectives: Any, new_critic: Any, tmp_path: Path
) -> None:
    # Weights read from a file lie elsewhere in memory than the fixture's, which can change a sum's last bit; so both
    # runs read them.
    policy = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    arguments = [str(tiny_folder), str(interrupted), repr(SETTINGS), repr(PROMPTS)]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert child.returncode == -signal.SIGKILL
    assert (interrupted / "iteration-0" / "report.json").is_file()
    assert (interrupted / "iteration-1" / "rollouts" / "shard-00000").is_dir()
    assert not (interrupted / "iteration-1" / "rollouts" / "shard-00001").exists()

    def run(folder: Path) -> tuple[HiddenStateCritic, list[IterationReport], Path]:
        critic = new_critic()
        reports = list(improve(policy, tiny_tokenizer, critic, tiny_objectives, PROMPTS, folder, SETTINGS))
        return critic, reports, folder

    assert_same_run(*run(interrupted), run(whole))


# Errors


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"settings": replace(SETTINGS, beta=2.0)}, "settings.beta, settings.zeta"),
        ({"settings": replace(SETTINGS, fit=replace(SETTINGS.fit, epochs=3))}, "settings.fit.epochs"),
        ({"settings": replace(SETTINGS, sampling=replace(SETTINGS.sampling, seed=5))}, "settings.sampling.seed"),
        ({"prompts": PROMPTS[:-1]}, "prompts"),
        ({"hidden": 16}, "critic.hidden"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_says_what_differs(
    start: Any, tiny_policy: Any, uninterrupted: Any, change: dict[str, Any], differing: str
) -> None:
    hidden = change.pop("hidden", 8)
    critic = HiddenStateCritic.for_policy(
        tiny_policy, ("good", "brevity"), hidden=hidden, rank=4, composition="independent"
    )
    with pytest.raises(
        DataError, match=rf"holds a run with different {re.escape(differing)}\. Hint: name a new output folder"
    ):
        next(start(critic, uninterrupted[2], **change))


def test_a_folder_of_another_policy_is_refused(
    tiny_tokenizer: Any, tiny_objectives: Any, make_other_policy: Any, uninterrupted: Any
) -> None:
    policy = make_other_policy()
    critic = HiddenStateCritic.for_policy(policy, ("good", "brevity"), hidden=8, rank=4, composition="independent")
    with pytest.raises(DataError, match="holds a run with different policy"):
        next(improve(policy, tiny_tokenizer, critic, tiny_objectives, PROMPTS, uninterrupted[2], SETTINGS))


def test_a_critic_for_another_shape_of_policy_is_refused(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    made_for = replace(Fingerprint.of(tiny_policy), hidden_size=48)
    critic = HiddenStateCritic(("good", "brevity"), made_for, embedding_size=32)
    with pytest.raises(CriticError, match="critic was made for a policy with hidden size 48 and 61 tokens"):
        next(improve(tiny_policy, tiny_tokenizer, critic, tiny_objectives, PROMPTS, tmp_path, SETTINGS))
    assert not list(tmp_path.iterdir())


def test_a_critic_of_a_fine_tune_may_be_the_start_and_becomes_this_policys(
    start: Any, tiny_policy: Any, make_other_policy: Any, tmp_path: Path
) -> None:
    critic = HiddenStateCritic.for_policy(
        make_other_policy(), ("good", "brevity"), hidden=8, rank=4, composition="independent"
    )
    with pytest.warns(UserWarning, match="not the weights"):
        next(start(critic, tmp_path))
    assert critic.fingerprint == Fingerprint.of(tiny_policy)
    assert Critic.from_pretrained(tmp_path / "iteration-0" / "critic").fingerprint == Fingerprint.of(tiny_policy)


@pytest.mark.parametrize("names", [("brevity", "good"), ("good",), ("good", "brevity", "more"), ("good", "short")])
def test_other_objectives_than_the_critics_are_refused(
    start: Any, new_critic: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    objectives = {name: lambda p, r: [0.0] * len(r) for name in names}
    with pytest.raises(ConfigError, match=f"objectives are {', '.join(names)}, but the critic has: good, brevity"):
        next(start(new_critic(), tmp_path, objectives=objectives))
    assert not list(tmp_path.iterdir())


def test_an_objective_that_never_varies_is_named(
    start: Any, new_critic: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    objectives = {"good": tiny_objectives["good"], "brevity": lambda p, r: [0.1] * len(r)}
    with pytest.raises(CriticError, match="objective 'brevity' gives every one of the 24 reference responses the same"):
        next(start(new_critic(), tmp_path, objectives=objectives))


def test_an_objective_that_returns_infinity_says_for_which_response(
    start: Any, new_critic: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    objectives = {"good": tiny_objectives["good"], "brevity": lambda p, r: [0.0] * 5 + [float("inf")] * (len(r) - 5)}
    with pytest.raises(ObjectiveError, match=r"objective 'brevity' scored response 5 \('.*'\) as inf"):
        next(start(new_critic(), tmp_path, objectives=objectives))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"rollouts": 0}, "rollouts is 0"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"zeta": -0.1}, "zeta is -0.1"),
        ({"zeta": float("inf")}, "zeta is inf"),
        ({"calibration_samples": -1}, "calibration_samples is -1"),
        ({"fit": FitSettings(target="monte_carlo")}, "reuse is True, but plain Monte Carlo returns are valid only"),
        ({"rollouts": 3}, "rollouts is 3"),
        ({"sampling": RolloutSettings(top_k=100)}, "top_k is 100, but the policy has 61 tokens"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(
    start: Any, new_critic: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        next(start(new_critic(), tmp_path, replace(SETTINGS, **change)))
    assert not list(tmp_path.iterdir())


# Conditioned


CONDITIONED = replace(SETTINGS, composition="conditioned", min_beta=0.5, max_beta=3.0, rollouts=48)


def test_conditioned_rollouts_draw_weights_from_the_simplex_and_beta_from_its_range(
    start: Any, new_critic: Any, tmp_path: Path
) -> None:
    critic = new_critic(composition="conditioned", memory=4)
    reports = list(start(critic, tmp_path, CONDITIONED))
    for report in reports:
        assert list(report.goal) == ["good", "brevity", MIXTURES]
        for metrics in (report.rewards, report.kl, report.goal, report.goal_error):
            assert list(metrics) == list(report.goal)
        assert list(report.explained) == ["good", "brevity"]
    assert float(critic.max_trained_lambda) == 3.0
    assert reports[0].kl[MIXTURES] > 0  # of the reference policy cut to its candidates
    drawn = []
    for iteration in (1, 2):
        shards = sorted((tmp_path / f"iteration-{iteration}" / "rollouts").glob("shard-*"))
        rows = [datasets.load_from_disk(str(shard)) for shard in shards]
        weights = torch.cat([torch.tensor(shard["weights"][:], dtype=torch.float64) for shard in rows])
        betas = torch.cat([torch.tensor(shard["beta"][:], dtype=torch.float64) for shard in rows])
        assert weights.shape == (48, 2)
        torch.testing.assert_close(weights.sum(1), torch.ones(48, dtype=torch.float64))
        assert (weights >= 0).all()
        alone = (weights == 1).any(1).double().mean()
        assert 0.05 < alone < 0.6  # 0.3 of 48: outside by chance once in 10,000 runs
        assert 0.5 <= betas.min() < betas.max() <= 3.0
        drawn.append(weights)
    assert not torch.equal(*drawn)


def test_strengths_default_to_a_range_around_beta() -> None:
    assert ImprovementSettings(beta=3.0).strengths == (0.5, 8.0)
    assert ImprovementSettings(beta=6.0, max_beta=7.0).strengths == (1.0, 7.0)
    with pytest.raises(ConfigError, match=r"min_beta is 2.0 and max_beta 1.0.*the defaults are β/6 and 8β/3"):
        ImprovementSettings(beta=12.0, max_beta=1.0)


def test_defaults_are_resolved_and_unused_settings_refused(start: Any, new_critic: Any, tmp_path: Path) -> None:
    next(start(new_critic(composition="conditioned"), tmp_path / "one", replace(SETTINGS, composition="conditioned")))
    stored = json.loads((tmp_path / "one" / "run.json").read_text())["settings"]
    assert (stored["min_beta"], stored["max_beta"], stored["zeta"]) == (0.25, 4.0, None)
    next(start(new_critic(), tmp_path / "other"))
    stored = json.loads((tmp_path / "other" / "run.json").read_text())["settings"]
    assert (stored["min_beta"], stored["max_beta"], stored["zeta"]) == (None, None, 1 / 1.5)
    with pytest.raises(ConfigError, match="zeta is 0.2, but the conditioned composition does not use it"):
        ImprovementSettings(zeta=0.2)
    for name in ("min_beta", "max_beta"):
        with pytest.raises(ConfigError, match=f"{name} is 2.0, but the independent composition does not use it"):
            ImprovementSettings(composition="independent", **{name: 2.0})


def test_an_interrupted_conditioned_run_resumes(start: Any, new_critic: Any, tmp_path: Path) -> None:
    options = {"composition": "conditioned", "memory": 4}
    uninterrupted = new_critic(**options)
    expected = list(start(uninterrupted, tmp_path / "uninterrupted", CONDITIONED))
    next(start(new_critic(**options), tmp_path / "interrupted", CONDITIONED))
    critic = new_critic(**options)
    reports = list(start(critic, tmp_path / "interrupted", CONDITIONED))
    assert_same_run(critic, reports, tmp_path / "interrupted", (uninterrupted, expected, tmp_path / "uninterrupted"))


@pytest.mark.parametrize(("requested", "has"), [("conditioned", "independent"), ("independent", "conditioned")])
def test_a_critic_of_the_other_composition_is_refused(
    start: Any, new_critic: Any, tmp_path: Path, requested: str, has: str
) -> None:
    with pytest.raises(ConfigError, match=f"composition is '{requested}', but the critic is '{has}'"):
        next(start(new_critic(composition=has), tmp_path, replace(SETTINGS, composition=requested)))


def test_no_prompt_is_an_error(start: Any, new_critic: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts is \[\], expected at least one prompt"):
        next(start(new_critic(), tmp_path, prompts=[]))
