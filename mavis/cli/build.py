"""Builders: from the groups of a config to policies, objectives, prompts, settings, critics and samplers."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.console import print_note
from mavis.cli.known_objectives import MANIFEST
from mavis.distributed import join_processes
from mavis.errors import ConfigError, MavisError, closest

if TYPE_CHECKING:
    from mavis.critics import Critic
    from mavis.critics.head_critic import HeadCritic
    from mavis.evaluation import EvaluationSettings
    from mavis.policies import Prompt
    from mavis.rewards import Objective
    from mavis.rollouts import RolloutSettings, Sampler
    from mavis.training import AlignSettings, DistillSettings, ImprovementSettings


def plain(config: Any) -> Any:
    """Convert a node of a config to plain Python data, with interpolations resolved.

    Raises:
        omegaconf.MissingMandatoryValue: if a required setting is missing.
    """
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(config):
        return config
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def load_policy(config: Any) -> tuple[Any, Any]:
    """Load the policy and the tokenizer that a `policy` group describes; see `mavis.policies.load_policy`."""
    from mavis import policies

    return policies.load_policy(**plain(config))


def load_critic(checkpoint: Any) -> Critic:
    """Load the critic of a `checkpoint` setting: that of one folder or hub repository, or a group of those of several.

    Raises:
        ConfigError: if it is neither a name nor a list of names.
        CriticError: if one cannot be loaded, or several cannot be grouped.
    """
    from mavis.critics import Critic
    from mavis.critics.group import as_critic

    folders = checkpoint_folders(checkpoint)
    return as_critic([Critic.from_pretrained(folder) for folder in folders])


def checkpoint_folders(checkpoint: Any) -> list[str]:
    """Return the folders or hub repositories that a `checkpoint` setting names, at least one."""
    names = plain(checkpoint)
    folders = names if isinstance(names, list) else [names]
    if not folders or not all(isinstance(folder, str) and folder for folder in folders):
        raise ConfigError(
            f"checkpoint is {names!r}, expected a critic's folder or a list of them.",
            "e.g. checkpoint=outputs/one/critic or checkpoint=[outputs/one/critic,outputs/two/critic].",
        )
    return folders


def build_objectives(config: Any, names: Sequence[str] | None = None) -> dict[str, Objective]:
    """Build the objectives of a config.

    Args:
        config: with `objectives`, a mapping from name to `_target_` and options.
        names: which objectives, in this order; None builds all.

    Raises:
        ConfigError: if there is none, one is unknown, or one cannot be built.
    """
    from hydra.utils import instantiate
    from omegaconf import MissingMandatoryValue, OmegaConf

    from mavis.rewards.protocol import check_callable

    _find_modules_of_working_directory()
    configured = config.get("objectives") or {}
    if not OmegaConf.is_dict(configured) and not isinstance(configured, dict):
        raise ConfigError(
            f"objectives is {configured!r}, expected a mapping from names to objectives.",
            "choose them by name, e.g. objective=[positive,dialogue].",
        )
    selected = list(configured) if names is None else list(names)
    if not selected:
        raise ConfigError("objective is empty.", "choose at least one, e.g. objective=[positive,dialogue].")
    objectives = {}
    for name in selected:
        if name not in configured:
            raise ConfigError(
                f"the critic's objective {name!r} is not among the configured ones.",
                f"{closest(name, configured)} Select the critic's objectives with objective=[{','.join(selected)}].",
            )
        try:
            objectives[name] = instantiate(configured[name], _convert_="all")
        except MissingMandatoryValue:
            raise
        except Exception as error:  # Hydra wraps the constructor's exception
            cause = error.__cause__ or error
            text = cause.message if isinstance(cause, MavisError) else " ".join(str(cause).split())
            hint = cause.hint if isinstance(cause, MavisError) else _instantiation_hint(configured[name])
            raise ConfigError(f"objective {name!r} cannot be built: {text}", hint) from error
        check_callable(name, objectives[name])
    return objectives


def _find_modules_of_working_directory() -> None:
    """Let `_target_` name a module in the working directory, as `python -m` does; installed packages come first."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def _instantiation_hint(config: Any) -> str:
    """Say what to do about a `_target_` that cannot be instantiated."""
    from hydra.utils import get_object

    target = str(config.get("_target_"))
    try:
        found = get_object(target)
    except Exception:
        return f"_target_ is module.name; the module is looked for in {os.getcwd()!r} and among installed packages."
    if inspect.isfunction(found) and not config.get("_partial_"):
        return "_target_ names a function: add `_partial_: true`, so that it is passed on instead of called."
    return "check its options."


