"""Training a reward model from preference pairs, and measuring it on pairs that were held out."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.data import Pair
from mavis.errors import DataError
from mavis.policies.save import save_policy
from mavis.rewards import RewardModel
from mavis.rewards.classifier_inputs import padding_of, read_positions
from mavis.rewards.trained_with import CONFIG_KEY
from mavis.rollouts.manifest import settings_manifest
from mavis.training.reward_model.classifier import add_adapters, build_classifier, describe_weights, merge_adapters
from mavis.training.reward_model.encoded_pairs import (
    EncodedPair,
    choose_template,
    digest_pairs,
    encode_pairs,
    split_pairs,
)
from mavis.training.reward_model.fit import fit_pairs
from mavis.training.reward_model.measure import length_fit, measure, share_right
from mavis.training.reward_model.settings import AUTO, RewardModelReport, RewardModelSettings
from mavis.training.run_folder import Progress, read_report, report_reuse, write_report
from mavis.utils.files import matches_manifest, read_json, refuse_model_folder, restore_folder, write_json
from mavis.utils.locks import locked_folder

_PENALTY_PAIRS = 512  # training pairs that the slope on length is measured on


def train_reward_model(
    backbone: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    folder: str | os.PathLike[str],
    settings: RewardModelSettings | None = None,
    *,
    progress: Progress | None = None,
) -> RewardModelReport:
    """Train a reward model from preference pairs.

        loss = −(1 − ε) log σ(r(chosen) − r(rejected)) − ε log σ(r(rejected) − r(chosen))

    A copy of the backbone's trunk gets a new head of one logit and is trained in float32, without dropout. The result
    is a plain folder, `folder/model`, that `RewardModel` and transformers load. A share of the pairs is held out: the
    report says how often the model agrees with them, beside what their lengths alone would say.

    Checkpoints are written while training. An interrupted run resumes when the same call is made on the same folder,
    and ends with the weights of an uninterrupted one; a finished run returns its report. Nothing is pickled.

    Args:
        backbone: a decoder or encoder, such as the policy or what `load_backbone` returns; it is not changed.
        tokenizer: its tokenizer.
        pairs: of `mavis.data.load_pairs`.
        folder: of this run.
        settings: of this run; None takes the defaults.
        progress: called with stage, done and total.

    Returns:
        The report, which is also `folder/report.json`.

    Raises:
        MissingPackageError: if PEFT is not installed and `lora_rank` is not 0.
        ObjectiveError: if the backbone cannot be a reward model, or its tokenizer does not fit.
        PromptError: if the pairs are conversations and the tokenizer has no chat template, or it refuses them.
        TrainingError: if there are too few pairs to hold some out, or the training diverges.
        DataError: if there is no pair, or the folder belongs to another run.

    Source: Bradley & Terry 1952; Ouyang et al., arXiv 2203.02155. Label smoothing: Mitchell 2023, "A note on DPO with
    noisy preferences and relationship to IPO".

    Examples:
        >>> import tempfile
        >>> import mavis
        >>> from mavis.data import Pair
        >>> from mavis.training import RewardModelSettings, train_reward_model
        >>> policy, tokenizer = mavis.embedded.load()
        >>> pairs = [Pair(f"Tom had {n} dogs.", " He was happy.", " He was sad.") for n in range(40)]
        >>> settings = RewardModelSettings(lora_rank=0, held_out=0.25)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = train_reward_model(policy, tokenizer, pairs, folder, settings)
        >>> report.template, report.training_pairs, report.held_out_pairs
        ('concat', 30, 10)
    """
    run, settings = Path(folder), settings or RewardModelSettings()
    report_progress = progress or (lambda stage, done, total: None)
    if not pairs:
        raise DataError("pairs is empty.", "give the pairs of mavis.data.load_pairs.")
    template = choose_template(settings, tokenizer, pairs)
    classifier = build_classifier(backbone, settings.seed)
    max_length = min(settings.max_length, read_positions(classifier) or settings.max_length)
    encoded, cut = encode_pairs(classifier, tokenizer, pairs, template, max_length)
    training, held_out = split_pairs(encoded, settings.held_out, settings.seed)
    manifest: dict[str, Any] = {
        "settings": settings_manifest(settings),
        "backbone": describe_weights(backbone),
        "pairs": digest_pairs(encoded),
        "template": template,
    }
    refuse_model_folder(run)
    with locked_folder(run):
        resumed = matches_manifest(run / "run.json", manifest, "a reward model with different")
        restore_folder(run / "model")
        if resumed and (run / "report.json").is_file() and (run / "model").is_dir():
            report_reuse(run)
            return read_report(run / "report.json", RewardModelReport)
        if not resumed:
            write_json(run / "run.json", manifest)
        trained_with: dict[str, Any] = {"template": template, "max_length": max_length, "length_penalty": 0.0}
        model = add_adapters(classifier, settings.lora_rank, settings.seed)
        seconds = fit_pairs(
            model,
            classifier,
            padding_of(classifier, tokenizer),
            training,
            run,
            settings,
            lambda done, total: report_progress("steps", done, total),
        )
        merged = merge_adapters(model, classifier)
        merged.config.get_text_config().pad_token_id = padding_of(merged, tokenizer)
        setattr(merged.config, CONFIG_KEY, trained_with)
        save_policy(run / "model", merged.cpu(), _saved_tokenizer(tokenizer))
        scorer = RewardModel(run / "model", device=backbone.device)
        trained_with["length_penalty"] = _length_penalty(scorer, training, settings, report_progress)
        config = read_json(run / "model" / "config.json", strict=False)
        write_json(run / "model" / "config.json", config | {CONFIG_KEY: trained_with})
        scorer.length_penalty = trained_with["length_penalty"]
        longer = float(share_right(_characters(training)).mean()) >= 0.5
        report = RewardModelReport(
            folder=str(run / "model"),
            template=template,
            max_length=max_length,
            training_pairs=len(training),
            held_out_pairs=len(held_out),
            held_out_prompts=len({pair.group for pair in held_out}),
            cut_texts=cut,
            **measure(
                _differences(scorer, held_out, "held-out pairs", report_progress),
                _characters(held_out),
                [pair.group for pair in held_out],
                "longer" if longer else "shorter",
            ),
            length_penalty=trained_with["length_penalty"],
            seconds=seconds,
            settings=asdict(settings),
        )
        write_report(run / "report.json", report)
        shutil.rmtree(run / "checkpoint", ignore_errors=True)
        return report


def _saved_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer as it is saved with the model, which reads the end of an overlong text."""
    saved = copy.deepcopy(tokenizer)
    saved.truncation_side, saved.padding_side = "left", "right"
    return saved


def _length_penalty(
    scorer: RewardModel, training: Sequence[EncodedPair], settings: RewardModelSettings, report_progress: Progress
) -> float:
    """Resolve the length penalty `auto`."""
    if settings.length_penalty != AUTO:
        return float(settings.length_penalty or 0.0)
    some = training[:: max(1, len(training) // _PENALTY_PAIRS)]
    slope = length_fit(_differences(scorer, some, "training pairs", report_progress), _characters(some))[1]
    return slope or 0.0


def _differences(scorer: RewardModel, pairs: Sequence[EncodedPair], stage: str, report_progress: Progress) -> Tensor:
    """Score the chosen response of each pair minus the rejected one, (N,)."""
    report_progress(stage, 0, len(pairs))
    prompts = [pair.pair.prompt for pair in pairs]
    scores = scorer(prompts + prompts, [pair.pair.chosen for pair in pairs] + [pair.pair.rejected for pair in pairs])
    report_progress(stage, len(pairs), len(pairs))
    chosen, rejected = torch.tensor(scores, dtype=torch.float64).split(len(pairs))
    return chosen - rejected


def _characters(pairs: Sequence[EncodedPair]) -> Tensor:
    return torch.tensor([pair.characters for pair in pairs], dtype=torch.float64)
