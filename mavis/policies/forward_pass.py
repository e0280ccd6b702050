"""One forward pass of the policy, as a hook sees it: which tokens it reads, at which positions."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.errors import DecodingError


class ResponsePosition(NamedTuple):
    """Where in their responses the rows of a decoding step are."""

    lengths: Tensor
    """Number of tokens (not padding) in each row, (B,) integer."""
    starts_response: bool | None
    """Whether the last token ends a prompt, so that a response starts; None where the pass does not show it."""
    shortest_resumable: int
    """Length of the shortest prefix that a later step may continue from."""


@dataclass(slots=True)
class ForwardPass:
    """The tokens that one forward pass reads, their positions, and the hidden states that it makes.

    Args:
        ids: (B, S) token ids that go in.
        start: position of the first of them: the length of the cache before the pass.
        mask: attention mask: (B, ≥ start + S), one of four dimensions, a mapping of several by name, or None.
        positions: (B or 1, S) integer, counted without padding, or None.
        cache: weak reference to the cache that the pass writes to, or None.
        hidden: (B, S', H) states at the output embedding: of the last S' ≤ S positions.
        first_read: the first index into S whose states have been read, or None.
    """

    ids: Tensor
    start: int
    mask: Any = None
    positions: Tensor | None = None
    cache: weakref.ref[Any] | None = None
    hidden: Tensor | None = None
    first_read: int | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], previous: ForwardPass | None) -> ForwardPass | None:
        """Describe a pass by the arguments of the policy's `forward`.

        Args:
            args: the arguments by position.
            kwargs: the arguments by name.
            previous: the pass before, in the same thread.

        Returns:
            The pass, or None if it has no ids or the length of its cache is unknown.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            return None
        cache = kwargs.get("past_key_values")
        cache = cache if cache is not None else kwargs.get("cache_params")  # what state-space models call it
        follows = (
            cache is not None and previous is not None and previous.cache is not None and previous.cache() is cache
        )
        before = previous if follows else None
        start = _length(cache, before)
        if start is None:
            return None
        mask = kwargs.get("attention_mask")
        if mask is None and before is not None and isinstance(before.mask, Tensor) and before.mask.dim() == 2:
            mask = F.pad(before.mask, (0, ids.shape[1]), value=1)  # state-space models are given the mask only once
        return cls(
            ids,
            start,
            mask=mask,
            positions=kwargs.get("position_ids"),
            cache=weakref.ref(cache) if cache is not None else None,
        )

    @property
    def new_tokens(self) -> int:
        """S, the number of tokens of each row that the pass reads."""
        return self.ids.shape[1]

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.new_tokens

    @property
    def cached(self) -> bool:
        """Whether the pass writes to a cache."""
        return self.cache is not None

    def position(self, length: int) -> ResponsePosition:
        """Return where in their responses the rows are at a prefix whose states were read.

        The first index that is read ends a prompt if this pass contains everything before it, or several tokens on top
        of a cache. The states of draft tokens are read in order, beginning with the one token that is not a draft.

        Args:
            length: number of ids, the last of which is in this pass.
        """
        index = length - 1 - self.start
        starts_response = index == self.first_read and (self.start == 0 or index > 0)
        return ResponsePosition(
            lengths=self._lengths(length),
            starts_response=starts_response if self.cached else None,
            shortest_resumable=self.start if self.cached else length - 1,
        )

    def is_padding(self, index: int) -> Tensor | None:
        """Return which rows have padding at an index of a first pass, (B,) bool; None if no mask shows it."""
        masks = self.mask.values() if isinstance(self.mask, dict) else [self.mask]
        mask = next((mask for mask in masks if isinstance(mask, Tensor)), None)
        if self.start or mask is None:
            return None
        if mask.dim() == 2 and mask.shape[1] >= self.new_tokens:
            return mask[:, index] == 0
        if mask.dim() == 4 and mask.shape[2] == self.new_tokens:  # a token sees itself, padding does not
            own = mask[:, 0, index, index]
            return ~own if own.dtype == torch.bool else own != 0
        return None

    def is_token(self, length: int) -> Tensor:
        """Return which of the first ids of every row are tokens, not padding: (B or 1, length) bool."""
        mask = self.mask
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= self.end:
            return mask[:, :length].bool()
        if mask is not None and (self.positions is None or self.positions.shape[1] != self.new_tokens):
            raise DecodingError(
                "the policy's attention mask is not per token and comes without position_ids, so padding cannot be "
                "distinguished from tokens.",
                "let generate build the masks.",
            )
        # Padding is on the left, so the number of tokens determines where they begin.
        return torch.arange(length, device=self.ids.device) >= length - self._lengths(length)[:, None]

    def _lengths(self, length: int) -> Tensor:
        """Count the tokens among the first ids of every row, without waiting for an accelerator."""
        mask, positions = self.mask, self.positions
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= self.end:
            return mask[:, :length].sum(dim=1)
        if (
            mask is not None
            and positions is not None
            and positions.dim() == 2
            and positions.shape[1] == self.new_tokens
        ):
            return positions[:, length - 1 - self.start] + 1
        return torch.full_like(self.ids[:1, 0], length)


def _length(cache: Any | None, before: ForwardPass | None) -> int | None:
    """Return the number of tokens of each row in a cache; None if it is unknown.

    Args:
        cache: the one that the pass writes to, or None.
        before: the previous pass, if it wrote to the same cache.
    """
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except ValueError:  # the states of state-space models do not record how many tokens they have read
        if before is not None:
            return before.end
        return None if cache.has_previous_state() else 0
    if not isinstance(length, Tensor):
        return int(length)
    # A static cache counts on its device; reading the count would make the host wait.
    return before.end if before is not None and length.device.type != "cpu" else int(length)
