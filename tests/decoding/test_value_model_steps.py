"""Steps tilted by a value model: the paper's, and what the model keeps between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mavis import MavisTilt
from tests.decoding.steps import Inputs, MakeCritic, follow


@pytest.mark.parametrize("readout", ["token", "candidates"])
def test_what_a_value_model_has_read_is_let_go_of_when_the_generation_is_over(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, readout: str
) -> None:
    critic: Any = make_critic(llama, readout=readout)
    tilt = MavisTilt([1.0, 0.4], critic, beta=1.5, top_k=7)
    with critic.attach(llama):
        out = llama.generate(
            **prompts, do_sample=False, max_new_tokens=3, logits_processor=tilt, return_dict_in_generate=True
        )
        kept = critic._reader._thread.kept
        assert (
            kept.length == prompts["input_ids"].shape[1] + 2
        )  # no candidate, and not the last token, which none follows
        del out
        assert critic._reader._thread.kept is None


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("objectives", [1, 2])
def test_a_step_is_the_papers(
    llama: Any, make_critic: MakeCritic, prompts: Inputs, temperature: float, objectives: int
) -> None:
    """Divide by T, keep the top k, add β Σ_m w_m V_m of every candidate read after the prefix, and normalise."""
    critic: Any = make_critic(llama, ("a", "b")[:objectives], readout="candidates", hidden=0)
    weights, beta, top_k = [0.8, 0.2][:objectives], 2.0, 6
    tilt = MavisTilt(weights, critic, beta=beta, top_k=top_k, temperature=temperature)
    torch.manual_seed(0)
    with critic.attach(llama):
        keep = follow(llama, prompts, tilt, do_sample=True, temperature=temperature)
    for ids, processed in keep.seen:
        generated = ids.shape[1] - prompts["input_ids"].shape[1]
        for row, asked in enumerate(prompts["attention_mask"]):
            prefix = ids[row][torch.cat([asked, torch.ones(generated, dtype=torch.long)]).bool()]
            with torch.no_grad():
                scores = llama(prefix[None]).logits[0, -1] / temperature
                kept, candidates = scores.topk(top_k)
                values = torch.stack(
                    [
                        critic.heads(
                            torch.nn.functional.layer_norm(
                                critic.trunk(torch.cat([prefix, token[None]])[None]).last_hidden_state[0, -1], (16,)
                            )
                        )[:, 0]
                        for token in candidates
                    ]
                )
                probs = (kept + beta * (values @ torch.tensor(weights))).softmax(-1)
            ours = (processed[row] / temperature).softmax(-1)
            torch.testing.assert_close(ours[candidates], probs, atol=1e-6, rtol=1e-5)
            assert float(ours.sum()) == pytest.approx(1.0)
