"""Capturing the hidden states of a policy's own forward passes, per thread, matched to score rows by position."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from mavis.errors import PAD_ON_THE_LEFT, DecodingError
from mavis.policies.call_stack import inside_processor
from mavis.policies.embeddings import output_embedding
from mavis.policies.forward_pass import ForwardPass, ResponsePosition
from mavis.policies.protocol import CausalLM

_NOT_MATCHED_HINT = (
    "the tilt needs each step's scores to come from the latest forward pass, in this thread, of the policy that the "
    "critic is attached to; attach before the policy is first compiled; inputs_embeds, learnt prompts, and states kept "
    "outside past_key_values and cache_params are not supported."
)
_OTHER_TOKENS = "the token ids of the scores are not the ones that the latest forward pass of the policy read."
_UNKNOWN_ROWS = (
    "the critic's recurrent memory does not cover every row: some continue a prefix that no earlier step ended with."
)
_PADDED_RIGHT = "the prompts are padded on the right, so responses would continue from padding."
_HINTS = {
    _PADDED_RIGHT: PAD_ON_THE_LEFT,
    _UNKNOWN_ROWS: "apply the tilt at every step, from the prompt on; a prompt that is read in chunks must not end "
    "with a chunk of one token.",
}


class StateCapture:
    """Hooks on a policy that keep the latest forward pass of each thread.

    Args:
        policy: a causal LM with an output embedding.
        owner: the critic that reads the hidden states.

    Raises:
        PolicyError: if the policy has no output embedding.
    """

    def __init__(self, policy: CausalLM, owner: Any) -> None:
        embedding = output_embedding(policy)
        # Wrappers (PEFT's, a compiled module) delegate `generate` to the model inside, whose passes are captured.
        model = next((inner for inner in policy.modules() if isinstance(inner, GenerationMixin)), policy)
        self.policy = weakref.ref(policy)
        # A shallow copy of the policy, or a layer that two policies share, calls the hooks for passes of its own.
        self._model, self._embedding = weakref.ref(model), weakref.ref(embedding)
        self.owner = owner  # a strong reference: the hooks of a critic that is gone could not be removed
        self._thread = threading.local()
        self._hooks: list[Any] = []
        # A compiler would record what a hook finds, but each pass has its own thread and its own callers.
        self._hooks += [
            model.register_forward_pre_hook(_Hook(self._policy_forward_hook), with_kwargs=True),
            embedding.register_forward_pre_hook(_Hook(self._output_embedding_hook)),
        ]
        _attached.setdefault(policy, []).append(self)

    def close(self) -> None:
        """Remove both hooks and release every tensor; closing twice is harmless."""
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
        self.raise_pending(wait=False)
        forward: ForwardPass | None = getattr(self._thread, "forward", None)
        if forward is None or forward.hidden is None:
            raise DecodingError(
                "critic is attached, but no forward pass of its policy was captured in this thread.",
                _NOT_MATCHED_HINT,
            )
        rows, length = prefix_ids.shape
        index = length - 1 - forward.start
        in_hidden = index - (forward.new_tokens - forward.hidden.shape[1])
        if rows != len(forward.ids) or index >= forward.new_tokens or in_hidden < 0:
            raise DecodingError(
                f"the scores are for {rows} rows at position {length - 1}, but the latest forward pass made states for "
                f"{len(forward.ids)} rows at positions {forward.end - forward.hidden.shape[1]} to {forward.end - 1}.",
                _NOT_MATCHED_HINT,
            )
        self._compare_ids(prefix_ids[:, forward.start :], forward.ids[:, : index + 1])
        padded = forward.is_padding(index)
        if padded is not None:
            self._raise_when_known(padded.any(), _PADDED_RIGHT)
        forward.first_read = index if forward.first_read is None else min(index, forward.first_read)
        return forward.hidden[:, in_hidden]

    def position(self, prefix_ids: Tensor) -> ResponsePosition:
        """Return where in their responses the rows are whose states were just read.

        Args:
            prefix_ids: (B, L) integer, for which `states` has returned.
        """
        forward: ForwardPass = self._thread.forward
        return forward.position(prefix_ids.shape[1])

    @property
    def cache(self) -> Any | None:
        """The cache that this thread's latest forward pass wrote to, or None."""
        forward: ForwardPass | None = getattr(self._thread, "forward", None)
        return forward.cache() if forward is not None and forward.cache is not None else None

    def is_token(self, prefix_ids: Tensor) -> Tensor:
        """Return which ids are tokens and which are padding, for rows whose states were just read.

        Args:
            prefix_ids: (B, L) integer, for which `states` has returned.

        Returns:
            (B, L) bool; all True if the pass was given no mask.
        """
        forward: ForwardPass = self._thread.forward
        return forward.is_token(prefix_ids.shape[1]).expand(len(prefix_ids), -1)

    def raise_if_unknown(self, unknown: Tensor) -> None:
        """Raise if rows are unknown: now, or once the result has arrived from an accelerator.

        Args:
            unknown: () bool, whether any row is unknown.

        Raises:
            DecodingError: if one is.
        """
        self._raise_when_known(unknown, _UNKNOWN_ROWS)

    def _compare_ids(self, expected: Tensor, captured: Tensor) -> None:
        if captured.device.type == "cpu" and expected.device.type == "cpu":
            if not torch.equal(expected, captured):
                raise DecodingError(_OTHER_TOKENS, _NOT_MATCHED_HINT)
            return
        self._raise_when_known((expected.to(captured.device) != captured).any(), _OTHER_TOKENS)

    def _raise_when_known(self, wrong: Tensor, message: str) -> None:
        """Raise an error if a scalar is True: at once on the CPU, else once it has arrived from the accelerator."""
        if wrong.device.type == "cpu":
            if bool(wrong):
                raise DecodingError(message, _HINTS.get(message, _NOT_MATCHED_HINT))
            return
        # Waiting for the comparison would stall every step; its result is read once it has arrived.
        event = torch.cuda.Event() if wrong.device.type == "cuda" else None
        result = wrong.to("cpu", non_blocking=True)
        if event is not None:
            event.record(torch.cuda.current_stream(wrong.device))
        self._pending().append((result, event, message))

    def raise_pending(self, *, wait: bool) -> None:
        """Raise errors of this thread that were found asynchronously.

        Args:
            wait: for results still on their way from an accelerator; else only those that have arrived count.

        Raises:
            DecodingError: if the ids differ from the captured ones, or rows are unknown.
        """
        pending = self._pending()
        while pending and (wait or pending[0][1] is None or pending[0][1].query()):
            result, event, message = pending.pop(0)
            if wait and event is not None:
                event.synchronize()
            if bool(result):
                pending.clear()
                raise DecodingError(message, _HINTS.get(message, _NOT_MATCHED_HINT))

    @property
    def restarted(self) -> bool:
        """Whether this thread's latest forward pass started new sequences after one that continued from a cache."""
        return bool(getattr(self._thread, "restarted", False))

    def _pending(self) -> list[tuple[Tensor, Any, str]]:
        if not hasattr(self._thread, "pending"):
            self._thread.pending = []
        pending: list[tuple[Tensor, Any, str]] = self._thread.pending
        return pending

    def _policy_forward_hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Compiled code still calls hooks that were removed later.
        if not self._hooks or module is not self._model() or inside_processor():
            return
        if "block_table" in kwargs:
            raise DecodingError(
                "critic is attached, but the policy generates by continuous batching (cache_implementation='paged'), "
                "which packs all sequences into one row and asks no logits processor that generate was given.",
                "generate without it, or detach the critic first.",
            )
        previous: ForwardPass | None = getattr(self._thread, "forward", None)
        self._thread.forward = forward = ForwardPass.of(args, kwargs, previous)
        if forward is None:
            return
        self._thread.restarted = forward.start == 0 and previous is not None and previous.start > 0
        _latest.capture = self

    def _output_embedding_hook(self, module: Any, args: tuple[Any, ...]) -> None:
        if module is not self._embedding():
            return
        forward: ForwardPass | None = getattr(self._thread, "forward", None)
        # The first call is the policy's own; a later one comes from other users of the same layer.
        if forward is not None and forward.hidden is None and args:
            forward.hidden = args[0]


