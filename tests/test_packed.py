"""rl/packed.py: MLX's codes in torch give values, logits and gradients of the dequantized base, and hold no copy."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import config as configs
from rl import models, packed
from rl.errors import UserError
from rl.rollouts import quantized
from rl.tiny import write_tiny

RANK = configs.Lora(rank=4, alpha=8.0)


def quantize(values: torch.Tensor, bits: int, group: int) -> tuple[packed.Packed, torch.Tensor]:
    """(codes in torch without a copy, MLX's own dequantized values)."""
    parts = mx.quantize(mx.array(values.numpy()), group_size=group, bits=bits)
    exact = mx.dequantize(*parts, group_size=group, bits=bits)
    mx.eval(*parts, exact)
    made = packed.packed(*(torch.from_dlpack(part) for part in parts), bits)
    return made, torch.from_numpy(np.array(exact))


@given(
    st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_values_are_mlx_s(bits: int, group: int, rows: int, groups: int, seed: int) -> None:
    """Nibble order, group borders: a permutation of either gives errors of the size of the weights."""
    values = torch.randn(rows, groups * group, generator=torch.Generator().manual_seed(seed))
    made, exact = quantize(values, bits, group)
    assert made.shape == values.shape
    torch.testing.assert_close(packed.dequantize(made, torch.float32), exact, rtol=0, atol=2e-7 * exact.abs().max())
    order = torch.randint(rows, (5,), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(packed.dequantize(made, torch.float32, order), exact[order], rtol=0, atol=1e-6)


def test_codes_are_shared_with_mlx_not_copied() -> None:
    parts = mx.quantize(mx.random.normal((8, 64)), group_size=32, bits=4)
    mx.eval(*parts)
    made = packed.packed(*(torch.from_dlpack(part) for part in parts), 4)
    assert made.codes.data_ptr() == np.frombuffer(memoryview(parts[0]), dtype=np.uint32).ctypes.data
    layer = packed.PackedLinear(made, None, torch.float32)
    assert layer.codes.data_ptr() == made.codes.data_ptr()


def test_product_and_its_gradient_against_float64() -> None:
    made, exact = quantize(torch.randn(96, 128), 4, 32)
    x = torch.randn(5, 7, 128)
    bias = torch.randn(96)
    layer = packed.PackedLinear(made, bias, torch.float32)
    inner = x.clone().requires_grad_()
    outgoing = torch.randn(5, 7, 96)
    y = layer(inner)
    y.backward(outgoing)
    torch.testing.assert_close(y.double(), x.double() @ exact.double().T + bias.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(inner.grad.double(), outgoing.double() @ exact.double(), rtol=1e-5, atol=1e-4)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not layer.bias.requires_grad


def test_between_forward_and_backward_no_values_are_held() -> None:
    """The point of it all: autograd must not keep the dequantized matrix."""
    made, _ = quantize(torch.randn(256, 256), 4, 32)
    sizes: list[int] = []
    x = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        packed.PackedLinear(made, None, torch.float32)(x).sum()
    assert max(sizes, default=0) < 256 * 256


@pytest.mark.parametrize("bits", [4, 8])
def test_policy_equals_the_dequantized_one(tmp_path: Path, bits: int) -> None:
    """Logits to 1e-5 and LoRA gradients to 1e-5 relative of the reference: the same folder's dequantized values."""
    folder = base(tmp_path, bits)
    ids = torch.randint(2, 17, (3, 12), generator=torch.Generator().manual_seed(1))

    def adapted(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        policy = models.add_lora(model, RANK)
        with torch.no_grad():  # B starts at zero, and then A has no gradient
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
        out = policy(input_ids=ids, labels=ids)
        out.loss.backward()
        return out.logits.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])

    reference = adapted(models.load_policy(models.Base("b", folder, "", None), torch.float32, "cpu"))
    found = adapted(packed.load_policy(folder, torch.float32, "cpu"))
    torch.testing.assert_close(found[0], reference[0], rtol=0, atol=1e-5)
    assert (found[1] - reference[1]).norm() / reference[1].norm() < 1e-5


def test_policy_holds_the_codes_alone(tmp_path: Path) -> None:
    model = packed.load_policy(base(tmp_path, 4), torch.float32, "cpu")
    layers = [module for module in model.modules() if isinstance(module, packed.PackedLinear)]
    assert len(layers) == 4 * 7 + 1  # and the tied head
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    assert sum(storages.values()) < numbers * (4 / 8 + 2 * 4 / 32) * 1.05 + 40_000  # codes, fp32 scales and biases
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.codes.data_ptr() == embedding.codes.data_ptr()


def test_scales_keep_their_type() -> None:
    made, _ = quantize(torch.randn(8, 64), 4, 32)
    with pytest.raises(TypeError, match="scales are torch"):
        packed.PackedLinear(made, None, torch.float32).half()


def test_other_formats_are_refused(tmp_path: Path) -> None:
    folder = base(tmp_path, 4)
    config = folder / "mlx" / "config.json"
    config.write_text(config.read_text().replace('"bits": 4', '"bits": 6'))
    with pytest.raises(UserError, match="6-bit codes, valid: 4 or 8"):
        packed.load_policy(folder, torch.float32, "cpu")


def base(folder: Path, bits: int) -> Path:
    """A tiny Llama's shared quantized base."""
    write_tiny(folder / "tiny", configs.TinyModel(), 0, "test")
    quantized.build(folder / "tiny", None, bits, 32, folder / "shared", source="x")
    return folder / "shared"
