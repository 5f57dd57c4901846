"""The policy with its value head: what it scores, where, and which weights are whose."""

from typing import Any

import pytest
import torch

from rl import config, models
from rl.algorithms import value

PAD = 0
TEMPERATURE = 0.7


def make_policy(base: models.Base, lora: bool = False) -> Any:
    torch.manual_seed(3)
    policy = models.load_policy(base, "float32", "cpu")
    if lora:
        policy = models.add_lora(policy, config.Lora(rank=4, alpha=8.0))
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return policy


def rows(lengths: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each (prompt tokens, completion tokens), drawn by a fixed seed."""
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(2, 17, (n,), generator=generator).tolist() for n in pair) for pair in lengths]


def padded(of: list[tuple[list[int], list[int]]], left: int = 0, right: int = 0) -> dict[str, torch.Tensor]:
    """As a rollout lays them out: prompts padded on the left, completions on the right, by so many columns more."""
    wide, long = max(len(p) for p, _ in of) + left, max(len(c) for _, c in of) + right
    prompts = [[PAD] * (wide - len(p)) + p for p, _ in of]
    completions = [c + [PAD] * (long - len(c)) for _, c in of]
    return {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.tensor([[t >= wide - len(p) for t in range(wide)] for p, _ in of]),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.tensor([[t < len(c) for t in range(long)] for _, c in of]),
    }


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_scores_are_those_of_each_row_alone_whatever_the_padding(tiny_base: models.Base, kind: str, lora: bool) -> None:
    """One plain forward a row, without padding, is the reference: logprob and entropy of the tempered distribution,
    value of the state *before* each token. Off by one column, a value would see the token it is the baseline of."""
    policy = make_policy(tiny_base, lora)
    both = value.ActorCritic(policy, kind)
    torch.nn.init.normal_(both.head.weight)
    torch.nn.init.normal_(both.head.bias)
    data = rows([(5, 4), (2, 1), (7, 3)])
    with torch.no_grad():
        for left, right in ((0, 0), (3, 2)):
            found = both(padded(data, left, right), TEMPERATURE)
            for i, (prompt, completion) in enumerate(data):
                out = policy(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
                start, n = len(prompt) - 1, len(completion)
                logps = (out.logits[0, start : start + n].double() / TEMPERATURE).log_softmax(-1)
                hidden = out.hidden_states[-1][0, start : start + n]
                expected = {
                    "logps_B_T": logps.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1),
                    "entropies_B_T": -(logps.exp() * logps).sum(-1),
                    "values_B_T": hidden.double() @ both.head.weight[0].double() + both.head.bias.double(),
                }
                for name, reference in expected.items():
                    torch.testing.assert_close(getattr(found, name)[i, :n].double(), reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_values_start_at_zero_and_the_head_can_leave_it(tiny_base: models.Base, kind: str) -> None:
    both = value.ActorCritic(make_policy(tiny_base), kind)
    found = both(padded(rows([(3, 2)])), 1.0)
    assert found.values_B_T.eq(0).all()
    found.values_B_T.sum().backward()
    assert both.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_the_value_loss_reaches_the_policy_only_where_they_share(tiny_base: models.Base, kind: str, lora: bool) -> None:
    policy = make_policy(tiny_base, lora)
    both = value.ActorCritic(policy, kind)
    torch.nn.init.normal_(both.head.weight)
    both(padded(rows([(3, 2)])), 1.0).values_B_T.sum().backward()
    reached = [n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert bool(reached) == (kind == "shared")
    if both.critic is not None:
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in both.critic.parameters())


def test_of_a_lora_policy_only_the_adapter_is_copied(tiny_base: models.Base) -> None:
    """A second frozen base would double the memory; a shared adapter would train the policy with the value loss."""
    policy = make_policy(tiny_base, lora=True)
    both = value.ActorCritic(policy, "separate")
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    trained = {p.data_ptr() for p in policy.parameters() if p.requires_grad}
    of_critic = {n: p.data_ptr() for n, p in both.critic.named_parameters()}
    assert frozen & set(of_critic.values())
    assert not trained & set(of_critic.values())
    assert all("lora" in n for n, pointer in of_critic.items() if pointer not in frozen)
    names = both.trained()
    assert {n.split(".")[0] for n in names} == {"policy", "critic", "head"}
    assert all("lora" in n or n.startswith("head.") for n in names)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_reference_stays_where_the_policy_started(tiny_base: models.Base, lora: bool) -> None:
    policy = make_policy(tiny_base, lora)
    batch = padded(rows([(4, 3)]))
    reference = value.frozen_copy(policy)
    with torch.no_grad():
        before, _, _ = value.policy_scores(reference, batch, 1.0)
        torch.testing.assert_close(before, value.policy_scores(policy, batch, 1.0)[0])
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1)
        assert (value.policy_scores(policy, batch, 1.0)[0] - before).abs().max() > 1e-3
        assert torch.equal(value.policy_scores(reference, batch, 1.0)[0], before)
    assert not any(p.requires_grad for p in reference.parameters())
    assert any(p.requires_grad for p in policy.parameters())


def test_entropies_carry_no_gradient(tiny_base: models.Base) -> None:
    assert not value.ActorCritic(make_policy(tiny_base), "shared")(
        padded(rows([(3, 2)])), 1.0
    ).entropies_B_T.requires_grad
