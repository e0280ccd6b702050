"""Which trunks can be read step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mavis.critics.trunk.reader import PrefixReader
from mavis.errors import CriticError, DecodingError
from tests.critics.trunk.reading import (
    FAMILIES,
    VOCABULARY,
    assert_same,
    build,
    candidates_for,
    prompts,
    read_from_scratch,
    truncated,
)


def test_trial_leaves_rng_state_modes_and_windows_unchanged() -> None:
    trunk = build("Mistral", sliding_window=4).train()
    trunk.layers[0].eval()
    modes = [module.training for module in trunk.modules()]
    state, weights = torch.get_rng_state(), {name: weight.clone() for name, weight in trunk.state_dict().items()}
    PrefixReader(trunk)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in trunk.modules()] == modes
    assert trunk.config.sliding_window == 4
    assert all(torch.equal(weight, weights[name]) for name, weight in trunk.state_dict().items())


@pytest.mark.parametrize(
    ("family", "attention"), [("Llama", "sdpa"), ("Gemma2, window 4", "eager"), ("GPT-NeoX", "sdpa")]
)
def test_attention_is_set_to_an_implementation_that_accepts_the_masks(family: str, attention: str) -> None:
    trunk = FAMILIES[family]()
    trunk.set_attn_implementation("eager")
    PrefixReader(trunk)
    assert trunk.config._attn_implementation == attention


def special(family: str, **settings: Any) -> Any:
    """Build a model whose config has other names for the usual sizes."""
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, hidden_size=16, **settings)
    with torch.random.fork_rng(devices=[]):
        return getattr(transformers, f"{family}Model")(config).eval()


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ALIBI = {"num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}
LOCAL = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "recurrent": (lambda: special("Mamba", num_hidden_layers=2), "MambaModel, whose forward does not take"),
    "ALiBi": (
        lambda: special("Bloom", n_layer=2, n_head=2, **SPECIAL),
        "BloomModel, whose forward does not take",
    ),
    "ALiBi beside positions": (lambda: special("Falcon", **ALIBI), "FalconModel, which raises"),
    "encoder": (lambda: build("Bert"), "BertModel, whose attention is not causal"),
    "windows of its own": (
        lambda: special("GPTNeo", **LOCAL, **SPECIAL),
        "GPTNeoModel, whose window_size of 256",
    ),
    "rotary frequencies that change": (
        lambda: build("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "LlamaModel, whose rotary frequencies (dynamic) change",
    ),
    "a language model's head": (
        lambda: transformers.LlamaForCausalLM(build("Llama").config),
        "LlamaForCausalLM, which has an output embedding",
    ),
    "no weights": (lambda: build("Llama").to("meta"), "LlamaModel, whose weights are on the meta device"),
    "no model": (lambda: nn.Linear(2, 2), "Linear, which is not a transformers model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_trunks_are_refused_with_the_reason(kind: str) -> None:
    make, said = REFUSED[kind]
    with torch.random.fork_rng(devices=[]):
        trunk = make()
    with pytest.raises(CriticError) as caught:
        PrefixReader(trunk)
    assert f"trunk is a {said}" in caught.value.message
    assert "position_ids" in caught.value.hint


@pytest.mark.parametrize("mistake", ["positions are ignored", "masks are ignored"])
def test_trunk_that_ignores_positions_or_masks_fails_the_trial(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(transformers.LlamaModel):
        def forward(  # type: ignore[no-untyped-def]
            self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None
        ):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask if mistake == "positions are ignored" else None,
                position_ids=position_ids if mistake == "masks are ignored" else None,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )

    trunk = Careless(build("Llama").config).eval()
    trunk.set_attn_implementation("eager")
    with pytest.raises(CriticError, match="Careless, whose states step by step differ from those of whole prefixes"):
        PrefixReader(trunk)
    assert trunk.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("prefix_ids", "is_token", "candidate_ids", "said"),
    [
        (torch.ones(2, 0).long(), torch.ones(2, 0).bool(), None, "prefix_ids has shape (2, 0)"),
        (torch.ones(3).long(), torch.ones(3).bool(), None, "prefix_ids has shape (3,)"),
        (torch.ones(2, 3).long(), torch.ones(2, 2).bool(), None, "is_token (2, 2) of torch.bool"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), None, "is_token (2, 3) of torch.int64"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).bool(), torch.ones(3, 4).long(), "candidate_ids has shape (3, 4)"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).bool(), torch.ones(2, 0).long(), "candidate_ids has shape (2, 0)"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).bool(), torch.ones(2).long(), "candidate_ids has shape (2,)"),
        (torch.ones(2, 2).long(), torch.tensor([[True, True], [True, False]]), None, "rows that end with padding"),
    ],
)
def test_invalid_shapes_are_refused(
    reader: PrefixReader, prefix_ids: Tensor, is_token: Tensor, candidate_ids: Tensor | None, said: str
) -> None:
    with pytest.raises(DecodingError) as caught:
        reader.read(prefix_ids, is_token, candidate_ids)
    assert said in caught.value.message


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_trunk_with_learnt_positions_refuses_longer_prefixes(family: str) -> None:
    reader, call = PrefixReader(build(family, max_position_embeddings=12)), prompts(0, length=12)
    assert_same(
        reader.read(*truncated(call, 11), candidates_for(call)),
        read_from_scratch(reader._trunk, *truncated(call, 11), candidates_for(call))[1],
    )
    reader.read(*call)
    with pytest.raises(DecodingError, match="prefix_ids has 12 positions, but the trunk has learnt 12"):
        reader.read(*call, candidates_for(call))


def test_changed_mode_or_attention_is_refused() -> None:
    trunk = build("Llama")
    reader = PrefixReader(trunk)
    trunk.train()
    with pytest.raises(CriticError, match="training mode"):
        reader.read(*prompts(0, 3))
    trunk.eval()
    trunk.set_attn_implementation("eager")
    with pytest.raises(CriticError, match="trunk has attention 'eager', expected 'sdpa'"):
        reader.read(*prompts(0, 3))
