"""The fingerprint of a policy: its shape, and a hash over a sample of its weights."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mavis.errors import CriticError
from mavis.policies.applied_vectors import applied_vectors
from mavis.policies.devices import weights_loaded
from mavis.policies.embeddings import embedding_shape, output_embedding
from mavis.policies.protocol import CausalLM

_SAMPLES_PER_TENSOR = 64


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the policy that a critic was made for.

    Args:
        model_type: the architecture's name in its config, such as `llama`.
        hidden_size: H, input size of the output embedding.
        vocab_size: V, output size of the output embedding.
        weights: hexadecimal hash over a sample of every weight, rounded to bfloat16 so that it does not depend on the
            precision in which the policy is loaded.

    Examples:
        >>> from mavis.policies import Fingerprint, embedded
        >>> policy, tokenizer = embedded.load()
        >>> Fingerprint.of(policy)
        Fingerprint(model_type='llama', hidden_size=128, vocab_size=2048, weights='80d4df1fd927c378')
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    weights: str

    @classmethod
    def of(cls, policy: CausalLM, tensors: Mapping[str, torch.Tensor] | None = None) -> Fingerprint:
        """Compute the fingerprint of a policy.

        Args:
            policy: a causal LM.
            tensors: its weights by name, if the policy itself is on the meta device.

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

    def check(self, policy: CausalLM) -> None:
        """Check that a policy has this shape, and warn if it has other weights.

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
        # The weights that vectors change may not be among the sampled ones.
        was_added = added is not None and added.has_effect and added.weights_before == self.weights
        if was_added or other.weights != self.weights:
            warnings.warn(
                f"{self._describe_difference(policy)}; its values are predictions about that other policy. "
                "Train a critic for this one if the tilt seems weak.",
                UserWarning,
                stacklevel=3,
            )

    def _describe_difference(self, policy: CausalLM) -> str:
        added = applied_vectors(policy)
        names = ", ".join(map(repr, added.names)) if added is not None else ""
        if added is not None and added.weights_before == self.weights:
            return f"vectors {names} are applied to the policy, and this critic was trained on the policy without them"
        said = "the policy has the shape but not the weights of the one this critic was trained on"
        return f"{said} (vectors {names} are applied to it)" if names else said

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON-compatible data."""
        return asdict(self)


def _weights_hash(policy: CausalLM, tensors: Mapping[str, torch.Tensor] | None) -> str:
    """Hash a strided sample of every weight; tied weights count once."""
    samples, seen = [], set[int]()
    tied = getattr(policy, "all_tied_weights_keys", None) or {}
    for path, module in policy.named_modules():
        fresh = []
        for name, parameter in module.named_parameters(recurse=False):
            # Offloading gives each tied weight a placeholder of its own.
            again = id(parameter) in seen or (parameter.device.type == "meta" and f"{path}.{name}".lstrip(".") in tied)
            seen.add(id(parameter))
            fresh += [] if again else [name]
        with weights_loaded(module):
            for name in fresh:
                weight = getattr(module, name) if tensors is None else tensors[f"{path}.{name}".lstrip(".")]
                flat = weight.detach().reshape(-1)
                if flat.device.type == "meta" or not flat.numel():
                    continue
                # A copy: a view would keep the whole weight in memory.
                few = flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)]
                samples.append(few.to("cpu", copy=True).to(torch.bfloat16))
    joined = torch.cat(samples).float() if samples else torch.zeros(0)
    return hashlib.sha256(joined.numpy().tobytes()).hexdigest()[:16]
