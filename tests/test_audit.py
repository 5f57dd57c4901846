"""The operator audit: what steps dispatch, what torch has for MPS, and that something missing there is caught."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rl import __main__ as cli
from rl.algorithms import ALGORITHMS
from rl.audit import command as audit
from rl.audit import kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found() -> dict[str, audit.Found]:
    """Every case of the audit, taken once."""
    return {name: case() for name, case in audit.audit()}


def test_mps_has_every_operator_of_every_algorithm(found: dict[str, audit.Found]) -> None:
    """The audit itself: an operator without a kernel raises on a Mac in the first step, and no CPU run can tell."""
    assert set(ALGORITHMS) < set(found)
    assert {name: case.wrong for name, case in found.items() if case.wrong} == {}


def test_a_step_is_heard_from_embedding_to_optimizer(found: dict[str, audit.Found]) -> None:
    """Trap: a recorder that misses the backward pass, the clipping or the optimizer passes everything."""
    everywhere = {"embedding", "linear", "rsqrt", "silu"}  # forward
    everywhere |= {"linear_backward", "silu_backward", "_softmax_backward_data"}
    everywhere |= {"linalg_vector_norm", "mul_.Tensor", "_fused_adamw_"}  # clipping, optimizer
    for name in set(found) - set(audit.PARTS):
        assert everywhere <= found[name].operators, name
        assert ("embedding_dense_backward" in found[name].operators) == ("LoRA" not in name)
    # TRL's fused head on every position, Bradley-Terry, the KL's exponential, GAE's cumulative mask
    assert {"logsumexp", "nll_loss_forward"} & found["orpo"].operators
    assert "log_sigmoid_forward" in found["reward"].operators & found["dpo"].operators
    assert "_amp_foreach_non_finite_check_and_unscale_" in found["fp16 loss scaling"].operators
    assert "__rshift__.Scalar" in found["packed 4-bit layers"].operators


def test_the_steps_take_mps_choices(found: dict[str, audit.Found]) -> None:
    """A CPU's own attention, its split of `linear`, and its clipping by lists say nothing of MPS."""
    for case in found.values():
        others = {"_scaled_dot_product_flash_attention_for_cpu", "_foreach_norm.Scalar", "_foreach_mul_.Tensor"}
        assert not others & case.operators
        assert not any("cuda" in name or "cudnn" in name or "mkldnn" in name for name in case.operators)
    assert "bmm" in found["sft"].operators  # attention as products


def test_the_page_in_docs_knows_every_operator(found: dict[str, audit.Found]) -> None:
    """`python -m rl audit --write` makes it anew."""
    text = (ROOT / audit.PAGE).read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([^`]+)` \| ([a-z A-Z]+) \|", text, re.MULTILINE))
    now = {name: audit.HOW[kernels.status(name)] for case in found.values() for name in case.operators}
    assert now.items() <= told.items()
    assert "**Nothing on this page was run" in text


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("mm", "kernel"),  # its structured kernel is mm.out's
        ("linear", "kernel"),  # composite on a CPU
        ("_fused_adamw_", "kernel"),
        ("_fused_adamw", "composite"),  # written by torchgen over the one above
        ("embedding", "composite"),  # for every device: index_select
        ("scaled_dot_product_attention", "composite"),  # no dispatch in the list
        ("embedding_renorm_", "cpu fallback"),  # registered outside the list
        ("linalg_eig", "missing"),  # CPU and CUDA
        ("_scaled_dot_product_flash_attention_for_cpu", "missing"),
        ("no_such_operator", "missing"),
    ],
)
def test_status_of_operators_read_by_hand(name: str, status: str) -> None:
    assert kernels.status(name) == status


@pytest.mark.skipif(not torch.backends.mps.is_built(), reason="the dispatcher of this build of torch knows no MPS")
def test_the_list_agrees_with_the_dispatcher_of_a_build_that_has_mps(found: dict[str, audit.Found]) -> None:
    names = {name for case in found.values() for name in case.operators if kernels.status(name) == "kernel"}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in names if not has(f"aten::{name}", "MPS")] == []


