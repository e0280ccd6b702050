"""Value heads: one small network per output, optionally conditioned on λ."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ValueHeads(nn.Module):
    """O independent two-layer heads, stored side by side so that one matrix product computes all of them.

        x_o = silu(W_o z + b_o);  (A_o, V_o) = U_o x_o + c_o

    Heads that read λ scale and shift the input of the silu, which is unchanged at λ = 0:

        x_o = silu((1 + γ_o) ∘ (W_o z + b_o) + δ_o),  (γ_o, δ_o) = C_o φ(λ),  φ(λ) = (λ / (1 + |λ|), log(1 + |λ|))

    The last layer is initialised with zeros, so a new critic predicts 0 everywhere and tilts nothing.

    Args:
        input_size: I, size of the inputs.
        outputs: O, the number of heads.
        hidden: width D of each head; 0 for linear heads, x_o = z, which cannot read λ.
        rank: r, size of a token's vector.
        conditions: M, size of λ; 0 for heads that do not read it.

    Source: scale and shift are FiLM (Perez et al., AAAI 2018).
    """

    def __init__(self, input_size: int, outputs: int, hidden: int, rank: int, conditions: int = 0) -> None:
        super().__init__()
        self.outputs, self.hidden, self.rank = outputs, hidden, rank
        if hidden:
            first = nn.Linear(input_size, outputs * hidden)
            # Stored as (I, O·D): with the few rows of a decoding step, this product costs half of its transpose.
            self.inner = nn.Parameter(first.weight.detach().T.contiguous())
            self.inner_bias = nn.Parameter(first.bias.detach())
        self.condition = nn.Parameter(torch.zeros(conditions + 1, 2 * outputs * hidden)) if conditions else None
        self.outer = nn.Parameter(torch.zeros(outputs, hidden or input_size, rank + 1))
        self.bias = nn.Parameter(torch.zeros(outputs, rank + 1))

    def forward(self, inputs: Tensor, lam: Tensor | None = None) -> Tensor:
        """Compute (A_o, V_o) of every head.

        Args:
            inputs: (..., I) float32.
            lam: (..., M) float32, λ = β·w, with leading dimensions that broadcast; None if the heads do not read it.

        Returns:
            (..., O, r + 1) float32: A_o in the first r entries, V_o in the last.
        """
        return torch.einsum("...od,odr->...or", self._inner(inputs, lam), self.outer) + self.bias

    def weighted_sum(self, inputs: Tensor, coefficients: Tensor, lam: Tensor | None = None) -> Tensor:
        """Compute Σ_o c_o (A_o, V_o) without the outputs of the individual heads.

        Args:
            inputs: (B, I) float32.
            coefficients: (B, O) float32, the c_o.
            lam: (B, M) float32; None if the heads do not read it.

        Returns:
            (B, r + 1) float32.
        """
        weighted = self._inner(inputs, lam) * coefficients[:, :, None]
        return torch.addmm(coefficients @ self.bias, weighted.flatten(1), self.outer.flatten(0, 1))

    def _inner(self, inputs: Tensor, lam: Tensor | None) -> Tensor:
        if not self.hidden:
            return inputs.unsqueeze(-2).expand(*inputs.shape[:-1], self.outputs, -1)
        inner = torch.addmm(self.inner_bias, inputs.flatten(0, -2), self.inner).view(*inputs.shape[:-1], -1)
        if self.condition is not None:
            assert lam is not None
            size = lam.abs().sum(-1, keepdim=True)
            scale, shift = (torch.cat([lam / (1 + size), size.log1p()], dim=-1) @ self.condition).chunk(2, dim=-1)
            inner = torch.addcmul(inner + shift, inner, scale)
        return F.silu(inner).unflatten(-1, (self.outputs, self.hidden))
