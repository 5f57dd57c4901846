"""Our forward against TRL's own: same logprobs, same gradients, less work."""

from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from rl import config, models
from rl.algorithms.learner import Forward, forward, row_keys, score_completions_only, shared_prefix

PAD = 0


def batch(prefix: int, prompts: list[int], completions: list[int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Ids and mask as TRL lays them out: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(2, 17, (prefix,), generator=generator)
    wide, long = prefix + max(prompts), max(completions)
    ids, mask = torch.full((len(prompts), wide + long), PAD), torch.zeros(len(prompts), wide + long, dtype=torch.long)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        tokens = torch.cat([head, torch.randint(2, 17, (p + c,), generator=generator)])
        ids[i, wide - prefix - p : wide + c] = tokens
        mask[i, wide - prefix - p : wide + c] = 1
    return ids, mask, torch.tensor(long)


def policy_of(base: models.Base, lora: bool) -> Any:
    torch.manual_seed(2)
    model = models.load_policy(base, "float32", "cpu")
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    if lora:
        model = models.add_lora(model, config.Lora(rank=4, alpha=8.0))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model


def plain(model: Any, ids: torch.Tensor, mask: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The few lines of TRL 1.16's `_get_per_token_logps_and_entropies` that matter for text."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-columns] = -100
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return out.log_probs[:, -columns:], out.entropy[:, -columns:]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("prefix", "prompts", "completions"),
    [(9, [3, 5, 1], [4, 2, 3]), (12, [2, 2], [1, 1]), (8, [1, 6, 3, 3], [5, 1, 5, 2])],
)
def test_shared_prefix_gives_the_same_logprobs_entropies_and_gradients(
    tiny_base: models.Base, lora: bool, prefix: int, prompts: list[int], completions: list[int]
) -> None:
    ids, mask, columns = batch(prefix, prompts, completions)
    columns = int(columns)
    model = policy_of(tiny_base, lora)
    assert shared_prefix(ids, mask, columns) == prefix
    weights = torch.randn(len(prompts), columns, generator=torch.Generator().manual_seed(1)) * mask[:, -columns:]
    results = []
    for ours in (False, True):
        model.zero_grad()
        logps, entropies = forward(model, ids, mask, columns, prefix) if ours else plain(model, ids, mask, columns)
        (logps * weights + 0.1 * entropies * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logps.detach(), entropies.detach(), gradients))
    (logps, entropies, gradients), (logps2, entropies2, gradients2) = results
    torch.testing.assert_close(logps2, logps, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropies2, entropies, atol=2e-5, rtol=1e-5)
    assert gradients.keys() == gradients2.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients2[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_shared_prefix_counts_tokens_and_leaves_one() -> None:
    ids, mask, _ = batch(5, [1, 1], [2, 2])
    ids[1, 5] = ids[0, 5]  # now the whole prompts are equal
    assert shared_prefix(ids, mask, 2) == 5
    ids[1, 2] = (ids[0, 2] + 1) % 17
    assert shared_prefix(ids, mask, 2) == 2
    assert shared_prefix(torch.tensor([[3, 4]]), torch.tensor([[1, 1]]), 1) == 0


def test_a_shuffled_batch_finds_its_rows_and_a_foreign_one_none() -> None:
    """TRL shuffles the generation batch between the old logprobs and the loss."""
    ids, mask, columns = batch(3, [2, 4, 1, 1], [2, 3, 1, 2])
    kept = Forward({k: i for i, k in enumerate(row_keys(ids, mask))}, torch.zeros(4, int(columns)), torch.zeros(4, 3))
    order = torch.tensor([2, 0, 3, 1])
    assert kept.reorder(ids[order], mask[order]).tolist() == order.tolist()
    ids[0, -1] += 1
    assert kept.reorder(ids, mask) is None


def test_the_head_scores_completion_tokens_only_with_the_same_result(
    tiny_base: models.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract with trl 1.16: `trl.trainer.utils._use_triton` decides that and nothing else."""
    import trl.trainer.utils
    from trl.kernels import chunked_logprob

    ids, mask, columns = batch(9, [3, 5, 1], [4, 2, 3])
    results, positions = [], []
    apply = trl.trainer.utils._ChunkedLogProbFunction.apply

    def counting(hidden: torch.Tensor, *args: Any) -> Any:
        positions.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", counting)
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", chunked_logprob._use_triton)
    for ours in (False, True):
        if ours:
            score_completions_only()
        model = policy_of(tiny_base, True)
        logps, entropies = forward(model, ids, mask, int(columns), 9)
        logps.sum().backward()
        results.append((logps.detach(), entropies.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)
    assert positions[1] == 4 + 2 + 3
    assert positions[0] > positions[1]
    assert not chunked_logprob._use_triton(torch.device("cpu"))  # the kernels themselves stay in torch
