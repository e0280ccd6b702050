"""The commands on a tiny policy: what they write and print, and how they report mistakes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mavis.cli.build import describe_prompts
from mavis.cli.evaluate import update_model_card
from mavis.critics import Critic, ValueModelCritic
from mavis.decoding import Response
from mavis.vectors import AlignmentVector

GENERATE = ("policy=tiny", "decoding.max_new_tokens=4", "beta=2")


def assert_refused(ran: Any, message: str) -> None:
    """A mistake the user can fix: status 2 and one line with a hint, the last one."""
    assert ran.code == 2, ran.err
    lines = ran.err.strip().splitlines()
    assert lines[-1].startswith("mavis: ")
    assert " Hint: " in lines[-1]
    assert message in lines[-1]
    assert "Traceback" not in ran.err


# train


def test_training_ends_in_a_critic_and_a_table(mavis: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    ran = mavis("train", *small, "output=run")
    assert ran.code == 0, ran.err
    critic = Critic.from_pretrained(tmp_path / "run" / "critic")
    assert critic.objectives == ("positive", "brevity")
    assert critic.calibration is not None
    assert (critic.calibration.max_new_tokens, critic.calibration.top_k) == (8, 20)
    assert f"critic: {tmp_path / 'run' / 'critic'}" in ran.out
    for word in ("iteration", "positive", "brevity", "KL (nats)"):
        assert word in ran.out
    for stage in ("iteration 0: rollouts", "iteration 0: fit"):
        assert stage in ran.err
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]


def test_the_same_command_resumes(mavis: Any, small: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained.parent, tmp_path / "run")
    for lost in ("critic", "calibration", "iteration-0/critic", "iteration-0/report.json"):
        path = tmp_path / "run" / lost
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert mavis("train", *small, "output=run").code == 0
    again, before = Critic.from_pretrained(tmp_path / "run" / "critic"), Critic.from_pretrained(trained)
    assert again.calibration == before.calibration
    for name, tensor in before.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_other_settings_in_the_same_folder_are_refused(
    mavis: Any, small: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained.parent, tmp_path / "run")
    ran = mavis("train", *small, "output=run", "beta=2")
    assert_refused(ran, "holds a run with different settings.beta, settings.zeta. Hint: name a new output folder")


def test_other_options_of_an_objective_in_the_same_folder_are_refused(
    mavis: Any, small: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained.parent, tmp_path / "run")
    ran = mavis("train", *small, "output=run", "objectives.brevity.scale=10")
    assert_refused(ran, "holds a run with different objective settings: brevity.scale. Hint: name a new output folder")


@pytest.mark.parametrize(
    "options",
    [
        ("critic.readout=token", "critic.hidden=8", "critic.rank=4"),
        ("critic.readout=token", "critic.hidden=8", "critic.rank=4", "critic.lora_rank=2"),
        ("critic.readout=candidates", "critic.hidden=0", "critic.norm=false", "experiment=paper"),
    ],
    ids=["token", "token with adapters", "candidates"],
)
def test_a_value_model_is_trained_and_used_like_any_critic(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, options: tuple[str, ...]
) -> None:
    if "critic.lora_rank=2" in options:
        pytest.importorskip("peft")
    others = [item for item in small if not item.startswith("critic.")]
    ran = mavis("train", *others, "critic=value_model", *options, "output=run")
    assert ran.code == 0, ran.err
    critic = Critic.from_pretrained(tmp_path / "run" / "critic")
    assert isinstance(critic, ValueModelCritic)
    assert critic.readout == options[0].partition("=")[2]
    assert critic.calibration is not None
    generated = mavis("generate", *GENERATE, "checkpoint=run/critic", "prompt=the dog", "decoding.top_k=20")
    assert generated.code == 0, generated.err
    assert generated.out.startswith("the dog")


@pytest.mark.parametrize("placed", ["auto", "balanced", "sequential"])
def test_training_with_a_device_map_gives_the_same_critic(
    mavis: Any, small: tuple[str, ...], trained: Path, tmp_path: Path, placed: str
) -> None:
    ran = mavis("train", *small, f"policy.device={placed}", "output=run")
    assert ran.code == 0, ran.err
    state = Critic.from_pretrained(trained).state_dict()
    for name, tensor in Critic.from_pretrained(tmp_path / "run" / "critic").state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("command", ["generate", "demo", "align", "elicit"])
def test_commands_of_one_process_refuse_several(mavis: Any, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ran = mavis(command, *(["prompt=hello"] if command == "generate" else []))
    assert ran.code == 2
    assert ran.err.startswith(
        f"mavis (process 1 of 2): 2 processes were started, but mavis {command} runs in one. Hint"
    )
    assert ran.err.count("\n") == 1


def test_an_unknown_kind_of_critic_is_refused(mavis: Any, small: tuple[str, ...]) -> None:
    assert_refused(mavis("train", *small, "critic.kind=value", "output=run"), "critic.kind is 'value'.")


def test_one_objective_asked_for_trains_one_head(mavis: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    assert mavis("train", *small, "objective=[brevity]", "output=run").code == 0
    assert Critic.from_pretrained(tmp_path / "run" / "critic").objectives == ("brevity",)


def test_a_sweep_makes_a_critic_for_every_combination(mavis: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    shorter = [item for item in small if not item.startswith("critic.hidden")]
    ran = mavis("train", "-m", *shorter, "beta=2,4", "critic.hidden=8,16", "objective=[brevity]", "output=runs")
    assert ran.code == 0, ran.err
    found = sorted(path.parent.parent.name for path in (tmp_path / "runs").glob("*/critic/config.json"))
    assert found == [f"beta={beta},critic.hidden={hidden}" for beta in (2, 4) for hidden in (16, 8)]
    for folder in (tmp_path / "runs").glob("beta*"):
        settings = json.loads((folder / "run.json").read_text())
        assert f"beta={settings['settings']['beta']:g},critic.hidden={settings['critic']['hidden']}" == folder.name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=[]"], "objective is empty"),
        (["beta=0"], "beta is 0"),
        (["improvement.iterations=0"], "iterations is 0"),
        (["improvement.fit.target=td"], "target is 'td'"),
        (["improvement.shard_size=0"], "shard_size is 0"),
        (["decoding.temperature=0"], "temperature is 0"),
        (["decoding.top_k=1000"], "top_k is 1000, but the policy has 61 tokens"),
        (["critic.hidden=0"], "hidden is 0"),
        (["objective=[brevity]", "objectives.brevity.scale=-1"], "objective 'brevity' cannot be built: scale is -1"),
        (["objective=[reward_model]"], "objectives.reward_model.model is not given"),
        (["+objectives.mine._target_=nowhere.thing"], "objective 'mine' cannot be built: Error loading 'nowhere"),
        (["data=file"], "data.prompts.source is not given"),
        (["data=file", "data.prompts.source=missing.txt"], "'missing.txt', which does not exist"),
        (["data=file", "data.prompts.source=empty.txt"], "'empty.txt', which holds no prompt"),
    ],
)
def test_a_mistake_in_the_settings_of_training_is_one_line(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert_refused(mavis("train", *small, "output=run", *overrides), message)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [(["improvment.rollouts=3"], "improvment"), (["critic.hiden=3"], "hiden"), (["objective=[positiv]"], "positiv")],
)
def test_a_misspelt_name_is_an_error_that_repeats_it(
    mavis: Any, small: tuple[str, ...], overrides: list[str], key: str
) -> None:
    ran = mavis("train", *small, *overrides)
    assert ran.code != 0
    assert key in ran.err
    assert "Traceback" not in ran.err


# distill

DISTILL = (
    "policy=tiny",
    "critic.hidden=8",
    "critic.rank=4",
    "decoding.max_new_tokens=8",
    "distillation.rollouts=32",
    "distillation.candidates=10",
    "distillation.fit.epochs=1",
)


@pytest.fixture
def other(tiny_policy: Any, tmp_path: Path) -> Path:
    """The folder of a critic with an objective that the trained one has not."""
    folder = tmp_path / "other"
    ValueModelCritic.for_policy(
        tiny_policy, ["kindness"], readout="candidates", hidden=0, composition="independent"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["hidden_state", "value_model"])
def test_a_distilled_critic_is_used_like_any_other(
    mavis: Any, trained: Path, other: Path, tmp_path: Path, kind: str
) -> None:
    ran = mavis("distill", *DISTILL, f"critic={kind}", f"critics=[{trained},{other}]", "output=run")
    assert ran.code == 0, ran.err
    critic = Critic.from_pretrained(tmp_path / "run" / "critic")
    assert critic.kind == kind
    assert critic.objectives == ("positive", "brevity", "kindness")
    assert critic.calibration is None
    assert torch.equal(critic.reward_std[:2], Critic.from_pretrained(trained).reward_std)
    assert f"critic: {tmp_path / 'run' / 'critic'}" in ran.out
    for word in ("kindness", "all", "between candidates"):
        assert word in ran.out
    for stage in ("rollouts", "fit"):
        assert stage in ran.err
    generated = mavis("generate", *GENERATE, "checkpoint=run/critic", "prompt=the dog", "decoding=default")
    assert generated.code == 0, generated.err
    assert generated.out.startswith("the dog")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "critics is not given. Hint: write critics=..."),
        (["critics=[]"], "critics is empty"),
        (["critics=nothing"], "'nothing', which does not exist"),
        (["critics=[TRAINED,TRAINED]"], "objective 'brevity' belongs to two of the critics"),
        (["critics=TRAINED", "distillation.candidates=62"], "candidates is 62, but the policy has 61 tokens"),
        (
            ["critics=TRAINED", "critic=value_model", "critic.readout=candidates"],
            "the student's readout is 'candidates'",
        ),
    ],
)
def test_a_mistake_in_what_is_to_be_distilled_is_one_line(
    mavis: Any, trained: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    given = [override.replace("TRAINED", str(trained)) for override in overrides]
    assert_refused(mavis("distill", *DISTILL, "output=run", *given), message)
    assert not (tmp_path / "run" / "run.json").exists()


# align

ALIGN = (
    "align",
    "policy=tiny",
    "objective=[brevity,positive]",
    "alignment.steps=2",
    "alignment.max_new_tokens=8",
    "alignment.reference_samples=32",
    "alignment.evaluation_samples=16",
    "output=run",
)


def test_aligning_ends_in_a_policy_and_a_table(mavis: Any, tmp_path: Path) -> None:
    ran = mavis(*ALIGN, "weights={brevity: 1.0}")
    assert ran.code == 0, ran.err
    assert f"aligned: {tmp_path / 'run' / 'policy'}" in ran.out
    for word in ("KL", "brevity", "weighted sum", "reward after"):
        assert word in ran.out
    for stage in ("reference rollouts", "steps", "responses after"):
        assert stage in ran.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["weights"] == {"brevity": 1.0, "positive": 0.0}
    assert report["evaluated_on"] == "evaluation prompts"
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]
    again = mavis(*ALIGN, "weights={brevity: 1.0}")
    assert again.out.splitlines()[-1] == ran.out.splitlines()[-1]
    assert_refused(mavis(*ALIGN), "holds an alignment with different weights.brevity, weights.positive.")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=[]"], "objective is empty"),
        (["weights={brevty: 1}"], "did you mean 'brevity'?"),
        (["weights={brevity: 0}"], "expected one row that is not all 0"),
        (["alignment.method=ppo"], "method is 'ppo'. Hint: known: rloo, grpo."),
        (["alignment.samples=1"], "samples is 1, expected a whole number ≥ 2"),
        (["beta=0"], "beta is 0"),
        (["alignment.temperature=0"], "temperature is 0"),
        (["data.prompts.source=missing.txt"], "'missing.txt', which does not exist"),
    ],
)
def test_a_mistake_in_the_settings_of_an_alignment_is_one_line(
    mavis: Any, tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert_refused(mavis(*ALIGN, *overrides), message)
    assert not (tmp_path / "run" / "run.json").exists()


# policies


def test_a_policy_must_be_named(mavis: Any) -> None:
    assert_refused(mavis("train", "policy=pretrained"), "policy.path is not given. Hint: write policy.path=...")


def test_a_policy_that_is_only_a_pickle_is_refused(
    mavis: Any, tiny_folder: Path, tiny_policy: Any, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(tiny_policy.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    ran = mavis("train", "policy=pretrained", "policy.path=pickled")
    assert_refused(ran, "policy.path is 'pickled', which cannot be loaded")
    assert "safetensors" in ran.err


def test_a_policy_that_is_cut_short_is_refused(mavis: Any, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(mavis("train", "policy=pretrained", "policy.path=short"), "which cannot be loaded")


# generate


def test_a_prompt_is_continued(mavis: Any, trained: Path) -> None:
    ran = mavis("generate", *GENERATE, f"checkpoint={trained}", "prompt=the dog", "samples=3")
    assert ran.code == 0, ran.err
    headings, texts = ran.out.splitlines()[::2], ran.out.splitlines()[1::2]
    assert headings == [f"--- prompt 1, sample {i}" for i in (1, 2, 3)]
    assert all(text.startswith("the dog") for text in texts)
    alone = mavis("generate", *GENERATE, f"checkpoint={trained}", "prompt=the dog").out
    assert alone.startswith("the dog")
    assert "---" not in alone


def test_generating_writes_nothing_anywhere(mavis: Any, trained: Path, tmp_path: Path) -> None:
    before = sorted(trained.parent.rglob("*"))
    assert mavis("generate", *GENERATE, f"checkpoint={trained}", "prompt=the dog").code == 0
    assert not list(tmp_path.iterdir())
    assert sorted(trained.parent.rglob("*")) == before


def test_a_seed_repeats_and_another_one_does_not(mavis: Any, trained: Path) -> None:
    def generated(*overrides: str) -> str:
        ran = mavis("generate", *GENERATE, f"checkpoint={trained}", "prompt=the dog", "samples=4", *overrides)
        return str(ran.out)

    assert generated() == generated() == generated("seed=0") != generated("seed=1")


def test_greedy_is_the_same_for_every_seed(mavis: Any, trained: Path) -> None:
    generated = {
        mavis("generate", *GENERATE, f"checkpoint={trained}", "prompt=the dog", "greedy=true", f"seed={seed}").out
        for seed in range(3)
    }
    assert len(generated) == 1


AWKWARD = 'Tom said, "it\'s = {x}" $y \\ [a, b]: ${z} \\'


def test_a_prompt_with_grammar_in_it_reaches_the_policy_unchanged(
    mavis: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    met: list[list[str]] = []
    nothing = Response("", [], finished=False, kl=[])
    monkeypatch.setattr(
        "mavis.decoding.respond", lambda p, t, prompts, **_: met.append(prompts) or [[nothing] for _ in prompts]
    )
    (tmp_path / "prompts.txt").write_text(f"{AWKWARD}\n\nthe dog\n", encoding="utf-8")
    base = ("generate", *GENERATE, f"checkpoint={trained}")
    by_name = mavis(*base, f"prompt={AWKWARD}")
    by_file = mavis(*base, "prompt_file=prompts.txt")
    by_stdin = mavis(*base, "prompt_file=-", stdin=f"{AWKWARD}\nthe dog\n")
    assert [ran.code for ran in (by_name, by_file, by_stdin)] == [0, 0, 0]
    assert met == [[AWKWARD], [AWKWARD, "the dog"], [AWKWARD, "the dog"]]
    assert by_name.out == f"{AWKWARD}\n"


@pytest.mark.parametrize(
    ("weights", "other"),
    [("{positive: 1.0}", "[1.0,0.0]"), ("{positive: 0.5, brevity: 0.5}", "null"), ("{brevity: -2}", "[0,-2]")],
)
def test_weights_may_be_a_mapping_or_a_list(mavis: Any, trained: Path, weights: str, other: str) -> None:
    base = ("generate", *GENERATE, f"checkpoint={trained}", "prompt=the dog", "samples=5", "beta=20")
    generated = [mavis(*base, f"weights={choice}") for choice in (weights, other)]
    assert generated[0].code == 0, generated[0].err
    assert generated[0].out == generated[1].out


def test_a_budget_may_stand_for_beta(mavis: Any, trained: Path) -> None:
    calibration = Critic.from_pretrained(trained).calibration
    assert calibration is not None
    kl = calibration.max_kl() * 0.9
    base = ("generate", "policy=tiny", "decoding.max_new_tokens=8", f"checkpoint={trained}", "prompt=the dog")
    by_kl = mavis(*base, "samples=6", f"target_kl={kl}", "weights=[1,0]")
    beta = calibration.beta(torch.tensor([1.0, 0.0]), kl)
    by_beta = mavis(*base, "samples=6", f"beta={beta}", "weights=[1,0]")
    assert by_kl.code == 0, by_kl.err
    assert by_kl.out == by_beta.out


@pytest.fixture
def vector(tiny_policy: Any, make_other_policy: Any, tmp_path: Path) -> str:
    """The folder of an alignment vector of the tiny policy, within the one that commands run in."""
    AlignmentVector.between(tiny_policy, make_other_policy()).save(tmp_path / "vectors" / "other-v1.0")
    return "vectors/other-v1.0"


def test_alignment_vectors_may_be_added_to_the_policy(mavis: Any, trained: Path, vector: str) -> None:
    base = ("generate", *GENERATE, f"checkpoint={trained}", "prompt=the dog", "samples=5")
    plain = mavis(*base)
    assert mavis(*base, f"vectors={{{vector}: 0}}").out == plain.out
    with pytest.warns(UserWarning, match=f"vectors '{vector}' are applied to the policy, and this critic was trained"):
        moved = mavis(*base, f"vectors={{{vector}: -0.5}}")
    assert moved.code == 0, moved.err
    assert moved.out != plain.out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{VECTOR: nan}", "the coefficient of 'VECTOR' is nan, expected a finite number"),
        ("{VECTOR: much}", "the coefficient of 'VECTOR' is 'much', expected a finite number"),
        ("{VECTOR: 1e300}", "plus the vectors overflows torch.float32. Hint: use smaller coefficients"),
        ("{nowhere: 1}", "'nowhere', which is not a folder"),
        ("{vectors: 1}", "which has no config.json"),
        ("{}", "vectors is {}, expected a coefficient for each folder"),
        ("0.5", "vectors is 0.5, expected a coefficient for each folder"),
        ("VECTOR", "vectors is 'VECTOR', expected a coefficient for each folder"),
        ("{VECTOR: 1, VECTOR: 2}", "vectors names folder 'VECTOR' twice. Hint: give each folder one coefficient."),
    ],
)
def test_a_mistake_in_the_vectors_is_one_line(mavis: Any, trained: Path, vector: str, value: str, message: str) -> None:
    base = ("generate", *GENERATE, f"checkpoint={trained}", "prompt=the dog")
    assert_refused(mavis(*base, f"vectors={value.replace('VECTOR', vector)}"), message.replace("VECTOR", vector))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "prompt is None and prompt_file is None; expected exactly one of them"),
        (["prompt=a", "prompt_file=b"], "expected exactly one of them"),
        (["prompt="], "prompt is empty"),
        (["prompt=???"], "prompt is not given"),
        (["prompt_file=-"], "standard input, which holds no prompt"),
        (["prompt_file=empty.txt"], "'empty.txt', which holds no prompt"),
        (["prompt_file=missing.txt"], "'missing.txt', which does not exist"),
        (["prompt_file=missing"], "prompt_file is 'missing', which does not exist"),
        (["prompt=a", "weights={positve: 1}"], "did you mean 'positive'?"),
        (["prompt=a", "weights={}"], "weights is empty"),
        (["prompt=a", "weights=[1]"], "weights has shape (1, 1), but the critic has 2 objectives"),
        (["prompt=a", "weights=0.5"], "weights is 0.5"),
        (["prompt=a", "weights={positive: nan}"], "expected a finite number"),
        (["prompt=a", "beta=-1"], "beta is -1"),
        (["prompt=a", "target_kl=2"], "both set the strength"),
        (["prompt=a", "beta=null", "target_kl=1e9"], "the critic was calibrated up to"),
        (["prompt=a", "samples=0"], "samples is 0"),
        (["prompt=a", "samples=2", "greedy=true"], "samples is 2 and greedy is True"),
        (["prompt=a", "checkpoint=nothing"], "'nothing', which does not exist"),
        (["prompt=a", "checkpoint=."], "has no config.json, so it is not a critic"),
    ],
)
def test_a_mistake_in_what_is_to_be_generated_is_one_line(
    mavis: Any, trained: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert_refused(mavis("generate", *GENERATE, f"checkpoint={trained}", *overrides), message)


# evaluate and demo

SWEEP = (
    "evaluation.divisions=2",
    "evaluation.betas=[1,3]",
    "evaluation.samples=2",
    "evaluation.reference_samples=4",
    "evaluation.speed_batch=2",
    "evaluation.speed_repeats=1",
)


def test_evaluation_writes_its_report_and_shows_it(mavis: Any, trained: Path, tmp_path: Path) -> None:
    before = shutil.copytree(trained, tmp_path / "before")
    ran = mavis(
        "evaluate",
        "policy=tiny",
        "decoding.max_new_tokens=6",
        *SWEEP,
        f"checkpoint={trained}",
        "objective=[brevity,positive]",
        "output=out",
    )
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["objectives"] == ["positive", "brevity"]  # the critic's order, whatever order was asked for
    assert len(report["rows"]) == 1 + 3 * 2
    assert set(report["rows"][0]["held_out"]) == {"readability"}
    assert report["settings"]["sampling"]["top_k"] == 20  # as trained
    for name in ("report.json", "report.csv", "frontier.png", "front.png"):
        assert str(tmp_path / "out" / name) in ran.out
    for word in ("(reference)", "efficiency", "tokens/s", "readability", "positive 0.5, brevity 0.5"):
        assert word in ran.out
    # The critic's card tells it, too; the critic itself is the same.
    assert Critic.from_pretrained(trained).about["efficiency"] == [
        {name: one[name] for name in ("weights", "kl", "efficiency")} for one in report["efficiency"]
    ]
    assert "| positive 0.5, brevity 0.5 |" in (trained / "README.md").read_text().split("## Frontier efficiency")[1]
    assert (trained / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()


def test_a_model_card_names_prompts_without_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "mine.txt").write_text("the dog")
    for source, name in {
        str(tmp_path / "secret" / "mine.txt"): "mine.txt",
        "~/secret/mine.txt": "mine.txt",
        "owner/dataset": "owner/dataset",
        "embedded": "the story openings that ship with mavis",
    }.items():
        assert describe_prompts(OmegaConf.create({"source": source})) == name
    assert describe_prompts(OmegaConf.create({"source": ["the dog", "a cat"]})) == "a list of 2 prompts"


def test_the_model_card_of_another_critic_saved_meanwhile_is_not_updated(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(trained, tmp_path / "critic")
    measured = Critic.from_pretrained(place)
    measured.about["efficiency"] = [{"weights": {"positive": 1.0}, "kl": 1.0, "efficiency": 0.123}]
    other = Critic.from_pretrained(place)
    other.reward_mean += 1
    other.save_pretrained(place)
    update_model_card(measured, place)
    assert Critic.from_pretrained(place).about == other.about
    update_model_card(measured, Path("me/on-the-hub"))  # there is nothing to write

    def refused(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mavis.critics.io.save.write_json", refused)
    update_model_card(other, place)
    assert "critic is not updated: Permission denied" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=[positive]"], "the critic's objective 'brevity' is not among the configured ones"),
        (["evaluation.betas=[0]"], "betas is [0]"),
        (["evaluation.samples=0"], "samples is 0"),
        (["evaluation.divisions=0"], "divisions"),
        (["evaluation.target_kls=[-1]"], "target_kls is [-1]"),
        (["data.evaluation_prompts.source=[]"], "an empty list, which holds no prompt"),
        (["+evaluation.held_out.readability.hardest=-1"], "objective 'readability' cannot be built: hardest is -1"),
        (["checkpoint=nothing"], "'nothing', which does not exist"),
    ],
)
def test_a_mistake_in_the_settings_of_evaluation_is_one_line(
    mavis: Any, trained: Path, overrides: list[str], message: str
) -> None:
    base = ("evaluate", "policy=tiny", *SWEEP, f"checkpoint={trained}", "objective=[positive,brevity]", "output=out")
    assert_refused(mavis(*base, *overrides), message)


def test_the_demo_leaves_a_critic_a_report_stories_and_a_command_that_works(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mavis.cli.demo.multiprocessing", Nobody())  # another process would take long to start
    ran = mavis("demo", *small, *SWEEP, "output=out", 'story=the dog\'s day, said "she"')
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seconds"] > 0
    for row in report["rows"]:
        assert {"weights", "beta", "rewards", "kl", "efficiency", "tokens_per_second"} <= set(row)
    for name in ("critic/config.json", "report.csv", "front.png", "frontier.png"):
        assert (tmp_path / "out" / name).is_file()
    for weights in ("{'positive': 1.0}", "{'positive': 0.5, 'brevity': 0.5}", "{'brevity': 1.0}"):
        assert weights in ran.out
    *_, line = ran.out.strip().splitlines()
    name, *command = shlex.split(line)
    assert name == "mavis"
    again = mavis(*command)
    assert again.code == 0, again.err
    assert again.out.count("--- prompt 1, sample") == 3


def test_the_demo_takes_one_objective(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mavis.cli.demo.multiprocessing", Nobody())
    one = ("objective=[brevity]", "improvement.calibration_samples=0", "output=out")
    ran = mavis("demo", *small, *SWEEP, *one)
    assert ran.code == 0, ran.err
    assert "{'brevity': 1.0}" in ran.out
    assert "{'brevity': -1.0}" in ran.out
    *_, line = ran.out.strip().splitlines()
    again = mavis(*shlex.split(line)[1:])
    assert again.code == 0, again.err


class Nobody:
    """Stands in for `multiprocessing`: a helper that dies before it has done anything."""

    def get_context(self, method: str) -> Nobody:
        return self

    def Process(self, **_: Any) -> Nobody:
        return self

    def start(self) -> None:
        pass

    def join(self) -> None:
        pass
