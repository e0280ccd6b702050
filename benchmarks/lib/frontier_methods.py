"""The policies, prompts, objectives and training methods that the frontier benchmark compares."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mavis import embedded
from mavis.rewards import Dialogue, Objective, Positive
from mavis.rollouts import load_prompts

PROMPTS = [
    "Once upon a time",
    "One day, a little girl",
    "Tom and Jane were",
    "The old man looked at",
    "Lily wanted to",
]
OBJECTIVES: dict[str, Objective] = {"positive": Positive(), "dialogue": Dialogue()}
TARGETS = (0.5, 1.0, 2.0, 4.0)
WEIGHTS = ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0])
PLAIN: dict[str, Any] = {
    "improvement": {
        "composition": "independent",
        "iterations": 2,
        "rollouts": 8_192,
        "reuse": False,
        "later_rate": 0.3,
    },
    "fit": {"target": "monte_carlo", "epochs": 4, "weight_decay": 0.01},
}
METHODS: dict[str, dict[str, Any]] = {
    "paper": {
        "about": "a copy of the policy that reads each of 40 candidates, plain returns, independent composition",
        "critic": {"readout": "candidates", "hidden": 0, "norm": False},
        **PLAIN,
        "top_k": 40,
    },
    "trunk": {
        "about": "`paper` with the token readout and no truncation, where truncation costs too much KL",
        "stands_in_for": "paper",
        "critic": {"readout": "token", "rank": 16},
        **PLAIN,
        "top_k": None,
    },
    "hidden": {
        "about": "heads on the policy's last hidden state, return decomposition, independent composition",
        "critic": {"rank": 16},
        "improvement": {"composition": "independent", "iterations": 2, "rollouts": 16_384, "later_rate": 0.3},
        "fit": {"epochs": 6, "weight_decay": 0.1},
        "top_k": None,
    },
    "memory": {
        "about": "`hidden` with a recurrent memory of the response",
        "critic": {"rank": 16, "memory": 128},
        "improvement": {"composition": "independent", "iterations": 2, "rollouts": 16_384, "later_rate": 0.3},
        "fit": {"epochs": 6, "weight_decay": 0.1},
        "top_k": None,
    },
    "best": {
        "about": "`memory` with the conditioned composition and one more iteration",
        "critic": {"rank": 16, "memory": 128},
        "improvement": {"composition": "conditioned", "iterations": 3, "rollouts": 16_384, "later_rate": 0.3},
        "fit": {"epochs": 6, "weight_decay": 0.1},
        "top_k": None,
    },
    "conditioned": {
        "about": "`best` after as many iterations as `memory`, which isolates the effect of the composition",
        "iterations_of": ("best", 2),
        "critic": {"rank": 16, "memory": 128},
        "top_k": None,
    },
}


SOURCES = {
    "embedded": "the policy that ships with mavis, described by bench_policy.py",
    "stories260K": "Karpathy's stories260K (llama2.c), from icppWorld/icpp_llm at 6c9bf2ee, llama2_c/stories260K",
}


def load(policy: str) -> tuple[Any, Any]:
    """Load a policy and its tokenizer."""
    if policy == "embedded":
        return embedded.load()
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    return model, tokenizer


def training_prompts() -> list[str]:
    """Return the shipped story openings, except those that overlap with the evaluation prompts."""
    openings = load_prompts(str(embedded.path() / "openings.txt"))
    return [text for text in openings if not any(text.startswith(p) or p.startswith(text) for p in PROMPTS)]
