"""Pretraining on a CPU from random weights: settings, packing, training loop and checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from mavis.errors import ConfigError, DataError
from mavis.training.optimizer_state import optimizer_tensors, restore_optimizers
from mavis.utils.files import atomic_folder, read_json
from recipes.embedded_policy.corpus import Story

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # what cross_entropy skips


@dataclass(frozen=True)
class Shape:
    """The sizes of the policy, a Llama."""

    hidden: int = 128
    layers: int = 5
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 352
    context: int = 512


@dataclass(frozen=True)
class Recipe:
    """The settings of the training.

    At step s the learning rates are multiplied by min(1, (s+1)/warmup, (steps−s)/(decay·steps)): constant, then linear
    to zero. `steps` may be changed on resuming while the decay has not started.
    """

    steps: int = 5000
    rows: int = 4  # rows of `length` tokens per step
    micro_rows: int = 4  # rows per forward and backward pass; does not change the result
    length: int = 512
    real_share: float = 0.5  # share of rows that come from real stories, before the decay ...
    decay_real_share: float = 0.75  # ... and during it
    matrix_lr: float = 0.02  # Muon, all matrices but the embedding
    other_lr: float = 0.004  # AdamW, the embedding and the norms
    weight_decay: float = 0.05  # on the matrices only
    warmup: int = 50
    decay: float = 0.4
    clip: float = 1.0  # gradient norm
    bfloat16: bool = True  # autocast; the weights stay fp32
    seed: int = 0
    save_every: int = 200
    report_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "micro_rows", "length", "save_every", "report_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1.", "set it higher.")
        if self.rows % self.micro_rows:
            raise ConfigError(f"rows is {self.rows}, micro_rows {self.micro_rows}.", "let one divide the other.")
        for name in ("real_share", "decay_real_share", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 to 1.", "0.5 is one half.")

    def real_rows(self, rows: int) -> int:
        """Return how many of the first `rows` rows are real: ⌊share · rows⌋, before and during the decay."""
        level = min(rows, self.rows * round((1 - self.decay) * self.steps))
        return int(level * self.real_share) + int((rows - level) * self.decay_real_share)

    def rate(self, step: int) -> float:
        """Return the factor on the learning rates at `step`, counted from 0."""
        level = min(1.0, (step + 1) / max(self.warmup, 1))
        return min(level, (self.steps - step) / max(self.decay * self.steps, 1.0))


@dataclass(frozen=True)
class Report:
    """The metrics after `step` steps; `loss` is the mean since the last report, in nats per token."""

    step: int
    steps: int
    loss: float
    rate: float
    tokens_per_second: float


def encode(stories: Sequence[Story], tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Encode each story as `<s> story </s>`, without the `</s>` where the story is not whole.

    Args:
        stories: N stories.
        tokenizer: one that puts its BOS before the text.

    Returns:
        N tensors (T_n,) of int16 ids, which a vocabulary below 32,768 fits in.
    """
    encoded = tokenizer([story.text for story in stories], return_attention_mask=False, verbose=False).input_ids
    eos = int(tokenizer.eos_token_id)
    return [
        torch.tensor([*ids, eos] if story.whole else ids, dtype=torch.int16)
        for story, ids in zip(stories, encoded, strict=True)
    ]


class Packing:
    """Concatenated stories, cut into rows; each epoch has its own random order.

    Row i of an epoch covers `length` + 1 tokens and shares its last one with row i + 1, so every token but an epoch's
    first is predicted exactly once. The last row is padded with `IGNORED`.

    Args:
        encoded: N tensors (T_n,) of ids.
        length: predictions per row.
        seed: of the orders.

    Raises:
        DataError: if there are fewer than two tokens.
    """

    def __init__(self, encoded: Sequence[torch.Tensor], length: int, seed: int) -> None:
        self.encoded, self.length, self.seed = list(encoded), length, seed
        self.tokens = sum(len(ids) for ids in self.encoded)
        if self.tokens < 2:
            raise DataError("there is no text to train on.", "give stories, or leave this source out (None).")
        self.rows = -(-(self.tokens - 1) // length)
        self._epoch, self._stream = -1, torch.empty(0)

    def row(self, index: int) -> torch.Tensor:
        """Return row `index`, counted over all epochs, (length + 1,)."""
        epoch, i = divmod(index, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.encoded), generator=generator).tolist()
            self._epoch, self._stream = epoch, torch.cat([self.encoded[k] for k in order])
        row = self._stream[i * self.length : (i + 1) * self.length + 1].long()
        return F.pad(row, (0, self.length + 1 - len(row)), value=IGNORED)


def batch_rows(real: Packing | None, sampled: Packing | None, recipe: Recipe, step: int) -> torch.Tensor:
    """Return the rows of one step, with the real ones evenly spread.

    Args:
        real: real stories; None if there are none.
        sampled: the teacher's; None if there are none.
        recipe: gives `rows`, and `real_rows`, which is unused if one source is None.
        step: counted from 0.

    Returns:
        ids (rows, length + 1), `IGNORED` where there is no token.

    Raises:
        DataError: if both are None.
    """
    if real is None and sampled is None:
        raise DataError("there is no text to train on.", "give real stories, sampled ones, or both.")
    rows = []
    for k in range(step * recipe.rows, (step + 1) * recipe.rows):
        before, after = recipe.real_rows(k), recipe.real_rows(k + 1)
        if sampled is None or (real is not None and after > before):
            rows.append(real.row(k if sampled is None else before))  # type: ignore[union-attr]
        else:
            rows.append(sampled.row(k if real is None else k - before))
    return torch.stack(rows)


