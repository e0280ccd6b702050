"""What tells one policy from another: its shape, and a hash over a sample of its weights."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mavis.errors import CriticError, PolicyError

_SAMPLES_PER_TENSOR = 64


@dataclass(frozen=True)
class Fingerprint:
    """The policy a critic was made for.

    Args:
        model_type: the architecture's name in its config, such as `llama`.
        hidden_size: H, what the output embedding reads.
        vocab_size: V, what the output embedding writes.
        weights: hexadecimal hash over a sample of every weight, rounded to bfloat16 so that it does not depend on the
            precision the policy is loaded in.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    weights: str

    @classmethod
    def of(cls, policy: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> Fingerprint:
        """Take the fingerprint of a policy.

        Args:
            policy: a causal LM.
            tensors: its weights by name, where the policy itself is only a skeleton without any.

        Raises:
            PolicyError: if the policy has no output embedding.
        """
        embedding = output_embedding(policy)
        hidden_size, vocab_size = embedding_shape(embedding)
        return cls(
            model_type=str(getattr(getattr(policy, "config", None), "model_type", "unknown")),
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            weights=_weights_hash(policy, tensors),
        )

    def check(self, policy: Any) -> None:
        """Refuse a policy of another shape and warn about one with other weights.

        Raises:
            CriticError: if the hidden size or the vocabulary differs.
            PolicyError: if the policy has no output embedding.
        """
        other = Fingerprint.of(policy)
        if (other.hidden_size, other.vocab_size) != (self.hidden_size, self.vocab_size):
            raise CriticError(
                f"critic was made for a policy with hidden size {self.hidden_size} and {self.vocab_size} tokens, but "
                f"policy ({other.model_type}) has hidden size {other.hidden_size} and {other.vocab_size} tokens.",
                "attach the critic to the policy it was trained on, or train one with for_policy(policy, ...).",
            )
        added = applied_vectors(policy)
        # What vectors change may lie between the weights that are sampled.
        was_added = added is not None and added.has_effect and added.weights_before == self.weights
        if was_added or other.weights != self.weights:
            warnings.warn(
                f"{self._what_differs(policy)}; its values are predictions about that other policy. "
                "Train a critic for this one if the tilt seems weak.",
                UserWarning,
                stacklevel=3,
            )

    def _what_differs(self, policy: Any) -> str:
        added = applied_vectors(policy)
        names = ", ".join(map(repr, added.names)) if added is not None else ""
        if added is not None and added.weights_before == self.weights:
            return f"vectors {names} are applied to the policy, and this critic was trained on the policy without them"
        said = "the policy has the shape but not the weights of the one this critic was trained on"
        return f"{said} (vectors {names} are applied to it)" if names else said

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class AppliedVectors:
    """The alignment vectors that are in a policy's weights for a while.

    Args:
        names: of the vectors.
        weights_before: the hash of the policy's weights without them.
        has_effect: whether they change any weight.
    """

    names: tuple[str, ...]
    weights_before: str
    has_effect: bool = True


vectors_of_policies: weakref.WeakKeyDictionary[Any, AppliedVectors] = weakref.WeakKeyDictionary()
"""Which vectors are applied to which policy; `mavis.vectors` writes it."""


def applied_vectors(policy: Any) -> AppliedVectors | None:
    """Say which alignment vectors are in a policy's weights, or in those of a model that it wraps."""
    found = (vectors_of_policies.get(module) for module in policy.modules())
    return next((added for added in found if added is not None), None)


def output_embedding(policy: Any) -> torch.nn.Module:
    """Find the layer that turns hidden states into logits.

    Raises:
        PolicyError: if there is none.
    """
    find = getattr(policy, "get_output_embeddings", None)
    embedding = find() if callable(find) else None
    if embedding is None:
        raise PolicyError(
            f"policy {type(policy).__name__} has no output embedding (get_output_embeddings() gave nothing).",
            "load the model with its language-model head, e.g. by AutoModelForCausalLM.",
        )
    return embedding


def embedding_shape(embedding: torch.nn.Module) -> tuple[int, int]:
    """Read (hidden size, vocabulary size) off an output embedding, not off a config, which some families break."""
    sizes = getattr(embedding, "in_features", None), getattr(embedding, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[1]), int(weight.shape[0])


def states_device(policy: Any) -> torch.device:
    """Say on which device the hidden states reach the output embedding.

    Raises:
        PolicyError: if the policy has no output embedding, or no weights.
    """
    embedding = output_embedding(policy)
    # Weights that accelerate brings from elsewhere for each forward pass are on no device in between.
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if device is None:
        weight = getattr(embedding, "weight", None)  # of a quantised layer it is a method
        device = weight.device if isinstance(weight, torch.Tensor) else policy.device
    device = torch.device(device)
    if device.type == "meta":
        raise PolicyError(
            f"policy {type(policy).__name__} is on device 'meta', where there are no weights.",
            "load its weights, e.g. by from_pretrained.",
        )
    return device


@contextmanager
def weights_at_hand(module: torch.nn.Module) -> Iterator[None]:
    """Bring a module's own weights back for a moment, where accelerate keeps them elsewhere between forward passes."""
    if any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False)):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield
    else:
        yield


def _weights_hash(policy: Any, tensors: Mapping[str, torch.Tensor] | None) -> str:
    samples, seen = [], set[int]()
    tied = getattr(policy, "all_tied_weights_keys", None) or {}
    for path, module in policy.named_modules():
        fresh = []
        for name, parameter in module.named_parameters(recurse=False):
            # Offloading gives tied weights a stand-in each.
            again = id(parameter) in seen or (parameter.device.type == "meta" and f"{path}.{name}".lstrip(".") in tied)
            seen.add(id(parameter))
            fresh += [] if again else [name]
        with weights_at_hand(module):
            for name in fresh:
                weight = getattr(module, name) if tensors is None else tensors[f"{path}.{name}".lstrip(".")]
                flat = weight.detach().reshape(-1)
                if flat.device.type == "meta" or not flat.numel():
                    continue
                # A copy: a view would keep in memory what is only here for a moment.
                few = flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)]
                samples.append(few.to("cpu", copy=True).to(torch.bfloat16))
    joined = torch.cat(samples).float() if samples else torch.zeros(0)
    return hashlib.sha256(joined.numpy().tobytes()).hexdigest()[:16]
