"""A layer in fp64, and how far from it, token by token, another way to compute the layer may be.

B batch, T tokens, H hidden, E experts, K experts per token, Hq query heads, Hkv key/value heads, D head size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..tools.tolerance import RATIO, to_fp64, truth

# Of a token's norm: what one rounding of each value (16-bit types), or other orders of a layer's sums, may cost.
FLOOR = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-20}


def distance(got: Tensor, exact: Tensor) -> Tensor:
    """[..., H] -> [...]: the length of the difference, relative to that of `exact`; infinite where a value is NaN.

    Not the largest value of all: a residual stream has a few channels that are a thousand times as large as the rest.
    """
    apart = (got.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
    return apart.nan_to_num(nan=float("inf"))


def with_perturbed_input(x: Tensor) -> Tensor:
    """x [B,T,H] -> fp64 [2B,T,H]: x, then x with each number moved by FLOOR of itself, up or down.

    What exact arithmetic makes of the second is as good an answer as any in x's dtype: how far it is from what it makes
    of the first is the model's own sensitivity, which one way to round need not show.
    """
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0), device="cpu").mul_(2).sub_(1)
    return torch.cat((x.double(), x.double() * (1 + FLOOR[x.dtype] * signs.to(x.device))))


@dataclass(frozen=True)
class Fp64Reference:
    """Exact values [B,T,H] fp64, and how far from them those of one token may be."""

    exact: Tensor
    limit: float

    @classmethod
    def beside(cls, exact: Tensor, plain: Tensor, ratio: float = RATIO) -> Fp64Reference:
        """exact [2B,T,H]: of an input `with_perturbed_input`; plain [B,T,H]: of the input, by plain torch in the weights' dtype.

        Of plain and moved the one that is farther from the truth sets the limit.
        """
        exact, moved = exact.chunk(2)
        apart = max(float(distance(other, exact).max()) for other in (plain, moved))
        return cls(exact, max(ratio * apart, FLOOR[plain.dtype]))

    def measure(self, got: Tensor, at: Tensor) -> tuple[float, float]:
        """The error of the tokens `at` [n] of each sequence, got [B,n,H], and its limit."""
        return float(distance(got, self.exact[:, at]).max()), self.limit


@dataclass(frozen=True)
class Expected:
    """What plain torch has for one layer, and the truth beside it.

    x, h           the layer's input, and its norm, in the weights' dtype [B,T,H]
    ids, weights   the experts of every token [B,T,K]
    normed, output the truth of h and of the layer's output
    logits         the gate's, fp64 [B,T,E], and how far from them (not relatively) those in the weights' dtype may be
    """

    x: Tensor
    h: Tensor
    ids: Tensor
    weights: Tensor
    normed: Fp64Reference
    output: Fp64Reference
    logits: Tensor
    logits_limit: float

    @classmethod
    def of(cls, plain: reference.Values, normed: Tensor, logits: Tensor, output: Tensor) -> Expected:
        """`plain`: of the block in the weights' dtype; the rest is fp64 [2B,...], of an input `with_perturbed_input`."""
        shape = plain.x.shape[:2]
        logits, moved = logits.chunk(2)
        apart = max(float((other.view_as(logits) - logits).abs().max()) for other in (plain.logits, moved))
        limit = RATIO * apart + FLOOR[plain.x.dtype] * float(logits.abs().max())
        ids, weights = plain.ids.view(*shape, -1), plain.weights.view(*shape, -1)
        truths = Fp64Reference.beside(normed, plain.normed), Fp64Reference.beside(output, plain.output)
        return cls(plain.x, plain.normed, ids, weights, *truths, logits, limit)

    def misrouted(self, ids: Tensor, at: Tensor) -> float:
        """By how much of the largest logit a token's experts `ids` [B,n,K] fall behind one that was not taken.

        The same experts in another order are no difference. Infinite for what is no choice of K of E experts.
        """
        logits = self.logits[:, at]
        ordered = ids.long().sort(-1).values
        bounds = ordered[..., 0].min() < 0 or ordered[..., -1].max() >= logits.shape[-1]
        if bounds or (ordered[..., 1:] == ordered[..., :-1]).any():
            return float("inf")
        rest = logits.scatter(-1, ordered, -float("inf")).amax(-1)
        behind = rest - logits.gather(-1, ordered).amin(-1)
        return max(0.0, float(behind.max()) / self._scale)

    @property
    def route_limit(self) -> float:
        """Two logits may be wrong, one up and one down."""
        return 2 * self.logits_limit / self._scale

    @property
    def _scale(self) -> float:
        return max(float(self.logits.abs().max()), 1e-30)


def wide_block(layer: Any, config: Any, tables: dict[str, Tensor], x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """One block in fp64, on x fp64 [B,T,H], each token by the experts ids [B*T,K] -> gate logits [B,T,E], output."""
    values = wide_values(layer, config, tables, x, ids)
    return values.logits.view(*x.shape[:2], -1), values.output


def wide_values(
    layer: Any, config: Any, tables: dict[str, Tensor], x: Tensor, ids: Tensor | None = None
) -> reference.Values:
    """One block in fp64, on x fp64 [B,T,H]; ids: see `reference.block`.

    The weights are widened one matrix, one expert at a time: a layer of them in fp64 is more than many GPUs hold.
    """

    def experts(h: Tensor, gate_up_proj: Any, down_proj: Any, ids: Tensor, weights: Tensor) -> Tensor:
        proj = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return truth("expert_swiglu", {"x": h, **proj, "ids": ids, "weights": weights})[0]

    whole = reference.uncached_attention(config.sliding_window, to_fp64(tables["cos"]), to_fp64(tables["sin"]))

    def attend(*qkv: Tensor) -> Tensor:
        """A sequence at a time: its scores in fp64 are large enough."""
        return torch.cat([whole(*one) for one in zip(*(x.split(1) for x in qkv), strict=True)])

    return reference.block(layer, config, x, attend, ids, to_fp64, experts)
