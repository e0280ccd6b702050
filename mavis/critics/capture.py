"""Hidden states of the policy's own forward passes, caught per thread and matched to score rows by position."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mavis.critics.fingerprint import output_embedding
from mavis.errors import CriticError, DecodingError

_NOT_MATCHED_HINT = (
    "the tilt needs each step's scores to come from the attached policy's latest forward pass in this thread; "
    "classifier-free guidance, assisted and prompt-lookup decoding, early exit, inputs_embeds and states kept outside "
    "past_key_values are not supported."
)
_OTHER_TOKENS = "the scores' token ids are not the ones that the latest forward pass of the policy has read."
_UNKNOWN_ROWS = (
    "the critic has a memory, but not of every row: some go on from ids that no earlier step has ended with."
)
_PADDED_RIGHT = "the prompts are padded on the right, so that responses would go on from padding."
_HINTS = {_PADDED_RIGHT: "tokenizer(prompts, return_tensors='pt', padding=True, padding_side='left')."}


@dataclass(slots=True)
class Forward:
    """One forward pass: which tokens at which positions made which hidden states.

    Args:
        ids: (B, S) token ids that went in.
        start: position of the first of them, which is the length of the cache before the pass.
        mask: (B, start + S) of the tokens that are not padding, as the pass was given it, or None.
        cached: whether the pass wrote to a cache.
        hidden: (B, S', H) states that reached the output embedding: the last S' ≤ S positions.
    """

    ids: Tensor
    start: int
    mask: Tensor | None = None
    cached: bool = False
    hidden: Tensor | None = None


class Capture:
    """Hooks on one policy that keep the latest forward pass of each thread.

    Args:
        policy: a causal LM with an output embedding.
        owner: the critic that reads the states.

    Raises:
        PolicyError: if the policy has no output embedding.
    """

    def __init__(self, policy: Any, owner: Any) -> None:
        embedding = output_embedding(policy)
        self.policy = weakref.ref(policy)
        self.owner = owner  # held, because the hooks of a critic that is gone could be removed by nobody
        self._thread = threading.local()
        self._hooks = [
            policy.register_forward_pre_hook(self._on_policy, with_kwargs=True),
            embedding.register_forward_pre_hook(self._on_output),
        ]
        _attached.setdefault(policy, []).append(self)

    def close(self) -> None:
        """Remove both hooks and let go of every tensor; closing twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._thread = threading.local()
        policy = self.policy()
        if policy is not None and self in _attached.get(policy, []):
            _attached[policy].remove(self)

    def states(self, prefix_ids: Tensor) -> Tensor:
        """Return the hidden state of the last token of every row.

        Args:
            prefix_ids: (B, L) integer, the ids that a logits processor is called with.

        Returns:
            (B, H), in the policy's dtype and on its device.

        Raises:
            DecodingError: if this thread has no forward pass, or none that made a state for these rows, or the rows are
                padded on the right. Ids that live on an accelerator are compared there without waiting; a mismatch is
                raised at a following step.
        """
        self.settle(wait=False)
        forward: Forward | None = getattr(self._thread, "forward", None)
        if forward is None or forward.hidden is None:
            raise DecodingError(
                "critic is attached, but no forward pass of its policy was caught in this thread.",
                "attach to the model itself, not to a wrapper whose generate runs an inner one; and before compiling.",
            )
        rows, length = prefix_ids.shape
        taken = forward.ids.shape[1]
        index = length - 1 - forward.start
        in_hidden = index - (taken - forward.hidden.shape[1])
        if rows != forward.ids.shape[0] or index >= taken or in_hidden < 0:
            raise DecodingError(
                f"the scores are for {rows} rows at position {length - 1}, but the latest forward pass made states for "
                f"{forward.ids.shape[0]} rows at positions {forward.start + taken - forward.hidden.shape[1]} to "
                f"{forward.start + taken - 1}.",
                _NOT_MATCHED_HINT,
            )
        self._compare(prefix_ids[:, forward.start :], forward.ids[:, : index + 1])
        mask = forward.mask
        if forward.start == 0 and mask is not None and mask.dim() == 2 and mask.shape[1] == taken:
            self._later((mask[:, index] == 0).any(), _PADDED_RIGHT)
        return forward.hidden[:, in_hidden]

    def place(self, prefix_ids: Tensor) -> tuple[Tensor, bool | None]:
        """Say where in a response the rows are whose states were just asked for.

        Args:
            prefix_ids: (B, L) integer, for which `states` has returned.

        Returns:
            How many of each row's ids are tokens, (B,) integer; and whether its last token ends a prompt: True after
            a pass that began a cache, False after one that read a single token to go on from a cache, None where it
            cannot be told from the pass.
        """
        forward: Forward = self._thread.forward
        length, taken = prefix_ids.shape[1], forward.ids.shape[1]
        begins = None if not forward.cached or (forward.start and taken > 1) else forward.start == 0
        if forward.mask is None or forward.mask.shape[-1] != forward.start + taken or forward.mask.dim() != 2:
            return torch.full_like(prefix_ids[:, 0], length), begins
        return forward.mask.sum(dim=1) - (forward.start + taken - length), begins

    def lost(self, answer: Tensor) -> None:
        """Raise, now or when the answer has arrived, if rows turn out to be unknown.

        Args:
            answer: () bool, True if some are.

        Raises:
            DecodingError: if so.
        """
        self._later(answer, _UNKNOWN_ROWS)

    def _compare(self, expected: Tensor, caught: Tensor) -> None:
        if caught.device.type == "cpu" and expected.device.type == "cpu":
            if not torch.equal(expected, caught):
                raise DecodingError(_OTHER_TOKENS, _NOT_MATCHED_HINT)
            return
        self._later((expected.to(caught.device) != caught).any(), _OTHER_TOKENS)

    def _later(self, bad: Tensor, said: str) -> None:
        """Raise an error if a scalar is True: at once on the CPU, elsewhere when the answer has arrived."""
        if bad.device.type == "cpu":
            if bool(bad):
                raise DecodingError(said, _HINTS.get(said, _NOT_MATCHED_HINT))
            return
        # A comparison that the host waits for would stall every step; the answer is read when it has arrived.
        event = torch.cuda.Event() if bad.device.type == "cuda" else None
        answer = bad.to("cpu", non_blocking=True)
        if event is not None:
            event.record(torch.cuda.current_stream(bad.device))
        self._pending().append((answer, event, said))

    def settle(self, *, wait: bool) -> None:
        """Raise if something that was wrong in this thread has been found out by now.

        Args:
            wait: for answers that are still on their way from an accelerator; else only those that have arrived count.

        Raises:
            DecodingError: if the ids differ from the caught ones, or rows are unknown.
        """
        pending = self._pending()
        while pending and (wait or pending[0][1] is None or pending[0][1].query()):
            answer, event, said = pending.pop(0)
            if wait and event is not None:
                event.synchronize()
            if bool(answer):
                pending.clear()
                raise DecodingError(said, _HINTS.get(said, _NOT_MATCHED_HINT))

    @property
    def restarted(self) -> bool:
        """Whether this thread's latest forward pass began anew after one that went on from a cache."""
        return bool(getattr(self._thread, "restarted", False))

    def _pending(self) -> list[tuple[Tensor, Any, str]]:
        if not hasattr(self._thread, "pending"):
            self._thread.pending = []
        pending: list[tuple[Tensor, Any, str]] = self._thread.pending
        return pending

    def _on_policy(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        previous: Forward | None = getattr(self._thread, "forward", None)
        self._thread.forward = None
        if ids is None:
            return
        cache = kwargs.get("past_key_values")
        start = cache.get_seq_length() if cache is not None else 0
        if isinstance(start, Tensor):  # a static cache counts on its device, and asking it would make the host wait
            follows = previous is not None and ids.shape[1] == 1 and len(ids) == len(previous.ids)
            start = previous.start + previous.ids.shape[1] if follows and previous is not None else int(start)
        self._thread.restarted = start == 0 and previous is not None and previous.start > 0
        self._thread.forward = Forward(ids, start, mask=kwargs.get("attention_mask"), cached=cache is not None)
        _latest.capture = self

    def _on_output(self, module: Any, args: tuple[Any, ...]) -> None:
        forward: Forward | None = getattr(self._thread, "forward", None)
        # The first call is the policy's own; a later one is somebody else's question to the same layer.
        if forward is not None and forward.hidden is None and args:
            forward.hidden = args[0]


def forward_states(policy: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Run one forward pass and return the states that reach the output embedding beside the logits.

    Args:
        policy: a causal LM with an output embedding.
        inputs: what its `forward` takes.

    Returns:
        Hidden states (B, S', H) and logits (B, S', V), S' the positions whose logits were computed.
    """
    caught: list[Tensor] = []
    hook = output_embedding(policy).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        logits = policy(**inputs).logits
    finally:
        hook.remove()
    return caught[-1], logits


def generating_critic() -> Any:
    """Find the critic attached to the policy whose forward pass came last in this thread.

    Raises:
        CriticError: if there is none, or if several critics are attached to that policy.
    """
    capture: Capture | None = getattr(_latest, "capture", None)
    policy = capture.policy() if capture is not None else None
    return attached_critic(policy)


def attached_critic(policy: Any | None) -> Any:
    """Find the critic attached to a policy.

    Raises:
        CriticError: if there is none, or if several are attached.
    """
    captures = _attached.get(policy, []) if policy is not None else []
    if not captures:
        raise CriticError(
            "critic is None, and no critic is attached to the policy that is generating in this thread.",
            "attach one with critic.attach(policy), or name it: MavisTilt(weights, critic).",
        )
    if len(captures) > 1:
        raise CriticError(
            f"critic is None, and {len(captures)} critics are attached to the policy that is generating.",
            "name the one to use: MavisTilt(weights, critic).",
        )
    return captures[0].owner


_attached: weakref.WeakKeyDictionary[Any, list[Capture]] = weakref.WeakKeyDictionary()
_latest = threading.local()
