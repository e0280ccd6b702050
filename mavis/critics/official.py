"""Import of value models that were trained by the paper's own code."""

from __future__ import annotations

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
from mavis.critics.trunk.backbone import load_trunk
from mavis.critics.value_model import ValueModelCritic
from mavis.errors import CriticError, DataError, check_number, closest, first_sentence
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.protocol import CausalLM
from mavis.utils.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_NOT_PLAIN = ("alora_invocation_tokens", "alpha_pattern", "fan_in_fan_out", "layer_replication", "use_dora")
"""Settings of peft under which a layer is not W + (α/r) B A, although its tensors have the usual names."""

_MOST_ADDED_TOKENS = 64
"""More tokens than the base has are those of another tokenizer; the paper's tokenizers add one, for padding."""

Folder = str | os.PathLike[str]


def import_official(
    folders: Mapping[str | tuple[str, ...], Folder],
    policy: CausalLM,
    *,
    base: Folder | None = None,
    reward_mean: Mapping[str, float] | None = None,
    reward_std: Mapping[str, float] | None = None,
) -> ValueModelCritic | CriticGroup:
    """Convert value models trained by the paper's own code to a critic with the same values.

        Q_m(s, a) = (⟨w_m, h(s ⊕ a)⟩ − mean_m) / std_m

    where h is the last state of a language model whose linear layers are W + (α/r) B A, and w_m a row of its `score`
    layer. The adapters (A, B) are merged into the weights, so peft is not needed. Pickles are never read.

    Args:
        folders: the adapter folder of each objective's value model, as written by peft's `save_pretrained`:
            `adapter_config.json` and `adapter_model.safetensors`. A tuple of names stands for a model of several
            objectives, as made by distillation, in the order of its outputs.
        policy: the causal LM to steer, with the vocabulary that the value models were trained on.
        base: folder or hub id of the language model under the adapters; None for the one that each adapter names.
        reward_mean: mean raw reward of reference-policy rollouts by objective; 0 if not given.
        reward_std: standard deviation of these by objective, > 0; 1 if not given. Without both, values stay on the
            scale of the raw rewards that the models were trained on, and beta is the paper's.

    Returns:
        A critic on the CPU: a `ValueModelCritic` for a single folder, else a `CriticGroup` in the order of the folders.
        To save a group, save each of its `critics`.

    Raises:
        CriticError: if a folder is missing, does not hold a LoRA adapter of a sequence classifier in safetensors, has
            another number of outputs than names, does not match its base, or knows fewer tokens than the policy; if a
            statistic is invalid or names another objective; if a name is repeated.
        PolicyError: if the policy has no output embedding.

    Examples:
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> try:
        ...     mavis.import_official({"helpful": "value_models/helpful"}, policy)
        ... except mavis.MavisError as error:
        ...     print(error.message)
        folders names 'value_models/helpful', which does not exist, expected an adapter.

        With the folders of the paper's code:

        >>> folders = {"helpful": "value_models/helpful", "harmless": "value_models/harmless"}
        >>> critic = mavis.import_official(folders, policy)  # doctest: +SKIP
        >>> critic.objectives  # doctest: +SKIP
        ('helpful', 'harmless')

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
    names: Sequence[str], folder: Path, policy: CausalLM, base: Folder | None, mean: Tensor, std: Tensor
) -> ValueModelCritic:
    """Build the critic of one value model, with the mean and std (M,) float64 of its rewards."""
    config, tensors = _read(folder)
    score = tensors.pop("score.weight", None)
    if score is None:
        raise CriticError(
            f"folder {str(folder)!r} has an adapter without a score layer, expected that of a value model.",
            "save the value model with modules_to_save=['score'].",
        )
    if len(score) != len(names):
        raise CriticError(
            f"folder {str(folder)!r} has a value model with {len(score)} outputs, but folders names {len(names)} "
            f"for it: {', '.join(map(str, names))}.",
            "name its objectives in the order of its outputs by a tuple: {('help', 'harm', 'humor'): folder}.",
        )
    source = base if base is not None else config.get("base_model_name_or_path")
    if not source:
        raise CriticError(
            f"base is None, and the adapter in {str(folder)!r} names no model.",
            "pass the folder or hub id of the language model under the adapter.",
        )
    fingerprint = Fingerprint.of(policy)
    trunk = load_trunk(source, "base")
    try:
        weights, rows = _merged(trunk, config, tensors, fingerprint.vocab_size)
    except (KeyError, RuntimeError) as error:
        raise CriticError(
            f"base {str(source)!r} does not fit the adapter in {str(folder)!r}: {first_sentence(error)}.",
            "pass the language model that the adapter was trained on.",
        ) from error
    if tensors:
        raise CriticError(
            f"folder {str(folder)!r} has the tensor {next(iter(tensors))}, expected low-rank adapters of linear "
            "layers, a score layer and perhaps an embedding.",
            "only adapters of the paper's value models can be imported.",
        )
    if rows < fingerprint.vocab_size:
        raise CriticError(
            f"base {str(source)!r} with the adapter in {str(folder)!r} knows {rows} tokens, but the policy writes "
            f"{fingerprint.vocab_size}.",
            "use the policy that the value model was trained for.",
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
    """Read the config of an adapter, and its tensors in float32 by their names in the classifier."""
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
        config = read_json(folder / CONFIG, strict=False)
        tensors = load_file(folder / WEIGHTS)
        kinds = config.get("peft_type"), config.get("task_type")
    except (SafetensorError, DataError, AttributeError, OSError) as error:
        raise CriticError(
            f"folder {str(folder)!r} is corrupt or truncated: {first_sentence(error)}.", "copy it again."
        ) from error
    if kinds != ("LORA", "SEQ_CLS"):
        raise CriticError(
            f"folder {str(folder)!r} has an adapter with peft_type and task_type {kinds}, expected "
            "('LORA', 'SEQ_CLS').",
            "name the folder of a value model, not of a policy.",
        )
    # The initialisation of an adapter does not matter, unless it changed the base weights, as named methods do.
    initialisation = config.get("init_lora_weights")
    changed = [name for name in _NOT_PLAIN if config.get(name)]
    changed += ["init_lora_weights"] if isinstance(initialisation, str) and initialisation != "gaussian" else []
    if changed:
        raise CriticError(
            f"folder {str(folder)!r} has an adapter with {changed[0]}={config[changed[0]]!r}, expected plain LoRA.",
            "only adapters of the paper's value models can be imported.",
        )
    return config, {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}


def _merged(
    trunk: Any, config: Mapping[str, Any], tensors: dict[str, Tensor], vocabulary: int
) -> tuple[dict[str, Tensor], int]:
    """Merge an adapter into a trunk's weights, and remove the merged tensors from `tensors`.

        W  becomes  W + (α/r) B A,  or  W + (α/√r) B A  where the adapter is rank-stabilised

    The paper's code extends the embedding to the tokenizer's added tokens before it trains or loads an adapter, and
    some adapters are saved without it. Added rows are then the mean of the others, around which that code draws them.

    Returns:
        The weights, and the number of rows of their input embedding.

    Raises:
        KeyError: if the trunk has no such layer.
        RuntimeError: if the layer has another shape.
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
    (embedding_name,) = [name for name, weight in trunk.named_parameters() if weight is embedding]
    # An embedding that was extended to the policy's tokens is saved as a whole, or not at all.
    saved = tensors.pop(prefix + embedding_name, None)
    rows = weights[embedding_name] if saved is None else saved
    missing = vocabulary - len(rows)
    if saved is None and 0 < missing <= _MOST_ADDED_TOKENS:
        rows = torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype).expand(missing, -1)])
    weights[embedding_name] = rows
    return weights, len(rows)


def _statistic(
    argument: str, given: Mapping[str, float] | None, objectives: Sequence[str], default: float
) -> dict[str, float]:
    """Check a statistic of the rewards and fill in its default, which is 1 for a standard deviation."""
    if not isinstance(given, Mapping | None):
        raise CriticError(f"{argument} is {given!r}, expected a number for each objective.", "pass e.g. {'help': 0.7}.")
    hint, low = "compute it from the raw rewards of rollouts of the reference policy.", 0.0 if default else None
    for name, value in (given or {}).items():
        if name not in objectives:
            raise CriticError(
                f"{argument} names objective {name!r}, but folders has: {', '.join(objectives)}.",
                closest(str(name), objectives),
            )
        check_number(CriticError, hint, low=low, strict=True, **{f"{argument} of {name!r}": value})
    return dict.fromkeys(objectives, default) | dict(given or {})


def _column(statistic: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """Return the statistic of some objectives: (M,) float64."""
    return torch.tensor([statistic[name] for name in names], dtype=torch.float64)
