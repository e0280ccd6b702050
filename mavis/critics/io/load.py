"""Loading a critic folder, with or without its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mavis.critics.calibration import Calibration
from mavis.critics.io.files import CONFIG, FORMAT, WEIGHTS, corrupt_error
from mavis.critics.io.hub import download_critic
from mavis.critics.trained_decoding import TrainedDecoding
from mavis.errors import CriticError, DataError, MissingPackageError, closest
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.names import check_source, is_hub_id
from mavis.utils.files import describe_pickles, read_json, restore_folder
from mavis.utils.tensors import load_tensors

Kinds = Mapping[str, Callable[..., Any]]
"""The classes of critics by the `kind` in their config."""

RENAMED_TENSORS = {"trained_up_to": "max_trained_lambda"}
"""Tensors that have another name in format 1."""


def load_critic(folder: str | os.PathLike[str], kinds: Kinds, revision: str | None = None) -> Any:
    """Load a critic from a folder or the hub; see `Critic.from_pretrained`."""
    path = Path(folder)
    restore_folder(path)
    if isinstance(folder, str) and is_hub_id(folder):
        check_source(folder, "folder", CriticError, revision)
        path = download_critic(folder, [CONFIG, WEIGHTS], revision)
    _describe(path, kinds)  # before anything is allocated that the weights do not need
    critic = _build(path, kinds)
    _load_weights(critic, path)
    return critic.eval()


def describe_critic(folder: str | os.PathLike[str], kinds: Kinds) -> Any:
    """Build the critic of a folder on the meta device; see `Critic.describe`."""
    path = Path(folder)
    restore_folder(path)
    return _describe(path, kinds).eval()


def _describe(path: Path, kinds: Kinds) -> Any:
    """Build the critic of a folder on the meta device, and compare its sizes with those of the stored tensors."""
    with torch.device("meta"):
        critic = _build(path, kinds)
    _check_weights_exist(path)
    try:
        with safe_open(path / WEIGHTS, framework="pt") as tensors:
            stored = {RENAMED_TENSORS.get(name, name): name for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            sizes = {name: tuple(tensors.get_slice(old).get_shape()) for name, old in stored.items()}
            _check_sizes({name: tuple(t.shape) for name, t in critic.state_dict().items()}, sizes, path)
            small = {name: tensors.get_tensor(stored[name]) for name in _SMALL_TENSORS}
    except (SafetensorError, RuntimeError, OSError) as error:
        raise corrupt_error(path / WEIGHTS, error) from error
    _check_numbers(small, path)
    for name, tensor in small.items():
        setattr(critic, name, tensor)
    return critic


_SMALL_TENSORS = ("reward_mean", "reward_std", "max_trained_lambda")


def _check_sizes(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Check that the tensors that the config describes are those that are stored."""
    for name in [*expected, *stored]:
        if expected.get(name) != stored.get(name):
            sizes = [str(list(found[name])) if name in found else "missing" for found in (expected, stored)]
            raise CriticError(
                f"folder {str(path)!r} is damaged: {name} is {sizes[0]} by {CONFIG} and {sizes[1]} in {WEIGHTS}.",
                "copy the folder again, or train the critic again.",
            )


def _check_numbers(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Check that weights are finite, and that rewards can be divided by their standard deviations."""
    for name, tensor in tensors.items():
        finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        if not finite or (name == "reward_std" and not bool((tensor > 0).all())):
            raise CriticError(
                f"{str(path / WEIGHTS)!r} holds {'zeros or negative numbers' if finite else 'NaN or infinity'} in "
                f"{name}.",
                "copy the folder again, or train the critic again.",
            )


def _build(path: Path, kinds: Kinds) -> Any:
    """Build the critic that the config of a folder describes, without loading weights."""
    config = _read_config(path)
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise CriticError(
            f"folder {str(path)!r} has a critic of kind {kind!r}, expected one of: {', '.join(kinds)}.",
            closest(str(kind), kinds),
        )
    try:
        critic = kinds[kind](config["objectives"], Fingerprint(**config["policy"]), **config["settings"])
        if config.get("calibration") is not None:
            critic.calibration = Calibration(**config["calibration"])
        critic.decoding = _trained_decoding(config, critic.calibration)
        critic.about = dict(config.get("about") or {})  # absent in folders of early versions
    except MissingPackageError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, CriticError) as error:
        raise corrupt_error(path / CONFIG, error) from error
    return critic


def _trained_decoding(config: Mapping[str, Any], calibration: Calibration | None) -> TrainedDecoding | None:
    """Return the decoding settings of training, which format 1 has in the calibration or in the record of training."""
    if config.get("decoding") is not None:
        return TrainedDecoding(**config["decoding"])
    if calibration is not None:
        return calibration.decoding
    # Distilled critics and uncalibrated ones have it in the record of their training, if anywhere.
    training = (config.get("about") or {}).get("training", {})
    if "sampling.temperature" not in training:
        return None
    top_k = training.get("candidates", training.get("sampling.top_k"))
    return TrainedDecoding(top_k, training["sampling.temperature"], training["sampling.max_new_tokens"])


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CriticError(f"folder is {str(path)!r}, which does not exist.", "train a critic first: mavis train.")
    if not (path / CONFIG).is_file():
        raise CriticError(
            f"folder {str(path)!r} has no {CONFIG}, so it is not a critic.",
            f"name the folder that Critic.save_pretrained wrote; it holds {CONFIG} and {WEIGHTS}.",
        )
    try:
        config = read_json(path / CONFIG)
    except DataError as error:
        raise CriticError(error.message, "copy the folder again, or train the critic again.") from error
    if not isinstance(config, dict) or "kind" not in config or "format" not in config:
        raise CriticError(
            f"{str(path / CONFIG)!r} is not the config of a critic.",
            "name the folder that Critic.save_pretrained wrote.",
        )
    if config["format"] not in range(1, FORMAT + 1):
        raise CriticError(
            f"folder {str(path)!r} has critic format {config['format']!r}; this version reads up to {FORMAT}.",
            "install the version of mavis that wrote it.",
        )
    return config


def _check_weights_exist(path: Path) -> None:
    """Check that a folder has weights in safetensors."""
    if not (path / WEIGHTS).is_file():
        raise CriticError(
            f"folder {str(path)!r} has no {WEIGHTS}{describe_pickles(path)}.",
            "save the critic again with Critic.save_pretrained.",
        )


def _load_weights(critic: torch.nn.Module, path: Path) -> None:
    _check_weights_exist(path)
    try:
        tensors = load_tensors(path / WEIGHTS)
        critic.load_state_dict({RENAMED_TENSORS.get(name, name): tensor for name, tensor in tensors.items()})
    except (SafetensorError, RuntimeError, OSError) as error:
        raise corrupt_error(path / WEIGHTS, error) from error
    _check_numbers(tensors, path)
