"""The corpus: real stories, stories sampled from a teacher LM, and the tokenizer."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mavis.errors import ConfigError, DataError, PolicyError
from mavis.utils.files import atomic_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Story:
    """A training text; `whole` is False if the teacher's context ended before the story."""

    text: str
    whole: bool = True


def normalise(text: str) -> str:
    """Normalise Unicode to NFC and white space to single spaces and newlines, with none at the ends.

    Args:
        text: a story as read or sampled.

    Returns:
        The story; normalisation is idempotent.
    """
    lines = (" ".join(line.split()) for line in unicodedata.normalize("NFC", text).splitlines())
    return "\n".join(line for line in lines if line)


def read_stories(path: str | Path) -> list[str]:
    """Read the normalised stories of a text file, separated by `<|endoftext|>`, in order.

    Args:
        path: a UTF-8 file. Bytes cut in the middle of a character (a file cut at a size) are dropped.

    Returns:
        The nonempty stories.

    Raises:
        DataError: if there is no such file, or it holds no story.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"corpus is {str(path)!r}, which is not a file.",
            f"give a text file whose stories are separated by {SEPARATOR} lines, such as TinyStories.",
        )
    parts = file.read_bytes().decode("utf-8", errors="ignore").split(SEPARATOR)
    stories = [story for story in map(normalise, parts) if story]
    if not stories:
        raise DataError(f"corpus {str(path)!r} holds no story.", f"separate stories by {SEPARATOR} lines.")
    return stories


def split_tail(stories: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Hold out the last stories, and remove copies of them from the training part.

    Args:
        stories: N stories, in the order of the file.
        share: the share of the bytes to hold out, in (0, 1); at least one story is.

    Returns:
        The training stories and the held-out stories.

    Raises:
        DataError: if share is outside (0, 1), or nothing would be left to train on.
    """
    if not 0 < share < 1:
        raise DataError(f"heldout share is {share}, expected a number in (0, 1).", "hold out 0.05.")
    sizes = [len(story.encode()) for story in stories]
    budget, cut = share * sum(sizes), len(stories) - 1
    held = sizes[cut] if stories else 0
    while cut > 0 and held + sizes[cut - 1] <= budget:
        cut -= 1
        held += sizes[cut]
    heldout = list(stories[max(cut, 0) :])
    seen = set(heldout)
    train = [story for story in stories[: max(cut, 0)] if story not in seen]
    if not train:
        raise DataError(f"{len(stories)} stories leave nothing to train on.", "give a larger corpus.")
    return train, heldout


def load_teacher(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the teacher LM in fp32, with an attention that is fast in `sample_stories`.

    Args:
        folder: a local Hugging Face folder with a causal LM and its tokenizer, which has a BOS token.

    Returns:
        The LM, frozen and in eval mode, and its tokenizer.

    Raises:
        PolicyError: if the folder is missing, or the tokenizer has no BOS token to start a story with.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    if not Path(folder).is_dir():
        raise PolicyError(
            f"teacher is {str(folder)!r}, which is not a folder.",
            "give the folder of a causal LM in the Hugging Face layout that tells stories.",
        )
    AttentionInterface.register("mavis_grouped", _grouped_attention)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.bos_token_id is None:
        raise PolicyError(
            f"teacher {str(folder)!r} has no BOS token.", "stories start with it: set tokenizer.bos_token."
        )
    teacher = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="mavis_grouped", use_safetensors=True
    )
    return teacher.eval().requires_grad_(False), tokenizer


