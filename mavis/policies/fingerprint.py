"""The fingerprint of a policy: its shape, and a hash over a sample of its weights."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mavis.errors import CriticError, warn_user
from mavis.policies.applied_vectors import applied_vectors
from mavis.policies.devices import weights_loaded
from mavis.policies.embeddings import embedding_shape, output_embedding, plain_weight
from mavis.policies.protocol import CausalLM

_SAMPLES_PER_TENSOR = 64
_STORED_SAMPLES = 256
_HALF, _BRAIN = "float16:", "bfloat16:"


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the policy that a critic was made for.

    Args:
        model_type: the architecture's name in its config, such as `llama`.
        hidden_size: H, input size of the output embedding.
        vocab_size: V, output size of the output embedding.
        weights: hexadecimal hash over a sample of every weight, rounded to bfloat16 so that it is the same for a policy
            loaded in bfloat16 and in float32.
        sample: some of the weights themselves, in the policy's precision, as rounding to float16 changes the hash. Not
            part of comparisons by `==`; empty in what mavis 0.1 has saved.

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
    sample: str = field(default="", compare=False, repr=False)

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
        weights = _sampled_weights(policy, tensors)
        return cls(
            model_type=str(getattr(getattr(policy, "config", None), "model_type", "unknown")),
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            weights=_hash(weights),
            sample=_encode(weights),
        )

    def matches(self, other: Fingerprint) -> bool:
        """Return whether two policies have the same shape and weights, as far as the precisions of both can tell."""
        same_shape = (self.hidden_size, self.vocab_size) == (other.hidden_size, other.vocab_size)
        return same_shape and (self.weights == other.weights or _agree(self.sample, other.sample))

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
                "choose the policy that the critic was trained for, or train a critic for this one.",
            )
        added = applied_vectors(policy)
        # The weights that vectors change may not be among the sampled ones.
        rounded = other.weights != self.weights and _agree(self.sample, other.sample)
        was_added = added is not None and added.has_effect and (rounded or added.weights_before == self.weights)
        if was_added or not self.matches(other):
            warn_user(self._describe_difference(policy, other))

    def _describe_difference(self, policy: CausalLM, other: Fingerprint) -> str:
        if not self.sample and other.sample.startswith(_HALF):
            return (
                "the policy is in float16, to which a critic saved by mavis 0.1 cannot compare the weights that it was "
                "trained on. Load the policy in bfloat16 or float32 to compare them."
            )
        return (
            f"{self._describe_weights(policy)}; its values are predictions about that other policy. "
            "Train a critic for this one if the tilt seems weak."
        )

    def _describe_weights(self, policy: CausalLM) -> str:
        added = applied_vectors(policy)
        names = ", ".join(map(repr, added.names)) if added is not None else ""
        if added is not None and added.weights_before == self.weights:
            return f"vectors {names} are applied to the policy, and this critic was trained on the policy without them"
        said = "the policy has the shape but not the weights of the one this critic was trained on"
        return f"{said} (vectors {names} are applied to it)" if names else said

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON-compatible data, without the sample: what the manifests of runs compare."""
        return {name: value for name, value in asdict(self).items() if name != "sample"}

    def to_json_with_sample(self) -> dict[str, Any]:
        """Return the fingerprint as JSON-compatible data, for folders that later meet policies in other precisions."""
        return asdict(self)


def _sampled_weights(policy: CausalLM, tensors: Mapping[str, torch.Tensor] | None) -> list[torch.Tensor]:
    """Return a strided sample of every weight, on the CPU; tied weights count once."""
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
                plain = plain_weight(weight)
                if plain is None or plain.device.type == "meta" or not plain.numel():
                    continue
                flat = plain.reshape(-1)
                # A copy: a view would keep the whole weight in memory.
                samples.append(flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)].to("cpu", copy=True))
    return samples


def _hash(samples: list[torch.Tensor]) -> str:
    rounded = [few.to(torch.bfloat16) for few in samples]
    joined = torch.cat(rounded).float() if rounded else torch.zeros(0)
    return hashlib.sha256(joined.numpy().tobytes()).hexdigest()[:16]


def _encode(samples: list[torch.Tensor]) -> str:
    """Write some of the samples in base64, rounded to float16 if the policy is, else to bfloat16."""
    half = any(few.dtype == torch.float16 for few in samples)
    joined = torch.cat([few.float() for few in samples]) if samples else torch.zeros(0)
    few = joined[:: max(1, -(-len(joined) // _STORED_SAMPLES))].to(torch.float16 if half else torch.bfloat16)
    return (_HALF if half else _BRAIN) + base64.b64encode(few.view(torch.int16).numpy().tobytes()).decode()


def _agree(one: str, other: str) -> bool:
    """Return whether samples in different precisions can be the same weights, rounded."""
    if not one or not other or one.startswith(_HALF) == other.startswith(_HALF):
        return False
    half, brain = (one, other) if one.startswith(_HALF) else (other, one)
    try:
        values = [
            torch.frombuffer(bytearray(base64.b64decode(text.partition(":")[2])), dtype=dtype).double()
            for text, dtype in ((half, torch.float16), (brain, torch.bfloat16))
        ]
    except ValueError:  # edited by hand
        return False
    if values[0].shape != values[1].shape:
        return False
    values[1] = torch.where(values[0].isinf(), values[1].sign() * torch.inf * (values[1].abs() >= 65504), values[1])
    largest = torch.maximum(values[0].abs(), values[1].abs())
    unit = torch.exp2(torch.frexp(largest).exponent - 1.0)  # the power of two below
    # Half a step of bfloat16 and of float16, whose steps stop shrinking at 2^-24.
    rounding = unit * 2**-8 + (unit * 2**-11).clamp_min(2**-25)
    return bool(((values[0] == values[1]) | ((values[0] - values[1]).abs() <= rounding)).all())
