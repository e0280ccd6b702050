"""Wherever `generate` goes: every score is tilted as if its prefix were read alone and at once, or refused by name.

What is expected is computed without a cache: one fresh forward pass for each prefix, the critic's values on the state
it ends with, and the tilt written out.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    LlamaConfig,
    LogitsProcessorList,
    TextIteratorStreamer,
    pipeline,
)

import mavis
from mavis import HiddenStateCritic, MavisTilt
from mavis.errors import DecodingError, PolicyError

MakeCritic = Callable[..., HiddenStateCritic]
ByHand = Callable[..., torch.Tensor]
Inputs = dict[str, torch.Tensor]
Seen = list[tuple[torch.Tensor, torch.Tensor]]

KINDS = {
    "plain": {},
    "memory": {"memory": 8},
    "conditioned": {"composition": "conditioned"},
    "conditioned memory": {"memory": 8, "composition": "conditioned"},
    "token": {"readout": "token"},
    "candidates": {"readout": "candidates"},
}
EITHER = ("plain", "conditioned memory", "candidates")
LAM = [1.5, 0.6]


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each kind of critic in turn."""
    return request.param


@pytest.fixture(params=[KINDS[name] for name in EITHER], ids=EITHER)
def either(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The least and the most that a critic reads."""
    return request.param


def tilt_for(critic: HiddenStateCritic, top_k: int | None = 7, **options: Any) -> MavisTilt:
    return MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=top_k, **options)


def processed(policy: Any, inputs: Inputs, *tilts: MavisTilt, **arguments: Any) -> Seen:
    """Generate, and return what came out of the processors with the ids it was for."""
    seen: Seen = []

    def keep(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((input_ids, scores))
        return scores

    arguments = {"do_sample": False, "max_new_tokens": 6} | arguments
    sampling = {"top_k": 0} if arguments["do_sample"] else {}
    policy.generate(**inputs, **sampling, **arguments, logits_processor=LogitsProcessorList([*tilts, keep]))
    return seen


def expect_tilted(
    by_hand: ByHand,
    policy: Any,
    critic: HiddenStateCritic,
    seen: Seen,
    inputs: Inputs,
    lam: list[float] = LAM,
    top_k: int | None = 7,
    reference: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Compare every row of every step with what it would have been alone."""
    assert seen
    for ids, logprobs in seen:
        copies = len(ids) // len(inputs["input_ids"])
        for row in range(len(ids)):
            asked = inputs["attention_mask"][row // copies]
            mask = torch.cat([asked, asked.new_ones(ids.shape[1] - len(asked))])
            scores = None if reference is None else reference(ids[row][mask.bool()][None], asked)
            expected = by_hand(policy, critic, ids[row], mask, lam, top_k, prompt=int(asked.sum()), reference=scores)
            torch.testing.assert_close(logprobs[row].double(), expected, atol=1e-4, rtol=1e-4)


# Assisted decoding


def smaller(vocabulary: int = 40) -> Any:
    """A draft model that agrees with nobody for long."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def noisy(policy: Any) -> Any:
    """A draft model that often agrees: some drafts are taken in full, some in part, some not at all."""
    torch.manual_seed(4)
    draft = copy.deepcopy(policy)
    with torch.no_grad():
        draft.get_output_embeddings().weight.add_(torch.randn_like(draft.get_output_embeddings().weight) * 0.4)
    return draft


ASSISTANCE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "another model": lambda policy: {"assistant_model": smaller()},
    "a similar model": lambda policy: {"assistant_model": noisy(policy)},
    "the policy itself": lambda policy: {"assistant_model": policy},
    "its first layer": lambda policy: {"assistant_early_exit": 1},
    "prompt lookup": lambda policy: {"prompt_lookup_num_tokens": 3},
}
REPETITIVE = {"input_ids": torch.tensor([[1, 7, 3, 9, 7, 3, 9, 7, 3]]), "attention_mask": torch.ones(1, 9).long()}
PADDED = {"input_ids": torch.tensor([[0, 0, 1, 7, 3, 9, 7, 3]]), "attention_mask": torch.tensor([[0, 0] + [1] * 6])}


@pytest.mark.parametrize("inputs", [REPETITIVE, PADDED], ids=["prompt", "padded prompt"])
@pytest.mark.parametrize("how", ASSISTANCE)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_drafts_change_no_score_of_a_token_that_is_taken(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    kind: dict[str, Any],
    how: str,
    do_sample: bool,
    inputs: Inputs,
) -> None:
    policy = copy.deepcopy(llama)
    critic = make_critic(policy, **kind)
    arguments = {"do_sample": do_sample, "max_new_tokens": 14, **({"top_k": 0} if do_sample else {})}
    torch.manual_seed(0)
    with critic.attach(policy):
        tilt = tilt_for(critic)
        plain = policy.generate(**inputs, **arguments, logits_processor=tilt)
        for _ in range(2):  # what the first has left behind does not reach the second
            out = policy.generate(
                **inputs,
                **arguments,
                **ASSISTANCE[how](policy),
                logits_processor=tilt,
                return_dict_in_generate=True,
                output_scores=True,
            )
            if not do_sample:
                assert torch.equal(out.sequences, plain)
            start = inputs["input_ids"].shape[1]
            assert len(out.scores) == out.sequences.shape[1] - start == 14
            seen = [(out.sequences[:, : start + step], scores) for step, scores in enumerate(out.scores)]
            expect_tilted(tilted_by_hand, policy, critic, seen, inputs)


def test_the_facade_hands_assistance_on(llama: Any, make_critic: MakeCritic) -> None:
    steer: dict[str, Any] = {"critic": make_critic(llama, memory=8), "weights": [1.0, 0.4], "beta": 1.5}
    steer |= {"do_sample": False, "max_new_tokens": 14}
    plain = mavis.generate(llama, REPETITIVE, **steer)
    for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": smaller()}):
        assert torch.equal(mavis.generate(llama, REPETITIVE, **steer, **extra), plain)


@pytest.mark.parametrize("how", ASSISTANCE)
def test_the_kl_of_assisted_decoding_is_refused(llama: Any, make_critic: MakeCritic, how: str) -> None:
    policy = copy.deepcopy(llama)
    critic = make_critic(policy)
    tilt = tilt_for(critic, record_kl=True)
    with critic.attach(policy), pytest.raises(DecodingError, match="record_kl is True, but generate is assisted"):
        policy.generate(
            **REPETITIVE, do_sample=False, max_new_tokens=9, logits_processor=tilt, **ASSISTANCE[how](policy)
        )


# Several at once


def test_threads_on_one_policy_have_a_memory_each(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    critic = make_critic(llama, **either)
    ways: list[tuple[Inputs, dict[str, Any]]] = [
        (prompts, {"do_sample": False, "num_beams": 2}),
        (prompts, {"do_sample": False, "use_cache": False}),
        ({name: tensor[1:2] for name, tensor in prompts.items()}, {"do_sample": False}),
        ({name: tensor[2:] for name, tensor in prompts.items()}, {"do_sample": False}),
    ]
    results: dict[int, Seen] = {}
    with critic.attach(llama):
        shared = tilt_for(critic)
        threads = [
            threading.Thread(
                target=lambda n=n: results.update(
                    {n: processed(llama, ways[n][0], shared, max_new_tokens=12, **ways[n][1])}
                )
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for n, (inputs, _) in enumerate(ways):
        expect_tilted(tilted_by_hand, llama, critic, results[n], inputs)


def test_two_critics_on_two_policies_and_two_on_one(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    """Two tilts of one policy act one after the other: the second takes the first's distribution for the reference."""
    other = copy.deepcopy(llama)
    mine, second, theirs = (
        make_critic(llama, **either),
        make_critic(llama, seed=1, **either),
        make_critic(other, **either),
    )
    with mine.attach(llama), theirs.attach(other), second.attach(llama):
        for policy, critic in ((llama, mine), (other, theirs), (llama, second)):
            expect_tilted(tilted_by_hand, policy, critic, processed(policy, prompts, tilt_for(critic)), prompts)
        seen = processed(llama, prompts, tilt_for(mine, top_k=None), tilt_for(second, top_k=None))
    for ids, logprobs in seen:
        for row, asked in enumerate(prompts["attention_mask"]):
            mask = torch.cat([asked, asked.new_ones(ids.shape[1] - len(asked))])
            expected = None
            for critic in (mine, second):
                expected = tilted_by_hand(
                    llama, critic, ids[row], mask, LAM, None, prompt=int(asked.sum()), reference=expected
                )
            torch.testing.assert_close(logprobs[row].double(), expected, atol=1e-4, rtol=1e-4)


# Classifier-free guidance


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "negative",
    [None, torch.tensor([[1, 8, 8, 2, 6]]).repeat(3, 1), torch.tensor([[2, 9]]).repeat(3, 1)],
    ids=["last token", "as long as the prompts", "shorter"],
)
def test_guidance_is_part_of_the_reference(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    either: dict[str, Any],
    negative: torch.Tensor | None,
    use_cache: bool,
) -> None:
    """The state of the conditional pass is read, though the unconditional one comes last in each step."""
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 4, 2], [1, 7, 3, 3, 20], [2, 1, 30, 12, 8]])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    critic = make_critic(llama, **either)

    def guided(ids: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        prompt = len(asked)
        other = ids[:, prompt - 1 : prompt] if negative is None else negative[:1]
        with torch.no_grad():
            conditional = llama(ids).logits[0, -1].log_softmax(-1)
            unconditional = llama(torch.cat([other, ids[:, prompt:]], 1)).logits[0, -1].log_softmax(-1)
        return unconditional + 1.5 * (conditional - unconditional)

    with critic.attach(llama):
        seen = processed(
            llama, inputs, tilt_for(critic), guidance_scale=1.5, negative_prompt_ids=negative, use_cache=use_cache
        )
    expect_tilted(tilted_by_hand, llama, critic, seen, inputs, reference=guided)


# Static caches and compilers


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_static_cache_is_as_good_as_any(
    policy: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    either: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    critic = make_critic(policy, **either)
    one = {"input_ids": torch.tensor([[6]]), "attention_mask": torch.ones(1, 1).long()}
    with critic.attach(policy):
        for inputs in (prompts, one, prompts):
            seen = processed(policy, inputs, tilt_for(critic), cache_implementation="static", **arguments)
            expect_tilted(tilted_by_hand, policy, critic, seen, inputs)


def test_padding_is_told_by_a_static_caches_mask_too(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs
) -> None:
    critic = make_critic(llama, memory=8)
    ids = torch.tensor([[0, 4, 5], [0, 4, 5]])  # in the second row the first is padding
    alike = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    right = {name: tensor.flip(1) for name, tensor in prompts.items()}
    with critic.attach(llama):
        seen = processed(llama, alike, tilt_for(critic), cache_implementation="static", num_beams=3)
        expect_tilted(tilted_by_hand, llama, critic, seen, alike)
        with pytest.raises(DecodingError, match="padded on the right"):
            processed(llama, right, tilt_for(critic), cache_implementation="static")


@pytest.fixture
def compilers() -> Iterator[None]:
    """Compiled code that does not outlive a test."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers about themselves
        yield
    torch.compiler.reset()


def auto_compiled(policy: Any, **options: Any) -> dict[str, Any]:
    """What makes `generate` compile the decoding steps, as it does by itself with a static cache on an accelerator."""
    config = CompileConfig(backend="eager", mode=None, **options)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def compiled_in_place(policy: Any) -> dict[str, Any]:
    policy.compile(backend="eager")
    return {}


def compiled_forward(policy: Any) -> dict[str, Any]:
    policy.forward = torch.compile(policy.forward, backend="eager")
    return {}


def compiled_inside(policy: Any) -> dict[str, Any]:
    policy.model.compile(backend="eager")
    return {}


COMPILERS = [auto_compiled, compiled_in_place, compiled_forward, compiled_inside]


@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("compiled", COMPILERS)
def test_compiled_passes_are_seen_by_a_critic_that_was_attached_before(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    compiled: Callable[..., dict[str, Any]],
) -> None:
    """Also in a thread that came after the compiler."""
    policy = copy.deepcopy(llama)
    critic = make_critic(policy, memory=8, composition="conditioned")
    with critic.attach(policy):
        arguments = compiled(policy)
        results: list[Seen] = []

        def run() -> None:
            results.append(processed(policy, prompts, tilt_for(critic), max_new_tokens=3, **arguments))

        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(results) == 2
    for seen in results:
        expect_tilted(tilted_by_hand, llama, critic, seen, prompts)


@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("compiled", COMPILERS)
def test_compiled_passes_are_seen_or_refused_by_a_critic_that_is_attached_later(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    compiled: Callable[..., dict[str, Any]],
) -> None:
    """Also one whose forerunner's hooks were compiled in."""
    policy = copy.deepcopy(llama)
    arguments = compiled(policy)
    policy.generate(**prompts, do_sample=False, max_new_tokens=4, **arguments)
    refusals = []
    for seed in range(2):
        critic = make_critic(policy, seed=seed)
        with critic.attach(policy):
            try:
                seen = processed(policy, prompts, tilt_for(critic), max_new_tokens=3, **arguments)
            except DecodingError as error:
                refusals.append(str(error))
            else:
                expect_tilted(tilted_by_hand, llama, critic, seen, prompts)
    assert all("before" in refusal and "compil" in refusal for refusal in refusals)


@pytest.mark.usefixtures("compilers")
def test_a_compiled_wrapper_is_the_policy_inside(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs
) -> None:
    policy = torch.compile(copy.deepcopy(llama), backend="eager")
    critic = make_critic(policy, memory=8)
    with critic.attach(policy):
        expect_tilted(tilted_by_hand, llama, critic, processed(policy, prompts, tilt_for(critic)), prompts)


@pytest.mark.usefixtures("compilers")
def test_a_graph_that_may_not_be_broken_is_refused(llama: Any, make_critic: MakeCritic, prompts: Inputs) -> None:
    policy = copy.deepcopy(llama)
    critic = make_critic(policy)
    with critic.attach(policy), pytest.raises(Exception, match="reads the hidden states.*compile with fullgraph=False"):
        processed(policy, prompts, tilt_for(critic), **auto_compiled(policy, fullgraph=True))


# Streams, pipelines, chats


def test_streams_pipelines_and_chats(
    tiny_policy: Any, tiny_tokenizer: Any, make_tiny_critic: Callable[..., HiddenStateCritic]
) -> None:
    critic = make_tiny_critic(scale=2.0)
    steer: dict[str, Any] = {"weights": {"good": 2.0}, "beta": 2.0, "top_k": None}
    text = "the little girl went to the park"
    inputs = dict(tiny_tokenizer([text], return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    expected = mavis.generate(tiny_policy, inputs, critic=critic, do_sample=False, max_new_tokens=8, **steer)
    plain = tiny_policy.generate(**inputs, do_sample=False, max_new_tokens=8)
    start = inputs["input_ids"].shape[1]
    response = tiny_tokenizer.decode(expected[0, start:], skip_special_tokens=True)
    assert not torch.equal(expected, plain)

    with critic.attach(tiny_policy):
        arguments = {"do_sample": False, "max_new_tokens": 8, "logits_processor": MavisTilt(critic=critic, **steer)}
        streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = threading.Thread(target=tiny_policy.generate, kwargs=inputs | arguments | {"streamer": streamer})
        thread.start()
        assert "".join(streamer) == response
        thread.join()

        pipe = pipeline("text-generation", model=tiny_policy, tokenizer=tiny_tokenizer)
        (answer,) = pipe(text, return_full_text=False, **arguments)
        assert answer["generated_text"].strip() == response

    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chat = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], return_tensors="pt", return_dict=True, add_generation_prompt=True
    )
    told = mavis.generate(tiny_policy, chat, critic=critic, do_sample=False, max_new_tokens=8, **steer)
    assert torch.equal(told, expected)


# Policies that are wrapped, quantised or kept elsewhere


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "embed_tokens", "lm_head"]])
def test_an_adapted_policy_is_attached_to_as_it_is_used(
    llama: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    either: dict[str, Any],
    targets: list[str],
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about adapted embeddings
        policy = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    critic = make_critic(policy, **either)
    for attached in (policy, policy.get_base_model()):
        with critic.attach(attached):
            expect_tilted(tilted_by_hand, policy, critic, processed(policy, prompts, tilt_for(critic)), prompts)
    steer: dict[str, Any] = {"critic": critic, "weights": [1.0, 0.4], "beta": 1.5, "do_sample": False}
    tilted = mavis.generate(policy, prompts, **steer, max_new_tokens=6)
    with policy.disable_adapter():
        assert not torch.equal(mavis.generate(policy, prompts, **steer, max_new_tokens=6), tilted)


@pytest.mark.parametrize("prompt", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_learnt_prompts_are_refused(llama: Any, make_critic: MakeCritic, prompts: Inputs, prompt: str) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, prompt)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about itself
        policy = peft.get_peft_model(copy.deepcopy(llama), config).eval()
        critic = make_critic(policy)
        with critic.attach(policy), pytest.raises(DecodingError, match="learnt prompts|inputs_embeds"):
            processed(policy, prompts, tilt_for(critic))


@pytest.mark.parametrize("kind", [KINDS["plain"], KINDS["conditioned memory"]], ids=["plain", "conditioned memory"])
def test_a_quantised_policy_is_read_like_any(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, kind: dict[str, Any]
) -> None:
    """Its weights are no tensors. Its scores depend on the whole batch, so its own states and scores are compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this elsewhere
        policy = torch.ao.quantization.quantize_dynamic(copy.deepcopy(llama), {torch.nn.Linear}, dtype=torch.qint8)
    critic = make_critic(policy, **kind)
    with critic.attach(policy):
        out = policy.generate(
            **prompts,
            do_sample=False,
            max_new_tokens=6,
            logits_processor=tilt_for(critic, top_k=None),
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            output_hidden_states=True,
        )
    states = torch.stack([step[-1][:, -1] for step in out.hidden_states], dim=1)
    inputs = critic.inputs_of_responses(states)
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        tilt = critic.tilt_of_inputs(inputs[:, step], None, torch.tensor([LAM] * 3))
        torch.testing.assert_close(scores, (logits + tilt).log_softmax(-1), atol=1e-4, rtol=1e-4)
    trained_on_another = make_critic(llama)
    with pytest.warns(UserWarning, match="not the weights of the one this critic was trained on"):
        trained_on_another.attach(policy).detach()


@pytest.mark.parametrize("place", ["device map", "hooks", "offloaded", "on disk"])
def test_weights_may_be_kept_elsewhere(
    policy: Any,
    make_critic: MakeCritic,
    tilted_by_hand: ByHand,
    prompts: Inputs,
    either: dict[str, Any],
    place: str,
    tmp_path: Path,
) -> None:
    """Without a warning about other weights, and with the same table of tokens."""
    import accelerate

    critic = make_critic(policy, **either)
    if place == "device map":
        policy.save_pretrained(tmp_path)
        placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    elif place == "hooks":
        placed = accelerate.dispatch_model(copy.deepcopy(policy), {"": "cpu"}, force_hooks=True)
    elif place == "offloaded":
        placed = accelerate.cpu_offload(copy.deepcopy(policy), execution_device="cpu")
    else:
        placed = accelerate.disk_offload(copy.deepcopy(policy), tmp_path, execution_device="cpu")
    if "readout" not in either:
        assert torch.equal(make_critic(placed, **either).token_table, critic.token_table)
    with critic.attach(placed):
        expect_tilted(tilted_by_hand, policy, critic, processed(placed, prompts, tilt_for(critic)), prompts)


def test_a_policy_without_weights_is_refused(llama: Any, make_critic: MakeCritic) -> None:
    empty = copy.deepcopy(llama).to("meta")
    with pytest.raises(PolicyError, match="LlamaForCausalLM is on device 'meta', where there are no weights"):
        make_critic(empty)
    with pytest.warns(UserWarning, match="not the weights"), pytest.raises(PolicyError, match="is on device 'meta'"):
        make_critic(llama).attach(empty)


# Families


ENDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "hidden_size": 32}
SIZES = ENDS | {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 48}
SHARED = WIDE | {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma": SHARED | {"head_dim": 8},
    "Gemma2": SHARED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "Gemma3Text": SHARED | {"head_dim": 8, "sliding_window": 4},
    "OPT": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "GPTNeoX": WIDE,
    "Mistral": SHARED | {"sliding_window": 4},
    "Falcon": SIZES,
    "Bloom": SIZES,
    "Phi": WIDE,
    "Cohere": SHARED | {"logit_scale": 0.3},
    "Granite": SHARED | {"logits_scaling": 3.0},
    "Mamba": ENDS | {"num_hidden_layers": 2, "state_size": 4},
    "Jamba": SHARED | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_read_where_its_scores_are_made(
    make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any], family: str
) -> None:
    """Also where logits are scaled or capped, states are projected, or the window is shorter than the sequence."""
    torch.manual_seed(1)
    policy = (
        AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**FAMILIES[family]))
        .eval()
        .requires_grad_(False)
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    critic = make_critic(policy, **either)
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}]
    with critic.attach(policy):
        for arguments in [*ways, {"cache_implementation": "static"}]:
            seen = processed(policy, prompts, tilt_for(critic), **arguments)
            expect_tilted(tilted_by_hand, policy, critic, seen, prompts)
        if family not in ("Mamba", "Jamba"):  # generate refuses them
            arguments = {"do_sample": False, "max_new_tokens": 12, "logits_processor": tilt_for(critic)}
            plain = policy.generate(**REPETITIVE, **arguments)
            assert torch.equal(policy.generate(**REPETITIVE, **arguments, prompt_lookup_num_tokens=3), plain)


def test_states_that_nobody_counts_are_refused(make_critic: MakeCritic, prompts: Inputs) -> None:
    config = transformers.RwkvConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        context_length=64,
        eos_token_id=None,
    )
    policy = AutoModelForCausalLM.from_config(config).eval()
    critic = make_critic(policy)
    with critic.attach(policy), pytest.raises(DecodingError, match="states that are kept outside past_key_values"):
        processed(policy, prompts, tilt_for(critic))


# What is left of generate


@pytest.mark.parametrize("chunk", [2, 3])
def test_prompts_may_be_read_in_chunks(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, chunk: int
) -> None:
    """A last chunk of one token cannot be told from the next step of a response, which only a memory has to know."""
    for kind in KINDS.values():
        critic = make_critic(llama, **kind)
        with critic.attach(llama):
            if chunk == 2 and "memory" in kind:
                with pytest.raises(DecodingError, match="must not end with a chunk of one token"):
                    processed(llama, prompts, tilt_for(critic), prefill_chunk_size=chunk)
            else:
                seen = processed(llama, prompts, tilt_for(critic), prefill_chunk_size=chunk)
                expect_tilted(tilted_by_hand, llama, critic, seen, prompts)


def test_a_second_turn_goes_on_from_the_cache_of_the_first(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    """What the user says next is part of the prompt, where a memory begins anew."""
    critic = make_critic(llama, **either)
    arguments = {"do_sample": False, "max_new_tokens": 4, "logits_processor": tilt_for(critic)}
    with critic.attach(llama):
        first = llama.generate(**prompts, **arguments, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6], [7, 8], [9, 9]])], dim=1)
        asked = prompts["attention_mask"]
        turn = {"input_ids": ids, "attention_mask": torch.cat([asked, asked.new_ones(3, 6)], dim=1)}
        seen = processed(llama, turn, tilt_for(critic), past_key_values=first.past_key_values)
    expect_tilted(tilted_by_hand, llama, critic, seen, turn)


def test_a_decoding_loop_of_the_callers_is_as_good_as_generates_own(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    def loop(model: Any, input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        return type(model)._sample(model, input_ids, **others)

    critic = make_critic(llama, **either)
    with critic.attach(llama):
        seen = processed(llama, prompts, tilt_for(critic), custom_generate=loop)
    expect_tilted(tilted_by_hand, llama, critic, seen, prompts)


def test_a_processor_that_runs_the_policy_itself_changes_nothing(
    llama: Any, make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any]
) -> None:
    class LooksElsewhere(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            llama(input_ids.flip(0))
            return scores

    critic = make_critic(llama, **either)
    with critic.attach(llama):
        seen = processed(llama, prompts, LooksElsewhere(), tilt_for(critic))
    expect_tilted(tilted_by_hand, llama, critic, seen, prompts)


def test_continuous_batching_is_refused(llama: Any, make_critic: MakeCritic) -> None:
    """It asks no processor, so the pass itself has to say so; `block_table` is what only its passes are given."""
    with make_critic(llama).attach(llama), pytest.raises(DecodingError, match="continuous batching.*detach the critic"):
        llama(torch.tensor([[1, 2]]), block_table=None)
