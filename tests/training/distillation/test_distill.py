"""Distillation: recorded values, the fit of a student, and that interruptions change nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.critics import Calibration, Critic, CriticGroup, HiddenStateCritic, TrainedDecoding, ValueModelCritic
from mavis.distributed import SINGLE_PROCESS
from mavis.errors import ConfigError, CriticError, DataError, TrainingError
from mavis.policies.token_embeddings import token_embeddings
from mavis.rollouts import RolloutPlan, RolloutSettings
from mavis.rollouts.collect import critic_digest
from mavis.training import DistillReport, DistillSettings, RegressionSettings, distill
from mavis.training.distillation.imitation import Imitation, explained
from mavis.training.distillation.recordings import Recordings, record, scale
from mavis.training.rollout_tensors import ShardedRollouts
from mavis.utils.files import read_json
from tests.factories import llama_config

PROMPTS = ["once upon a time", "the dog", "she said", "the little old man ran", "he was"]
SETTINGS = DistillSettings(
    rollouts=20,
    candidates=9,
    sampling=RolloutSettings(max_new_tokens=8, top_k=30, temperature=0.9, shard_size=8),
    fit=RegressionSettings(epochs=2, batch_size=8),
)
LEARNING = DistillSettings(
    rollouts=128,
    candidates=20,
    sampling=RolloutSettings(max_new_tokens=12, top_k=None, shard_size=64),
    fit=RegressionSettings(epochs=20, batch_size=8, learning_rate=2e-2, weight_decay=0.0),
)
TRUNK = llama_config(vocab_size=61, num_key_value_heads=1, initializer_range=0.3, max_position_embeddings=64)


class Stop(Exception):
    """Interrupts a run."""


def talkative(critic: Any, seed: int = 0) -> Any:
    """Give a critic random heads of a certain scale."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        critic.heads.outer.copy_(torch.randn(critic.heads.outer.shape, generator=source) * 0.4)
        critic.heads.bias.copy_(torch.randn(critic.heads.bias.shape, generator=source) * 0.1)
    critic.reward_mean.copy_(torch.arange(len(critic.objectives)) + seed + 1.0)
    critic.reward_std.copy_(torch.arange(len(critic.objectives)) + seed + 2.0)
    return critic.eval()


@pytest.fixture(scope="session")
def make(tiny_policy: Any) -> Callable[..., Any]:
    """Build an untrained critic: a value model where `readout` is given, else one of the policy's states."""

    def build(*objectives: str, **options: Any) -> Any:
        kind: Any = ValueModelCritic if "readout" in options else HiddenStateCritic
        names = objectives or ("good", "brevity")
        return kind.for_policy(
            tiny_policy, names, **({"hidden": 16, "rank": 8, "composition": "independent"} | options)
        )

    return build


@pytest.fixture(scope="session")
def mixed(make: Any) -> list[Critic]:
    """A critic of each kind, each for one objective."""
    kinds = [{}, {"memory": 6}, {"readout": "token"}, {"readout": "candidates", "hidden": 0, "backbone": TRUNK}]
    return [talkative(make(name, **kind), seed) for seed, (name, kind) in enumerate(zip("abcd", kinds, strict=True))]


@pytest.fixture
def run(tiny_policy: Any, tiny_tokenizer: Any) -> Callable[..., DistillReport]:
    """`distill` on the tiny policy."""

    def call(student: Any, teachers: Any, folder: Path, settings: Any = SETTINGS, **options: Any) -> DistillReport:
        prompts = options.pop("prompts", PROMPTS)
        return distill(student, teachers, tiny_policy, tiny_tokenizer, prompts, folder, settings, **options)

    return call


def assert_same(critic: Critic, other: Critic) -> None:
    assert critic.objectives == other.objectives
    assert critic.calibration == other.calibration
    state = other.state_dict()
    for name, tensor in critic.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# Recording


@pytest.fixture
def recordings(tiny_policy: Any, tiny_tokenizer: Any, mixed: list[Critic], tmp_path: Path) -> Recordings:
    """Recorded values of critics of all kinds along responses to prompts of different length."""
    plan = RolloutPlan.reference(PROMPTS, 0)
    settings = replace(SETTINGS.sampling, shard_size=len(PROMPTS), top_k=None, max_new_tokens=30)
    (shard,) = record(tiny_policy, tiny_tokenizer, CriticGroup(mixed), plan, tmp_path, settings, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]
    return shard