def _grouped_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend from one position: query (B, H, 1, D), key and value (B, G, T, D), H / G heads share a key."""
    batch, heads, steps, width = query.shape
    if steps != 1:
        raise PolicyError(f"the teacher got {steps} positions at once, expected one.", "sample token by token.")
    groups = key.shape[1]
    # Folding the heads of a group into the query axis saves a copy of keys and values per head. For one position,
    # plain products over keys that are transposed in memory are faster than the fused kernel.
    grouped = query.reshape(batch, groups, heads // groups, width) * (scaling or width**-0.5)
    out = torch.matmul(torch.matmul(grouped, key.transpose(-1, -2)).softmax(-1), value)
    return out.reshape(batch, heads, 1, width).transpose(1, 2), None


def _preallocated_cache(layers: int, length: int) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        """A preallocated cache layer: growing by `cat` would take most of the time."""

        used = 0

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                batch, heads, _, width = key_states.shape
                self.key_buffer = key_states.new_empty(batch, heads, width, length)  # transposed, see above
                self.value_buffer = value_states.new_empty(batch, heads, length, width)
            start, end = self.used, self.used + key_states.shape[2]
            self.key_buffer[..., start:end] = key_states.transpose(-1, -2)
            self.value_buffer[:, :, start:end] = value_states
            self.used = end
            self.keys = self.key_buffer[..., :end].transpose(-1, -2)
            self.values = self.value_buffer[:, :, :end]
            return self.keys, self.values

    cache = DynamicCache()
    cache.layers = [Layer() for _ in range(layers)]
    cache.layer_class_to_replicate = None
    return cache


@torch.inference_mode()
def sample_stories(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    temperature: float,
    generator: torch.Generator,
) -> list[Story]:
    """Sample stories from the teacher at temperature T, in rows of `length` tokens that start with BOS.

    Rows are cut where the teacher starts or ends a story; an unfinished story loses its last word and is marked as not
    whole.

    Args:
        teacher: from `load_teacher`.
        tokenizer: the teacher's.
        rows: rows sampled at once.
        length: tokens per row, BOS included; the teacher's context at most.
        temperature: T > 0.
        generator: of all random numbers.

    Returns:
        The stories, normalised, in the order of the rows.
    """
    cache = _preallocated_cache(teacher.config.num_hidden_layers, length)
    ids = torch.full((rows, length), int(tokenizer.bos_token_id))
    for position in range(length - 1):
        step_logits = teacher(
            ids[:, position : position + 1],
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.full((1, 1), position),
        ).logits[:, -1]
        # argmax(logits/T − log E), E exponential, is a draw from softmax(logits/T): the Gumbel trick.
        noise = torch.empty_like(step_logits).exponential_(generator=generator).clamp_min_(1e-30).log_()
        ids[:, position + 1] = (step_logits / temperature - noise).argmax(-1)
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    stories = []
    for row in ids.tolist():
        starts = [i for i, token in enumerate(row) if token in ends]
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            raw = str(tokenizer.decode(row[start + 1 : end], skip_special_tokens=True))
            text = normalise(raw if end is not None else raw.rpartition(" ")[0])
            if text and "\ufffd" not in text:
                stories.append(Story(text, whole=end is not None))
    return stories


def sample_shards(
    teacher_folder: str | Path,
    folder: str | Path,
    shards: Sequence[int],
    rows: int,
    length: int,
    temperature: float,
    seed: int,
) -> Iterator[Path]:
    """Write the missing shards of sampled stories, `00007.jsonl` and so on.

    Args:
        teacher_folder: see `load_teacher`.
        folder: where the shards go.
        shards: their numbers; shard i depends on seed + i only, so processes can share the work.
        rows: rows per shard.
        length: tokens per row.
        temperature: T > 0.
        seed: ≥ 0.

    Yields:
        The path of each shard once it is on disk.

    Raises:
        PolicyError: if the teacher cannot be loaded.
    """
    missing = [i for i in shards if not (Path(folder) / f"{i:05d}.jsonl").exists()]
    teacher, tokenizer = load_teacher(teacher_folder) if missing else (None, None)
    for i in shards:
        path = Path(folder) / f"{i:05d}.jsonl"
        if i in missing:
            generator = torch.Generator().manual_seed(seed + i)
            stories = sample_stories(teacher, tokenizer, rows, length, temperature, generator)
            with atomic_file(path) as temporary:
                lines = (json.dumps({"text": s.text, "whole": s.whole}, ensure_ascii=False) for s in stories)
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        yield path


def read_shards(paths: Sequence[Path]) -> list[Story]:
    """Read shards of sampled stories, in the order of the paths.

    Args:
        paths: shards that `sample_shards` wrote.

    Returns:
        Their stories.

    Raises:
        DataError: if a shard is missing or broken.
    """
    stories: list[Story] = []
    for path in paths:
        try:
            with path.open(encoding="utf-8") as lines:
                stories += [Story(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"shard {str(path)!r} cannot be read: {error}.", "delete it and rerun: it is sampled again."
            ) from error
    return stories


def train_tokenizer(texts: Sequence[str], vocabulary: int, context: int) -> PreTrainedTokenizerBase:
    """Train a lossless byte-level BPE tokenizer that puts `<s>` before every text.

    Args:
        texts: the training part of the real stories.
        vocabulary: the number of tokens V, the three special ones and 256 bytes included.
        context: the longest input the policy is trained on, in tokens.

    Returns:
        The tokenizer; `<s>` is 0, `</s>` 1, `<pad>` 2; it pads on the left.

    Raises:
        ConfigError: if the vocabulary is smaller than the bytes need, or larger than the texts can fill.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 259:
        raise ConfigError(f"vocabulary is {vocabulary}, expected at least 259.", "256 bytes and 3 special tokens.")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocabulary:
        raise ConfigError(
            f"the texts give {bpe.get_vocab_size()} tokens, vocabulary is {vocabulary}.",
            "give more text or a smaller vocabulary.",
        )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
