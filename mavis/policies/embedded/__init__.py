"""The small story LM that ships with the package, with its critic: for examples and tests without downloads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mavis.errors import PolicyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mavis.policies.protocol import CausalLM


def path() -> Path:
    """Return the folder of the embedded policy, in the Hugging Face layout.

    Examples:
        >>> import mavis
        >>> (mavis.embedded.path() / "model.safetensors").is_file()
        True
    """
    return Path(__file__).resolve().parent


def critic_path() -> Path:
    """Return the folder of the critic that ships with the embedded policy, for `Critic.from_pretrained`.

    Its objectives are `positive` (VADER sentiment) and `dialogue` (share of characters inside quotation marks).

    Examples:
        >>> import mavis
        >>> mavis.Critic.from_pretrained(mavis.embedded.critic_path()).objectives
        ('positive', 'dialogue')
    """
    return path() / "critic"


def load() -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Load the embedded policy from the files of the package.

    Returns:
        The policy (float32, evaluation mode, frozen) and its tokenizer, which pads on the left and puts `<s>` first.

    Raises:
        PolicyError: if the weights are not in this copy of the package.

    Examples:
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
        >>> output = policy.generate(**inputs, do_sample=False, max_new_tokens=6)
        >>> tokenizer.decode(output[0], skip_special_tokens=True)
        'Once upon a time, there was a little girl'
    """
    if not (path() / "model.safetensors").is_file():
        raise PolicyError(
            f"the embedded policy is not in {str(path())!r}.",
            "install the package from a wheel, or train it: python -m recipes.embedded_policy.main --help.",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # loading takes a fraction of a second
    policy = AutoModelForCausalLM.from_pretrained(
        path(), dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    if shown:
        logging.enable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path(), local_files_only=True)
    return policy.eval().requires_grad_(False), tokenizer
