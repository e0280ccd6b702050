"""The small network of a hidden-state critic: one head per objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ValueHeads(nn.Module):
    """M independent two-layer heads, laid side by side so that one matrix product serves them all.

        z = layer_norm(h);  x_m = silu(W_m z + b_m);  (A_m, V_m) = U_m x_m + c_m

    The last layer starts at zero, so a new critic predicts 0 everywhere and tilts nothing.

    Args:
        input_size: H, size of the hidden state.
        objectives: M.
        hidden: width D of each head.
        rank: r, size of a token's vector.
    """

    def __init__(self, input_size: int, objectives: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.objectives, self.hidden, self.rank = objectives, hidden, rank
        first = nn.Linear(input_size, objectives * hidden)
        # Laid out as (H, M·D): for the few rows of a decoding step this product is half as dear as the transposed one.
        self.inner = nn.Parameter(first.weight.detach().T.contiguous())
        self.inner_bias = nn.Parameter(first.bias.detach())
        self.outer = nn.Parameter(torch.zeros(objectives, hidden, rank + 1))
        self.bias = nn.Parameter(torch.zeros(objectives, rank + 1))

    def forward(self, states: Tensor) -> Tensor:
        """Compute (A_m, V_m) of every objective.

        Args:
            states: (..., H), floating.

        Returns:
            (..., M, r + 1) float32: A_m in the first r places, V_m in the last.
        """
        inner = self._inner(states)
        return torch.einsum("...md,mdr->...mr", inner, self.outer) + self.bias

    def mixed(self, states: Tensor, lam: Tensor) -> Tensor:
        """Compute Σ_m λ_m (A_m, V_m) without forming the single objectives.

        Args:
            states: (B, H), floating.
            lam: (B, M), λ = β·w in 1 / reward.

        Returns:
            (B, r + 1) float32.
        """
        weighted = self._inner(states) * lam[:, :, None]
        return torch.addmm(lam @ self.bias, weighted.flatten(1), self.outer.flatten(0, 1))

    def _inner(self, states: Tensor) -> Tensor:
        # States of large models differ in scale from token to token; layer norm makes one learning rate fit all.
        normed = F.layer_norm(states.float(), states.shape[-1:])
        inner = torch.addmm(self.inner_bias, normed.flatten(0, -2), self.inner)
        return F.silu(inner).view(*states.shape[:-1], self.objectives, self.hidden)
