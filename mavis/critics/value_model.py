"""The value-model critic of the paper: a separate small language model with value heads."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from mavis.critics.base import Composition
from mavis.critics.head_critic import HeadCritic, check_sizes
from mavis.critics.trunk.backbone import (
    build_config,
    check_tokenizer,
    config_to_dict,
    copy_weights,
    load_trunk,
    pad_vocabulary,
)
from mavis.critics.trunk.lora import add_lora, merge_lora
from mavis.critics.trunk.reader import PrefixReader
from mavis.errors import CriticError, check_whole, closest
from mavis.policies.embeddings import embedding_width
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.limits import learnt_positions
from mavis.policies.protocol import CausalLM
from mavis.policies.token_embeddings import token_embeddings

Readout = Literal["token", "candidates"]
"""Where values are read: at the last token of the prefix for all tokens at once, or at each candidate."""


class ValueModelCritic(HeadCritic):
    """Reads values from the last state of a small language model that all objectives share, the trunk.

        candidates:  Q_m(s, a) = V_m(z(s ⊕ a))
        token:       Q_m(s, a) = V_m(z(s)) + ⟨A_m(z(s)), u_a⟩

    where z is the trunk's last hidden state, layer-normed unless `norm` is False. `candidates` is the paper's form: the
    trunk reads every candidate after the prefix, independently of the others. `token` reads one token per step,
    whatever the number of candidates. The trunk has its own cache, which follows `generate` through beam search,
    assisted decoding and new prompts.

    Args:
        objectives: M distinct names.
        fingerprint: of the policy that the critic is for; determines V.
        backbone: config of the trunk, as a dict with its `model_type`.
        readout: `token` or `candidates`.
        embedding_size: E, width of the policy's input embedding.
        hidden: width of each head; 0 for heads that are linear in z, as the paper's.
        rank: r, size of u_a in the `token` readout.
        composition: how the objectives' values become a tilt.
        norm: whether the trunk's last state gets a layer norm without parameters; the paper uses none.
        lora_rank: rank of adapters on the trunk's linear layers, which are then the only part of it that is trained; 0
            trains the whole trunk.

    Raises:
        CriticError: if a size, the readout or the composition is invalid, the trunk is not a decoder or knows fewer
            tokens than the policy, or a name is repeated.
        MissingPackageError: if adapters are requested and peft is not installed.

    Examples:
        A trunk of random weights, far smaller than the policy:

        >>> from transformers import LlamaConfig
        >>> import mavis
        >>> policy, tokenizer = mavis.embedded.load()
        >>> small = LlamaConfig(
        ...     vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> critic = mavis.ValueModelCritic.for_policy(policy, ["positive", "dialogue"], backbone=small)
        >>> critic.readout, critic.trunk.config.hidden_size
        ('token', 16)

        While the policy generates, the trunk reads along; untrained heads predict 0:

        >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
        >>> with critic.attach(policy):
        ...     logits = policy(**inputs).logits
        ...     values = critic.values(inputs["input_ids"], None)
        >>> values.shape, float(values.abs().max())
        (torch.Size([1, 2048, 2]), 0.0)

    Source: MAVIS (arXiv 2508.13415).
    """

    kind = "value_model"
    reads_states = False

    def __init__(
        self,
        objectives: Sequence[str],
        fingerprint: Fingerprint,
        backbone: Mapping[str, Any],
        readout: Readout = "token",
        embedding_size: int = 1,
        hidden: int = 128,
        rank: int = 64,
        composition: Composition = "independent",
        norm: bool = True,
        lora_rank: int = 0,
    ) -> None:
        if readout not in get_args(Readout):
            raise CriticError(f"readout is {readout!r}.", closest(str(readout), get_args(Readout)))
        check_sizes(rank=rank)
        config = build_config(backbone)
        super().__init__(
            objectives,
            fingerprint,
            composition,
            input_size=config.get_text_config().hidden_size,
            embedding_size=embedding_size,
            hidden=hidden,
            rank=rank if readout == "token" else 0,
        )
        self.readout: Readout = readout
        self.norm = norm
        self.lora_rank = 0
        self._rank = rank
        self._embedding_size = embedding_size
        self.trunk: Any = AutoModel.from_config(config)
        rows = self.trunk.get_input_embeddings().weight.shape[0]
        if rows < fingerprint.vocab_size:
            raise CriticError(
                f"backbone knows {rows} tokens, but the policy writes {fingerprint.vocab_size}.",
                "choose a backbone with the policy's own tokenizer.",
            )
        self._reader: PrefixReader | None = None
        self._policy_cache: Any = None
        self._add_lora(lora_rank)

    @classmethod
    def for_policy(
        cls,
        policy: CausalLM,
        objectives: Sequence[str],
        *,
        backbone: PreTrainedConfig | str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        readout: Readout = "token",
        hidden: int = 128,
        rank: int = 64,
        composition: Composition = "conditioned",
        norm: bool = True,
        lora_rank: int = 0,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> ValueModelCritic:
        """Build an untrained critic for a policy; it predicts 0 until it is trained.

        Args:
            policy: a causal LM with input and output embeddings.
            objectives: M distinct names.
            backbone: the trunk: a folder or hub id of any `AutoModel` decoder, a config for random weights, or None for
                a copy of the policy without its output embedding.
            tokenizer: of the policy; if given, a loaded backbone must have all of its tokens, and its vocabulary may be
                padded to another size than the policy's.
            readout: `token` or `candidates`.
            hidden: width of each head; 0 for linear heads.
            rank: size of a token's vector in the `token` readout.
            composition: `conditioned` on λ = β·w, which converges to the optimum for all weights, or `independent`, as
                the paper, whose values can be combined with those of other critics.
            norm: whether the trunk's last state gets a layer norm; the paper uses none.
            lora_rank: rank of adapters that are trained instead of the trunk's own weights; 0 for none.
            trust_remote_code: whether to run Python code that a loaded backbone contains.
            seed: of the initial weights.

        Raises:
            PolicyError: if the policy has no output embedding.
            CriticError: if the backbone cannot be loaded or has another vocabulary, the weights to copy are quantised,
                offloaded or under adapters, or a size, the readout or the composition is invalid.
            MissingPackageError: if adapters are requested and peft is not installed.
        """
        fingerprint = Fingerprint.of(policy)
        source: Any = None
        config: Any
        if isinstance(backbone, PreTrainedConfig):
            config = backbone
        elif backbone is None:
            source = policy.base_model
            config = source.config
        else:
            source = load_trunk(backbone, "backbone", trust_remote_code)
            if tokenizer is not None:
                check_tokenizer(backbone, tokenizer, trust_remote_code)
                pad_vocabulary(source, tokenizer, fingerprint.vocab_size)
            config = source.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            critic = cls(
                objectives,
                fingerprint,
                config.to_dict(),
                readout,
                embedding_width(policy),
                hidden,
                rank,
                composition,
                norm,
            )
            if source is not None:
                copy_weights(source, critic.trunk, None if backbone is None else str(backbone))
            critic._add_lora(lora_rank)
        critic.refresh_token_table(token_embeddings(policy))
        return critic.eval()

    def rollout_inputs(self, ids: Tensor, is_token: Tensor, states: Tensor) -> Tensor:
        """See `HeadCritic.rollout_inputs`; in the `candidates` readout the heads read each step's own token."""
        steps = states.shape[1]
        positions = (is_token.long().cumsum(1) - 1).clamp_min(0)
        hidden = self.trunk(
            input_ids=ids, attention_mask=is_token.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        return self._normed(hidden[:, -steps:] if self.readout == "candidates" else hidden[:, -steps - 1 : -1])

    def prefix_inputs(self, states: Tensor) -> Tensor:
        """Compute the inputs of the heads in the `token` readout, for callers that run the trunk themselves.

        Args:
            states: (B, H) floating, the trunk's last hidden states at the ends of prefixes.

        Returns:
            (B, I) float32.
        """
        return self._normed(states)

    def tilt(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor) -> Tensor:
        """See `Critic.tilt`."""
        if self.readout == "token":
            return super().tilt(prefix_ids, candidate_ids, lam)
        with torch.no_grad():
            inputs = self._candidate_inputs(prefix_ids, candidate_ids)
            repeated = lam.to(inputs.device).repeat_interleave(inputs.shape[1], dim=0)
            return self.tilt_from_inputs(inputs.flatten(0, 1), None, repeated).view(inputs.shape[:2])

    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """See `Critic.values`."""
        if self.readout == "token":
            return super().values(prefix_ids, candidate_ids, lam)
        with torch.no_grad():
            inputs = self._candidate_inputs(prefix_ids, candidate_ids)
            repeated = lam.to(inputs.device).repeat_interleave(inputs.shape[1], dim=0) if lam is not None else None
            return self.values_from_inputs(inputs.flatten(0, 1), None, repeated).view(*inputs.shape[:2], -1)

    @property
    def max_positions(self) -> int | None:
        """See `Critic.max_positions`."""
        return learnt_positions(self.trunk)

    def merge_lora(self) -> None:
        """Merge the adapters into the trunk's weights in place: W becomes W + 2 B A.

        The values stay the same. Afterwards peft is not needed, and training updates the whole trunk. Without adapters
        this does nothing.
        """
        if self.lora_rank:
            merge_lora(self.trunk)
            self.lora_rank = 0

    def trunk_parameters(self) -> list[nn.Parameter]:
        """See `HeadCritic.trunk_parameters`."""
        return list(self.trunk.parameters())

    def settings(self) -> dict[str, Any]:
        """See `Critic.settings`."""
        return super().settings() | {
            "backbone": config_to_dict(self.trunk.config),
            "readout": self.readout,
            "embedding_size": self._embedding_size,
            "rank": self._rank,
            "norm": self.norm,
            "lora_rank": self.lora_rank,
        }

    def detach(self) -> None:
        """See `Critic.detach`."""
        super().detach()
        self._reader = self._policy_cache = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_reader": None, "_policy_cache": None}

    def _on_attach(self, policy: CausalLM) -> None:
        super()._on_attach(policy)
        self._reader, self._policy_cache = PrefixReader(self.eval().trunk), threading.local()

    def _add_lora(self, rank: int) -> None:
        check_whole(CriticError, "16 is a good rank; 0 trains the whole trunk.", 0, lora_rank=rank)
        if rank:
            add_lora(self.trunk, rank)
            self.lora_rank = rank

    def _normed(self, states: Tensor) -> Tensor:
        return super()._normed(states) if self.norm else states.float()

    def _inputs(self, prefix_ids: Tensor) -> Tensor:
        return self._normed(self._read(prefix_ids, None))

    def _candidate_inputs(self, prefix_ids: Tensor, candidate_ids: Tensor | None) -> Tensor:
        if candidate_ids is None:
            vocabulary = torch.arange(self.fingerprint.vocab_size, device=prefix_ids.device)
            candidate_ids = vocabulary.expand(len(prefix_ids), -1)
        return self._normed(self._read(prefix_ids, candidate_ids))

    def _read(self, prefix_ids: Tensor, candidate_ids: Tensor | None) -> Tensor:
        self._states(prefix_ids)  # checks that the rows are those of the attached policy; the states are not needed
        assert self._capture is not None
        assert self._reader is not None
        # Nothing else announces the end of a generation, so the prefixes are released with the policy's own cache.
        cache, reader = self._capture.cache, self._reader
        previous: weakref.ref[Any] | None = getattr(self._policy_cache, "ref", None)
        if cache is not None and (previous is None or previous() is not cache):
            self._policy_cache.ref = weakref.ref(cache, lambda _: reader.release())
        is_token, position = self._capture.is_token(prefix_ids), self._capture.position(prefix_ids)
        raise_if_unknown = self._capture.raise_if_unknown if position.starts_response is False else None
        return reader.read(prefix_ids, is_token, candidate_ids, raise_if_unknown=raise_if_unknown)
