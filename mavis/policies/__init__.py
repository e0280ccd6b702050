"""Everything that concerns the policy: loading, fingerprint, embeddings, and hooks on its forward pass."""

from mavis.policies.fingerprint import Fingerprint
from mavis.policies.loading import load_policy
from mavis.policies.protocol import CausalLM
from mavis.policies.save import save_policy
from mavis.policies.state_capture import forward_states
from mavis.policies.token_embeddings import token_embeddings

__all__ = ["CausalLM", "Fingerprint", "forward_states", "load_policy", "save_policy", "token_embeddings"]
