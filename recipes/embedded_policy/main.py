"""`python -m recipes.embedded_policy.main`: train a small story LM as the embedded policy was trained."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer

from mavis.cli.hydra_app import check_single_process
from mavis.errors import ConfigError, MavisError, closest
from mavis.policies.save import save_policy
from mavis.utils.files import atomic_folder, write_json
from recipes.embedded_policy import corpus as texts
from recipes.embedded_policy.bits_per_byte import bits_per_byte
from recipes.embedded_policy.pretrain import Packing, Recipe, Report, Shape, build_policy, encode, pretrain

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)
STAGES = ("all", "sample", "train")


def run(config: DictConfig) -> Path:
    """Sample, train and save as `config` (pretrain.yaml beside this file) says.

    Args:
        config: the composed configuration.

    Returns:
        The folder of the policy, or of the shards with `stage=sample`.

    Raises:
        MavisError: if a setting, the corpus or the teacher cannot be used.
    """
    settings = _settings(config)
    torch.set_num_threads(settings["threads"])
    tic = time.perf_counter()
    train, heldout = texts.split_tail(texts.read_stories(settings["corpus"]), settings["heldout"])
    work, output = Path(settings["work"]), Path(settings["output"])
    recipe = Recipe(**settings["recipe"])
    with _progress() as progress:
        if settings["stage"] != "train":
            _sample(settings, work / "shards", progress)
        if settings["stage"] == "sample":
            return work / "shards"
        tokenizer = _tokenizer(train, settings, work / "tokenizer")
        paths = sorted((work / "shards").glob("[0-9]*.jsonl"))[: settings["sample"]["shards"]]
        sampled = encode(texts.read_shards(paths), tokenizer) if paths else []
        real = encode([texts.Story(text) for text in train], tokenizer)
        log.info("%d real and %d sampled tokens", sum(map(len, real)), sum(map(len, sampled)))
        policy = build_policy(tokenizer, Shape(**settings["shape"]), recipe.seed)
        reports = pretrain(
            policy,
            Packing(real, recipe.length, seed=2 * recipe.seed + 1),
            Packing(sampled, recipe.length, seed=2 * recipe.seed + 2) if sampled else None,
            recipe,
            work / "checkpoint",
        )
        _train(
            policy, tokenizer, reports, heldout[: settings["evaluate_stories"]], settings["evaluate_every"], progress
        )
    bits = bits_per_byte(policy.eval(), tokenizer, heldout)
    log.info("held out: %.4f bits per byte", bits)
    save_policy(output, policy, tokenizer)
    facts = {
        "real_tokens": sum(map(len, real)),
        "sampled_tokens": sum(map(len, sampled)),
        "real_bytes": sum(len(text.encode()) for text in train),
        "steps": recipe.steps,
        "step_tokens": recipe.rows * recipe.length,
        "real_rows_share": round(recipe.real_rows(recipe.steps * recipe.rows) / recipe.steps / recipe.rows, 4),
        "minutes": round((time.perf_counter() - tic) / 60, 1),  # of this process: a resumed run took longer
        "bits_per_byte": round(bits, 5),
    }
    write_json(work / "run.json", facts)
    log.info("the policy is in %s", output)
    return output


def _settings(config: DictConfig) -> dict[str, Any]:
    """Resolve a configuration and check what Hydra does not."""
    for name in ("corpus", "teacher"):
        if OmegaConf.is_missing(config, name):
            raise ConfigError(f"{name} is not set.", f"give it on the command line: {name}=PATH.")
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    if settings["stage"] not in STAGES:
        raise ConfigError(f"stage is {settings['stage']!r}.", closest(str(settings["stage"]), STAGES))
    return dict(settings)


def _sample(settings: Mapping[str, Any], folder: Path, progress: Progress) -> None:
    """Sample this worker's share of the shards."""
    options = dict(settings["sample"])
    shards = range(options.pop("shards"))[options.pop("worker") :: options.pop("workers")]
    bar = progress.add_task("sample", total=len(shards))
    for _ in texts.sample_shards(settings["teacher"], folder, shards, **options):
        progress.advance(bar)


def _tokenizer(stories: Sequence[str], settings: Mapping[str, Any], folder: Path) -> Any:
    """Train a tokenizer, unless an earlier call has stored one in `folder`, and load it."""
    if not folder.is_dir():
        new = texts.train_tokenizer(stories, settings["tokenizer"]["vocabulary"], settings["shape"]["context"])
        with atomic_folder(folder) as temporary:
            new.save_pretrained(temporary)
    return AutoTokenizer.from_pretrained(folder)


def _train(
    policy: Any, tokenizer: Any, reports: Iterator[Report], heldout: Sequence[str], every: int, progress: Progress
) -> None:
    """Run the training that yields `reports`, evaluating every `every` steps; 0 never does."""
    bar = progress.add_task("train", total=None)
    for report in reports:
        progress.update(bar, total=report.steps, completed=report.step, description=f"train, loss {report.loss:.3f}")
        log.info(
            "step %d: loss %.4f nats per token, rate %.2f, %.0f tokens/s",
            report.step, report.loss, report.rate, report.tokens_per_second,
        )  # fmt: skip
        if every and report.step % every == 0 and report.step < report.steps:
            log.info("step %d: %.4f bits per byte", report.step, bits_per_byte(policy.eval(), tokenizer, heldout))
            policy.train()


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    # On stderr, so that output can be piped; without a terminal the log alone reports progress.
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


@hydra.main(version_base="1.3", config_path=".", config_name="pretrain")
def main(config: DictConfig) -> None:
    """Run the command; errors that the user can correct end it with one line instead of a traceback."""
    try:
        check_single_process("this recipe")
        run(config)
    except MavisError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
