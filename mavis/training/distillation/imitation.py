"""The error of a student's values against its teachers' recorded ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mavis.critics.head_critic import HeadCritic
from mavis.training.distillation.recordings import Recordings
from mavis.training.regression import explained_share
from mavis.training.rollout_tensors import ShardedRollouts

_BETWEEN = 20.0
"""Weight of differences between candidates, relative to what all candidates of a step share and no tilt depends on."""


class Imitation(nn.Module):
    """The squared error of a student's values against the recorded ones, step by step.

        ((E_a δ_m)² + 20 · Var_a δ_m) / scale_m²,     δ_m = Q_m(s_t, a) − Q_m^teacher(s_t, a),  a ∼ π_ref

    over the candidates of a step. The first term is the state's value; the second is all that a tilt depends on, and is
    smaller.

    Args:
        student: a critic whose values of all tokens are one product with their embeddings.
        embeddings: (V, E) float32, the e_a of `token_embeddings`.
        scale: (M,) float32 > 0, the standard deviation of the teachers' values, so that no objective dominates another.
    """

    def __init__(self, student: HeadCritic, embeddings: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("embeddings", embeddings, persistent=False)

    def values(self, batch: Recordings) -> Tensor:
        """Compute the student's values of the candidates, (B, T, K, M), with gradients."""
        embeddings, projection = self.embeddings, self.student.projection
        assert isinstance(embeddings, Tensor)
        assert projection is not None
        heads = self.student.heads(batch.inputs_of(self.student))
        known, inverse = batch.candidate_ids.unique(return_inverse=True)  # most candidates occur many times
        tokens = F.embedding(inverse, projection(embeddings[known]))
        return torch.einsum("btmr,btkr->btkm", heads[..., :-1], tokens) + heads[..., None, :, -1]

    def forward(self, batch: Recordings) -> tuple[Tensor, Tensor]:
        """Return weighted squared errors and weights of each step, (B, T, M) each."""
        weight = batch.is_response[:, :, None].expand(-1, -1, batch.values.shape[-1]).float()
        assert isinstance(self.scale, Tensor)
        wrong, probs = (self.values(batch) - batch.values) / self.scale, batch.logprobs.exp()
        common = torch.einsum("btk,btkm->btm", probs, wrong)
        between = torch.einsum("btk,btkm->btm", probs, (wrong - common[:, :, None]).square())
        return (common.square() + _BETWEEN * between) * weight, weight


@torch.no_grad()
def explained(
    imitation: Imitation, recordings: ShardedRollouts[Recordings], index: Tensor, batch_size: int
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Compute the share of the variance of the recorded values that a student explains.

        1 − E[(Q − Q^teacher)²] / Var[Q^teacher],     over all steps s_t and a ∼ π_ref among the candidates

    Args:
        imitation: holds the student.
        recordings: of all processes.
        index: (n,) integer, the held-out rollouts.
        batch_size: rollouts at once.

    Returns:
        The share by objective, and the same of differences to the mean of a step's candidates.
    """
    student = imitation.student
    sums = torch.zeros(7, len(student.objectives), dtype=torch.float64)
    for some in index.split(batch_size):
        batch = recordings.rows(some).to(student.reward_mean.device)
        probs, taught = batch.logprobs.exp().double()[batch.is_response], batch.values.double()[batch.is_response]
        wrong = imitation.values(batch)[batch.is_response] - taught
        means = [torch.einsum("sk,skm->sm", probs, x) for x in (taught, taught**2, wrong, wrong**2)]
        moments = [*means, means[0] ** 2, means[2] ** 2, torch.ones_like(means[0])]
        sums = sums + torch.stack(moments).sum(1).cpu()
    mean, second, _, error, common, common_error, steps = recordings.processes.all_reduce_sum(sums)
    mean, second, error, common, common_error = (x / steps for x in (mean, second, error, common, common_error))
    return (
        explained_share(student.objectives, error, second - mean**2),
        explained_share(student.objectives, error - common_error, second - common),
    )
