"""How well does the embedded policy predict held-out stories, compared with its teacher? Writes its model card.

python benchmarks/bench_policy.py --corpus cased.txt --teacher path/to/stories260K --run path/to/work/run.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from lib.results import hardware, write
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from mavis.policies import embedded
from mavis.utils.files import atomic_file
from recipes.embedded_policy.bits_per_byte import bits_per_byte
from recipes.embedded_policy.corpus import read_stories, split_tail

CARD = """\
# The embedded policy

A story LM of {parameters:,} parameters that ships with `mavis`, so that examples, tests and the demo need no
download. It is a Hugging Face Llama (vocabulary {vocabulary:,}, hidden size {hidden}, {layers} layers, {heads}
heads on {key_value_heads} key-value heads, tied embeddings, context {context} tokens), {megabytes:.1f} MB, and
loads by `mavis.policies.embedded.load()`.

## How well it predicts

Bits per byte on held-out stories ({stories} stories, {bytes:,} bytes: the tail of the corpus, never trained on;
each story after its BOS, longer ones through windows of {context} tokens that overlap by half). Lower is better.

| policy | parameters | bits per byte |
|---|---|---|
| embedded | {parameters:,} | {bits:.4f} |
| stories260K | {teacher_parameters:,} | {teacher_bits:.4f} |

The ratio is {ratio:.3f}. The training data differ: the embedded policy has seen the rest of this file many times, and
stories260K, trained on all of TinyStories, may have seen the held-out stories themselves. Measured by
`benchmarks/bench_policy.py`, which writes this card and `benchmarks/results/policy.json`.

## Data and licences

- Real stories: 2.1 MB of TinyStories (Eldan and Li, arXiv 2305.07759), which is under CDLA-Sharing-1.0, as
  redistributed in gusjengis/toy-RNN at e4c7ff8b (`cased.txt`). The last {heldout:.0%} of its bytes is held out.
- Sampled stories: text sampled at temperature {temperature:g} from stories260K (Karpathy's llama2.c, `tinyllamas`;
  converted from icppWorld/icpp_llm at 6c9bf2ee), itself trained on TinyStories. That repository's licence is
  MIT; a licence of the weights themselves is not stated there.
- The code and the weights of this folder come under the package's licence, subject to the above.

## Recipe

`python -m recipes.embedded_policy.main corpus=cased.txt teacher=stories260K`, settings in `pretrain.yaml` beside it:
byte-level BPE trained on the real stories; {real_tokens:,} real and {sampled_tokens:,} sampled tokens, packed into
rows of {length} tokens; {steps:,} steps of {step_tokens:,} tokens, {real_rows_share:.0%} of them real, which makes
{real_epochs:.1f} epochs of the real stories and {sampled_epochs:.1f} of the sampled ones; Muon on the matrices and
AdamW on the rest, bf16 autocast over fp32 weights, a constant learning rate that decays to zero over the
last {decay:.0%}. It took {minutes:.0f} minutes on one core of a shared {cpu} machine, after about
{sample_minutes:.0f} core-minutes of sampling.

## Samples

Not cherry-picked: all rows of one call each, seed {seed}, no top-k, no top-p, at most {new_tokens} new tokens.
At temperature 1 many words and sentences are wrong; at 0.8 more sentences are grammatical, but the story still wanders.

### Temperature 1

{texts}

### Temperature 0.8

{cooler}

## Intended use

