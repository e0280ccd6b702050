"""Incremental reading of prefixes and candidates by a small language model, with its own cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mavis.critics.trunk.compatibility import Windows, check_supported, detect_windows
from mavis.critics.trunk.fused import FusedTrunk, is_plain_linear
from mavis.critics.trunk.kv_cache import PADDING, KeptPrefixes, StepMask
from mavis.errors import PAD_ON_THE_LEFT, CriticError, DecodingError
from mavis.policies.limits import learnt_positions

_MAX_CANDIDATES_PER_PASS = 512
"""The candidates' part of the attention mask grows with the square of their number."""


class PrefixReader:
    """Reads prefixes with a trunk, each token once where possible, and each candidate independently of the others.

    Prefixes are cached per thread, and the next call continues from them: it reads only what is new, finds rows that
    were reordered, duplicated or dropped, and truncates rows that were rolled back or edited to what they share with
    known ones. Anything else is read from the beginning. So is everything after the trunk's weights were replaced or
    modified in place; writes through `.data` do not count as modifications in torch and go unnoticed.

    Args:
        trunk: a decoder without output embedding. Its attention is set to `sdpa`, or to `eager` if its `sdpa` does not
            accept the masks of candidates. On the CPU, its weights are transposed in memory and keep their values. If
            `FusedTrunk` supports it, that runs instead; this is decided when reading starts from the beginning, not at
            every step, so a hook that is added in between does not fire.

    Raises:
        CriticError: if a trial shows that the trunk's states cannot be computed step by step.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        check_supported(trunk)
        self._trunk: Any = trunk
        self._thread = threading.local()
        self._embedding: Any = trunk.get_input_embeddings()
        self._max_positions = learnt_positions(trunk)
        self._attention = ""
        self._windows: Windows = {}
        self._refresh_lock = threading.Lock()
        self._fused: FusedTrunk | None = None
        self._allow_fused = True
        self._refresh()
        try:
            detect_windows(trunk, self.read, self._set_windows)
        except CriticError:
            if self._fused is None:
                raise
            self._allow_fused, self._fused = False, None
            detect_windows(trunk, self.read, self._set_windows)

    def read(
        self,
        prefix_ids: Tensor,
        is_token: Tensor,
        candidate_ids: Tensor | None = None,
        *,
        raise_if_unknown: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Compute the trunk's last hidden states at the ends of prefixes, or at candidates after them.

        Args:
            prefix_ids: (B, L) integer, L ≥ 1.
            is_token: (B, L) bool, False on the padding, which is on the left.
            candidate_ids: (B, K) integer, K ≥ 1, or None.
            raise_if_unknown: lets a trunk on an accelerator skip waiting until the ids are compared with those of the
                previous call. Rows of the same length, or a token longer, are assumed to continue these, and this is
                called with a bool scalar that is True if one does not; it raises now or once the result has arrived.
                If None, the host waits, and any rows are read.

        Returns:
            (B, H) float32, or (B, K, H) with candidates.

        Raises:
            CriticError: if the trunk is in training mode, or its attention implementation was changed.
            DecodingError: if the shapes do not match, a row ends with padding, or the trunk has learnt too few
                positions.
        """
        self._check_call(prefix_ids, is_token, candidate_ids)
        if candidate_ids is not None and candidate_ids.shape[1] > _MAX_CANDIDATES_PER_PASS:
            parts = candidate_ids.split(_MAX_CANDIDATES_PER_PASS, dim=1)
            each = [self.read(prefix_ids, is_token, part, raise_if_unknown=raise_if_unknown) for part in parts]
            return torch.cat(each, dim=1)
        with torch.inference_mode(False), torch.no_grad():
            device = self._embedding.weight.device
            is_token = is_token.to(device)
            ids = torch.where(is_token, prefix_ids.to(device), PADDING)
            kept = self._take_kept(ids, None if device.type == "cpu" else raise_if_unknown)
            length = ids.shape[1]
            if candidate_ids is not None:
                result = self._forward(kept, is_token, ids, candidate_ids.to(device))
            else:
                if kept.state is None and kept.length == length:
                    kept.truncate(length - 1)
                if kept.length < length:
                    self._forward(kept, is_token, ids, ids[:, :0])
                assert kept.state is not None
                result = kept.state
            self._thread.kept = kept
            return result.clone()  # outside inference mode, and independent of the cache

    @property
    def windows(self) -> Windows:
        """The window W of each kind of layer, or None for no window; the only kind is "" if all layers are alike."""
        return self._windows

    @property
    def max_positions(self) -> int | None:
        """The number of positions that the trunk has learnt embeddings for, or None if it has no such table."""
        return self._max_positions

    def release(self) -> None:
        """Drop the prefixes of this thread."""
        self._thread.kept = None

    def release_all(self) -> None:
        """Drop the prefixes of all threads."""
        self._thread = threading.local()

    def forward(self, ids: Tensor, masks: dict[str, Tensor], positions: Tensor, cache: Cache, end: int) -> Tensor:
        """Compute the trunk's last hidden states at tokens after those in a cache, which is extended by them.

        Args:
            ids: (B, S) integer.
            masks: additive, by kind of layer (see `windows`): (B, 1, S, L + S).
            positions: (B, S) integer, ≥ 0.
            cache: with as many layers as the trunk, or none yet.
            end: a bound above all positions, known on the host.

        Returns:
            (B, S, H) in the trunk's dtype.
        """
        fused = self._fused
        if fused is not None and not torch.is_autocast_enabled(ids.device.type):
            return fused(ids, masks, positions, cache, end)
        hidden: Tensor = self._trunk(
            input_ids=ids,
            attention_mask=masks.get("", masks),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )[0]
        return hidden

    def _set_windows(self, windows: Windows) -> None:
        """Use these windows and the trunk's current attention implementation from now on."""
        self._windows, self._attention = windows, self._trunk.config._attn_implementation
        self.release()

    def _refresh(self) -> tuple[Any, ...]:
        """Find the trunk's current weights, fuse them if possible, and return their version."""
        # These objects outlive a caller's inference mode.
        with self._refresh_lock, torch.inference_mode(False), torch.no_grad():
            _transpose_in_memory(self._trunk)
            modules = list(self._trunk.modules())
            self._slots = [(module._parameters, name) for module in modules for name in module._parameters]
            self._has_versions = not any(weight.is_inference() for weight in self._trunk.parameters())
            self._fused = None  # frees the old copy before the new one is allocated
            if self._allow_fused and self._has_versions and FusedTrunk.supports(self._trunk):
                # Copied even if no weight seems to have changed: writes through `.data` leave the version as it is.
                with suppress(RuntimeError, MemoryError):  # without memory for a copy, the trunk itself runs
                    self._fused = FusedTrunk(self._trunk)
            self._last_version = self._weights_version()
            return self._last_version

    def _weights_version(self) -> tuple[Any, ...]:
        """Return a value that changes when weights are moved, replaced, or modified in place."""
        weights = [weight for slots, name in self._slots if (weight := slots.get(name)) is not None]
        addresses = [weight.data_ptr() for weight in weights]
        return addresses, [weight._version for weight in weights] if self._has_versions else ()

    def _take_kept(self, ids: Tensor, raise_if_unknown: Callable[[Tensor], None] | None) -> KeptPrefixes:
        """Remove this thread's prefixes from the cache, and extend or truncate them to a beginning of the new ones.

        `read` puts them back when it succeeds, so an interrupted call leaves nothing half-written behind.
        """
        kept: KeptPrefixes | None = getattr(self._thread, "kept", None)
        self._thread.kept = None
        version = self._weights_version()
        refreshed = kept is None or version != self._last_version
        if refreshed:
            version = self._refresh()
        if kept is not None and kept.weights != version:
            kept = None
        if kept is not None and raise_if_unknown is not None and ids.shape[1] - kept.length in (0, 1):
            kept.extend_without_sync(ids, raise_if_unknown)
            return kept
        if not bool((ids[:, -1] != PADDING).all()):
            raise DecodingError(
                "prefix_ids has rows that end with padding, expected the padding on the left.",
                PAD_ON_THE_LEFT,
            )
        if kept is not None and kept.extend(ids):
            return kept
        version = version if refreshed else self._refresh()
        return KeptPrefixes(ids, {kind: StepMask(window) for kind, window in self._windows.items()}, version)

    def _forward(self, kept: KeptPrefixes, is_token: Tensor, ids: Tensor, candidate_ids: Tensor) -> Tensor:
        """Read the new tokens of the prefixes, and candidates: (B, K, H) float32."""
        length, candidates = ids.shape[1], candidate_ids.shape[1]
        new = length - kept.length
        # A step consists of many small operations, each of which costs less in inference mode. The tensors kept from
        # here are only ever written to here.
        with torch.inference_mode():
            tokens = is_token.sum(dim=1, keepdim=True)
            read = ids[:, kept.length :] * is_token[:, kept.length :]  # a valid id for padding
            # The last id is a token, so the sum gives its position; several positions need the cumulative sum.
            positions = tokens[:, :new] if new < 2 else is_token.cumsum(dim=1)[:, -new:]
            positions = (positions - 1).clamp_(min=0)
            if candidates:
                read = torch.cat([read, candidate_ids], dim=1)
                positions = torch.cat([positions, tokens.expand(-1, candidates)], dim=1)
            dtype = self._embedding.weight.dtype
            masks = {kind: mask.mask(is_token, new, candidates, dtype) for kind, mask in kept.masks.items()}
            hidden = self.forward(read, masks, positions, kept.cache, length + 1)
            kept.cache.set_length(length)
            kept.length = length
            if new:
                kept.state = hidden[:, new - 1].to(torch.float32, copy=True)
            return hidden[:, new:].float()

    def _check_call(self, prefix_ids: Tensor, is_token: Tensor, candidate_ids: Tensor | None) -> None:
        shape = tuple(prefix_ids.shape)
        if len(shape) != 2 or not shape[1] or is_token.shape != shape or is_token.dtype != torch.bool:
            raise DecodingError(
                f"prefix_ids has shape {shape} and is_token {tuple(is_token.shape)} of {is_token.dtype}, expected "
                "(B, L) for both, L ≥ 1, and bool.",
                "pass the ids that the logits processor is called with, and attention_mask.bool() for them.",
            )
        shape = tuple(candidate_ids.shape) if candidate_ids is not None else (len(prefix_ids), 1)
        if len(shape) != 2 or shape[0] != len(prefix_ids) or not shape[1]:
            raise DecodingError(
                f"candidate_ids has shape {shape}, expected ({len(prefix_ids)}, K) with K ≥ 1.",
                "pass a row of candidates for every prefix, or None for the states of the prefixes themselves.",
            )
        longest = prefix_ids.shape[1] + (candidate_ids is not None)
        if self._max_positions is not None and longest > self._max_positions:
            raise DecodingError(
                f"prefix_ids has {prefix_ids.shape[1]} positions, but the trunk has learnt "
                f"{self._max_positions}, one of which a candidate needs.",
                "generate fewer tokens, or use a trunk with rotary positions.",
            )
        if self._trunk.training:
            raise CriticError("trunk is in training mode, in which dropout changes its states.", "call critic.eval().")
        if self._trunk.config._attn_implementation != self._attention:
            raise CriticError(
                f"trunk has attention {self._trunk.config._attn_implementation!r}, expected {self._attention!r}, which "
                "the reader has set.",
                "do not change the attention of a trunk in use, or create a new PrefixReader.",
            )


def _transpose_in_memory(trunk: nn.Module) -> None:
    """Store the weights of linear layers with the input dimension first, on the CPU.

    A product with a single row reads every weight once, and runs a third faster when it adds to all outputs at once.
    """
    for weight in [module.weight for module in trunk.modules() if is_plain_linear(module)]:
        if weight.device.type == "cpu" and weight.is_contiguous() and not weight.is_inference():
            weight.data = weight.data.t().contiguous().t()