def test_recorded_values_equal_those_of_each_prompt_alone(
    tiny_policy: Any, mixed: list[Critic], recordings: Recordings
) -> None:
    lengths = recordings.is_response.sum(1).tolist()
    assert len(set(lengths)) > 1
    assert not recordings.is_prompt.all()
    group = CriticGroup(mixed)
    for row, length in enumerate(lengths):
        values, logprobs = [], []
        ids = recordings.candidate_ids[row].long()

        def follow(prefix: Any, scores: Any, row: int = row, ids: Any = ids, v: Any = values, p: Any = logprobs) -> Any:
            step = len(v)
            v.append(group.values(prefix, ids[step][None])[0])
            p.append((scores[0, ids[step]] / 0.9).log_softmax(-1))
            assert set(scores[0].topk(9).indices.tolist()) == set(ids[step].tolist())
            return torch.nn.functional.one_hot(recordings.action_ids[row, step], 61)[None].float().log()

        prompt = recordings.prompt_ids[row][recordings.is_prompt[row]][None]
        with group.attached_to(tiny_policy):
            out = tiny_policy.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=length,
                logits_processor=[follow],
            )
        assert out[0, prompt.shape[1] :].tolist() == recordings.action_ids[row, :length].tolist()
        torch.testing.assert_close(recordings.values[row, :length], torch.stack(values), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(recordings.logprobs[row, :length], torch.stack(logprobs), atol=1e-5, rtol=1e-5)
        assert not recordings.values[row, length:].any()
    assert all(critic.attached_policy is None for critic in mixed)


# Fitting


def test_the_error_weighs_differences_between_candidates_twenty_times(
    tiny_policy: Any, make: Any, recordings: Recordings
) -> None:
    """Every sum written out, from the student's own values at each step alone."""
    student, embeddings = talkative(make(*"abcd", readout="token"), 5), token_embeddings(tiny_policy)
    student.refresh_token_table(embeddings)
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0])
    imitation, batch = Imitation(student, embeddings, scale), recordings
    with torch.no_grad():
        inputs = batch.inputs_of(student)
        squared, weight = imitation(batch)
        probs, wrong, taught = [], [], []
        for row, step in batch.is_response.nonzero().tolist():
            own = student.values_from_inputs(inputs[row, step][None], batch.candidate_ids[row, step][None].long())[0]
            p, error = batch.logprobs[row, step].exp()[:, None], own - batch.values[row, step]
            common = (p * error).sum(0)
            between = (p * (error - common) ** 2).sum(0)
            expected = (common**2 + 20 * between) / scale**2
            torch.testing.assert_close(squared[row, step], expected, atol=1e-4, rtol=1e-4)
            probs.append(p), wrong.append(error), taught.append(batch.values[row, step])
    assert weight.sum().item() == 4 * len(probs)
    assert not squared[~batch.is_response].any()

    def share(error: torch.Tensor, values: torch.Tensor) -> list[float]:
        p = torch.stack(probs) / len(probs)
        spread = (p * (values - (p * values).sum((0, 1))) ** 2).sum((0, 1))
        return (1 - (p * error**2).sum((0, 1)) / spread).tolist()

    def centred(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([v - (p * v).sum(0) for p, v in zip(probs, values, strict=True)])

    shared = ShardedRollouts.shard(batch, SINGLE_PROCESS)
    found = explained(imitation, shared, torch.arange(len(batch)), batch_size=2)
    assert list(found[0].values()) == pytest.approx(share(torch.stack(wrong), torch.stack(taught)), abs=1e-4)
    assert list(found[1].values()) == pytest.approx(share(centred(wrong), centred(taught)), abs=1e-4)


@pytest.mark.parametrize(
    ("form", "epochs"), [({}, 40), ({"readout": "token", "hidden": 0}, 15)], ids=["states", "linear"]
)
def test_a_student_like_its_teacher_learns_its_values(
    run: Any, make: Any, tmp_path: Path, form: dict[str, Any], epochs: int
) -> None:
    student, teacher = make(**form, rank=32), talkative(make(**form))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    heads_alone = replace(LEARNING, fit=replace(LEARNING.fit, trunk_rate=1e-9, epochs=epochs))
    report = run(student, teacher, tmp_path, heads_alone)
    assert min(report.explained.values()) > 0.99, report
    assert min(report.between_candidates.values()) > 0.98, report
    # It knows the recorded candidates and no others, so a tilt takes these unless told otherwise.
    sampling = heads_alone.sampling
    assert student.decoding == TrainedDecoding(heads_alone.candidates, sampling.temperature, sampling.max_new_tokens)
    assert report.losses[report.epoch] == min(report.losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_two_of_the_papers_critics_become_one_trunk_that_reads_a_token_a_step(
    run: Any, make: Any, tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    paper = {"readout": "candidates", "hidden": 0, "backbone": TRUNK}
    teachers = [talkative(make(name, **paper, seed=i), i) for i, name in enumerate(("good", "brevity"))]
    student = make(readout="token", hidden=32, rank=32)
    student.calibration = Calibration([1.0], [[1.0]] * 3, 8, 20)
    report = run(student, teachers, tmp_path, replace(LEARNING, rollouts=256, fit=replace(LEARNING.fit, epochs=8)))
    # Four other pairs of teachers reached at least 0.35 and 0.24.
    assert min(report.explained.values()) > 0.25, report
    assert min(report.between_candidates.values()) > 0.15, report
    assert student.calibration is None
    assert student.reward_mean.tolist() == [1.0, 2.0]
    assert student.reward_std.tolist() == [2.0, 3.0]
    saved = Critic.from_pretrained(tmp_path / "critic")
    assert_same(saved, student)
    inputs = tiny_tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    tilts = [mavis.MavisTilt({"good": 1.0, "brevity": 0.5}, c, beta=2.0, record_kl=True) for c in (student, saved)]
    for tilt in tilts:
        with tilt.critic.attached_to(tiny_policy):
            tiny_policy.generate(**inputs, do_sample=False, max_new_tokens=4, logits_processor=tilt)
    assert torch.equal(tilts[0].kl, tilts[1].kl)
    assert (tilts[0].kl.sum(1) > 0.01).all()


# Interruption and resumption


@pytest.fixture(scope="session")
def teachers(make: Any) -> list[Critic]:
    return [talkative(make("good"), 0), talkative(make("brevity", memory=4), 1)]


@pytest.fixture(scope="session")
def uninterrupted(
    make: Any, teachers: list[Critic], tiny_policy: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, DistillReport, Path]:
    """An uninterrupted run, to compare the others with."""
    student, folder = make(memory=4), tmp_path_factory.mktemp("uninterrupted")
    return student, distill(student, teachers, tiny_policy, tiny_tokenizer, PROMPTS, folder, SETTINGS), folder


@pytest.mark.parametrize("same_object", [False, True])
def test_interrupted_at_every_progress_report_it_ends_as_an_uninterrupted_run(
    run: Any, make: Any, teachers: list[Critic], uninterrupted: Any, tmp_path: Path, same_object: bool
) -> None:
    student, breaks, seen, written = make(memory=4), 0, set(), dict[str, int]()

    def stop_at_news(stage: str, done: int, total: int) -> None:
        if (stage, done) not in seen:
            seen.add((stage, done))
            raise Stop

    for _ in range(20):
        student = student if same_object else make(memory=4)
        try:
            report = run(student, teachers, tmp_path, progress=stop_at_news)
            break
        except Stop:
            breaks += 1
        for path in tmp_path.glob("rollouts/*"):  # a shard is written once
            assert written.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
        assert len(written) == min(breaks - 1, 3)
    assert seen == {("rollouts", n) for n in (0, 8, 16, 20)} | {("fit", n) for n in (0, 1, 2)}
    assert report == uninterrupted[1]
    assert_same(student, uninterrupted[0])
    assert_same(Critic.from_pretrained(tmp_path / "critic"), Critic.from_pretrained(uninterrupted[2] / "critic"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"critic", "report.json", "rollouts", "run.json", "start"}


def test_a_finished_student_is_loaded_without_calling_the_policy(
    run: Any, make: Any, teachers: list[Critic], uninterrupted: Any, tiny_policy: Any
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the policy was called")

    student, hook = make(memory=4), tiny_policy.register_forward_pre_hook(never)
    try:
        report = run(student, teachers, uninterrupted[2])
    finally:
        hook.remove()
    assert report == uninterrupted[1]
    assert asdict(report) == read_json(uninterrupted[2] / "report.json")
    assert_same(student, uninterrupted[0])


def test_a_shard_that_is_cut_short_is_named(run: Any, make: Any, teachers: list[Critic], tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done:
            raise Stop

    with pytest.raises(Stop):
        run(make(), teachers, tmp_path, progress=stop)
    shard = tmp_path / "rollouts" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard '.*00000.safetensors' cannot be read: .* Hint: delete it"):
        run(make(), teachers, tmp_path)


# Errors


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"settings": replace(SETTINGS, candidates=8)}, "settings.candidates"),
        ({"settings": replace(SETTINGS, fit=replace(SETTINGS.fit, epochs=3))}, "settings.fit.epochs"),
        ({"prompts": PROMPTS[:-1]}, "prompts"),
        ({"teachers": 7}, "teachers"),
        ({"memory": 5}, "critic.memory"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_says_what_differs(
    run: Any, make: Any, teachers: list[Critic], uninterrupted: Any, change: dict[str, Any], differing: str
) -> None:
    seed, student = change.pop("teachers", 0), make(memory=change.pop("memory", 4))
    others = [talkative(make("good"), seed), teachers[1]]
    with pytest.raises(
        DataError, match=rf"holds a run with different {re.escape(differing)}\. Hint: name a new output folder"
    ):
        run(student, others, uninterrupted[2], **change)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"composition": "conditioned"}, {}, "the student is conditioned"),
        ({}, {"composition": "conditioned"}, "composition is 'conditioned' in the critic of good, brevity, whose"),
        ({"readout": "candidates"}, {}, "the student's readout is 'candidates', which would have to read every"),
    ],
)
def test_critics_that_cannot_be_distilled_are_refused(
    run: Any, make: Any, tmp_path: Path, student: Any, teacher: Any, message: str
) -> None:
    for teachers in (make(**teacher), [make(**teacher)]):
        with pytest.raises(ConfigError, match=message):
            run(make(**student), teachers, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("brevity", "good"), ("good",), ("good", "brevity", "more")])
