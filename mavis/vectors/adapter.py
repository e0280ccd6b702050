"""The weight differences of a LoRA adapter, computed by peft from the adapter's folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mavis.errors import DataError, VectorError, first_sentence, import_optional
from mavis.utils.files import read_json
from mavis.vectors.model_tensors import ModelTensors, meta_model, subtracted
from mavis.vectors.tensor_files import LazyTensors

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE_HINT = "merge it into its base (merge_and_unload), save that, and pass its folder."
_RESAVE_HINT = "save the adapter again with save_pretrained."
_BASE_HINT = "pass the base that the adapter was trained on."
_FACTORS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")
_PLAIN_INITS = (True, False, "gaussian", "eva")  # other initialisations change the base's weights as well


def is_adapter(model: Any) -> bool:
    """Return whether this is the folder of an adapter."""
    return isinstance(model, str | os.PathLike) and (Path(model).expanduser() / _CONFIG).is_file()


def adapter_differences(base: ModelTensors, folder: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Compute what a LoRA adapter adds to each weight.

        Δ = scaling · B·A,   and Δ = saved − base for modules that were trained in full (`modules_to_save`)

    Args:
        base: the model that the adapter was trained on.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        Δ by name, float32; products B·A are computed on access.

    Raises:
        VectorError: if the adapter is not a plain LoRA, does not fit the base, or changes a tied weight.
        MissingPackageError: if peft is not installed.

    Source: LoRA, Hu et al. (ICLR 2022).
    """
    peft = import_optional("peft", "an adapter", "vectors")
    path = Path(folder).expanduser()
    _check_settings(path)
    adapted = _attach_adapter(peft, base, path)
    layers, saved = {}, {}
    for name, module in adapted.get_base_model().named_modules():
        inner = name.replace(".base_layer", "")
        if isinstance(module, peft.tuners.lora.LoraLayer):
            if module.lora_variant:
                raise VectorError(f"aligned is {str(path)!r}, a variant of LoRA such as DoRA.", _MERGE_HINT)
            layers[f"{inner}.{getattr(module, 'parameter_name', 'weight')}"] = module
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            for part, tensor in module.modules_to_save["default"].state_dict().items():
                saved[f"{inner}.{part}"] = tensor
    tied = {*base.layout.tied, *base.layout.tied.values()}
    for name in [*layers, *saved]:
        if name in tied or name not in base.layout.shapes:
            what = "is tied to another" if name in tied else "base does not have"
            raise VectorError(f"aligned is {str(path)!r}, an adapter that changes {name!r}, which {what}.", _MERGE_HINT)
    differences = {name: subtracted(tensor, base[name]) for name, tensor in saved.items()}
    return LazyTensors(
        [*layers, *saved], lambda name: differences[name] if name in differences else _product(layers[name])
    )


@torch.no_grad()
def _product(layer: Any) -> Tensor:
    delta: Tensor = layer.get_delta_weight("default")
    return delta.float()


def _check_settings(path: Path) -> None:
    try:
        settings = read_json(path / _CONFIG, strict=False)
    except (OSError, DataError) as error:
        raise VectorError(f"{str(path / _CONFIG)!r} is corrupt: {first_sentence(error)}.", _RESAVE_HINT) from error
    if not isinstance(settings, dict):
        raise VectorError(f"{str(path / _CONFIG)!r} is corrupt: it holds a {type(settings).__name__}.", _RESAVE_HINT)
    kind, init = settings.get("peft_type"), settings.get("init_lora_weights", True)
    if kind != "LORA" or init not in _PLAIN_INITS:
        what = f"initialised by {init!r}, which changes the base as well" if kind == "LORA" else f"of type {kind!r}"
        raise VectorError(f"aligned is {str(path)!r}, an adapter {what}; expected a plain LoRA.", _MERGE_HINT)
    if not (path / _WEIGHTS).is_file():
        raise VectorError(
            f"aligned is {str(path)!r}, which has no {_WEIGHTS}; pickles are never read.",
            _RESAVE_HINT,
        )


def _attach_adapter(peft: Any, base: ModelTensors, path: Path) -> Any:
    """Attach an adapter to a model that has the base's modules and none of its weights."""
    skeleton = meta_model(base.stored.folder if base.stored else base.skeleton, "base")
    # A single zero, expanded to each shape: peft moves an adapter to its base's device, and 'meta' would lose it.
    skeleton._apply(lambda tensor: torch.zeros((), dtype=torch.float32).expand(tensor.shape))
    try:
        # With a LoRA on an embedding, peft also saves the base's own embedding.
        tensors = {name: t for name, t in load_file(path / _WEIGHTS).items() if ".base_layer." not in name}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mismatches are errors below
            adapted = peft.PeftModel(skeleton, peft.PeftConfig.from_pretrained(path))
            peft.set_peft_model_state_dict(adapted, tensors)
            loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise VectorError(
            f"aligned is {str(path)!r}, an adapter that cannot be attached to base: {first_sentence(error)}.",
            _BASE_HINT,
        ) from error
    if odd := sorted(set(tensors) ^ set(loaded)):
        where = "adapter" if odd[0] in tensors else "base"
        raise VectorError(
            f"aligned is {str(path)!r}, an adapter that does not fit base: {odd[0]!r} is only in the {where}.",
            _BASE_HINT,
        )
    fully_trained = {
        name.replace(".modules_to_save.default", "") for name in adapted.state_dict() if ".modules_to_save" in name
    }
    for name in sorted(set(tensors) - fully_trained):
        if not any(part in name for part in _FACTORS) or name.endswith(".bias"):
            raise VectorError(
                f"aligned is {str(path)!r}, an adapter with {name!r}, which is not a plain LoRA.", _MERGE_HINT
            )
    return adapted