It demonstrates and tests how a decoding-time tilt changes the text of a policy, on any laptop. It writes children's
stories in English. It knows no facts, follows no instructions, loses track of characters within a paragraph, and its
output has not been checked for safety. Do not deploy it, and do not take measurements on it as those of a useful LM.
"""


def sample(
    policy: Any, tokenizer: Any, rows: int, new_tokens: int, seed: int, temperature: float
) -> tuple[list[str], float]:
    """Return `rows` stories sampled from BOS, and the share of them that reached an end token."""
    torch.manual_seed(seed)
    ids = torch.full((rows, 1), tokenizer.bos_token_id)
    out = policy.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
    )
    ended = (out == tokenizer.eos_token_id).any(dim=1).float().mean().item()
    return tokenizer.batch_decode(out, skip_special_tokens=True), ended


def quoted(texts: list[str]) -> str:
    """Format texts as Markdown quotes, separated by rules."""
    return "\n\n---\n\n".join("> " + text.replace("\n", "\n>\n> ") for text in texts)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for the embedded policy and one for the teacher."""
    _, heldout = split_tail(read_stories(arguments.corpus), arguments.heldout)
    rows = []
    for name, folder in (("embedded", embedded.path()), ("stories260K", Path(arguments.teacher))):
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        context = policy.config.max_position_embeddings
        tic = time.perf_counter()
        bits = bits_per_byte(policy, tokenizer, heldout, context)
        rows.append(
            {
                "policy": name,
                "parameters": sum(p.numel() for p in policy.parameters()),
                "weight_file_bytes": (folder / "model.safetensors").stat().st_size,
                "bits_per_byte": round(bits, 5),
                "context": context,
                "stories": len(heldout),
                "bytes": sum(len(story.encode()) for story in heldout),
                "seconds": round(time.perf_counter() - tic, 1),
            }
        )
    rows[0]["ratio"] = round(rows[0]["bits_per_byte"] / rows[1]["bits_per_byte"], 5)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="the text file of the recipe")
    parser.add_argument("--teacher", required=True, help="the folder of stories260K")
    parser.add_argument("--run", required=True, help="the run.json that the recipe wrote")
    parser.add_argument("--sample-minutes", type=float, required=True, help="core-minutes of sampling")
    parser.add_argument("--heldout", type=float, default=0.05)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows = measure(arguments)
    policy, tokenizer = embedded.load()
    texts, ended = sample(policy, tokenizer, arguments.samples, arguments.new_tokens, arguments.seed, 1.0)
    cooler, _ = sample(policy, tokenizer, arguments.samples, arguments.new_tokens, arguments.seed, 0.8)
    rows[0]["samples_ended"] = ended
    recipe = OmegaConf.load(Path(__file__).parents[1] / "recipes" / "embedded_policy" / "pretrain.yaml")
    run = json.loads(Path(arguments.run).read_text(encoding="utf-8"))
    tokens = run["steps"] * run["step_tokens"]
    config = policy.config
    card = CARD.format(
        parameters=rows[0]["parameters"],
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        context=config.max_position_embeddings,
        megabytes=sum(f.stat().st_size for f in embedded.path().iterdir() if f.is_file()) / 1e6,
        stories=rows[0]["stories"],
        bytes=rows[0]["bytes"],
        bits=rows[0]["bits_per_byte"],
        teacher_parameters=rows[1]["parameters"],
        teacher_bits=rows[1]["bits_per_byte"],
        ratio=rows[0]["ratio"],
        heldout=arguments.heldout,
        temperature=recipe.sample.temperature,
        real_tokens=run["real_tokens"],
        sampled_tokens=run["sampled_tokens"],
        length=recipe.recipe.length,
        steps=run["steps"],
        step_tokens=run["step_tokens"],
        real_rows_share=run["real_rows_share"],
        real_epochs=tokens * run["real_rows_share"] / run["real_tokens"],
        sampled_epochs=tokens * (1 - run["real_rows_share"]) / run["sampled_tokens"],
        decay=recipe.recipe.decay,
        minutes=run["minutes"],
        sample_minutes=arguments.sample_minutes,
        cpu=hardware()["cpu"],
        seed=arguments.seed,
        new_tokens=arguments.new_tokens,
        texts=quoted(texts),
        cooler=quoted(cooler),
    )
    with atomic_file(embedded.path() / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    settings = {k: v for k, v in vars(arguments).items() if k not in ("corpus", "teacher", "run")}
    write("policy", {**settings, "training": run}, rows)


if __name__ == "__main__":
    main()
