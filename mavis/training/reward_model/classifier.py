"""The network of a reward model: the trunk of a language model with a head of one logit, and adapters."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mavis.errors import ObjectiveError, first_sentence, import_optional
from mavis.policies.names import check_source, load_errors

_HINT = "give a decoder or encoder that transformers has a sequence classifier of, such as Llama, Qwen or BERT."


def load_backbone(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load the trunk of any decoder or encoder, and its tokenizer, to train a reward model from.

    Args:
        path: a folder or a model id on the hub; weights are read from safetensors only.
        device: where the trunk goes.
        revision: branch, tag or commit on the hub; None for `main`.
        trust_remote_code: whether to run Python code that the checkpoint contains.

    Returns:
        The trunk, without any head, and the tokenizer.

    Raises:
        ObjectiveError: if there is no such model, or its weights are not safetensors.

    Examples:
        >>> import mavis
        >>> from mavis.training import load_backbone
        >>> backbone, tokenizer = load_backbone(mavis.embedded.path())
        >>> type(backbone).__name__
        'LlamaModel'
    """
    from transformers import AutoModel, AutoTokenizer

    given = os.path.expanduser(os.fspath(path))
    check_source(given, "backbone", ObjectiveError, revision)
    shared: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with load_errors(
        f"backbone is {given!r}, which",
        ObjectiveError,
        "give a folder with config.json, *.safetensors and a tokenizer, or a model id that the hub can serve.",
    ):
        tokenizer = AutoTokenizer.from_pretrained(given, **shared)
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(0)  # some encoders have a layer that few checkpoints hold
            backbone = AutoModel.from_pretrained(given, use_safetensors=True, dtype=torch.float32, **shared)
    return backbone.to(device).eval(), tokenizer


def build_classifier(backbone: Any, seed: int) -> Any:
    """Build a sequence classifier of one logit in float32 on a copy of a model's trunk.

    Args:
        backbone: a decoder or encoder, with or without a head; it is not changed.
        seed: of the new head.

    Raises:
        ObjectiveError: if it is quantised or carries adapters, or if transformers has no such classifier.
    """
    from transformers import AutoModelForSequenceClassification

    kind = type(backbone).__name__
    if hasattr(backbone, "peft_config"):
        raise ObjectiveError(f"backbone {kind} carries adapters.", "merge them first: backbone.merge_and_unload().")
    if not all(parameter.is_floating_point() for parameter in backbone.parameters()):
        raise ObjectiveError(f"backbone {kind} is quantised, so it cannot be trained.", "load it with plain weights.")
    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    config.use_cache = False
    try:
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(seed)
            classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ObjectiveError(f"backbone {kind} cannot be a reward model: {first_sentence(error)}.", _HINT) from error
    state = backbone.base_model.state_dict()
    missing, unexpected = classifier.base_model.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.startswith("pooler.")]
    if wrong:
        raise ObjectiveError(
            f"backbone {kind} has another trunk than {type(classifier).__name__}: {', '.join(wrong[:3])}.", _HINT
        )
    return classifier.to(backbone.device).eval()  # without dropout


def add_adapters(classifier: Any, rank: int, seed: int) -> Any:
    """Add adapters to all linear layers of a classifier, which is changed; its head is trained as a whole.

    Args:
        classifier: of `build_classifier`.
        rank: of the adapters; 0 adds none.
        seed: of the adapters.

    Returns:
        The model to train: the classifier, or what wraps it.

    Raises:
        MissingPackageError: if PEFT is not installed.
    """
    if not rank:
        return classifier.requires_grad_(True)
    peft = import_optional("peft", "lora_rank", "lora", ", or lora_rank=0 to train all weights")
    heads = [
        name
        for name, module in classifier.named_children()
        if name != classifier.base_model_prefix and any(True for _ in module.parameters())
    ]
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=heads
    )
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        return peft.get_peft_model(classifier, config).eval()


def merge_adapters(model: Any, classifier: Any) -> Any:
    """Return the classifier with its adapters merged into its weights.

    Args:
        model: of `add_adapters`.
        classifier: that was given to it.
    """
    merged = classifier if model is classifier else model.merge_and_unload()
    return merged.eval().requires_grad_(False)


def describe_weights(model: Any) -> str:
    """Return a hash over a sample of every weight of a model's trunk."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in sorted(model.base_model.state_dict().items()):
        flat = weight.detach().flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, len(flat) // 64)].cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and PEFT from reporting that a head is new."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # PEFT corrects it and warns for each layer
            yield
    finally:
        logging.set_verbosity(verbosity)
