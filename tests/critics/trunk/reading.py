"""Tiny trunks, sequences of calls of a prefix reader, and the same states read from scratch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mavis.critics.trunk.reader import PrefixReader

VOCABULARY = 61
Call = tuple[Tensor, Tensor]
"""The ids of prefixes, and which of them are tokens."""


def build(family: str, seed: int = 0, **settings: Any) -> Any:
    """Build a random trunk of two layers whose states depend strongly on its attention."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "initializer_range": 0.3, "max_position_embeddings": 200,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text"):
        sizes["num_key_value_heads"] = 1
    if family in ("Qwen3", "Gemma2", "Gemma3Text"):
        sizes["head_dim"] = 8
    if family == "GPT2":
        del sizes["intermediate_size"]
    if family == "OPT":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
        sizes["init_std"] = sizes.pop("initializer_range")
        del sizes["intermediate_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes | settings))
        for name, weight in trunk.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(weight, std=0.1)
    return trunk.eval()


MIXED = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": lambda: build("Llama"),
    "Llama, every layer with biases": lambda: build("Llama", attention_bias=True, mlp_bias=True),
    "GPT-2": lambda: build("GPT2"),
    "Qwen2": lambda: build("Qwen2"),
    "Qwen2, one layer with a window": lambda: build(
        "Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "Qwen3": lambda: build("Qwen3"),
    "Mistral, window 4": lambda: build("Mistral", sliding_window=4),
    "Mistral, window 1": lambda: build("Mistral", sliding_window=1),
    "Gemma2, window 4": lambda: build("Gemma2", sliding_window=4),
    "Gemma3, window 4": lambda: build("Gemma3Text", sliding_window=4, layer_types=MIXED),
    "OPT": lambda: build("OPT"),
    "GPT-NeoX": lambda: build("GPTNeoX"),
}


@functools.cache
def cached_reader(family: str) -> PrefixReader:
    return PrefixReader(FAMILIES[family]())


def fresh_reader(family: str) -> PrefixReader:
    reader = cached_reader(family)
    reader.release_all()
    return reader


@torch.no_grad()
def read_from_scratch(trunk: Any, prefix_ids: Tensor, is_token: Tensor, candidate_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Read every row alone, without padding and without cache, once for each of its candidates.

    Returns:
        States at the ends of the prefixes (B, H), and at the candidates (B, K, H).
    """
    ends, states = [], []
    for ids, kept, candidates in zip(prefix_ids, is_token, candidate_ids, strict=True):
        rows = torch.cat([ids[kept].expand(len(candidates), -1), candidates[:, None]], dim=1)
        places = torch.arange(rows.shape[1]).expand(len(rows), -1)
        hidden = trunk(
            input_ids=rows, attention_mask=torch.ones_like(rows), position_ids=places, use_cache=False
        ).last_hidden_state.float()
        ends.append(hidden[0, -2])
        states.append(hidden[:, -1])
    return torch.stack(ends), torch.stack(states)


def prompts(*padding: int, length: int = 6, seed: int = 0) -> Call:
    """Return random prefixes, one for each given amount of padding."""
    ids = torch.randint(VOCABULARY, (len(padding), length), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(length) >= torch.tensor(padding)[:, None]


def longer(call: Call, new: int = 1, rows: list[int] | None = None, seed: int = 1) -> Call:
    """Return the prefixes of some rows with new tokens appended."""
    ids, is_token = call if rows is None else (call[0][rows], call[1][rows])
    added = torch.randint(VOCABULARY, (len(ids), new), generator=torch.Generator().manual_seed(seed + ids.shape[1]))
    return torch.cat([ids, added], dim=1), torch.cat([is_token, torch.ones_like(added, dtype=torch.bool)], dim=1)


def truncated(call: Call, length: int) -> Call:
    return call[0][:, :length], call[1][:, :length]


def with_edit(call: Call, row: int, place: int) -> Call:
    ids = call[0].clone()
    ids[row, place] = (ids[row, place] + 1) % VOCABULARY
    return ids, call[1]


def with_padding(call: Call, more: int) -> Call:
    """Return the same tokens with more padding before them."""
    ids, is_token = call
    return (
        torch.cat([ids[:, :1].expand(-1, more), ids], dim=1),
        torch.cat([torch.zeros(len(ids), more, dtype=torch.bool), is_token], dim=1),
    )


def calls_of(name: str) -> list[Call]:
    """Return the successive calls of a scenario, as in generation or stranger."""
    start = prompts(0, 3, 1)
    one = longer(start)
    two = longer(one)
    grown = longer(two, 5)
    first_hidden = (start[0], start[1] & (torch.arange(6) > 1))
    return {
        "one token more at a time": [start, one, two, longer(two), longer(longer(two)), grown, longer(grown)],
        "several tokens at a time": [start, three := longer(start, 3), seven := longer(three, 4), longer(seven)],
        "from a single token on": [prompts(0, length=1), longer(prompts(0, length=1))],
        "the same again": [start, start, one, one, one],
        "beams change places": [start, longer(start, 1, [2, 0, 1]), longer(longer(start, 1, [2, 0, 1]), 1, [1, 0, 2])],
        "beams double and drop out": [start, doubled := longer(start, 1, [1, 1, 2]), longer(doubled, 2, [2, 0, 0])],
        "beams change places in the last token only": [start, one, (one[0][[1, 2, 0]], one[1][[1, 2, 0]])],
        "fewer rows": [start, longer(start, 1, [2, 1]), longer(longer(start, 1, [2, 1]), 1, [0])],
        "more rows": [start, longer(start, 1, [0, 1, 2, 2, 0])],
        "rollback": [grown, two, longer(two, 1, seed=7), start, one],
        "rollback to other rows": [grown, truncated((grown[0][[2, 2, 1]], grown[1][[2, 2, 1]]), 8)],
        "less padding after a rollback": [
            prompts(5, 0, length=8), longer(prompts(5, 0, length=8)), longer(longer(prompts(5, 0, length=8)), 3),
            prompts(3, 0, length=8), longer(prompts(3, 0, length=8)),
        ],
        "an with_edit token": [grown, with_edit(grown, 0, 8), longer(with_edit(grown, 0, 8))],
        "an with_edit beginning": [two, with_edit(two, 0, 0), with_edit(two, 2, 1)],
        "an with_edit last token": [two, with_edit(two, 1, 7), longer(with_edit(two, 1, 7))],
        "another prompt": [one, prompts(2, 0, 0, length=7, seed=5), prompts(0, length=4, seed=6), start],
        "another prompt in one row": [start, longer((torch.cat([start[0][:2], prompts(1, seed=9)[0]]), start[1]))],
        "more padding before the same tokens": [two, with_padding(two, 2), longer(with_padding(two, 2)), two],
        "tokens that have become padding": [start, first_hidden, longer(first_hidden), one],
        "other ids where there is padding": [start, (torch.where(start[1], start[0], 7), start[1]), one],
    }[name]  # fmt: skip


SCENARIOS = [
    "one token more at a time", "several tokens at a time", "from a single token on", "the same again",
    "beams change places", "beams double and drop out", "beams change places in the last token only", "fewer rows",
    "more rows", "rollback", "rollback to other rows", "less padding after a rollback", "an with_edit token",
    "an with_edit beginning", "an with_edit last token",
    "another prompt", "another prompt in one row", "more padding before the same tokens",
    "tokens that have become padding", "other ids where there is padding",
]  # fmt: skip


def candidates_for(call: Call, number: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (len(call[0]), number), generator=torch.Generator().manual_seed(len(call[0][0])))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
