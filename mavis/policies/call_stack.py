"""Who is asking: what the call stack says about scores and forward passes that are not a decoding step's own.

The ids of a draft can look like those of a step, and on an accelerator the host does not know them; the function that
is running is known at once and for certain.
"""

from __future__ import annotations

import sys
from typing import Literal

from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator


def assistance() -> Literal["drafting", "verifying"] | None:
    """Say whether the caller is part of assisted decoding.

    Returns:
        `drafting` where tokens are being proposed, by whatever model or lookup; `verifying` where the policy's own
        scores of proposed tokens are processed; None in every other way of generating.
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
    """Whether the caller was called by a logits processor, such as that of classifier-free guidance."""
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "__call__" and isinstance(
            frame.f_locals.get("self"), LogitsProcessor | LogitsProcessorList
        ):
            return True
    return False