def test_other_objectives_than_the_teachers_are_refused(
    run: Any, make: Any, teachers: list[Critic], tmp_path: Path, names: tuple[str, ...]
) -> None:
    message = f"the student's objectives are {', '.join(names)}, but the teachers have: good, brevity"
    with pytest.raises(ConfigError, match=message):
        run(make(*names), teachers, tmp_path)


def test_teachers_that_cannot_be_combined_are_refused(run: Any, make: Any, tmp_path: Path) -> None:
    with pytest.raises(CriticError, match="objective 'good' belongs to two of the critics"):
        run(make(), [make("good"), make()], tmp_path)
    with pytest.raises(CriticError, match=r"critic is \[\], expected critics"):
        run(make(), [], tmp_path)
    with pytest.raises(CriticError, match="critic is a str, expected a critic"):
        run(make(), "outputs/critic", tmp_path)


def test_a_student_for_another_shape_of_policy_is_refused(
    run: Any, make: Any, teachers: list[Critic], tmp_path: Path
) -> None:
    student = make()
    student.fingerprint = replace(student.fingerprint, vocab_size=60)
    with pytest.raises(CriticError, match="critic was made for a policy with hidden size 32 and 60 tokens"):
        run(student, teachers, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollouts": 3}, "rollouts is 3, expected a whole number ≥ 4"),
        ({"candidates": 0}, "candidates is 0, expected a whole number ≥ 1"),
        ({"candidates": 2.5}, "candidates is 2.5"),
        ({"candidates": 62}, "candidates is 62, but the policy has 61 tokens"),
        ({"sampling": RolloutSettings(top_k=62)}, "top_k is 62, but the policy has 61 tokens"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(
    run: Any, make: Any, teachers: list[Critic], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(make(), teachers, tmp_path, replace(SETTINGS, **change))
    assert not list(tmp_path.iterdir())


def test_no_prompt_is_an_error(run: Any, make: Any, teachers: list[Critic], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts is \[\], expected at least one prompt"):
        run(make(), teachers, tmp_path, prompts=[])


def test_the_scale_is_the_standard_deviation_of_the_values(recordings: Recordings) -> None:
    values = recordings.values[recordings.is_response].flatten(0, 1)
    torch.testing.assert_close(scale(ShardedRollouts.shard(recordings, SINGLE_PROCESS)), values.std(dim=0))
    constant = replace(recordings, values=torch.ones_like(recordings.values))
    assert scale(ShardedRollouts.shard(constant, SINGLE_PROCESS)).tolist() == [1.0] * 4


def test_one_text_is_no_list_of_prompts(run: Any, make: Any, teachers: list[Critic], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompts is 'once', expected at least one prompt"):
        run(make(), teachers, tmp_path, prompts="once")


def test_a_group_is_no_student(run: Any, teachers: list[Critic], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="student is a CriticGroup, expected one critic with heads of its own"):
        run(mavis.CriticGroup(teachers), teachers, tmp_path)


def test_values_that_are_not_finite_leave_no_critic_behind(run: Any, make: Any, tmp_path: Path) -> None:
    teacher = talkative(make())
    with torch.no_grad():
        teacher.heads.bias[0, -1] = torch.nan
    with pytest.raises(TrainingError, match="the held-out error was nan before the fit"):
        run(make(), teacher, tmp_path)
    assert not (tmp_path / "critic").exists()


def test_a_trunk_whose_settings_have_numeric_names_resumes_too(run: Any, make: Any, tmp_path: Path) -> None:
    """As the labels of a classifier have, which JSON turns into text."""
    trunk = copy.deepcopy(TRUNK)
    trunk.id2label = {0: "bad", 1: "good"}
    teacher = talkative(make())
    reports = [run(make(readout="token", backbone=trunk), teacher, tmp_path) for _ in range(2)]
    assert reports[0] == reports[1]


def test_the_digest_of_a_teacher_depends_on_its_settings_too(make: Any) -> None:
    digests = {critic_digest(make(readout="candidates", norm=norm)) for norm in (True, False)}
    assert len(digests) == 2
    assert critic_digest(make().bfloat16()) != critic_digest(make())
