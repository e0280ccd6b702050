"""Value models that the paper's own code has trained, as critics."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mavis.critics.group import CriticGroup
from mavis.critics.value_model import ValueModelCritic, load_trunk
from mavis.errors import CriticError, closest, first_sentence
from mavis.policies.fingerprint import Fingerprint
from mavis.utils.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_NOT_PLAIN = ("alora_invocation_tokens", "alpha_pattern", "fan_in_fan_out", "layer_replication", "use_dora")
"""Settings of peft under which a layer is not W + (α/r) B A, and no other name in the file says so."""

Folder = str | os.PathLike[str]


def import_official(
    folders: Mapping[str | tuple[str, ...], Folder],
    policy: Any,
    *,
    base: Folder | None = None,
    reward_mean: Mapping[str, float] | None = None,
    reward_std: Mapping[str, float] | None = None,
) -> ValueModelCritic | CriticGroup:
    """Turn value models that the paper's own code has trained into a critic with their values.

        Q_m(s, a) = (⟨w_m, h(s ⊕ a)⟩ − mean_m) / std_m

    where h is the last state of a language model whose linear layers are W + (α/r) B A, and w_m a row of its `score`
    layer. The adapters (A, B) are folded into the weights here: peft is not needed, and nothing pickled is read.

    Args:
        folders: by objective, what peft's `save_pretrained` wrote for its value model: `adapter_config.json` and
            `adapter_model.safetensors`. A tuple of names stands for one model of several objectives, in the order of
            its outputs, as distillation makes it.
        policy: the causal LM to be steered, with the vocabulary that the value models were trained on.
        base: folder or hub id of the language model under the adapters; None takes the one that each of them names.
        reward_mean: by objective, of the raw rewards of reference-policy rollouts; 0 where it is not given.
        reward_std: likewise, > 0; 1 where it is not given. Without either, values stay on the scale of the raw rewards
            that the models were trained on, and beta is the paper's.

    Returns:
        A critic on the CPU that is attached to nothing: a `ValueModelCritic` for one folder, or a group of them in the
        order of the folders. A group is kept by saving each of its `critics`.

    Raises:
        CriticError: if a folder is missing, is no adapter of a sequence classifier or a pickled one, has another number
            of outputs than names, does not fit its base or knows fewer tokens than the policy; if a statistic is
            impossible or of no objective; if a name is repeated.
        PolicyError: if the policy has no output embedding.

    Source: the value models of MAVIS (arXiv 2508.13415), as github.com/5-Jeremy/MAVIS saves them.
    """
    if not isinstance(folders, Mapping) or not folders:
        raise CriticError(
            f"folders is {folders!r}, expected an adapter folder for each objective.",
            "pass e.g. {'help': 'value_models/iter_1/help', 'harm': 'value_models/iter_1/harm'}.",
        )
    for key, given in folders.items():
        if not isinstance(given, str | os.PathLike):
            raise CriticError(
                f"folders names {given!r} for {key!r}, expected a folder.", "pass the path of an adapter."
            )
    models = [(key if isinstance(key, tuple) else (key,), Path(given).expanduser()) for key, given in folders.items()]
    objectives = [name for names, _ in models for name in names]
    mean = _statistic("reward_mean", reward_mean, objectives, 0.0)
    std = _statistic("reward_std", reward_std, objectives, 1.0)
    critics = [
        _import(names, folder, policy, base, _column(mean, names), _column(std, names)) for names, folder in models
    ]
    return critics[0] if len(critics) == 1 else CriticGroup(critics)


def _import(
    names: Sequence[str], folder: Path, policy: Any, base: Folder | None, mean: Tensor, std: Tensor
) -> ValueModelCritic:
    """Build the critic of one value model; mean and std are (M,) float64."""
    config, tensors = _read(folder)
    score = tensors.pop("score.weight", None)
    if score is None:
        raise CriticError(
            f"folder {str(folder)!r} holds an adapter without a score layer, expected one that values tokens.",
            "save the value model with modules_to_save=['score'].",
        )
    if len(score) != len(names):
        raise CriticError(
            f"folder {str(folder)!r} holds a value model with {len(score)} outputs, but folders names {len(names)} "
            f"for it: {', '.join(map(str, names))}.",
            "name all of its objectives, in the order of its outputs, by a tuple: {('help', 'harm', 'humor'): folder}.",
        )
    source = base if base is not None else config.get("base_model_name_or_path")
    if not source:
        raise CriticError(
            f"base is None, and the adapter in {str(folder)!r} names no model.",
            "give the folder or hub id of the language model under the adapter.",
        )
    fingerprint = Fingerprint.of(policy)
    trunk = load_trunk(source, "base")
    try:
        weights, rows = _merged(trunk, config, tensors)
    except (KeyError, RuntimeError) as error:
        raise CriticError(
            f"base {str(source)!r} does not fit the adapter in {str(folder)!r}: {first_sentence(error)}.",
            "give the language model that the adapter was trained on.",
        ) from error
    if tensors:
        raise CriticError(
            f"folder {str(folder)!r} holds {next(iter(tensors))}, expected low-rank adapters of linear layers, a score "
            "layer and perhaps an embedding.",
            "other adapters than those of the paper's value models cannot be imported.",
        )
    if rows < fingerprint.vocab_size:
        raise CriticError(
            f"base {str(source)!r} with the adapter in {str(folder)!r} knows {rows} tokens, but the policy writes "
            f"{fingerprint.vocab_size}.",
            "take the policy that the value model was trained for, or, if the adapter was saved without its longer "
            "embedding, a base that has it.",
        )
    trunk.config.vocab_size = rows
    critic = ValueModelCritic(names, fingerprint, trunk.config.to_dict(), "candidates", hidden=0, norm=False)
    critic.trunk.load_state_dict(weights)
    critic.reward_mean.copy_(mean)
    critic.reward_std.copy_(std)
    with torch.no_grad():
        critic.heads.outer.copy_((score / std[:, None])[:, :, None])
        critic.heads.bias.copy_((-mean / std)[:, None])
    return critic.eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter's settings, and its tensors in float32 by the names that they have in the classifier."""
    if not (folder / CONFIG).is_file():
        missing = f"has no {CONFIG}" if folder.is_dir() else "does not exist"
        raise CriticError(
            f"folders names {str(folder)!r}, which {missing}, expected an adapter.",
            f"name the folder that save_pretrained wrote; it holds {CONFIG} and {WEIGHTS}.",
        )
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / WEIGHTS).with_suffix(".bin")
        found = f", only {pickled.name}, which is never read because loading a pickle can run code"
        raise CriticError(
            f"folder {str(folder)!r} has no {WEIGHTS}{found if pickled.is_file() else ''}.",
            "save the adapter again with save_pretrained(..., safe_serialization=True).",
        )
    try:
        config = read_json(folder / CONFIG)
        tensors = load_file(folder / WEIGHTS)
        kinds = config.get("peft_type"), config.get("task_type")
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, OSError) as error:
        raise CriticError(
            f"folder {str(folder)!r} is corrupt or truncated: {first_sentence(error)}.", "copy it again."
        ) from error
    if kinds != ("LORA", "SEQ_CLS"):
        raise CriticError(
            f"folder {str(folder)!r} holds an adapter with peft_type and task_type {kinds}, expected "
            "('LORA', 'SEQ_CLS').",
            "name the folder of a value model, not that of a policy.",
        )
    # How an adapter began is of no matter, unless that changed the weights under it, as methods with a name do.
    start = config.get("init_lora_weights")
    changed = [name for name in _NOT_PLAIN if config.get(name)]
    changed += ["init_lora_weights"] if isinstance(start, str) and start != "gaussian" else []
    if changed:
        raise CriticError(
            f"folder {str(folder)!r} holds an adapter with {changed[0]}={config[changed[0]]!r}, expected plain LoRA.",
            "other adapters than those of the paper's value models cannot be imported.",
        )
    return config, {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}


