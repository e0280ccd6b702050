"""`VllmSampler`: draws rollouts with a vLLM engine instead of the policy's own `generate`."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from mavis.critics import Critic
from mavis.distributed import join_processes
from mavis.errors import ConfigError, MavisError, MissingPackageError, first_sentence
from mavis.policies.chat import Prompt
from mavis.policies.devices import states_device
from mavis.policies.encoding import prompt_ids
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.generation_config import end_token_ids
from mavis.rollouts.sampler import SampledResponses
from mavis.rollouts.sampling import RolloutSettings
from mavis.vllm import watchdog
from mavis.vllm.request_arguments import BETA, TOP_K, WEIGHTS
from mavis.vllm.served_critic import CONFIG_KEY, check_servable, needs_every_token, weights_fingerprint

_PROCESSOR = "mavis.vllm.logits_processor:MavisLogitsProcessor"
_RESERVED_OPTIONS = (
    *("model", "dtype", "tokenizer", "logits_processors", "additional_config", "generation_config"),
    *("quantization", "kv_cache_dtype", "hf_overrides"),
)
"""Options of `vllm.LLM` that decide how responses are drawn, which the sampler sets or leaves out itself."""
_MAX_REQUESTS = 256


class VllmSampler:
    """Draws rollouts with a vLLM engine in a process of its own, which is restarted for every critic.

    Every request has its own seed, so an interrupted run draws the same responses when it resumes. The policy in this
    process replays the responses for their KL. The engine stops when `collect` is done, when the sampler is closed or
    its `with` block ends, and when this process ends, even if it is killed.

    Args:
        options: of `vllm.LLM`, such as `gpu_memory_utilization`; on an accelerator the policy needs a share too.

    Raises:
        ConfigError: if an option is one that the sampler sets itself.
        MissingPackageError: if vLLM is not installed.

    Examples:
        >>> from mavis.vllm.sampler import VllmSampler
        >>> VllmSampler(dtype="float16")
        Traceback (most recent call last):
            ...
        mavis.errors.ConfigError: dtype is 'float16', but the sampler sets it itself. Hint: leave it out.
        >>> from mavis.training import improve
        >>> with VllmSampler(gpu_memory_utilization=0.5) as sampler:  # doctest: +SKIP
        ...     reports = list(improve(policy, tokenizer, critic, objectives, prompts, "run", sampler=sampler))
    """

    name = "vllm"

    def __init__(self, **options: Any) -> None:
        for option in _RESERVED_OPTIONS:
            if option in options:
                raise ConfigError(
                    f"{option} is {options[option]!r}, but the sampler sets it itself.",
                    "leave it out.",
                )
        if find_spec("vllm") is None:
            raise MissingPackageError(
                "sampling rollouts with vLLM needs vLLM, which is not installed.",
                "pip install vllm, in an environment of its own, or use the sampler `generate`.",
            )
        self._options = options
        self._engine: Any = None
        self._served: tuple[Any, ...] = ()
        self._folder: Path | None = None
        self._watchdog: subprocess.Popen[str] | None = None
        self._model: tuple[tuple[Any, ...], str] = (), ""

    def check(self, policy: Any, critic: Critic | None) -> None:
        """Refuse policies and critics that an engine cannot serve; see `Sampler.check`.

        Raises:
            CriticError: for a critic that cannot be served.
            ConfigError: for several processes, or a policy with adapters.
        """
        if critic is not None:
            check_servable(critic, "critic")
        if (count := join_processes(states_device(policy)).world_size) > 1:
            raise ConfigError(
                f"{count} processes would each start an engine on the same devices.",
                "start one process, or use the sampler `generate`, which supports several.",
            )
        if hasattr(policy, "peft_config"):
            raise ConfigError(
                "the policy has adapters, which the engine would ignore.",
                "merge them first: policy = policy.merge_and_unload().",
            )

    def draw(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        settings: RolloutSettings,
        seed: int,
        *,
        top_k: int | None = None,
        critic: Critic | None = None,
        lam: Tensor | None = None,
    ) -> SampledResponses:
        """Draw one response to each prompt; see `Sampler.draw`. The KL is left to the caller's replay."""
        if settings.min_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {settings.min_new_tokens}, which the sampler {self.name!r} does not support.",
                "use the sampler `generate`, or leave it 0.",
            )
        from vllm import SamplingParams

        ids = prompt_ids(tokenizer, prompts)
        ends = sorted(end_token_ids(policy))
        longest = max(map(len, ids)) + settings.max_new_tokens
        engine = self._engine_for(policy, tokenizer, critic, longest, settings.shard_size)
        limit = int(engine.model_config.max_model_len)
        if longest > limit:  # the engine would silently truncate such a response
            raise ConfigError(
                f"max_new_tokens is {settings.max_new_tokens}, so the longest prompt and its response have {longest} "
                f"tokens, but the engine's max_model_len is {limit}.",
                "use a smaller max_new_tokens, or a larger max_model_len.",
            )
        rows: list[list[float] | None] = lam.tolist() if lam is not None else [None] * len(ids)
        params = [
            SamplingParams(
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=top_k or 0,
                seed=seed + row,
                stop_token_ids=ends,
                ignore_eos=True,  # `stop_token_ids` has all end tokens
                detokenize=False,
                extra_args={WEIGHTS: weights, BETA: 1.0, TOP_K: settings.top_k or 0} if weights is not None else None,
            )
            for row, weights in enumerate(rows)
        ]
        outputs = engine.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        return SampledResponses(ids, [list(output.outputs[0].token_ids) for output in outputs])

    def release(self) -> None:
        """Stop the engine and free its memory; the next draw starts another."""
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
            self._engine = None
            gc.collect()

    def close(self) -> None:
        """Stop the engine and delete the files written for it."""
        self.release()
        if self._watchdog is not None and self._watchdog.stdin is not None:
            with suppress(OSError):  # it may have been killed
                self._watchdog.stdin.close()  # it then kills remaining processes and deletes the folder
            self._watchdog.wait()
        self._watchdog = self._folder = None
        self._model = (), ""

    def __enter__(self) -> VllmSampler:
        """Return the sampler."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the sampler."""
        self.close()

    def _engine_for(self, policy: Any, tokenizer: Any, critic: Critic | None, longest: int, rows: int) -> Any:
        """Return an engine that serves the current weights of policy and critic and fits the longest response."""
        served = _version(policy), _version(critic)
        engine = self._engine
        if engine is not None and self._served == served and longest <= engine.model_config.max_model_len:
            return engine
        self.release()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mavis-vllm-"))
            self._watchdog = subprocess.Popen(
                [sys.executable, watchdog.__file__, str(self._folder)],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,  # so that Ctrl-C does not reach it
            )
        self._engine = self._start(policy, tokenizer, critic, longest, rows, self._folder)
        self._served = served
        return self._engine

    def _start(self, policy: Any, tokenizer: Any, critic: Critic | None, longest: int, rows: int, folder: Path) -> Any:
        # A forked engine would inherit locks whose threads do not exist in it.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # version 2 supports no such logits processors
        from vllm import LLM

        # Kept small, since a value model's buffers are allocated for this many requests of this length.
        limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        length = 1 << (longest - 1).bit_length()
        options: dict[str, Any] = {
            "max_model_len": min(length, limit) if limit else length,
            "max_num_seqs": min(rows, _MAX_REQUESTS),
            "seed": 0,
            "disable_log_stats": True,
        }
        if critic is not None:
            shutil.rmtree(folder / "critic", ignore_errors=True)
            critic.save_pretrained(folder / "critic")
            options |= {"logits_processors": [_PROCESSOR], "additional_config": {CONFIG_KEY: str(folder / "critic")}}
            if needs_every_token(critic):
                options["async_scheduling"] = False
        options |= self._options
        before = set(psutil.Process().children(recursive=True))
        try:
            engine = LLM(
                model=self._model_folder(policy, tokenizer, folder),
                tokenizer=str(folder / "tokenizer"),
                dtype=str(policy.dtype).removeprefix("torch."),
                generation_config="vllm",
                **options,
            )
        except MavisError:
            raise
        except Exception as error:  # vLLM raises many types, and logs the details
            raise ConfigError(
                f"vLLM does not start with {options}: {first_sentence(error)}",
                "see its own messages above, or use the sampler `generate` if vLLM cannot serve this policy.",
            ) from error
        assert self._watchdog is not None
        assert self._watchdog.stdin is not None
        started = set(psutil.Process().children(recursive=True)) - before
        with suppress(OSError):
            self._watchdog.stdin.write("".join(f"{watchdog.process_identity(one)}\n" for one in started))
            self._watchdog.stdin.flush()
        return engine

    def _model_folder(self, policy: Any, tokenizer: Any, folder: Path) -> str:
        """Return the folder that the policy was loaded from; save it if it came from a hub or was changed since."""
        version, model = _version(policy), str(getattr(policy.config, "_name_or_path", ""))
        if self._model[0] != version:
            tokenizer.save_pretrained(folder / "tokenizer")
            policy.config.save_pretrained(folder / "tokenizer")  # vLLM reads the tokenizer's type from it
            if weights_fingerprint(model) != Fingerprint.of(policy).weights:
                model = str(folder / "policy")
                policy.save_pretrained(model)
            self._model = version, model
        return self._model[1]


def _version(module: Any) -> tuple[Any, ...]:
    """Identify a module and its weights; in-place changes of the weights change the result."""
    if module is None:
        return ()
    weights = [*module.parameters(), *module.buffers()]
    return id(module), *((one.data_ptr(), None if one.is_inference() else one._version) for one in weights)
