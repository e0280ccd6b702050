"""Small random models for tests, made from nothing."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NEVER_ENDING: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
"""Special tokens of a model that writes up to the limit."""

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [
    "good", "great", "happy", "love", "bad", "sad", "awful", "hate", "the", "a", "one", "little", "big", "old",
    "girl", "boy", "dog", "cat", "man", "bird", "she", "he", "they", "was", "is", "had", "said", "saw", "ran",
    "went", "to", "and", "in", "on", "with", "for", "day", "time", "once", "upon", "house", "tree", "ball", "food",
    "home", "park", "water", "not", "very", "but", "so", "then", ".", ",", "!", "?", '"',
]  # fmt: skip


def llama_config(**overrides: Any) -> LlamaConfig:
    """Configure a Llama of 2 layers × 16 over 40 tokens; `overrides` are arguments of `LlamaConfig`."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaConfig(**sizes | overrides)


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Build a frozen random Llama of `llama_config(**overrides)`.

    It seeds torch's global generator, so that what a test draws next is the same in every run as well.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**overrides)).eval().requires_grad_(False)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of `WORDS`, split at spaces, that pads on the left and adds no token of its own."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def word_policy(seed: int = 0) -> LlamaForCausalLM:
    """Build a random Llama of 2 layers × 32 over `WORDS` whose next-token entropy is around half of log V.

    Every embedding shares its first coordinate, so the first column of the output embedding acts as a bias: special
    tokens other than the end are practically never sampled, and most responses end within forty tokens.
    """
    with torch.random.fork_rng(devices=[]):
        policy = tiny_llama(
            seed,
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        policy.model.embed_tokens.weight.normal_()[:, 0] = 6.0
        policy.lm_head.weight.normal_(std=0.4)[:, 0] = 0.0
        policy.lm_head.weight[[0, 1, 3], 0] = -10.0
        policy.lm_head.weight[2] *= 0.5
        policy.lm_head.weight[2, 0] = 0.9
    policy.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return policy


class Opaque(torch.Tensor):
    """A quantised weight of a class of its own, as torchao's, which supports few operations."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("reshape", "view", "flatten", "float", "to", "__getitem__"):
            raise NotImplementedError(f"{func} is not supported")
        return super().__torch_function__(func, types, args, kwargs or {})


class Dequantisable(Opaque):
    """One that can be dequantised."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def with_weights_of(kind: type[Opaque]) -> Any:
    """Build a tiny Llama whose linear layers have weights of a quantised class."""
    policy = tiny_llama()
    for module in policy.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().as_subclass(kind)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            assert type(module.weight) is kind
    return policy
