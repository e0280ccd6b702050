"""The paper's critic: a small language model of its own, with value heads on its last state."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from mavis.critics.base import Composition
from mavis.critics.head_critic import HeadCritic, check_sizes
from mavis.critics.trunk.lora import add_lora, merge_lora
from mavis.critics.trunk.reader import PrefixReader
from mavis.errors import CriticError, check_whole, closest, first_sentence
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.token_embeddings import token_embeddings

Readout = Literal["token", "candidates"]
"""Where values are read: for all tokens at once at the prefix's last token, or at every candidate after the prefix."""


class ValueModelCritic(HeadCritic):
    """Values from the last state of a small language model that all objectives share, the trunk.

        candidates:  Q_m(s, a) = V_m(z(s ⊕ a))
        token:       Q_m(s, a) = V_m(z(s)) + ⟨A_m(z(s)), u_a⟩

    where z is the trunk's last hidden state, layer-normed unless `norm` is False. `candidates` is the paper's form: the
    trunk reads every candidate, each after the prefix and blind to the others. `token` reads one token a step, however
    many candidates there are. The trunk keeps a cache of its own, which follows `generate` through beams, rollbacks and
    new prompts.

    Args:
        objectives: M distinct names.
        fingerprint: the policy this critic is for; gives V.
        backbone: the trunk's configuration, as plain data with its `model_type`.
        readout: `token` or `candidates`.
        embedding_size: E, width of the policy's input embedding.
        hidden: width of each head; 0 for heads that are linear in z, as the paper's.
        rank: r, size of u_a in the `token` readout.
        composition: how the objectives' values become a tilt.
        norm: whether the trunk's last state gets a layer norm without parameters; the paper's heads read it as it is.
        lora_rank: rank of adapters on the trunk's linear layers, which are then all that a fit trains of it; 0 for
            none, and a trunk that is trained whole.

    Raises:
        CriticError: if a size, the readout or the composition is impossible, the trunk is no decoder or knows fewer
            tokens than the policy, or a name is repeated; MissingPackageError if adapters need peft.

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
        config = _configuration(backbone)
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
        self._watched: Any = None
        self._add_lora(lora_rank)

    @classmethod
    def for_policy(
        cls,
        policy: Any,
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
        """Build a critic that fits a policy; it predicts 0 until it is trained.

        Args:
            policy: a causal LM with input and output embeddings.
            objectives: M distinct names.
            backbone: the trunk: a folder or hub id of any `AutoModel` decoder, a configuration for one with random
                weights, or None for a copy of the policy without its output embedding.
            tokenizer: the policy's, to be compared with that of a backbone that is loaded.
            readout: `token` or `candidates`.
            hidden: width of each head; 0 for linear heads.
            rank: size of a token's vector in the `token` readout.
            composition: `conditioned` on λ = β·w, which comes to the optimum of every mixture, or `independent`, whose
                values go with any weights and can be put together with those of other critics.
            norm: whether the trunk's last state gets a layer norm; False is the paper's.
            lora_rank: rank of adapters that are trained instead of the trunk's own weights; 0 trains those.
            trust_remote_code: whether a loaded backbone may bring code of its own.
            seed: of the initial weights.

        Raises:
            PolicyError: if the policy has no output embedding.
            CriticError: if the backbone cannot be loaded, has another vocabulary, or a size, the readout or the
                composition is impossible; MissingPackageError if adapters need peft.
        """
        trunk: Any = None
        config: Any
        if backbone is None:
            trunk = policy.base_model
            config = trunk.config
            if any(weight.is_meta for weight in trunk.parameters()):
                raise CriticError(
                    "backbone is None, but the policy's weights are kept elsewhere and cannot be copied.",
                    "name the folder or hub id that the policy was loaded from.",
                )
        elif isinstance(backbone, PreTrainedConfig):
            config = backbone
        else:
            trunk = load_trunk(backbone, "backbone", trust_remote_code)
            config = trunk.config
            _check_tokenizer(_source(backbone), tokenizer, trust_remote_code)
        width = policy.get_input_embeddings().weight.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            critic = cls(
                objectives, Fingerprint.of(policy), config.to_dict(), readout, width, hidden, rank, composition, norm
            )
            if trunk is not None:
                critic.trunk.load_state_dict(trunk.state_dict())
            critic._add_lora(lora_rank)
        critic.refresh_token_table(token_embeddings(policy))
        return critic.eval()

    def inputs_of_rollouts(self, ids: Tensor, is_token: Tensor, states: Tensor) -> Tensor:
        """See `HeadCritic.inputs_of_rollouts`; in the `candidates` readout the heads read each step's own token."""
        steps = states.shape[1]
        positions = (is_token.long().cumsum(1) - 1).clamp_min(0)
        read = self.trunk(
            input_ids=ids, attention_mask=is_token.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        return self._normed(read[:, -steps:] if self.readout == "candidates" else read[:, -steps - 1 : -1])

    def inputs_of_ends(self, states: Tensor) -> Tensor:
        """Compute what the heads of the `token` readout read, for callers who keep the trunk's cache themselves.

        Args:
            states: (B, H), floating: the trunk's last hidden states at the ends of prefixes.

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
            each = lam.repeat_interleave(inputs.shape[1], dim=0)
            return self.tilt_of_inputs(inputs.flatten(0, 1), None, each).view(inputs.shape[:2])

    def values(self, prefix_ids: Tensor, candidate_ids: Tensor | None, lam: Tensor | None = None) -> Tensor:
        """See `Critic.values`."""
        if self.readout == "token":
            return super().values(prefix_ids, candidate_ids, lam)
        with torch.no_grad():
            inputs = self._candidate_inputs(prefix_ids, candidate_ids)
            each = lam.repeat_interleave(inputs.shape[1], dim=0) if lam is not None else None
            return self.values_of_inputs(inputs.flatten(0, 1), None, each).view(*inputs.shape[:2], -1)

    def merge_lora(self) -> None:
        """Fold the adapters into the trunk's weights in place, W + 2 B A for W.

        The values stay as they are. From now on peft is not needed, and a fit trains the trunk whole. Without adapters
        nothing happens.
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
            "backbone": _plain(self.trunk.config),
            "readout": self.readout,
            "embedding_size": self._embedding_size,
            "rank": self._rank,
            "norm": self.norm,
            "lora_rank": self.lora_rank,
        }

    def detach(self) -> None:
        """See `Critic.detach`."""
        super().detach()
        self._reader = self._watched = None

    def _on_attach(self, policy: Any) -> None:
        super()._on_attach(policy)
        self._reader, self._watched = PrefixReader(self.eval().trunk), threading.local()

    def _add_lora(self, rank: int) -> None:
        check_whole(CriticError, "16 is a good rank; 0 trains the trunk whole.", 0, lora_rank=rank)
        if rank:
            add_lora(self.trunk, rank)
            self.lora_rank = rank

    def _normed(self, states: Tensor) -> Tensor:
        return super()._normed(states) if self.norm else states.float()

    def _inputs(self, prefix_ids: Tensor) -> Tensor:
        return self._normed(self._read(prefix_ids, None))

    def _candidate_inputs(self, prefix_ids: Tensor, candidate_ids: Tensor | None) -> Tensor:
        if candidate_ids is None:
            every = torch.arange(self.fingerprint.vocab_size, device=prefix_ids.device)
            candidate_ids = every.expand(len(prefix_ids), -1)
        return self._normed(self._read(prefix_ids, candidate_ids))

    def _read(self, prefix_ids: Tensor, candidate_ids: Tensor | None) -> Tensor:
        self._states(prefix_ids)  # not for the states: that these rows are the attached policy's is checked there
        assert self._capture is not None
        assert self._reader is not None
        # What was read is let go of together with the policy's own cache, whose end nothing else announces.
        cache, reader = self._capture.cache, self._reader
        watched: weakref.ref[Any] | None = getattr(self._watched, "cache", None)
        if cache is not None and (watched is None or watched() is not cache):
            self._watched.cache = weakref.ref(cache, lambda _: reader.release())
        position = self._capture.position(prefix_ids)
        missing = self._capture.raise_if_missing if position.starts_response is False else None
        return reader.read(prefix_ids, self._capture.is_token(prefix_ids), candidate_ids, missing=missing)