_OLD_DEFAULTS = {
    "output": (0, None),
    "template": ("chat", "auto"),
    "max_length": (512, None),
    "length_penalty": (0, None),
}
"""Options of reward models whose default has changed: what it was, and what it is now."""


def _keep_old_defaults(manifest: dict[str, Any], path: Path) -> None:
    """Take a run's own defaults where it is resumed with today's; their identity says whether rewards still hold."""
    from mavis.utils.files import read_json

    stored = read_json(path) if path.is_file() else {}
    for name, options in manifest.items():
        before = stored.get(name)
        if not isinstance(before, dict) or options.get("_target_") != "mavis.rewards.RewardModel":
            continue
        for key, (old, new) in _OLD_DEFAULTS.items():
            if key in options and options[key] == new and before.get(key, old) == old:
                options.pop(key)
                if key in before:
                    options[key] = before[key]


@contextmanager
def locked_run(config: Any, names: Sequence[str], folder: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, and record there how its objectives are configured.

    Stored rewards are only valid for these options.

    Raises:
        DataError: if another run is using the folder, or it holds a run whose objectives are configured differently.
    """
    from mavis.utils.files import matches_manifest, write_json
    from mavis.utils.locks import locked_folder

    manifest = {name: plain(config.objectives[name]) for name in names}
    path, is_main = folder / MANIFEST, join_processes().is_main
    with locked_folder(folder, is_main):
        if is_main:
            _keep_old_defaults(manifest, path)
            if not matches_manifest(path, manifest, "a run with different objective settings:"):
                write_json(path, manifest)
        yield


def read_prompts(config: Any) -> list[Prompt]:
    """Read the prompts that one entry of a `data` group describes."""
    from mavis.policies import embedded
    from mavis.rollouts import load_prompts

    options = plain(config)
    if options["source"] == "embedded":
        return load_prompts(**options | {"source": str(embedded.path() / "openings.txt")})
    return load_prompts(**options, report=print_note if isinstance(options["source"], str) else None)


def read_evaluation_prompts(data: Any) -> list[Prompt]:
    """Read the evaluation prompts of a `data` group.

    Raises:
        ConfigError: if some of them are training prompts of the same group.
    """
    from omegaconf import OmegaConf

    from mavis.policies.chat import prompt_key

    prompts = read_prompts(data.evaluation_prompts)
    trained = [] if OmegaConf.is_missing(data.prompts, "source") else read_prompts(data.prompts)
    keys = {prompt_key(prompt) for prompt in trained}
    shared = [prompt for prompt in prompts if prompt_key(prompt) in keys]
    if shared:
        raise ConfigError(
            f"data.evaluation_prompts contains {len(shared)} of the training prompts, such as {shared[0]!r}.",
            "evaluate on prompts that the critic was not trained on; training prompts overestimate it.",
        )
    return prompts


def describe_prompts(config: Any) -> str:
    """Name the prompts of one entry of a `data` group for a model card, which shows no path on this machine."""
    source = plain(config.source)
    if isinstance(source, list):
        return f"a list of {len(source)} prompts"
    if source == "embedded":
        return "the story openings that ship with mavis"
    path = Path(source).expanduser()
    return path.name if path.exists() else str(source)


def rollout_settings(config: Any, shard_size: int, critic: Critic | None = None) -> RolloutSettings:
    """Build the settings of sampling from the `decoding` group and the seed.

    Args:
        config: with that group.
        shard_size: responses sampled and written together.
        critic: a trained critic, which knows what `as_trained` stands for.
    """
    from mavis.decoding.settings import AS_TRAINED, check_settings, trained_length, trained_temperature, trained_top_k
    from mavis.rollouts import RolloutSettings

    decoding = plain(config.decoding)
    if critic is not None:
        check_settings(None, None, decoding["top_k"], decoding["temperature"])
        decoding["top_k"] = trained_top_k(decoding["top_k"], critic)
        decoding["temperature"] = trained_temperature(decoding["temperature"], critic)
        if decoding["max_new_tokens"] == AS_TRAINED:
            decoding["max_new_tokens"] = trained_length(critic)
    return RolloutSettings(**decoding, shard_size=shard_size, seed=config.seed)


def improvement_settings(config: Any) -> ImprovementSettings:
    """Build the settings of training from the `improvement` and `decoding` groups, β and the seed."""
    from mavis.training import FitSettings, ImprovementSettings

    options = plain(config.improvement)
    sampling = rollout_settings(config, options.pop("shard_size"))
    fit = FitSettings(**options.pop("fit"))
    return ImprovementSettings(**options, beta=config.beta, sampling=sampling, fit=fit)


def distill_settings(config: Any) -> DistillSettings:
    """Build the settings of a distillation from `distillation`, the `decoding` group and the seed."""
    from mavis.training import DistillSettings, RegressionSettings

    options = plain(config.distillation)
    sampling = rollout_settings(config, options.pop("shard_size"))
    fit = RegressionSettings(**options.pop("fit"))
    return DistillSettings(**options, sampling=sampling, fit=fit)


def align_settings(config: Any) -> AlignSettings:
    """Build the settings of an alignment from `alignment`, β and the seed."""
    from mavis.training import AlignSettings

    return AlignSettings(**plain(config.alignment), beta=config.beta, seed=config.seed)


def evaluation_settings(config: Any, critic: Critic | None = None) -> EvaluationSettings:
    """Build the settings of a sweep from the `evaluation` and `decoding` groups and the seed."""
    from mavis.evaluation import EvaluationSettings

    options = plain(config.evaluation)
    options.pop("held_out", None)
    sampling = rollout_settings(config, options.pop("shard_size"), critic)
    options |= {name: tuple(options[name]) for name in ("betas", "target_kls") if name in options}
    return EvaluationSettings(**options, sampling=sampling)


def build_critic(config: Any, policy: Any, tokenizer: Any, objectives: list[str], composition: str) -> HeadCritic:
    """Build the untrained critic that a `critic` group describes.

    Args:
        config: with that group and a seed.
        policy: the reference policy.
        tokenizer: its tokenizer.
        objectives: their names.
        composition: `independent` or `conditioned`.

    Raises:
        ConfigError: if there is no such kind of critic.
    """
    from mavis.critics import HiddenStateCritic, ValueModelCritic

    options = plain(config.critic)
    kind = options.pop("kind")
    options |= {"composition": composition, "seed": config.seed}
    if kind == HiddenStateCritic.kind:
        return HiddenStateCritic.for_policy(policy, objectives, **options)
    if kind == ValueModelCritic.kind:
        return ValueModelCritic.for_policy(policy, objectives, tokenizer=tokenizer, **options)
    raise ConfigError(f"critic.kind is {kind!r}.", closest(str(kind), [HiddenStateCritic.kind, ValueModelCritic.kind]))


def build_sampler(config: Any) -> AbstractContextManager[Sampler]:
    """Build the sampler of rollouts that a `sampler` group describes; leaving its `with` block releases it.

    Args:
        config: with that group.

    Raises:
        ConfigError: if there is no such sampler.
    """
    from mavis.rollouts.sampler import GENERATE_SAMPLER

    kind = str(config.sampler.kind)
    if kind == GENERATE_SAMPLER.name:
        return nullcontext(GENERATE_SAMPLER)
    from mavis.vllm.sampler import VllmSampler

    if kind == VllmSampler.name:
        return VllmSampler(**plain(config.sampler.options))
    raise ConfigError(f"sampler.kind is {kind!r}.", closest(kind, [GENERATE_SAMPLER.name, VllmSampler.name]))