def build_policy(tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> PreTrainedModel:
    """Build a Llama with tied embeddings and random fp32 weights.

    Args:
        tokenizer: gives the vocabulary and the special ids.
        shape: the sizes.
        seed: of the weights.

    Returns:
        The policy; its generation config holds the special ids only.

    Raises:
        ConfigError: if the sizes do not divide.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    if shape.hidden % (2 * shape.heads) or shape.heads % shape.key_value_heads:
        raise ConfigError(
            f"{shape} has sizes that do not divide.",
            "let heads divide hidden into even parts, and key_value_heads divide heads.",
        )
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = LlamaForCausalLM(config)
    policy.generation_config = GenerationConfig(**ids)
    return policy


def targets_of(rows: torch.Tensor, bos: int) -> torch.Tensor:
    """Return the targets of rows (B, T + 1), (B, T): the next token, `IGNORED` where that is BOS.

    BOS is always given, and predicting it after a story that was cut off would teach the policy to stop anywhere.
    """
    return rows[:, 1:].masked_fill(rows[:, 1:] == bos, IGNORED)


def token_loss(policy: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Compute Σ −log π(row[t+1] | row[:t+1]) over the targets of rows (B, T + 1), in nats, a scalar."""
    inputs = rows[:, :-1].clamp_min(0)  # padding is never predicted, so any id will do
    step_logits = policy(inputs, use_cache=False).logits
    targets = targets_of(rows, policy.config.bos_token_id)
    return F.cross_entropy(step_logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def pretrain(
    policy: PreTrainedModel,
    real: Packing | None,
    sampled: Packing | None,
    recipe: Recipe,
    checkpoint: Path | None = None,
) -> Iterator[Report]:
    """Train the policy in place, with Muon (matrices) and AdamW (the rest), resuming from a checkpoint.

    A step's rows depend on the seed and the step only, so a resumed run equals an uninterrupted one.

    Args:
        policy: from `build_policy`.
        real: real stories.
        sampled: the teacher's stories.
        recipe: the settings.
        checkpoint: a folder that is replaced every `save_every` steps and at the end.

    Yields:
        A report every `report_every` steps and at the end.

    Raises:
        DataError: if there is no text.
        ConfigError: if the checkpoint is of another policy.
    """
    matrices = [p for n, p in policy.named_parameters() if p.ndim == 2 and "embed" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in policy.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    start = load_checkpoint(checkpoint, policy, optimizers) if checkpoint and checkpoint.exists() else 0
    policy.train()
    loss_sum = tokens_sum = 0.0
    tic = time.perf_counter()
    for step in range(start, recipe.steps):
        rows = batch_rows(real, sampled, recipe, step)
        count = int((targets_of(rows, policy.config.bos_token_id) != IGNORED).sum())
        for part in rows.split(recipe.micro_rows):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                loss = token_loss(policy, part)
            (loss / count).backward()
            loss_sum += loss.item()
        tokens_sum += count
        torch.nn.utils.clip_grad_norm_(policy.parameters(), recipe.clip)
        for optimizer, lr in zip(optimizers, (recipe.matrix_lr, recipe.other_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if checkpoint and (done % recipe.save_every == 0 or done == recipe.steps):
            save_checkpoint(checkpoint, policy, optimizers, done)
        if done % recipe.report_every == 0 or done == recipe.steps:
            speed = tokens_sum / (time.perf_counter() - tic)
            yield Report(done, recipe.steps, loss_sum / tokens_sum, recipe.rate(step), speed)
            loss_sum = tokens_sum = 0.0
            tic = time.perf_counter()
    policy.eval()


def save_checkpoint(
    folder: Path, policy: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], step: int
) -> None:
    """Write weights, optimiser states and step to a folder, atomically and without pickle."""
    from safetensors.torch import save_file

    with atomic_folder(folder) as temporary:
        policy.save_pretrained(temporary / "policy")
        save_file(optimizer_tensors(optimizers), temporary / "optimizers.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def load_checkpoint(folder: Path, policy: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Load a checkpoint into a policy and its optimisers.

    Args:
        folder: written by `save_checkpoint`.
        policy: a policy of the same shape.
        optimizers: as they were when saved.

    Returns:
        The number of steps done.

    Raises:
        ConfigError: if the folder is broken or of another policy.
    """
    from safetensors.torch import load_file, load_model

    try:
        step = int(read_json(folder / "state.json")["step"])
        states = load_file(folder / "optimizers.safetensors")
        # strict=False lets the tied output embedding, which is not stored, be missing; the sizes are checked.
        load_model(policy, folder / "policy" / "model.safetensors", strict=False)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"checkpoint {str(folder)!r} cannot be resumed: {error}.", "delete it or give another folder."
        ) from error
    restore_optimizers(optimizers, states)
    return step