def forward_states(policy: CausalLM, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Run one forward pass and return the hidden states at the output embedding and the logits.

    Args:
        policy: a causal LM with an output embedding.
        inputs: what its `forward` takes.

    Returns:
        Hidden states (B, S', H) and logits (B, S', V), S' the positions whose logits were computed.

    Examples:
        >>> import torch
        >>> from mavis.policies import embedded, forward_states
        >>> policy, tokenizer = embedded.load()
        >>> with torch.no_grad():
        ...     states, logits = forward_states(policy, **tokenizer("Once upon a time", return_tensors="pt"))
        >>> states.shape, logits.shape
        (torch.Size([1, 5, 128]), torch.Size([1, 5, 2048]))
    """
    captured: list[Tensor] = []
    hook = output_embedding(policy).register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    try:
        logits = policy(**inputs).logits
    finally:
        hook.remove()
    return captured[-1], logits


def generating_policy() -> Any | None:
    """Return the policy whose forward pass came last in this thread, or None."""
    capture: StateCapture | None = getattr(_latest, "capture", None)
    return capture.policy() if capture is not None else None


def captures_on(policy: Any) -> list[StateCapture]:
    """Return the captures on a policy itself."""
    return list(_attached.get(policy, []))


def captures_around(policy: Any) -> list[StateCapture]:
    """Return the captures on a policy, on what wraps it (PEFT, a compiler), or on what it wraps."""
    inside = set(policy.modules())
    found = [captures for other, captures in list(_attached.items()) if other in inside or policy in other.modules()]
    return [capture for captures in found for capture in captures]


class _Hook:
    """Excludes a hook from compiled graphs, and stays behind when a module is copied or pickled with its hooks."""

    def __init__(self, hook: Callable[..., None]) -> None:
        reason = "a critic reads the hidden states of every pass: compile with fullgraph=False, or detach the critic"
        self._hook: Callable[..., None] = torch.compiler.disable(hook, reason=reason)

    def __call__(self, *args: Any) -> None:
        self._hook(*args)

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """What a copy of a module has in place of a hook."""

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


_attached: weakref.WeakKeyDictionary[Any, list[StateCapture]] = weakref.WeakKeyDictionary()
_latest = threading.local()
