"""Does attention's backward stay finite where a kernel is known not to? Run by `nox -s mps_smoke` on whatever is there.

cuDNN's SDPA backward, torch's default for half precision on Hopper since 2.11, gives NaN for the queries when a mask is
passed, the length is 64 modulo 128 and a row's logsumexp is below ln(1 / FLT_MAX) = -88.7 (pytorch issue 196678, trl
issue 7181). A loss stays finite while every gradient below that layer is lost. `rl.device.prepare` switches it off.

Seen on an H200 with torch 2.11.0 and cuDNN 9.19: with cuDNN's kernel NaN in bfloat16 and float16, without it relative
errors of 3.2e-2 and 4.2e-3, the roundings of those types.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LENGTH, WIDTH, SCORE = 64, 64, -120.0


def gradient_error(device: "torch.device | str", dtype: "torch.dtype", seed: int = 0) -> float:
    """Relative error of dq, dk and dv together against float64, for scores near -120 under a causal mask; NaN counts.

    Inputs are rounded to `dtype` before either side sees them, so that only the computation is compared.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)

    def noise() -> torch.Tensor:
        return 0.1 * torch.randn(1, 2, LENGTH, WIDTH, generator=generator)

    inputs = [WIDTH**0.5 * direction + noise(), SCORE * direction + noise(), 10 * noise()]
    inputs = [tensor.to(dtype) for tensor in inputs]
    outgoing = torch.randn(1, 2, LENGTH, WIDTH, generator=generator).to(dtype)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    scores = (exact[0] @ exact[1].mT / WIDTH**0.5).masked_fill(~mask, float("-inf"))
    (scores.softmax(-1) @ exact[2]).backward(outgoing.double())

    found = [tensor.to(device).requires_grad_() for tensor in inputs]
    out = torch.nn.functional.scaled_dot_product_attention(*found, attn_mask=mask.to(device))
    out.backward(outgoing.to(device))
    wanted = torch.cat([tensor.grad.flatten() for tensor in exact])
    got = torch.cat([tensor.grad.cpu().double().flatten() for tensor in found])
    return ((got - wanted).norm() / wanted.norm()).item()
