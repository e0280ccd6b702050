"""Objectives scored by a trained sequence classifier."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mavis.errors import ObjectiveError, check_number, check_whole, warn_user
from mavis.policies.chat import Prompt
from mavis.policies.limits import embedding_rows
from mavis.policies.names import check_source, load_errors
from mavis.rewards.classifier_inputs import pad_texts, padding_of, read_positions
from mavis.rewards.identity import file_digest
from mavis.rewards.prefix_scores import check_causal, encode_prefixes, prefix_logits
from mavis.rewards.protocol import BATCH_TOLERANCE, check_sign
from mavis.rewards.reward_texts import check_template, check_vocabulary, encode_texts, fill_template
from mavis.rewards.trained_with import trained_with

_AUTO = "auto"
_MAX_LENGTH = 512  # of a checkpoint that does not say

_CONTENT = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py")  # suffixes of the files that make a checkpoint


class RewardModel:
    """Score by a reward model or classifier, from the hub or a folder.

        R = sign · logits[i]                     (output = i, or None for the only one)
        R = sign · (logits[i] − logits[j])       (output = [i, j])

    With a length penalty, penalty · (characters of the response) / 100 is subtracted before the sign is applied.

    The model is loaded at the first call and kept. A reward does not depend on the rest of its batch, up to rounding:
    about 1e-5 in float32, and the precision of the type in half precision.

    Args:
        model: hub id, or a local folder as `save_pretrained` writes it (model and tokenizer).
        output: index of the logit, or two indices [i, j] for logit i − logit j, such as positive − negative. None reads
            the only logit; a model with several needs an index, as logit 0 is the negative class of most classifiers.
        template: "chat", the tokenizer's chat template over the conversation (a prompt that is a text is one user
            message) and an assistant message (the response); "concat", prompt + response as one text, which a
            conversation is not; or a text of your own with `{response}`
            and, if wanted, `{prompt}`, `{bos}` and `{eos}`: "{response}", "{response} {bos} {prompt}". "auto" takes the
            one that `train_reward_model` trained the checkpoint with, and "chat" for all others.
        truncation_side: "left" keeps the end of an overlong text, the response; "right" keeps its start, for templates
            in which the response comes first.
        max_length: the most tokens to read, ≥ 1, no more than the model has positions; None takes what
            `train_reward_model` trained the checkpoint with, and for all others 512, or all positions if fewer.
        batch_size: texts per forward pass, ≥ 1.
        device: where the model runs, for example "cpu" or "cuda:0".
        dtype: "float32", "bfloat16", ... or a torch dtype; None keeps the dtype of the checkpoint.
        sign: 1 for a reward, −1 for a cost.
        length_penalty: reward per 100 characters that is subtracted; None takes the one that the checkpoint was trained
            with, which is 0 unless `train_reward_model` wrote another.
        trust_remote_code: run Python code that comes with the checkpoint.
        revision: branch, tag or commit on the hub; None takes the default branch.

    Raises:
        ObjectiveError: if an argument is out of range; at the first call, if the checkpoint is missing, has no
            safetensors weights, no tokenizer files or no trained head, or does not fit `output`, `template` or
            `max_length`; if a prompt is a conversation and the template is not `chat`; if the tokenizer knows no token
            of the texts, or has tokens that the model does not.
        PromptError: if a conversation cannot be used, or the chat template refuses it.

    Examples:
        A tiny untrained classifier in a temporary folder:

        >>> import tempfile
        >>> import mavis
        >>> from transformers import LlamaConfig, LlamaForSequenceClassification
        >>> from mavis.rewards import RewardModel
        >>> tokenizer = mavis.embedded.load()[1]
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaForSequenceClassification(config).save_pretrained(folder)
        ...     _ = tokenizer.save_pretrained(folder)
        ...     rewards = RewardModel(folder, template="concat")(["Once upon a time"] * 2, [" there was", " a"])
        >>> len(rewards)
        2
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        output: int | Sequence[int] | None = None,
        template: str = _AUTO,
        truncation_side: str = "left",
        max_length: int | None = None,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        sign: int = 1,
        length_penalty: float | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        self.model = os.path.expanduser(os.fspath(model))
        self.output = (0,) if output is None else _indices(output)
        self._asks_for_output = output is None
        self.template = template if template == _AUTO else check_template(template)
        self.truncation_side = _one_of("truncation_side", truncation_side, ("left", "right"))
        check_whole(ObjectiveError, "16 is usual.", batch_size=batch_size)
        if max_length is not None:
            check_whole(ObjectiveError, "null takes what the checkpoint was trained with.", max_length=max_length)
        self.max_length = _MAX_LENGTH if max_length is None else max_length
        self._asks_for_max_length = max_length is None
        self.batch_size = batch_size
        self.device = _device(device)
        self.dtype = _dtype(dtype)
        self.sign = check_sign(sign)
        if length_penalty is not None:
            check_number(ObjectiveError, "0 subtracts nothing.", length_penalty=length_penalty)
        self.length_penalty = length_penalty
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.batch_tolerance = BATCH_TOLERANCE  # see `check_batch_independence`
        self._loaded: tuple[Any, Any, int | None] | None = None
        self._checkpoint: dict[str, str] | None = None

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Score B responses.

        Args:
            prompts: B prompts, texts without any template or conversations.
            responses: B responses.

        Returns:
            B raw rewards in the order of the responses.
        """
        if not len(responses):
            return []
        model, tokenizer, padding_id = self._ready()
        pairs = zip(prompts, responses, strict=True)
        texts = encode_texts(
            self.model,
            tokenizer,
            [fill_template(self.template, tokenizer, prompt, response) for prompt, response in pairs],
            template=self.template,
            max_length=self.max_length,
            embeddings=embedding_rows(model),
        )
        rewards = [0.0] * len(texts)
        for rows in self._batches(texts):
            logits = self._logits(model, padding_id, [texts[row] for row in rows])
            for row, reward in zip(rows, self._selected(logits).tolist(), strict=True):
                rewards[row] = self.sign * (reward - self._penalty(model, len(responses[row])))
        return rewards

    def score_prefixes(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[float]]:
        """Score every prefix of B responses in one pass over each, with a causal reward model.

        The response is read as unfinished: what the chat template writes after it, such as the end of the turn, is left
        out. The last score is thus the reward of the response so far, not that of the finished one.

        Args:
            prompts: B prompts, texts without any template or conversations.
            responses: B responses.

        Returns:
            For each response the raw reward after each of its tokens, as the reward model's own tokenizer splits it;
            none for an empty response.

        Raises:
            ObjectiveError: if the model reads its text in both directions, the response is not the last part of the
                text, or the response alone has more than `max_length` tokens.
        """
        if not len(responses):
            return []
        model, tokenizer, padding_id = self._ready()
        if self.truncation_side != "left":
            raise ObjectiveError(
                "truncation_side is 'right', which cuts off the response.",
                "score prefixes with truncation_side='left'.",
            )
        texts = [
            encode_prefixes(
                self.model, tokenizer, self.template, prompt, response, self.max_length, embedding_rows(model)
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        ids = [text.ids for text in texts]
        longest = max(ids, key=len)
        check_causal(self.model, model, longest, padding_id, lambda some: self._logits(model, padding_id, [some]))
        scores: list[list[float]] = [[] for _ in texts]
        for rows in self._batches(ids):
            input_ids, is_token = pad_texts(model, [ids[row] for row in rows], padding_id)
            logits = prefix_logits(model, input_ids, is_token)
            for row, rewards in zip(rows, self._selected(logits).tolist(), strict=True):
                scores[row] = [
                    self.sign * (rewards[position] - self._penalty(model, characters))
                    for position, characters in zip(texts[row].positions, texts[row].characters, strict=True)
                ]
        return scores

    def identity(self) -> dict[str, Any]:
        """Identify the rewards by the checkpoint and by what it reads; see `objective_identity`. Loads the model."""
        model, _, _ = self._ready()
        if self._checkpoint is None:
            folder = Path(self.model)
            files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
            self._checkpoint = {path.name: file_digest(path) for path in files if path.suffix in _CONTENT} or {
                "commit": getattr(model.config, "_commit_hash", None) or self.revision or self.model
            }
        names = ("output", "template", "truncation_side", "max_length", "dtype", "sign", "length_penalty")
        return {"checkpoint": self._checkpoint, **{name: getattr(self, name) for name in names}}

    def _ready(self) -> tuple[Any, Any, int | None]:
        """Return model, tokenizer and padding, loaded at the first call."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _batches(self, texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield the indices of texts batch by batch, of similar lengths, so that there is little padding.

        The longest come first, so that memory runs out at once or never.
        """
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _selected(self, logits: torch.Tensor) -> torch.Tensor:
        """Select the output, (...), of logits (..., labels)."""
        selected = logits[..., self.output[0]]
        return selected - logits[..., self.output[1]] if len(self.output) == 2 else selected

    def _penalty(self, model: Any, characters: int) -> float:
        """Compute what is subtracted for the length of a response."""
        penalty = self.length_penalty
        if penalty is None:
            penalty = trained_with(model).get("length_penalty", 0.0)
        return float(penalty) * characters / 100

    def _logits(self, model: Any, padding_id: int | None, texts: list[list[int]]) -> torch.Tensor:
        """Compute the logits (b, labels), float64 on the CPU, of b lists of token ids, padded on the right."""
        input_ids, is_token = pad_texts(model, texts, padding_id)
        with torch.inference_mode():
            logits = model(input_ids=input_ids, attention_mask=is_token).logits
        return logits.to("cpu", torch.float64)

    def _load(self) -> tuple[Any, Any, int | None]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._check_folder()
        source: dict[str, Any] = {
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }
        hint = "give a hub id or a folder with config.json, model.safetensors and the tokenizer's files."
        with load_errors(f"reward model {self.model!r}", ObjectiveError, hint):
            tokenizer = AutoTokenizer.from_pretrained(self.model, truncation_side=self.truncation_side, **source)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                self.model,
                dtype=self.dtype or "auto",
                use_safetensors=True,  # pickled weights could run code
                output_loading_info=True,
                **source,
            )
        self._resolve(model)
        self._check_fit(model, tokenizer, sorted(loading["missing_keys"]))
        if model.dtype not in (torch.float32, torch.float64):
            self.batch_tolerance = 0.05
        return model.to(self.device).eval(), tokenizer, padding_of(model, tokenizer)

    def _check_folder(self) -> None:
        """Refuse a folder that is missing or holds only pickled weights, before any request to the network."""
        folder = Path(self.model)
        check_source(self.model, "model", ObjectiveError, self.revision)
        if not folder.is_dir():
            return
        if not any(folder.glob("*.safetensors")):
            raise ObjectiveError(
                f"reward model {self.model!r} holds no *.safetensors, and pickled weights are not read.",
                "load it once where you trust it, and save it again with model.save_pretrained(folder).",
            )

    def _resolve(self, model: Any) -> None:
        """Take what was left to the checkpoint from its config."""
        trained = trained_with(model)
        template = check_template(trained.get("template", "chat"))
        if self.template == _AUTO:
            self.template = template
        elif "template" in trained and template != self.template:
            warn_user(
                f"template is {self.template!r}, but reward model {self.model!r} was trained with {template!r}: its "
                "scores of other texts may mean nothing."
            )
        if self._asks_for_max_length:
            length = trained.get("max_length", _MAX_LENGTH)
            self.max_length = min(length, read_positions(model) or length)

    def _check_fit(self, model: Any, tokenizer: Any, missing: list[str]) -> None:
        """Check that the checkpoint has what the arguments ask for."""
        if missing:
            raise ObjectiveError(
                f"reward model {self.model!r} lacks the weights {', '.join(missing[:4])}.",
                "give a checkpoint trained for sequence classification: these weights would be random.",
            )
        check_vocabulary(self.model, tokenizer)
        labels = model.config.num_labels
        if self._asks_for_output and labels > 1:
            raise ObjectiveError(
                f"output is not given, but reward model {self.model!r} has {labels} logits: {_describe_labels(model)}.",
                "name the one that is the reward: output=1, or output=[1, 0] for logit 1 − logit 0.",
            )
        if max(self.output) >= labels:
            raise ObjectiveError(
                f"output is {_show(self.output)}, but reward model {self.model!r} has {labels} logits: "
                f"{_describe_labels(model)}.",
                f"use indices from 0 to {labels - 1}.",
            )
        if self.template == "chat" and tokenizer.chat_template is None:
            raise ObjectiveError(
                f"template is 'chat', but the tokenizer of reward model {self.model!r} has no chat template.",
                "use template='concat' to score prompt + response as one text.",
            )
        positions = read_positions(model)
        if positions is not None and self.max_length > positions:
            raise ObjectiveError(
                f"max_length is {self.max_length}, but reward model {self.model!r} reads {positions} tokens.",
                f"use max_length={positions} or less.",
            )


def _indices(output: int | Sequence[int]) -> tuple[int, ...]:
    # A list from a Hydra config is not a Python list.
    indices: tuple[Any, ...] = tuple(output) if isinstance(output, Iterable) else (output,)
    if len(indices) not in (1, 2) or not all(type(index) is int and index >= 0 for index in indices):
        raise ObjectiveError(
            f"output is {output!r}, but it must be an index or two indices, each 0 or more.",
            "output=0 reads one logit, output=[1, 0] the difference logit 1 − logit 0.",
        )
    return indices


def _one_of(name: str, value: str, allowed: tuple[str, str]) -> str:
    if value not in allowed:
        raise ObjectiveError(
            f"{name} is {value!r}, but it must be {allowed[0]!r} or {allowed[1]!r}.",
            f"set {name}={allowed[0]!r}.",
        )
    return value


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ObjectiveError(
            f"device is {device!r}, which torch does not know.", "use 'cpu', 'cuda' or 'cuda:0'."
        ) from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ObjectiveError(
            f"dtype is {dtype!r}, which is not a floating-point type of torch.",
            "use 'float32', 'bfloat16' or 'float16', or None for the checkpoint's own.",
        )
    return found


def _show(indices: tuple[int, ...]) -> str:
    return str(indices[0]) if len(indices) == 1 else str(list(indices))


def _describe_labels(model: Any) -> str:
    return ", ".join(f"{index} ({name})" for index, name in sorted(model.config.id2label.items())[:8])
