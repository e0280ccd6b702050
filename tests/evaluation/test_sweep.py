"""The sweep against an exact world: responses of a single token, with rewards by token.

There Q(s, a) is the reward itself, the tilted policy is optimal, and the metrics are sums over the vocabulary.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from mavis.critics import Critic, HiddenStateCritic
from mavis.errors import ConfigError, CriticError, DataError, WeightsError
from mavis.evaluation import EvaluationReport, EvaluationSettings, evaluate, write_report
from mavis.evaluation.sweep_rollouts import reference_rollouts
from mavis.policies.fingerprint import Fingerprint
from mavis.rollouts import RolloutSettings

PROMPTS = ["once upon a time", "the dog", "she said"]
ONE_TOKEN = EvaluationSettings(
    divisions=2,
    betas=(0.5, 1.0, 2.0),
    samples=400,
    reference_samples=1500,
    target_kls=(0.1, 0.2, 50.0),
    speed_repeats=0,
    sampling=RolloutSettings(max_new_tokens=1, top_k=None, shard_size=5000),
)
SHORT = EvaluationSettings(
    divisions=2,
    betas=(1.0, 3.0),
    samples=4,
    reference_samples=6,
    target_kls=(0.5,),
    speed_batch=2,
    speed_repeats=1,
    sampling=RolloutSettings(max_new_tokens=6, top_k=20, shard_size=40),
)


class TokenReward:
    """Scores a response of one word, or of none, by a table."""

    def __init__(self, tokenizer: Any, table: Tensor) -> None:
        words = tokenizer.get_vocab()
        self.rewards = {word: float(table[i]) for word, i in words.items()}
        self.rewards[""] = float(table[tokenizer.eos_token_id])

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self.rewards[response.strip()] for response in responses]


@pytest.fixture(scope="session")
def tables() -> Tensor:
    """(2, V) two rewards of every token, on the normalised scale."""
    return torch.randn(2, 61, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture(scope="session")
def exact(tiny_policy: Any, tiny_tokenizer: Any, tables: Tensor) -> tuple[HiddenStateCritic, dict[str, Any]]:
    """A critic whose values are the rewards of the tokens, normalised by mean 10 and std 4, and its objectives."""
    critic = HiddenStateCritic.for_policy(tiny_policy, ["first", "second"], hidden=4, rank=2, composition="independent")
    critic.reward_mean.fill_(10.0)
    critic.reward_std.fill_(4.0)
    with torch.no_grad():
        critic.heads.bias[:, :-1] = torch.eye(2)
    critic.token_table[:, :-1] = tables.T.float()
    raw = 4.0 * tables + 10.0
    return critic, {name: TokenReward(tiny_tokenizer, raw[i]) for i, name in enumerate(critic.objectives)}


@pytest.fixture(scope="session")
def one_token(
    tiny_policy: Any, tiny_tokenizer: Any, exact: Any, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationReport:
    critic, objectives = exact
    folder = tmp_path_factory.mktemp("one_token")
    report = evaluate(tiny_policy, tiny_tokenizer, critic, objectives, PROMPTS, folder, ONE_TOKEN)
    assert report is not None
    return report


@pytest.fixture(scope="session")
def reference_logprobs(tiny_policy: Any, tiny_tokenizer: Any) -> Tensor:
    """(P, V) log π_ref of the first token after each prompt."""
    with torch.no_grad():
        rows = [tiny_policy(**tiny_tokenizer(p, return_tensors="pt")).logits[0, -1] for p in PROMPTS]
    return torch.log_softmax(torch.stack(rows).double(), dim=-1)


def best(reference_logprobs: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, float]:
    """(P, V) log-probabilities of the optimal policy, and its mean KL."""
    logprobs = torch.log_softmax(reference_logprobs + beta * rewards, dim=-1)
    return logprobs, float((logprobs.exp() * (logprobs - reference_logprobs)).sum(-1).mean())


@pytest.fixture
def measure(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> Callable[..., EvaluationReport]:
    def run(critic: HiddenStateCritic, settings: EvaluationSettings = SHORT, **options: Any) -> EvaluationReport:
        objectives = options.pop("objectives", None) or {name: tiny_objectives[name] for name in critic.objectives}
        prompts = options.pop("prompts", PROMPTS)
        folder = options.pop("folder", tmp_path / "rollouts")
        report = evaluate(tiny_policy, tiny_tokenizer, critic, objectives, prompts, folder, settings, **options)
        assert report is not None
        return report

    return run


# In the exact world


def weights_of(entry: Any) -> Tensor:
    return torch.tensor(list(entry.weights.values()), dtype=torch.float64)


def test_the_first_row_is_the_reference_policy(
    one_token: EvaluationReport, reference_logprobs: Tensor, tables: Tensor
) -> None:
    row = one_token.rows[0]
    assert row.beta == 0.0
    assert row.weights == {"first": 0.0, "second": 0.0}
    assert (row.kl, row.kl_stderr) == (0.0, 0.0)
    assert row.efficiency is None
    assert row.responses == len(PROMPTS) * ONE_TOKEN.reference_samples
    for name, table in zip(("first", "second"), tables, strict=True):
        mean = float((reference_logprobs.exp() * table).sum(-1).mean())
        spread = 4 * float((reference_logprobs.exp() * table.square()).sum(-1).mean() / row.responses) ** 0.5
        assert row.rewards[name] == pytest.approx(mean, abs=spread)


def test_there_is_a_row_per_weights_and_beta_in_order(one_token: EvaluationReport) -> None:
    rows = one_token.rows[1:]
    found = [(*row.weights.values(), row.beta) for row in rows]
    assert found == [(w, 1 - w, beta) for w in (1.0, 0.5, 0.0) for beta in (0.5, 1.0, 2.0)]
    assert {row.responses for row in rows} == {len(PROMPTS) * ONE_TOKEN.samples}


def test_rewards_and_kl_are_those_of_the_tilted_policy(
    one_token: EvaluationReport, reference_logprobs: Tensor, tables: Tensor
) -> None:
    for row in one_token.rows[1:]:
        logprobs, kl = best(reference_logprobs, weights_of(row) @ tables, row.beta)
        # The KL of a step is exact and there is only one step, so there is no sampling error.
        assert row.kl == pytest.approx(kl, abs=1e-5)
        for name, table in zip(("first", "second"), tables, strict=True):
            mean = float((logprobs.exp() * table).sum(-1).mean())
            spread = 4.5 * float((logprobs.exp() * table.square()).sum(-1).mean() / row.responses) ** 0.5
            assert row.rewards[name] == pytest.approx(mean, abs=spread)


def test_the_optimal_policy_has_an_efficiency_of_one(one_token: EvaluationReport) -> None:
    known = [row.efficiency for row in one_token.rows[1:] if row.efficiency is not None]
    assert len(known) >= 6
    assert known == pytest.approx([1.0] * len(known), abs=0.25)
    read = [entry.efficiency for entry in one_token.efficiency if entry.kl < 1]
    assert len(read) == 6
    # Interpolated between two points of the sweep, on the chord below the frontier.
    assert all(0.7 < efficiency < 1.15 for efficiency in read)


def test_the_reward_at_a_kl_is_interpolated_between_neighbours_in_the_sweep(one_token: EvaluationReport) -> None:
    reference = one_token.rows[0]
    for entry in one_token.efficiency:
        weights = weights_of(entry)
        sweep = [reference] + [row for row in one_token.rows[1:] if row.weights == entry.weights]
        rewards = [float(weights @ torch.tensor(list(row.rewards.values()), dtype=torch.float64)) for row in sweep]
        if entry.kl < 1:
            expected = numpy.interp(entry.kl, [row.kl for row in sweep], rewards)
            assert entry.reward == pytest.approx(float(expected))
            limit = next(limit for limit in one_token.limits if limit.weights == entry.weights)
            best = numpy.interp(entry.kl, limit.kl, limit.reward)
            efficiency = (entry.reward - rewards[0]) / (best - rewards[0])
            assert entry.efficiency == pytest.approx(efficiency, abs=0.01)  # the limit's own points lie close


def test_nothing_is_extrapolated(one_token: EvaluationReport) -> None:
    beyond = [entry for entry in one_token.efficiency if entry.kl == 50.0]
    assert len(beyond) == 3
    assert all(entry.reward is None and entry.efficiency is None for entry in beyond)


def test_the_limits_are_the_best_reward_at_each_kl(
    one_token: EvaluationReport, reference_logprobs: Tensor, tables: Tensor
) -> None:
    assert len(one_token.limits) == 3
    for limit in one_token.limits:
        assert limit.kl[0] == 0.0
        assert limit.effective_sample_size[0] == ONE_TOKEN.reference_samples
        assert limit.kl == sorted(limit.kl)
        assert limit.reward == sorted(limit.reward)
        rewards = weights_of(limit) @ tables
        logprobs, kl = best(reference_logprobs, rewards, 1.0)
        at_one = min(range(len(limit.kl)), key=lambda i: abs(limit.kl[i] - kl))
        assert limit.reward[at_one] == pytest.approx(float((logprobs.exp() * rewards).sum(-1).mean()), abs=0.15)
        below = [limit.reward[0]]
        for entry, n in zip(limit.best_of_n, (2, 4, 8, 16), strict=True):
            assert entry.n == n
            assert 0 < entry.kl <= math.log(n) - (n - 1) / n + 1e-6  # less where rewards tie
            assert entry.reward > below[-1]
            below.append(entry.reward)


def test_exact_values_are_calibrated(one_token: EvaluationReport) -> None:
    found = [(entry.objective, entry.beta) for entry in one_token.values]
    assert found == [(name, beta) for name in ("first", "second") for beta in (0.0, 0.5, 1.0, 2.0)]
    for entry in one_token.values:
        assert entry.slope == pytest.approx(1.0, abs=1e-4)
        assert entry.intercept == pytest.approx(0.0, abs=1e-4)
        assert entry.r_squared == pytest.approx(1.0, abs=1e-4)
        assert sum(row.count for row in entry.rows) > 200


def test_values_twice_too_large_have_a_slope_of_a_half(exact: Any, measure: Any, tiny_policy: Any) -> None:
    critic, objectives = exact
    loud = HiddenStateCritic.for_policy(tiny_policy, critic.objectives, hidden=4, rank=2, composition="independent")
    loud.load_state_dict(critic.state_dict())
    with torch.no_grad():
        loud.heads.bias.mul_(2.0)
        loud.heads.bias[:, -1] = 1.0
    settings = replace(ONE_TOKEN, divisions=1, betas=(1.0,), samples=20, reference_samples=100)
    report = measure(loud, settings, objectives=objectives)
    for entry in report.values:
        assert entry.slope == pytest.approx(0.5, abs=1e-4)
        assert entry.intercept == pytest.approx(-0.5, abs=1e-4)
        assert entry.r_squared < 0


def test_the_normalisation_is_reported(one_token: EvaluationReport) -> None:
    assert one_token.normalisation == {name: {"mean": 10.0, "std": 4.0} for name in ("first", "second")}


def test_the_front_is_measured_from_its_reference_point(one_token: EvaluationReport) -> None:
    front = one_token.front
    assert front.reference_point == {"first": -1.0, "second": -1.0}
    assert len(front.non_dominated) == len(one_token.rows)
    assert not front.non_dominated[0]
    points = [tuple(row.rewards.values()) for row in one_token.rows]
    front_points = sorted(point for point, kept in zip(points, front.non_dominated, strict=True) if kept)
    left, volume = -1.0, 0.0
    for first, second in front_points:
        volume += (first - left) * (second + 1.0)
        left = first
    assert front.hypervolume == pytest.approx(volume)


# On the tiny policy


@pytest.mark.parametrize("top_k", [20, None])
def test_nothing_is_interpolated_below_the_kl_that_truncation_costs(
    measure: Any, make_tiny_critic: Any, top_k: int | None
) -> None:
    """No β leads there from the reference policy, so a line from it would not be a measurement."""
    sampling = replace(SHORT.sampling, top_k=top_k)
    report = measure(make_tiny_critic(), replace(SHORT, betas=(0.1, 3.0), target_kls=(1e-6, 1.0), sampling=sampling))
    floor = report.cut.kl if top_k else 0.0
    assert (report.cut is not None) == (top_k is not None)
    assert (floor > 0.1) == (top_k is not None)
    for entry in report.efficiency:
        swept = [row.kl for row in report.rows[1:] if row.weights == entry.weights]
        assert (entry.reward is not None) == (min(floor, *swept) <= entry.kl <= max(swept))
    # A target that no tilt can reach is not counted; otherwise the first target would halve the mean.
    trusted = replace(
        report,
        efficiency=[replace(entry, efficiency=None) for entry in report.efficiency],
        limits=[replace(limit, effective_sample_size=[99.0] * len(limit.kl)) for limit in report.limits],
    )
    assert trusted.mean_efficiency(kl=1e-6) == (None if top_k else 0.0)


def test_a_limit_that_rests_on_few_rollouts_gives_no_efficiency(measure: Any, make_tiny_critic: Any) -> None:
    whole = replace(SHORT.sampling, top_k=None)
    report = measure(make_tiny_critic(), replace(SHORT, sampling=whole))  # 6 reference rollouts per prompt
    assert all(row.efficiency is None for row in report.rows)
    assert all(entry.efficiency is None for entry in report.efficiency)
    assert any(entry.reward is not None for entry in report.efficiency)


def test_the_metrics_of_a_row_are_those_of_its_responses(
    measure: Any, make_tiny_critic: Any, tiny_policy: Any, tmp_path: Path
) -> None:
    import datasets

    critic = make_tiny_critic()
    critic.reward_mean.copy_(torch.tensor([0.5, -4.0]))
    critic.reward_std.copy_(torch.tensor([0.7, 1.5]))
    vowels = {"vowels": lambda prompts, responses: [float(r.count("a")) for r in responses]}
    report = measure(critic, held_out=vowels)
    shards = [datasets.load_from_disk(str(path)) for path in sorted((tmp_path / "rollouts" / "sweep").glob("shard-*"))]
    responses = datasets.concatenate_datasets(shards)[:]
    row, where = report.rows[3], slice(2 * 12, 3 * 12)  # weights (½, ½), β = 1; 3 prompts × 4 samples
    assert row.weights == {"good": 0.5, "brevity": 0.5}
    assert responses["weights"][where] == [[0.5, 0.5]] * 12
    assert responses["prompt"][where] == [prompt for prompt in PROMPTS for _ in range(4)]

    def by_prompt(values: Sequence[float]) -> tuple[float, float]:
        table = torch.tensor(values, dtype=torch.float64).view(3, 4)
        return float(table.mean()), math.sqrt(float((table.var(1) / 4).sum())) / 3

    raw = responses["rewards"][where]
    for column, (name, mean, std) in enumerate((("good", 0.5, 0.7), ("brevity", -4.0, 1.5))):
        expected = by_prompt([(reward[column] - mean) / std for reward in raw])
        assert (row.rewards[name], row.rewards_stderr[name]) == pytest.approx(expected)
    assert (row.kl, row.kl_stderr) == pytest.approx(by_prompt([sum(kl) for kl in responses["kl"][where]]))
    assert row.length == pytest.approx(sum(map(len, responses["response_ids"][where])) / 12)
    texts = responses["response"][where]
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    assert row.distinct_2 == pytest.approx(len(set(pairs)) / len(pairs))
    counts = by_prompt([text.count("a") for text in texts])
    assert (row.held_out["vowels"], row.held_out_stderr["vowels"]) == pytest.approx(counts)

    total, tokens = 0.0, 0
    for prompt, ids in zip(responses["prompt_ids"][where], responses["response_ids"][where], strict=True):
        with torch.no_grad():
            logits = tiny_policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        total += float(logprobs[torch.arange(len(ids)), torch.tensor(ids)].sum())
        tokens += len(ids)
    assert row.perplexity == pytest.approx(math.exp(-total / tokens), rel=1e-4)


def test_speed_is_reported_next_to_plain_decoding(measure: Any, make_tiny_critic: Any) -> None:
    report = measure(make_tiny_critic())
    speed = report.speed
    assert speed["batch"] == 2
    assert report.rows[0].tokens_per_second == speed["plain"]["tokens_per_second"] > 0
    assert {row.tokens_per_second for row in report.rows[1:]} == {speed["tilted"]["tokens_per_second"]}
    assert speed["plain"]["ratio"] == 1.0


def test_a_second_call_samples_nothing_and_returns_the_same_report(
    measure: Any, make_tiny_critic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_policy: Any
) -> None:
    critic, settings = make_tiny_critic(), replace(SHORT, speed_repeats=0)
    first = measure(critic, settings)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the policy was asked to generate")

    monkeypatch.setattr(tiny_policy, "generate", never)
    assert measure(critic, settings) == first


def test_reference_rollouts_can_be_sampled_without_a_critic(
    measure: Any,
    make_tiny_critic: Any,
    tiny_policy: Any,
    tiny_tokenizer: Any,
    tiny_objectives: Any,
    tmp_path: Path,
) -> None:
    arguments = (tiny_policy, tiny_tokenizer, tiny_objectives, PROMPTS, tmp_path / "before", SHORT)
    drawn = sum(len(shard) for shard in reference_rollouts(*arguments))
    assert drawn == len(PROMPTS) * SHORT.reference_samples
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "before" / "reference").rglob("*")}
    critic, settings = make_tiny_critic(), replace(SHORT, speed_repeats=0)
    assert measure(critic, settings, folder=tmp_path / "before") == measure(critic, settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "before" / "reference").rglob("*")} == times


def test_interrupted_at_every_progress_report_it_returns_the_same_in_the_end(
    measure: Any, make_tiny_critic: Any, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    critic, settings, seen = make_tiny_critic(), replace(SHORT, speed_repeats=0), set()

    def stop_once(*event: object) -> None:
        if event not in seen:
            seen.add(event)
            raise Stop

    for _ in range(30):
        try:
            report = measure(critic, settings, folder=tmp_path / "interrupted", progress=stop_once)
            break
        except Stop:
            assert critic.attached_policy is None
    assert report == measure(critic, settings)
    assert ("scoring", 6, 6) in seen


def test_the_critic_stays_attached_or_detached(measure: Any, make_tiny_critic: Any, tiny_policy: Any) -> None:
    critic = make_tiny_critic()
    detached = measure(critic)
    assert critic.attached_policy is None
    with critic.attach(tiny_policy):
        attached = measure(critic)
        assert critic.attached_policy is tiny_policy
    assert attached.values == detached.values


def test_one_objective_and_one_prompt_are_enough(measure: Any, make_tiny_critic: Any, tmp_path: Path) -> None:
    report = measure(make_tiny_critic("good"), prompts=PROMPTS[:1])
    assert [row.weights for row in report.rows] == [{"good": 0.0}, {"good": 1.0}, {"good": 1.0}]
    assert report.rows[1].rewards_stderr["good"] > 0  # of the sampling; the prompts are fixed
    assert [path.name for path in write_report(tmp_path / "report", report)] == [
        "report.json",
        "report.csv",
        "frontier.png",
    ]


# On disk


def test_the_report_is_written_as_json_csv_and_two_plots(measure: Any, make_tiny_critic: Any, tmp_path: Path) -> None:
    vowels = {"vowels": lambda prompts, responses: [float(r.count("a")) for r in responses]}
    report = measure(make_tiny_critic(), held_out=vowels)
    paths = write_report(tmp_path / "report", report)
    assert [path.name for path in paths] == ["report.json", "report.csv", "frontier.png", "front.png"]
    assert all(path.parent == tmp_path / "report" for path in paths)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(paths[0].read_text(encoding="utf-8"), parse_constant=refuse) == json.loads(
        json.dumps(report.to_json())
    )
    with paths[1].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.rows) == 7
    assert {
        *("weights.good", "weights.brevity", "beta", "rewards.good", "rewards.brevity"),
        *("rewards_stderr.good", "rewards_stderr.brevity", "kl", "kl_stderr", "efficiency", "responses", "length"),
        *("distinct_2", "perplexity", "tokens_per_second", "held_out.vowels", "held_out_stderr.vowels"),
    } == set(rows[0])
    for written, row in zip(rows, report.rows, strict=True):
        assert float(written["kl"]) == row.kl
        assert float(written["rewards.good"]) == row.rewards["good"]
        assert written["efficiency"] == ""
    for path in paths[2:]:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_report_converts_to_plain_data_in_a_fixed_shape(measure: Any, make_tiny_critic: Any) -> None:
    data = measure(make_tiny_critic()).to_json()
    assert list(data) == [
        *("objectives", "prompts", "settings", "normalisation", "rows", "cut", "efficiency", "limits"),
        *("front", "values", "speed"),
    ]
    assert list(data["rows"][0]) == [
        *("weights", "beta", "rewards", "rewards_stderr", "kl", "kl_stderr", "efficiency", "responses", "length"),
        *("distinct_2", "perplexity", "tokens_per_second"),
    ]
    assert list(data["efficiency"][0]) == ["weights", "kl", "reward", "efficiency", "reason"]
    assert list(data["limits"][0]) == ["weights", "kl", "reward", "effective_sample_size", "best_of_n"]
    assert list(data["limits"][0]["best_of_n"][0]) == ["n", "reward", "kl"]
    assert list(data["front"]) == ["reference_point", "hypervolume", "non_dominated"]
    assert list(data["values"][0]) == ["objective", "beta", "rows", "slope", "intercept", "r_squared"]


def test_an_existing_report_is_replaced(measure: Any, make_tiny_critic: Any, tmp_path: Path) -> None:
    report = measure(make_tiny_critic())
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("old")
    write_report(tmp_path / "report", report)
    assert json.loads((tmp_path / "report" / "report.json").read_text())["objectives"] == ["good", "brevity"]
    assert not [path for path in (tmp_path / "report").iterdir() if path.name.startswith(".")]


# Several critics


@pytest.fixture
def single(tiny_policy: Any) -> list[HiddenStateCritic]:
    """A critic for each objective."""
    critics = []
    for seed, name in enumerate(("good", "brevity")):
        critic = HiddenStateCritic.for_policy(
            tiny_policy, [name], hidden=4, rank=2, composition="independent", seed=seed
        )
        with torch.no_grad():
            critic.heads.bias.normal_(generator=torch.Generator().manual_seed(seed))
        critics.append(critic)
    return critics


def test_several_critics_are_evaluated_under_one_tilt(measure: Any, single: Any, tiny_objectives: Any) -> None:
    report = measure(single, objectives=dict(tiny_objectives))
    assert report.objectives == ["good", "brevity"]
    assert [len(row.rewards) for row in report.rows] == [2] * 7
    assert all(row.kl > 0 for row in report.rows[1:])
    assert [(value.objective, value.beta) for value in report.values] == [
        (name, beta) for name in ("good", "brevity") for beta in (0.0, 1.0, 3.0)
    ]
    assert report.speed["tilted"]["ratio"] > 0
    assert all(critic.attached_policy is None for critic in single)


class NoHeads(Critic, has_folder=False):
    """A critic without value heads."""

    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        raise AssertionError

    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        raise AssertionError

    def settings(self) -> dict[str, Any]:
        return {}


def test_critics_whose_values_cannot_be_compared_are_refused_before_anything_is_sampled(
    measure: Any, single: Any, tmp_path: Path
) -> None:
    other = NoHeads(["other"], single[0].fingerprint)
    objectives = {"good": len, "other": len}
    with pytest.raises(
        CriticError, match="the critic of good, other is a NoHeads, expected one with value heads. Hint"
    ):
        measure([single[0], other], objectives=objectives)
    with pytest.raises(CriticError, match="objective 'good' belongs to two of the critics"):
        measure([single[0], single[0]], objectives=objectives)
    assert not list(tmp_path.rglob("*"))


# Errors


def test_more_candidates_than_tokens_are_refused_before_anything_is_sampled(
    measure: Any, make_tiny_critic: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="top_k is 62, but the policy has 61 tokens"):
        measure(make_tiny_critic(), replace(SHORT, sampling=RolloutSettings(top_k=62)))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("weights", [[{"good": 1.0}, {"good": 0.3, "brevity": 0.7}], [[1.0, 0.0], [0.3, 0.7]]])
def test_weights_of_ones_own_take_the_place_of_the_grid(measure: Any, make_tiny_critic: Any, weights: Any) -> None:
    report = measure(make_tiny_critic(), replace(SHORT, weights=weights))
    expected = [{"good": 1.0, "brevity": 0.0}, {"good": 0.3, "brevity": 0.7}]
    assert [row.weights for row in report.rows[1:]] == [weights for weights in expected for _ in SHORT.betas]
    assert [entry.weights for entry in report.efficiency] == expected
    assert report.settings["weights"] == [[1.0, 0.0], [0.3, 0.7]]


def test_weights_of_other_objectives_are_refused(measure: Any, make_tiny_critic: Any) -> None:
    with pytest.raises(WeightsError, match="weights names objective 'goood'.*did you mean 'good'"):
        measure(make_tiny_critic(), replace(SHORT, weights=[{"goood": 1.0}]))
    with pytest.raises(WeightsError, match="where a choice weighs nothing"):
        measure(make_tiny_critic(), replace(SHORT, weights=[{"good": 1.0}, {"good": 0.0}]))


def test_a_grid_without_divisions_is_refused(measure: Any, make_tiny_critic: Any) -> None:
    with pytest.raises(WeightsError, match="divisions"):
        measure(make_tiny_critic(), replace(SHORT, divisions=0))


def test_the_critic_of_another_policy_is_refused_before_anything_is_sampled(
    measure: Any, tiny_policy: Any, tmp_path: Path
) -> None:
    critic = HiddenStateCritic(("good", "brevity"), replace(Fingerprint.of(tiny_policy), hidden_size=7), 8)
    with pytest.raises(CriticError, match="critic was made for a policy with hidden size 7"):
        measure(critic, SHORT)
    assert not list(tmp_path.rglob("plan.json"))


def test_no_prompts_is_an_error(measure: Any, make_tiny_critic: Any) -> None:
    with pytest.raises(DataError, match="prompts is empty"):
        measure(make_tiny_critic(), prompts=[])


@pytest.mark.parametrize("names", [("brevity", "good"), ("good",), ("good", "short")])
def test_objectives_other_than_the_critics_are_refused(
    measure: Any, make_tiny_critic: Any, names: tuple[str, ...]
) -> None:
    objectives = {name: lambda prompts, responses: [0.0] * len(responses) for name in names}
    with pytest.raises(ConfigError, match=f"objectives are {', '.join(names)}, but the critic has: good, brevity"):
        measure(make_tiny_critic(), objectives=objectives)


def test_a_folder_with_the_sweep_of_another_critic_is_refused(measure: Any, make_tiny_critic: Any) -> None:
    measure(make_tiny_critic())
    with pytest.raises(DataError, match="holds rollouts with different critic"):
        measure(make_tiny_critic(seed=1))
