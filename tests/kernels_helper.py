"""CUDA kernels of rl/rollouts, compiled for a CPU: what `device.cuda_kernel` gives, without a GPU."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads

import mlx.core as mx  # isort: skip

HERE = Path(__file__).parent
TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float32: "float", mx.int32: "int", mx.uint32: "unsigned", mx.bool_: "bool"}
TYPES |= {mx.uint64: "uint64_t"}
MULTIPLY = """
template <>
inline void multiply<__nv_bfloat16>(
    float (&sums)[4], unsigned w0, unsigned w1, unsigned w2, unsigned w3, unsigned x0, unsigned x1) {
    multiply_in_warp<__nv_bfloat16>(sums, Fragment{{w0, w1, w2, w3}, {x0, x1}});
}
"""
compiler = shutil.which("g++") or shutil.which("clang++")


def cuda_kernel(
    folder: Path,
    name: str,
    inputs: Sequence[str],
    source: str,
    header: str = "",
    *,
    contiguous: bool = False,
    outputs: Sequence[str] = ("out",),
) -> Callable[..., list[mx.array]]:
    """As `device.cuda_kernel`, each thread a fiber (tests/cuda_on_cpu.hpp); libraries are kept in `folder`."""

    def call(
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[Any],
        shared_memory: int = 0,
    ) -> list[mx.array]:
        given = [mx.contiguous(array) if contiguous else array for array in inputs]
        mx.eval(given)
        tensors = [torch.from_dlpack(array) for array in given]
        out = [torch.from_dlpack(_zeros(*told)) for told in zip(output_shapes, output_dtypes, strict=True)]
        arguments = ", ".join(
            f"const {TYPES[array.dtype]}* {name}, Numbers {name}_shape, Numbers {name}_strides"
            for name, array in zip(names, given, strict=True)
        )
        constants = "".join(
            f"using {key} = {TYPES[value]};\n" if isinstance(value, mx.Dtype) else f"constexpr int {key} = {value:d};\n"
            for key, value in template
        )
        passed = ", ".join(
            f"static_cast<const {TYPES[array.dtype]}*>(data[{i}]), Numbers{{shapes[{i}]}}, Numbers{{strides[{i}]}}"
            for i, array in enumerate(given)
        )
        results = ", ".join(f"{TYPES[dtype]}* {name}" for dtype, name in zip(output_dtypes, outputs, strict=True))
        made = ", ".join(
            f"static_cast<{TYPES[dtype]}*>(data[{len(given) + i}])" for i, dtype in enumerate(output_dtypes)
        )
        text = f"""#include "cuda_on_cpu.hpp"
{header}
{MULTIPLY if "multiply" in header else ""}
static void kernel({arguments}, {results}) {{
{constants}{source}
}}
extern "C" void run(void** data, int64_t** shapes, int64_t** strides, int x, int y, int threads, int room) {{
    room_bytes = room;
    launch(x, y, threads, {"meet(" in source:d}, [&] {{ kernel({passed}, {made}); }});
}}
"""
        assert all(size % per == 0 for size, per in zip(grid, threadgroup, strict=True))
        numbers = [
            [(ctypes.c_int64 * max(1, t.dim()))(*of(t)) for t in tensors]
            for of in (lambda t: t.shape, lambda t: t.stride())
        ]
        as_pointers = [
            (ctypes.POINTER(ctypes.c_int64) * len(row))(*(ctypes.cast(n, ctypes.POINTER(ctypes.c_int64)) for n in row))
            for row in numbers
        ]
        data = (ctypes.c_void_p * (len(tensors) + len(out)))(*(t.data_ptr() for t in [*tensors, *out]))
        sizes = [size // per for size, per in zip(grid, threadgroup, strict=True)]
        _library(folder, text).run(data, *as_pointers, sizes[0], sizes[1], threadgroup[0], shared_memory)
        return [mx.array(one) for one in out]

    names = list(inputs)
    return call


def _zeros(shape: tuple[int, ...], dtype: Any) -> mx.array:
    array = mx.zeros(shape, dtype)
    mx.eval(array)
    return array


@cache
def _library(folder: Path, text: str) -> Any:
    stem = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(text, encoding="utf-8")
    library = stem.with_suffix(".so")
    options = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}"]
    subprocess.run([compiler, *options, str(stem.with_suffix(".cpp")), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