def _configuration(backbone: Mapping[str, Any]) -> PreTrainedConfig:
    plain = dict(backbone)
    model_type = plain.pop("model_type", None)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **plain)
    except (ValueError, TypeError) as error:
        raise CriticError(
            f"backbone has model_type {model_type!r}, which transformers does not know.",
            "choose a model that AutoModel can build without code of its own.",
        ) from error
    config.dtype = torch.float32
    return config


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """Turn a configuration into plain data, without where it came from."""
    content = config.to_diff_dict() | {"model_type": config.model_type}
    plain = {name: value for name, value in content.items() if name not in ("_name_or_path", "transformers_version")}
    as_read: dict[str, Any] = json.loads(json.dumps(plain))  # names that are numbers, as of labels, come back as text
    return as_read


def load_trunk(source: str | os.PathLike[str], argument: str, trust_remote_code: bool = False) -> Any:
    """Load a decoder without its output embedding, in float32 and from safetensors.

    Args:
        source: folder or hub id.
        argument: what the caller calls it.
        trust_remote_code: whether it may bring code of its own.

    Raises:
        CriticError: if it cannot be loaded.
    """
    name = _source(source)
    try:
        return AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise CriticError(
            f"{argument} is {name!r}, which cannot be loaded: {first_sentence(error)}.",
            "give a folder with config.json and *.safetensors, or a hub id.",
        ) from error


def _source(given: str | os.PathLike[str]) -> str:
    """Tell a folder from a hub id."""
    folder = Path(given).expanduser()
    return str(folder) if folder.exists() else str(given)


def _check_tokenizer(source: str, tokenizer: Any, trust_remote_code: bool) -> None:
    if tokenizer is None:
        return
    try:
        other = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return  # a folder without a tokenizer says nothing
    if other.get_vocab() != tokenizer.get_vocab():
        raise CriticError(
            f"backbone {source!r} has another vocabulary than the policy's tokenizer.",
            "its token ids would mean other words; choose a backbone with the policy's own tokenizer.",
        )
