"""The check that would have found the NaN of cuDNN's attention backward, without the GPU that has it."""

import math
from typing import Any

import pytest
import torch

from rl import attention_check


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 1.5e-1)])
def test_a_sound_kernel_passes(dtype: torch.dtype, most: float) -> None:
    assert attention_check.gradient_error("cpu", dtype) < most


def test_a_kernel_that_scores_absent_keys_zero_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch issue 196678: exp(0 - logsumexp) of the keys past the end overflows float32, and inf times 0 is NaN."""

    class PastTheEnd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -math.inf)
            lse = scores.logsumexp(-1, keepdim=True)
            p = (scores - lse).exp()
            ctx.save_for_backward(q, k, v, p, lse)
            return p @ v

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            q, k, v, p, lse = ctx.saved_tensors
            delta = (p * (grad @ v.mT)).sum(-1, keepdim=True)
            ds = p * (grad @ v.mT - delta) / q.shape[-1] ** 0.5
            absent = (0 - lse).float().exp() * torch.zeros_like(k[..., :1, :])  # the padded half of the last tile
            return ds @ k + absent, ds.mT @ q, p.mT @ grad, None

    def broken(q: Any, k: Any, v: Any, attn_mask: Any) -> torch.Tensor:
        return PastTheEnd.apply(q, k, v, attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    assert math.isnan(attention_check.gradient_error("cpu", torch.float32))
    monkeypatch.setattr(attention_check, "SCORE", -80.0)  # above -88.7 the overflow is gone, and with it the NaN
    assert attention_check.gradient_error("cpu", torch.float32) < 1e-4