def _merged(trunk: Any, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Fold an adapter into a trunk's weights, and take out of `tensors` what has found its place.

        W  becomes  W + (α/r) B A,  or  W + (α/√r) B A  where the adapter is rank-stabilised

    Returns:
        The weights, and the number of tokens that they know.

    Raises:
        KeyError: if the trunk has no such layer.
        RuntimeError: if it has one of another shape.
    """
    weights = dict(trunk.state_dict())
    prefix = f"{trunk.base_model_prefix}."
    for name in [name for name in tensors if name.endswith(_DOWN)]:
        layer = name.removesuffix(_DOWN)
        down, up = tensors.pop(name), tensors.pop(layer + _UP)
        rank = len(down)
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        target = layer.removeprefix(prefix) + ".weight"
        weights[target] = weights[target] + scale * (up @ down)
    embedding = trunk.get_input_embeddings().weight
    (place,) = [name for name, weight in trunk.named_parameters() if weight is embedding]
    # An embedding that was made longer for the policy's tokens is saved whole.
    weights[place] = tensors.pop(prefix + place, weights[place])
    return weights, len(weights[place])


def _statistic(
    argument: str, given: Mapping[str, float] | None, objectives: Sequence[str], default: float
) -> dict[str, float]:
    """Complete a statistic of the rewards by its default; the default of a standard deviation is 1."""
    if not isinstance(given, Mapping | None):
        raise CriticError(f"{argument} is {given!r}, expected a number for each objective.", "pass e.g. {'help': 0.7}.")
    for name, value in (given or {}).items():
        if name not in objectives:
            raise CriticError(f"{argument} names objective {name!r}.", closest(str(name), objectives))
        if not isinstance(value, int | float) or not math.isfinite(value) or (default and value <= 0):
            raise CriticError(
                f"{argument} of {name!r} is {value!r}, expected a finite number{' > 0' if default else ''}.",
                "take it from the raw rewards of rollouts of the reference policy.",
            )
    return dict.fromkeys(objectives, default) | dict(given or {})


def _column(statistic: Mapping[str, float], names: Sequence[str]) -> Tensor:
    return torch.tensor([statistic[name] for name in names], dtype=torch.float64)