def planted(monkeypatch: pytest.MonkeyPatch, work: Any) -> audit.Found:
    """An SFT step whose loss calls `work` on a tensor of the device."""
    from rl.algorithms import sft

    real = sft.DuetSFTTrainer.compute_loss

    def loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        work(inputs["input_ids"].float())
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(sft.DuetSFTTrainer, "compute_loss", loss)
    ((_, case),) = audit.audit(["sft"])
    return case()


def test_a_planted_operator_that_mps_lacks_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = torch.library.Library("aten", "FRAGMENT")
    try:
        library.define("duet_planted(Tensor x) -> Tensor")
        library.impl("duet_planted", torch.sin, "CPU")
        assert planted(monkeypatch, torch.ops.aten.duet_planted).wrong == ["duet_planted"]
        assert cli.main(["audit", "sft"]) == 1
        assert "MPS lacks what these steps need: duet_planted (sft)" in capsys.readouterr().err
    finally:
        library._destroy()


def test_an_operator_that_torch_has_and_mps_lacks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planted(monkeypatch, lambda x: torch.linalg.eig(x.T @ x)).wrong == ["linalg_eig"]


def test_an_operator_inside_a_composite_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: below autograd only the outer name is dispatched: `embedding`, for every device, is `index_select`."""
    monkeypatch.setitem(kernels.entries(), "index_select", kernels.Entry(frozenset({"CPU", "CUDA"}), None))
    ((_, case),) = audit.audit(["sft"])
    assert case().wrong == ["index_select"]


@pytest.mark.parametrize(
    ("work", "wrong"),
    [
        (lambda x: x.double(), True),
        (lambda x: torch.zeros(3, dtype=torch.float64, device=x.device), True),
        (lambda x: x.cpu().double().sum(), False),  # of the host there too
        (lambda x: torch.tensor([0.5]).double(), False),
        (lambda x: torch.zeros(2, dtype=torch.float64), False),
        (lambda x: torch.tensor([0.5]).to(x.device).double(), True),
    ],
)
def test_a_float64_tensor_on_the_device_is_caught_and_one_of_the_host_is_not(
    monkeypatch: pytest.MonkeyPatch, work: Any, wrong: bool
) -> None:
    found = planted(monkeypatch, work)
    assert any("float64" in what for what in found.wrong) == wrong


def test_listening_leaves_torch_as_it_was() -> None:
    """Trap: kernels that stay registered would slow and change every later step of this process."""
    x, weight = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention

    def names() -> set[str]:
        from torch.utils._python_dispatch import TorchDispatchMode

        seen: set[str] = set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.add(func.name())
                return func(*args, **(kwargs or {}))

        with Watch():
            torch.nn.functional.linear(x, weight)
        return seen

    before = names()
    heard = audit.listen(lambda: torch.nn.functional.linear(x, weight))
    assert "linear" in heard.operators
    assert names() == before
    assert "aten::linear" not in before
    assert torch.nn.functional.scaled_dot_product_attention is attention


def test_the_replaced_products_are_the_real_ones() -> None:
    """The audit runs its own `linear`, gradient and attention: wrong ones would train another step than runs do."""
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    q, k, v = (torch.randn(2, 2, 6, 8) for _ in range(3))

    def both() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        (torch.nn.functional.linear(*leaves) ** 2).sum().backward()
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return [*(t.grad for t in leaves if t.grad is not None), attended]

    heard: list[torch.Tensor] = []
    operators = audit.listen(lambda: heard.extend(both())).operators
    assert {"linear_backward", "_scaled_dot_product_attention_math_for_mps"} <= operators
    for mine, real in zip(heard, both(), strict=True):
        torch.testing.assert_close(mine, real)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["grppo"], "error: audit: no algorithm 'grppo', did you mean 'grpo'?\n"),
        (["sft", "--write"], "error: audit: --write is for the page of all algorithms: give no algorithm with it\n"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", *arguments]) == 2
    assert capsys.readouterr().err == line
