"""The MLX side: a sampler that decodes from the policy's weights. Knows nothing of TRL.

Importing this package binds a fast BLAS before `mlx.core` loads (Linux only): mlx's Linux wheel links reference BLAS,
whose `cblas_sgemm` calls `sgemm_`, a symbol that torch's library exports too and computes about 40 times faster.
"""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path


def _bind_blas() -> bool:
    """Make torch's `sgemm_` visible to mlx's CPU backend; True when it was done."""
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    spec = importlib.util.find_spec("torch")
    library = Path(spec.origin).parent / "lib" / "libtorch_cpu.so" if spec and spec.origin else None
    if library is None or not library.exists():
        return False
    import torch  # noqa: F401  loads the library's own dependencies first

    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return True


# mlx's CUDA backend rounds float32 products to TF32 unless told not to: mean |dlogp| 6e-3 instead of 2e-5
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# and keeps so many CUDA graphs; past twice its 400, in a run's life, it would raise "Cache thrashing is happening"
os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "2000")
os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")
BLAS_BOUND = _bind_blas()
