"""A small language model that reads prefixes and candidates while a policy generates, with a cache of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mavis.critics.trunk.fused import FusedTrunk, is_plain
from mavis.critics.trunk.kv_cache import PADDING, KeptPrefixes, StepMask
from mavis.critics.trunk.trial import Windows, check_suitable, find_windows
from mavis.errors import PAD_ON_THE_LEFT, CriticError, DecodingError

_AT_ONCE = 512
"""How many candidates one forward pass reads at most: the part of the mask that is theirs grows with their square."""


class PrefixReader:
    """Reads prefixes with a trunk, every token once as far as possible, and candidates as if each stood alone.

    What has been read is kept per thread, and the next call goes on from it: longer prefixes are read on, rows that
    have changed places, doubled or dropped out are found again, prefixes that are shorter or end otherwise are cut to
    what they share with known ones, and anything else is read anew. So is everything after the trunk's weights have
    been replaced, or changed in a way that torch counts, which excludes what is written through `.data`.

    Args:
        trunk: a decoder without output embedding; its attention is set to `sdpa`, or to `eager` if it has no `sdpa`
            that takes the masks of candidates. On the CPU its weights stay what they are, but are laid out anew. One
            that `FusedTrunk` understands is read by that, which is looked at again where nothing is kept to go on from,
            and not at every step: a hook that is put into it meanwhile does not fire.

    Raises:
        CriticError: if the trunk's states cannot be computed step by step, which is tried.
    """

    def __init__(self, trunk: nn.Module) -> None:
        check_suitable(trunk)
        self._trunk: Any = trunk
        self._thread = threading.local()
        self._embedding, self._positions = _tables(trunk)
        self._attention = ""
        self._windows: Windows = {}
        self._looking = threading.Lock()
        self._fused: FusedTrunk | None = None
        self._may_fuse = True
        self._look()
        try:
            find_windows(trunk, self.read, self._use)
        except CriticError:
            if self._fused is None:
                raise
            self._may_fuse, self._fused = False, None
            find_windows(trunk, self.read, self._use)

    def read(
        self,
        prefix_ids: Tensor,
        is_token: Tensor,
        candidate_ids: Tensor | None = None,
        *,
        missing: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Compute the trunk's last hidden states at the ends of prefixes, or at candidates that follow them.

        Args:
            prefix_ids: (B, L) integer, L ≥ 1.
            is_token: (B, L) bool, False on the padding, which is on the left.
            candidate_ids: (B, K) integer, K ≥ 1, or None.
            missing: for a trunk on an accelerator, where the host would have to wait for a comparison of the ids with
                those of the call before: rows that are as long or a token longer are taken to go on from these, and it
                is told of a bool scalar that is True if some do not; it raises, at once or when the answer has arrived.
                Without it the host waits, and whatever the rows are, they are read.

        Returns:
            (B, H) float32, or (B, K, H) with candidates.

        Raises:
            CriticError: if the trunk is in training mode or takes other masks now.
            DecodingError: if the shapes do not fit, a row ends with padding, or there are more positions than learnt.
        """
        self._check_call(prefix_ids, is_token, candidate_ids)
        if candidate_ids is not None and candidate_ids.shape[1] > _AT_ONCE:
            parts = candidate_ids.split(_AT_ONCE, dim=1)
            return torch.cat([self.read(prefix_ids, is_token, part, missing=missing) for part in parts], dim=1)
        with torch.inference_mode(False), torch.no_grad():
            device = self._embedding.weight.device
            is_token = is_token.to(device)
            ids = torch.where(is_token, prefix_ids.to(device), PADDING)
            kept = self._take(ids, None if device.type == "cpu" else missing)
            length = ids.shape[1]
            if candidate_ids is not None:
                result = self._forward(kept, is_token, ids, candidate_ids.to(device))
            else:
                if kept.state is None and kept.length == length:
                    kept.cut(length - 1)
                if kept.length < length:
                    self._forward(kept, is_token, ids, ids[:, :0])
                assert kept.state is not None
                result = kept.state
            self._thread.kept = kept
            return result.clone()  # a tensor of no mode, and not what is kept

    @property
    def windows(self) -> Windows:
        """The window W of each kind of layer, or None where there is none; of the kind "" if they are all alike."""
        return self._windows

    @property
    def positions(self) -> int | None:
        """How many positions the trunk has learnt, or None where there is no table of them."""
        return self._positions

    def release(self) -> None:
        """Let go of what this thread has read."""
        self._thread.kept = None

    def release_all(self) -> None:
        """Let go of what any thread has read."""
        self._thread = threading.local()

    def forward(self, ids: Tensor, masks: dict[str, Tensor], positions: Tensor, cache: Cache, end: int) -> Tensor:
        """Compute the trunk's last hidden states at tokens that follow those of a cache, which takes them in.

        Args:
            ids: (B, S) integer.
            masks: by kind of layer, see `windows`: (B, 1, S, L + S), what is added to attention.
            positions: (B, S) integer, ≥ 0.
            cache: of as many layers as the trunk has, or none yet.
            end: more than any position, known on the host.

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

    def _use(self, windows: Windows) -> None:
        """Read with these windows, and with the attention that the trunk has now, from the beginning."""
        self._windows, self._attention = windows, self._trunk.config._attn_implementation
        self.release()

    def _look(self) -> tuple[Any, ...]:
        """Look at the trunk's modules and weights, which may have been replaced, and give what tells their versions."""
        # What is made here outlives a caller's inference mode.
        with self._looking, torch.inference_mode(False), torch.no_grad():
            _lay_out(self._trunk)
            modules = list(self._trunk.modules())
            self._slots = [(module._parameters, name) for module in modules for name in module._parameters]
            self._counted = not any(weight.is_inference() for weight in self._trunk.parameters())
            self._fused = None  # what there was is let go of before another is made
            if self._may_fuse and self._counted and FusedTrunk.understands(self._trunk):
                # Made anew even where no weight seems to be another: what is written through `.data` is not counted.
                with suppress(RuntimeError, MemoryError):  # where there is no room, the trunk itself has some
                    self._fused = FusedTrunk(self._trunk)
            self._seen = self._versions()
            return self._seen

    def _versions(self) -> tuple[Any, ...]:
        """Return what is another when weights have been moved or replaced, or changed in a way that torch counts."""
        weights = [weight for slots, name in self._slots if (weight := slots.get(name)) is not None]
        places = [weight.data_ptr() for weight in weights]
        return places, [weight._version for weight in weights] if self._counted else ()

    def _take(self, ids: Tensor, missing: Callable[[Tensor], None] | None) -> KeptPrefixes:
        """Take what is kept out of its place and make it a beginning of the prefixes.

        It is put back when the call has succeeded: one that breaks off leaves nothing half-written behind.
        """
        kept: KeptPrefixes | None = getattr(self._thread, "kept", None)
        self._thread.kept = None
        weights = self._versions()
        looked = kept is None or weights != self._seen
        if looked:
            weights = self._look()
        if kept is not None and kept.weights != weights:
            kept = None
        if kept is not None and missing is not None and ids.shape[1] - kept.length in (0, 1):
            kept.go_on_unseen(ids, missing)
            return kept
        if not bool((ids[:, -1] != PADDING).all()):
            raise DecodingError(
                "prefix_ids has rows that end with padding, expected the padding on the left.",
                PAD_ON_THE_LEFT,
            )
        if kept is not None and kept.go_on(ids):
            return kept
        weights = weights if looked else self._look()
        return KeptPrefixes(ids, {kind: StepMask(window) for kind, window in self._windows.items()}, weights)

    def _forward(self, kept: KeptPrefixes, is_token: Tensor, ids: Tensor, candidate_ids: Tensor) -> Tensor:
        """Read what is new of the prefixes, and candidates: (B, K, H) float32."""
        length, candidates = ids.shape[1], candidate_ids.shape[1]
        new = length - kept.length
        # A step is many small operations, of which each is dearer outside inference mode. What is made here and
        # kept is written to nowhere else.
        with torch.inference_mode():
            tokens = is_token.sum(dim=1, keepdim=True)
            read = ids[:, kept.length :] * is_token[:, kept.length :]  # for padding the trunk gets an id that it knows
            # The last of a prefix is a token, so a sum gives its position; those of more come from counting them all.
            positions = tokens[:, :new] if new < 2 else is_token.cumsum(dim=1)[:, -new:]
            positions = (positions - 1).clamp_(min=0)
            if candidates:
                read = torch.cat([read, candidate_ids], dim=1)
                positions = torch.cat([positions, tokens.expand(-1, candidates)], dim=1)
            dtype = self._embedding.weight.dtype
            masks = {kind: mask.mask(is_token, new, candidates, dtype) for kind, mask in kept.masks.items()}
            hidden = self.forward(read, masks, positions, kept.cache, length + 1)
            kept.cache.keep(length)
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
        if self._positions is not None and longest > self._positions:
            raise DecodingError(
                f"prefix_ids has {prefix_ids.shape[1]} positions, but the trunk has learnt {self._positions}, one of "
                "which a candidate needs.",
                "generate fewer tokens, or use a trunk with rotary positions.",
            )
        if self._trunk.training:
            raise CriticError("trunk is in training mode, in which dropout changes its states.", "call critic.eval().")
        if self._trunk.config._attn_implementation != self._attention:
            raise CriticError(
                f"trunk has attention {self._trunk.config._attn_implementation!r}, expected {self._attention!r}, which "
                "the reader has set.",
                "leave a trunk's attention as it is, or make a new reader.",
            )


def _lay_out(trunk: nn.Module) -> None:
    """Keep the weights of linear layers input by input on the CPU, where a product with one row is then a third faster.

    Such a product reads every weight once, and is faster in the order in which it adds to all outputs at once.
    """
    for weight in [module.weight for module in trunk.modules() if is_plain(module)]:
        if weight.device.type == "cpu" and weight.is_contiguous() and not weight.is_inference():
            weight.data = weight.data.t().contiguous().t()


def _tables(trunk: Any) -> tuple[Any, int | None]:
    """Return a trunk's input embedding, and of how many positions it has learnt a table, or None if it has none."""
    embedding, most = trunk.get_input_embeddings(), getattr(trunk.config, "max_position_embeddings", None)
    tables = [module for module in trunk.modules() if isinstance(module, nn.Embedding) and module is not embedding]
    return embedding, most if most and any(most <= table.num_embeddings <= most + 2 for table in tables) else None
