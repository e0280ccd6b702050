"""Aligning a copy of a policy with one objective or a weighted sum of several, by KL-regularised fine-tuning."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.data import draw_prompts
from mavis.decoding.weights import Weights, weight_rows
from mavis.errors import DataError, MissingPackageError, ObjectiveError, PolicyError, WeightsError, first_sentence
from mavis.policies import Prompt
from mavis.policies.devices import states_device
from mavis.policies.embeddings import is_quantised
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.generation_config import check_savable
from mavis.policies.limits import check_prompts_fit
from mavis.rewards import Objective, score
from mavis.rollouts.collect import RolloutPlan, collect
from mavis.rollouts.manifest import matches_scored_manifest, write_scored_manifest
from mavis.rollouts.policy_kl import response_kl
from mavis.rollouts.replay import Sequences
from mavis.training.alignment.settings import AlignReport, AlignSettings
from mavis.training.run_folder import Progress, read_report, report_reuse, write_report
from mavis.utils.files import refuse_model_folder
from mavis.utils.locks import locked_folder


def align(
    policy: Any,
    tokenizer: Any,
    objectives: Mapping[str, Objective],
    weights: Weights,
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    settings: AlignSettings,
    *,
    evaluation_prompts: Sequence[Prompt] | None = None,
    progress: Progress | None = None,
) -> AlignReport:
    """Fine-tune a copy of a policy for a weighted sum of objectives, regularised by its KL to the policy.

        J(π) = E_π[Σ_m w_m R_m] − (1/β) · KL(π ‖ π_ref)

    Rewards are normalised by the mean and standard deviation over responses of the reference policy, as everywhere.

    Everything is written to `folder` as soon as it is finished: the reference rollouts, checkpoints of the training,
    and at the end the policy (`folder/policy`, or `folder/adapter` with LoRA) and `folder/report.json`. An interrupted
    run resumes when the same call is made on the same folder, and ends with the weights of an uninterrupted one; a
    finished run returns its report. Nothing is pickled or sent to trackers or over the network.

    Args:
        policy: the reference policy, of any precision; it is not changed. A copy in float32 is trained.
        tokenizer: its tokenizer.
        objectives: M objectives by name.
        weights: by name, or M numbers; finite, not all 0.
        prompts: to sample from while training.
        folder: of this run.
        settings: of this run.
        evaluation_prompts: to measure reward and KL on; None measures on fresh responses to `prompts`, which the report
            says.
        progress: called with stage, done and total as each stage advances.

    Returns:
        The report.

    Raises:
        MissingPackageError: if TRL or PEFT is not installed.
        WeightsError: if the weights are not one finite number per objective, or all 0.
        PolicyError: if the policy cannot be trained: it is quantised or carries adapters already; or if the tokenizer
            writes tokens that the policy has no embedding of.
        ConfigError: if the longest prompt and response have more positions than the policy has learnt.
        DataError: if the folder belongs to another run, or there is no prompt.
        ObjectiveError: if an objective never varies, or returns something other than one finite number per response.

    Source: RLOO: Ahmadian et al., "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human
    Feedback in LLMs", ACL 2024. GRPO: Shao et al., "DeepSeekMath", arXiv 2402.03300, here without its divisions by a
    response's length and by the spread of its group (Liu et al., arXiv 2503.20783), which would change what β means.

    Examples:
        0 steps measure the reference policy itself; training needs the extra `align`.

        >>> import tempfile
        >>> import mavis
        >>> from mavis.rewards import Brevity
        >>> from mavis.training import AlignSettings, align
        >>> policy, tokenizer = mavis.embedded.load()
        >>> settings = AlignSettings(steps=0, reference_samples=8, evaluation_samples=2, max_new_tokens=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = align(policy, tokenizer, {"short": Brevity()}, [1.0], ["The dog"], folder, settings)
        >>> report.weights, report.kl
        ({'short': 1.0}, 0.0)
    """
    run, report_progress = Path(folder), progress or (lambda stage, done, total: None)
    row = _weights(weights, list(objectives))
    _check(policy, tokenizer, prompts, evaluation_prompts, settings)
    manifest = _manifest(policy, objectives, row, prompts, evaluation_prompts, settings)
    refuse_model_folder(run)
    with locked_folder(run):
        resumed = matches_scored_manifest(run / "run.json", manifest, objectives, "an alignment with different")
        if resumed and (run / "report.json").is_file():
            report_reuse(run)
            return read_report(run / "report.json", AlignReport)
        training = _import_training()
        if not resumed:
            write_scored_manifest(run / "run.json", manifest, objectives)

        sample = partial(_sample, tokenizer, objectives, run, settings, report_progress)
        raw, _ = sample(policy, "reference rollouts", prompts, settings.reference_samples, seed=0)
        mean, std = _normalisation(raw, list(objectives))

        def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            raw = torch.from_numpy(score(objectives, prompts, responses))
            return list(((raw - mean) / std @ row).tolist())

        seconds = training.reinforce(
            policy,
            tokenizer,
            draw_prompts(prompts, settings.steps * settings.batch_size, settings.seed + 1),
            reward,
            run,
            settings,
            lambda done: report_progress("steps", done, settings.steps),
        )
        aligned = training.aligned_copy(policy, run, settings)
        measured_on = evaluation_prompts or prompts
        raw_before, _ = sample(policy, "responses before", measured_on, settings.evaluation_samples, seed=2)
        raw_after, shards = sample(aligned, "responses after", measured_on, settings.evaluation_samples, seed=2)
        before, after = (raw_before - mean) / std, (raw_after - mean) / std
        kl = _kl(aligned, policy, shards, settings.temperature)
        report = AlignReport(
            folder=str(training.save_aligned(aligned, tokenizer, run)),
            weights=manifest["weights"],
            rewards_before=_by_name(objectives, before.mean(0)),
            rewards_after=_by_name(objectives, after.mean(0)),
            reward_before=float((before @ row).mean()),
            reward_after=float((after @ row).mean()),
            reward_error=_standard_error(after @ row),
            kl=float(kl.mean()),
            kl_error=_standard_error(kl),
            goal=float((after @ row).mean() - kl.mean() / settings.beta),
            mean=_by_name(objectives, mean),
            std=_by_name(objectives, std),
            responses=settings.evaluation_samples,
            evaluated_on="evaluation prompts" if evaluation_prompts else "training prompts",
            seconds=seconds,
            settings=manifest["settings"],
        )
        write_report(run / "report.json", report)
        for name in ("checkpoint", "reference"):  # each as large as the policy, and no longer needed
            shutil.rmtree(run / name, ignore_errors=True)
        return report


def _manifest(
    policy: Any,
    objectives: Mapping[str, Objective],
    row: Tensor,
    prompts: Sequence[Prompt],
    evaluation_prompts: Sequence[Prompt] | None,
    settings: AlignSettings,
) -> dict[str, Any]:
    """Describe a run by plain data, so that only the same call resumes it."""
    return {
        "settings": asdict(settings),
        "weights": _by_name(objectives, row),
        "policy": Fingerprint.of(policy).to_json(),
        "prompts": RolloutPlan.reference(prompts, 0).digest(),
        "evaluation_prompts": RolloutPlan.reference(evaluation_prompts or (), 0).digest(),
    }


def _import_training() -> Any:
    try:
        import mavis.training.alignment.reinforce as training
    except ImportError as error:
        raise MissingPackageError(
            f"align needs TRL and PEFT, which cannot be imported: {first_sentence(error)}.",
            "pip install 'mavis-decoding[align]'.",
        ) from error
    return training


def _sample(
    tokenizer: Any,
    objectives: Mapping[str, Objective],
    run: Path,
    settings: AlignSettings,
    report_progress: Progress,
    model: Any,
    stage: str,
    prompts: Sequence[Prompt],
    rows: int,
    *,
    seed: int,
) -> tuple[Tensor, list[Any]]:
    """Sample plain responses of a policy; return raw rewards (rows, M) and the shards."""
    plan = RolloutPlan.reference(draw_prompts(prompts, rows, settings.seed + seed), len(objectives))
    shards: list[Any] = []
    report_progress(stage, 0, rows)
    for shard in collect(model, tokenizer, objectives, plan, run / stage.replace(" ", "-"), settings.sampling(seed)):
        shards.append(shard)
        report_progress(stage, sum(map(len, shards)), rows)
    return torch.cat([torch.tensor(shard["rewards"][:], dtype=torch.float64) for shard in shards]), shards


def _kl(aligned: Any, policy: Any, shards: Sequence[Any], temperature: float) -> Tensor:
    """Compute the KL of the aligned policy to the reference along its own responses, (rows,)."""
    sequences = (Sequences.pack(shard["prompt_ids"], shard["response_ids"]) for shard in shards)
    return torch.cat([response_kl(aligned, policy, some, temperature=temperature) for some in sequences])


def _by_name(objectives: Mapping[str, Objective], values: Tensor) -> dict[str, float]:
    return dict(zip(objectives, values.tolist(), strict=True))


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def _weights(weights: Weights, objectives: Sequence[str]) -> Tensor:
    """Read the weights as one row, (M,)."""
    if not objectives:
        raise ObjectiveError("objectives is empty.", "name at least one, for example {'positive': Positive()}.")
    rows = weight_rows(weights, objectives, whose="the run")
    if len(rows) > 1 or not bool(rows.any()):
        raise WeightsError(
            f"weights is {rows.tolist()}, expected one row that is not all 0.",
            "a policy is aligned with one mixture; align another one for other weights.",
        )
    return rows[0]


def _normalisation(raw: Tensor, objectives: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Estimate mean and standard deviation (M,) of raw rewards (N, M)."""
    std, mean = torch.std_mean(raw, dim=0)
    for name, deviation in zip(objectives, std.tolist(), strict=True):
        if not deviation > 1e-12:
            raise ObjectiveError(
                f"objective {name!r} gives every one of the {len(raw)} reference responses the same reward, so there "
                "is nothing to learn.",
                "use prompts or an objective whose rewards differ, or more reference_samples.",
            )
    return mean, std


def _check(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    evaluation_prompts: Sequence[Prompt] | None,
    settings: AlignSettings,
) -> None:
    if not prompts or (evaluation_prompts is not None and not evaluation_prompts):
        raise DataError("prompts or evaluation_prompts is empty.", "give at least one prompt.")
    if hasattr(policy, "peft_config"):
        raise PolicyError("policy carries adapters already.", "merge them first: policy.merge_and_unload().")
    if not settings.lora_rank and any(map(is_quantised, policy.parameters())):
        raise PolicyError("policy is quantised, so its weights cannot be trained.", "train adapters: lora_rank=16.")
    check_savable(policy)
    if tokenizer.eos_token_id is None:
        raise PolicyError("the tokenizer has no end token, so no response would end.", "set tokenizer.eos_token.")
    both = [*prompts, *(evaluation_prompts or [])]
    check_prompts_fit(policy, tokenizer, both, settings.max_new_tokens)
    if states_device(policy).type == "cuda" and torch.cuda.device_count() > 1:
        raise PolicyError(
            f"{torch.cuda.device_count()} accelerators are visible, but a policy is aligned on one.",
            "set CUDA_VISIBLE_DEVICES to one of them before Python starts.",
        )
