"""What a trunk is made from: configs, checkpoints and policies, whose weights and tokens are checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from mavis.errors import CriticError
from mavis.policies.embeddings import plain_weight
from mavis.policies.names import check_source, load_errors


def build_config(backbone: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the config of a trunk in float32 from a dict with its `model_type`.

    Raises:
        CriticError: if transformers does not know the model.
    """
    plain = dict(backbone)
    plain.pop("quantization_config", None)  # a trunk has plain weights
    model_type = plain.pop("model_type", None)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **plain)
    except (ValueError, TypeError) as error:
        raise CriticError(
            f"backbone has model_type {model_type!r}, which transformers does not know.",
            "choose a model that AutoModel can build without remote code.",
        ) from error
    config.dtype = torch.float32
    return config


def config_to_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """Convert a config to JSON-compatible data, without its origin."""
    content = config.to_diff_dict() | {"model_type": config.model_type}
    plain = {name: value for name, value in content.items() if name not in ("_name_or_path", "transformers_version")}
    as_json: dict[str, Any] = json.loads(json.dumps(plain))  # numeric keys, as of labels, become strings
    return as_json


def load_trunk(source: str | os.PathLike[str], argument: str, trust_remote_code: bool = False) -> Any:
    """Load a decoder without its output embedding, in float32 and from safetensors.

    Args:
        source: a folder or hub id.
        argument: the name of the caller's argument, for errors.
        trust_remote_code: whether to run Python code that it contains.

    Raises:
        CriticError: if it cannot be loaded.
    """
    name = _resolve(source)
    check_source(name, argument, CriticError)
    with load_errors(
        f"{argument} is {name!r}, which", CriticError, "give a folder with config.json and *.safetensors, or a hub id."
    ):
        return AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )


def _resolve(source: str | os.PathLike[str]) -> str:
    """Return an existing folder with `~` expanded, or else a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder) if folder.exists() else str(source)


def check_tokenizer(source: str | os.PathLike[str], tokenizer: Any, trust_remote_code: bool = False) -> None:
    """Check that a backbone's tokenizer has every token of the policy's, under the same id.

    Args:
        source: a folder or hub id; without a tokenizer there is nothing to compare.
        tokenizer: of the policy.
        trust_remote_code: whether to run Python code that it contains.

    Raises:
        CriticError: if a token is missing or has another id.
    """
    name = _resolve(source)
    try:
        others = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code).get_vocab()
    except (OSError, ValueError):
        return
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if others.get(token) != index:
            there = f"is {others[token]}" if token in others else "is missing"
            raise CriticError(
                f"backbone is {name!r}, which has another vocabulary than the policy's tokenizer: token {token!r} "
                f"{there}, not {index}.",
                "its token ids would mean other words; choose a backbone with the policy's own tokenizer.",
            )


def pad_vocabulary(trunk: Any, tokenizer: Any, vocabulary: int) -> None:
    """Give a trunk as many embeddings as the policy writes tokens, if it knows all that the tokenizer has.

    Models of one family pad the same vocabulary to different sizes; what pads it is never a word. The new rows are the
    mean of the others.

    Args:
        trunk: changed in place.
        tokenizer: of the policy.
        vocabulary: the size of the policy's output embedding.
    """
    rows = trunk.get_input_embeddings().weight.shape[0]
    if max(tokenizer.get_vocab().values()) < rows < vocabulary:
        trunk.resize_token_embeddings(vocabulary, mean_resizing=False)
        with torch.no_grad():
            weight = trunk.get_input_embeddings().weight
            weight[rows:] = weight[:rows].mean(dim=0)


@torch.no_grad()
def copy_weights(source: Any, trunk: Any, backbone: str | None) -> None:
    """Copy the weights of a plain model to a trunk of the same config.

    Args:
        source: a decoder without output embedding.
        trunk: in float32; changed in place.
        backbone: the argument of the user, for errors; None for a copy of the policy.

    Raises:
        CriticError: if the source has no plain weights: it is offloaded, quantised or carries adapters.
    """
    whose = "backbone is None, but the policy's" if backbone is None else f"backbone is {backbone!r}, but its"
    hint = "pass the folder or hub id of the plain model as backbone, or a smaller one with its tokenizer."
    if any(weight.is_meta for weight in source.parameters()):
        raise CriticError(f"{whose} weights are offloaded and cannot be copied.", hint)
    found = {
        name: plain
        for name, tensor in source.state_dict().items()
        if isinstance(tensor, Tensor) and (plain := plain_weight(tensor)) is not None
    }
    if _kinds(found) != _kinds(trunk.state_dict()):
        adapted = hasattr(source, "peft_config") or any("lora_" in name for name in found)
        reason = "carry adapters" if adapted else "are quantised, or not those that its config describes,"
        merge = "merge the adapters: policy.merge_and_unload(); or " if adapted else ""
        raise CriticError(f"{whose} weights {reason} and cannot be copied.", merge + hint)
    trunk.load_state_dict(found)


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, bool]]:
    """Return the shape of each tensor, and whether it is of floating point with at least two bytes."""
    return {
        name: (tensor.shape, tensor.is_floating_point() and tensor.itemsize > 1) for name, tensor in tensors.items()
    }
