"""What `nox -s mps_smoke` asks of MLX itself: does a weight of the trainer arrive with all its bits?"""

import mlx.core as mx
import numpy as np
import torch

from rl.rollouts.load import DTYPES
from rl.rollouts.transfer import to_mlx


def changed_bits(dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """(values whose bits differ, values sent) from torch on `device` to MLX, by the hand-over that runs use.

    Every value of a 16-bit dtype but NaN, and 65,280 of float32 from all its exponents, denormals and infinities with
    them: a path through another dtype, or one that flushes denormals, changes some of them.
    """
    word = torch.int16 if dtype.itemsize == 2 else torch.int32
    bits = 8 * dtype.itemsize
    # an odd step, so that the low bits vary as well
    patterns = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), 1 if bits == 16 else 2**16 + 1).to(word)
    values = patterns.view(dtype)
    values = values[~values.isnan()]
    array = to_mlx(values.to(device))
    if array.dtype != DTYPES[str(dtype).removeprefix("torch.")]:
        return len(values), len(values)
    arrived = np.array(array.view(mx.uint16 if bits == 16 else mx.uint32))
    sent = values.view(word).numpy().view(arrived.dtype)
    return int((arrived != sent).sum()), len(values)
