"""Recognising how a policy generates by the call stack: assistance, other processors, the generation config.

The ids of a draft can look like those of a decoding step, and on an accelerator the host cannot see them without
waiting; the calling function is known immediately and for certain.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator


def assistance() -> Literal["drafting", "verifying"] | None:
    """Return the role of the caller in assisted decoding.

    Returns:
        `drafting` while tokens are proposed by a draft model or a lookup; `verifying` while the policy's own scores of
        proposed tokens are processed; None otherwise.
    """
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        name = frame.f_code.co_name
        if name == "get_candidates" and isinstance(frame.f_locals.get("self"), CandidateGenerator):
            return "drafting"
        if name == "_assisted_decoding":
            return "verifying"
    return None


def inside_processor() -> bool:
    """Return whether a logits processor, such as that of classifier-free guidance, is on the call stack."""
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "__call__" and isinstance(
            frame.f_locals.get("self"), LogitsProcessor | LogitsProcessorList
        ):
            return True
    return False


def running_generation_config() -> Any | None:
    """Return the config of the innermost `generate` on the call stack, with every default filled in, or None."""
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        config = frame.f_locals.get("generation_config")
        if isinstance(config, GenerationConfig) and isinstance(frame.f_locals.get("self"), GenerationMixin):
            return config
    return None
