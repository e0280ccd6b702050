"""The input embedding of a policy, scaled to unit variance for value heads."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mavis.errors import PolicyError
from mavis.policies.devices import states_device, weights_loaded
from mavis.policies.embeddings import embedding_shape, embedding_width, output_embedding, plain_weight
from mavis.policies.protocol import CausalLM


def token_embeddings(policy: CausalLM) -> Tensor:
    """Return the policy's input embedding, scaled so that its entries have unit variance over the vocabulary.

    Returns:
        (V, E) float32, where V is the size of the *output* vocabulary: rows beyond it are dropped, missing rows are 0.

    Raises:
        PolicyError: if the policy has no output embedding, or no weights, or its input embedding cannot be read.

    Examples:
        >>> from mavis.policies import embedded, token_embeddings
        >>> policy, tokenizer = embedded.load()
        >>> token_embeddings(policy).shape
        torch.Size([2048, 128])
    """
    states_device(policy)  # raises for a policy without weights
    embedding = policy.get_input_embeddings()
    with weights_loaded(embedding):
        plain = plain_weight(embedding.weight)
        if plain is None or plain.shape[1] != embedding_width(policy):
            raise PolicyError(
                f"policy {type(policy).__name__} has an input embedding that is quantised and cannot be read.",
                "quantise the other layers only.",
            )
        weight = plain.float()
    _, vocabulary = embedding_shape(output_embedding(policy))
    weight = F.pad(weight[:vocabulary], (0, 0, 0, max(0, vocabulary - weight.shape[0])))
    return weight / weight.std().clamp_min(1e-12)
