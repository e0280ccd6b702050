"""Everything that concerns the policy: loading, fingerprint, embeddings, and hooks on its forward pass."""

from mavis.policies.chat import Conversation, Prompt, as_conversation, last_user_turn, render_prompt
from mavis.policies.encoding import encode_prompts, prompt_ids
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.loading import load_policy
from mavis.policies.protocol import CausalLM
from mavis.policies.save import save_policy
from mavis.policies.state_capture import forward_states
from mavis.policies.token_embeddings import token_embeddings

__all__ = [
    "CausalLM",
    "Conversation",
    "Fingerprint",
    "Prompt",
    "as_conversation",
    "encode_prompts",
    "forward_states",
    "last_user_turn",
    "load_policy",
    "prompt_ids",
    "render_prompt",
    "save_policy",
    "token_embeddings",
]
