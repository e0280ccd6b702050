"""`python -m recipes.embedded_policy.main`: train a small story LM as the embedded policy was trained."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from mavis.cli.hydra_app import check_single_process
from mavis.errors import ConfigError, MavisError
from mavis.utils.files import atomic_folder, write_json

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)
STAGES = ("all", "sample", "train")


def run(config: DictConfig) -> Path:
    """Sample, train and save what `config` (pretrain.yaml beside this file) says.

    Args:
        config: the composed configuration.

    Returns:
        The folder of the policy (of the shards, where only those were asked for).

    Raises:
        MavisError: a setting, the corpus or the teacher cannot be used.
    """
    import torch
    from transformers import AutoTokenizer

    from mavis.policies.save import save_policy
    from recipes.embedded_policy import corpus as texts
    from recipes.embedded_policy import pretrain as recipes
    from recipes.embedded_policy.bits_per_byte import bits_per_byte

    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    for name in ("corpus", "teacher"):
        if OmegaConf.is_missing(config, name):
            raise ConfigError(f"{name} is not set.", f"give it on the command line: {name}=PATH.")
    if settings["stage"] not in STAGES:
        raise ConfigError(f"stage is {settings['stage']!r}.", f"choose one of {', '.join(STAGES)}.")
    torch.set_num_threads(settings["threads"])
    tic = time.perf_counter()
    train, heldout = texts.split_tail(texts.read_stories(settings["corpus"]), settings["heldout"])
    work, output = Path(settings["work"]), Path(settings["output"])
    shards = work / "shards"
    with _progress() as progress:
        if settings["stage"] != "train":
            wanted = dict(settings["sample"])
            mine = range(wanted["shards"])[wanted.pop("worker") :: wanted.pop("workers")]
            del wanted["shards"]
            bar = progress.add_task("sample", total=len(mine))
            for _ in texts.sample_shards(settings["teacher"], shards, mine, **wanted):
                progress.advance(bar)
        if settings["stage"] == "sample":
            return shards

        folder = work / "tokenizer"
        if not folder.is_dir():
            context = settings["shape"]["context"]
            fresh = texts.train_tokenizer(train, settings["tokenizer"]["vocabulary"], context)
            with atomic_folder(folder) as temporary:
                fresh.save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        recipe = recipes.Recipe(**settings["recipe"])
        paths = sorted(shards.glob("[0-9]*.jsonl"))[: settings["sample"]["shards"]]
        sampled = recipes.encode(texts.read_shards(paths), tokenizer) if paths else []
        real = recipes.encode([texts.Story(text) for text in train], tokenizer)
        log.info("%d real and %d sampled tokens", sum(map(len, real)), sum(map(len, sampled)))
        policy = recipes.build_policy(tokenizer, recipes.Shape(**settings["shape"]), recipe.seed)
        reports = recipes.pretrain(
            policy,
            recipes.Packing(real, recipe.length, seed=2 * recipe.seed + 1),
            recipes.Packing(sampled, recipe.length, seed=2 * recipe.seed + 2) if sampled else None,
            recipe,
            work / "checkpoint",
        )
        bar = progress.add_task("train", total=recipe.steps)
        every, few = settings["evaluate_every"], heldout[: settings["evaluate_stories"]]
        for report in reports:
            progress.update(bar, completed=report.step, description=f"train, loss {report.loss:.3f}")
            log.info(
                "step %d: loss %.4f nats a token, rate %.2f, %.0f tokens/s",
                report.step, report.loss, report.rate, report.tokens_per_second,
            )  # fmt: skip
            if every and report.step % every == 0 and report.step < recipe.steps:
                log.info("step %d: %.4f bits per byte", report.step, bits_per_byte(policy.eval(), tokenizer, few))
                policy.train()
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


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    # On stderr, so that what is printed can be piped; off where nobody watches, the log has the figures.
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


@hydra.main(version_base="1.3", config_path=".", config_name="pretrain")
def main(config: DictConfig) -> None:
    """Run the command; a mistake that the user can mend ends it with one line instead of a traceback."""
    try:
        check_single_process("this recipe")
        run(config)
    except MavisError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
