"""Our forward against TRL's own: same logprobs, same gradients, less work."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from rl import config, models
from rl.algorithms import learner, pieces
from rl.algorithms.learner import Forward, Shared, forward, row_keys, score_completions_only, share, shared_prefix
from rl.algorithms.online import adapters_off

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


def bare(base: models.Base) -> Any:
    torch.manual_seed(2)
    model = models.load_policy(base, "float32", "cpu")
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model


def policy_of(base: models.Base, lora: bool) -> Any:
    model = bare(base)
    if lora:
        model = models.add_lora(model, config.Lora(rank=4, alpha=8.0))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model


def plain(model: Any, ids: torch.Tensor, mask: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The few lines of TRL 1.16's `_get_per_token_logps_and_entropies` that matter for text."""
    labels = torch.where(mask == 0, -100, ids)
    labels[:, :-columns] = -100
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return out.log_probs[:, -columns:], out.entropy[:, -columns:]


def groups(prefix: int, prompts: list[int], completions: list[int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """As `batch`, each prompt with as many rows as there are completions for it, shuffled as TRL shuffles them."""
    size = len(completions) // len(prompts)
    ids, mask, long = batch(prefix, [p for p in prompts for _ in range(size)], completions, seed)
    split = ids.shape[1] - int(long)
    for first in range(0, len(completions), size):
        ids[first : first + size, :split] = ids[first, :split].clone()
    order = torch.randperm(len(completions), generator=torch.Generator().manual_seed(seed))
    return ids[order], mask[order], long


def both(model: Any, ids: torch.Tensor, mask: torch.Tensor, columns: int, shared: Shared) -> tuple[Any, Any]:
    """(TRL's, ours): logprobs, entropies and gradients of a weighted sum of them."""
    weights = torch.randn(len(ids), columns, generator=torch.Generator().manual_seed(1)) * mask[:, -columns:]
    results = []
    for ours in (False, True):
        model.zero_grad()
        logps, entropies = forward(model, ids, mask, columns, shared) if ours else plain(model, ids, mask, columns)
        (logps * weights + 0.1 * entropies * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logps.detach(), entropies.detach(), gradients))
    return results[0], results[1]


def assert_equal(theirs: Any, ours: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=2e-5, rtol=1e-5)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("prefix", "prompts", "completions"),
    [(9, [3, 5, 1], [4, 2, 3]), (12, [2, 2], [1, 1]), (8, [1, 6, 3, 3], [5, 1, 5, 2])],
)
def test_shared_prefix_gives_the_same_logprobs_entropies_and_gradients(
    tiny_base: models.Base, lora: bool, prefix: int, prompts: list[int], completions: list[int]
) -> None:
    ids, mask, columns = batch(prefix, prompts, completions)
    assert shared_prefix(ids, mask, int(columns)) == prefix
    assert_equal(*both(policy_of(tiny_base, lora), ids, mask, int(columns), Shared(prefix)))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("prefix", "prompts", "completions"),
    [
        (9, [3, 5, 1], [4, 2, 3, 1, 1, 4]),  # the last prompt has no token of its own to read ahead
        (0, [12, 1], [2, 5, 1, 3]),
        (8, [6], [5, 1, 5, 2]),
        (0, [4, 9, 4], [1, 1, 1, 1, 1, 1]),
    ],
)
def test_prompts_read_once_give_the_same_logprobs_entropies_and_gradients(
    tiny_base: models.Base,
    monkeypatch: pytest.MonkeyPatch,
    lora: bool,
    prefix: int,
    prompts: list[int],
    completions: list[int],
) -> None:
    """Traps: keys of padding between prompt and completion, positions after it, rows that a shuffle has parted from
    their prompt, and a prompt's last token, whose logits score the first of the completion."""
    monkeypatch.setattr(learner, "PIECE_TOKENS", 0)
    ids, mask, columns = groups(prefix, prompts, completions)
    shared = share(ids, mask, int(columns))
    assert shared is not None
    if len(prompts) > 1:
        assert len(shared.prompts) == len(prompts)
        assert (shared.prefix > 0) == (prefix >= pieces.SHORTEST_PREFIX)
    else:
        assert shared == Shared(prefix + prompts[0] - 1)  # one prompt is all prefix
    assert_equal(*both(policy_of(tiny_base, lora), ids, mask, int(columns), shared))


def every_prompt(ids: torch.Tensor, mask: torch.Tensor, columns: int, prefix: int, again: int = 0) -> Shared:
    """Each prompt read once, whatever it saves; the first one `again` times more, as on MPS."""
    keys = row_keys(ids[:, :-columns], mask[:, :-columns])
    distinct = list(dict.fromkeys(keys))
    first = [keys.index(key) for key in distinct]
    return Shared(prefix, (*first, *first[:1] * again), tuple(distinct.index(key) for key in keys))


@given(
    st.integers(0, 10), st.lists(st.integers(1, 8), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 10**6)
)
@settings(max_examples=12, deadline=None)
def test_any_batch_gives_the_same_gradients(
    tiny_base: models.Base, prefix: int, prompts: list[int], size: int, seed: int
) -> None:
    """Whatever `share` decides, and the way with the most pieces beside it."""
    lengths = torch.randint(1, 6, (len(prompts) * size,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids, mask, columns = groups(prefix, prompts, lengths, seed)
    model = policy_of(tiny_base, True)
    common = shared_prefix(ids, mask, int(columns))
    longest = int(mask[:, : -int(columns)].sum(1).max())
    ways = [share(ids, mask, int(columns))]
    if longest - 1 > common:
        ways.append(every_prompt(ids, mask, int(columns), common))
    for shared in filter(None, ways):
        assert_equal(*both(model, ids, mask, int(columns), shared))


def test_the_way_with_the_fewest_tokens_is_taken() -> None:
    """8 x 4 of the default config's kind: 20 tokens all share, 6 of each question, 4 of each completion."""
    ids, mask, columns = groups(20, [6] * 8, [4] * 32)
    way = share(ids, mask, int(columns))
    assert (way.prefix, len(way.prompts), len(way.of_row)) == (20, 8, 32)  # 20 + 8 x 5 + 32 x 4 tokens, 2 pieces more
    assert share(*batch(0, [5, 5], [3, 3])[:2], 3) is None  # nothing to share
    assert share(*batch(30, [1, 1], [3, 3])[:2], 3) == Shared(30)  # a question of one token is not read ahead
    ids, mask, columns = groups(0, [40, 44], [9] * 8)
    assert len(share(ids, mask, 9).prompts) == 2
    assert share(ids, mask, 9, cost=10**6) is None


def test_a_piece_costs_a_gpu_fewer_tokens_the_larger_the_model() -> None:
    """Launches are as many for wide layers as for narrow ones: SmolLM2's 135M and 1.7B, whose layers have 3,538,944 and
    67,108,864 weights."""
    small = LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    large = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=32)
    cuda = torch.device("cuda")
    assert learner.piece_tokens(cuda, small) == round(pieces.PIECE_WEIGHTS["cuda"] / 3_538_944)
    assert learner.piece_tokens(cuda, large) == round(pieces.PIECE_WEIGHTS["cuda"] / 67_108_864)
    assert learner.piece_tokens(torch.device("cpu"), large) == learner.PIECE_TOKENS


def test_on_mps_prompts_come_in_few_counts_and_widths(tiny_base: models.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths in buckets and a power of two of prompts: each shape of its own leaks there. Computed here on the CPU."""
    monkeypatch.setattr(learner, "padded", lambda length, device: -(-length // 32) * 32)
    ids, mask, columns = groups(3, [9, 4, 7], [4, 2, 3, 1, 1, 4])
    shared = every_prompt(ids, mask, int(columns), 0, again=1)
    widths: list[tuple[int, ...]] = []
    model = policy_of(tiny_base, True)
    hook = (
        model.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape))
    )
    ours = forward(model, ids, mask, int(columns), shared)
    hook.remove()
    assert [shape[:2] for shape in widths] == [(1, 4 * 32 + 6 * 32)]
    torch.testing.assert_close(ours[0], plain(model, ids, mask, int(columns))[0], atol=2e-5, rtol=1e-5)


def test_nothing_below_the_first_adapter_is_recorded(tiny_base: models.Base) -> None:
    """`[model.lora] layers` = 1: the layers below and the embedding keep no graph."""
    model = models.add_lora(bare(tiny_base), config.Lora(rank=4, alpha=8.0, layers=1))
    recorded: dict[str, list[bool]] = {}

    def note(name: str) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            recorded.setdefault(name, []).append(out.requires_grad)

        return hook

    for name, module in model.get_base_model().model.named_modules():
        if name.startswith(("embed_tokens", "layers")):
            module.register_forward_hook(note(name))
    ids, mask, columns = groups(9, [3, 5], [4, 2, 3, 1])
    shared = every_prompt(ids, mask, int(columns), 9)
    logps, _ = forward(model, ids, mask, int(columns), shared)
    assert logps.requires_grad
    top = max(int(name.split(".")[1]) for name in recorded if name.startswith("layers."))
    below = {n: seen for n, seen in recorded.items() if not n.startswith(f"layers.{top}")}
    assert all(len(seen) == 1 for seen in below.values())  # prefix, prompts and completions in one pass
    assert not any(any(seen) for seen in below.values())
    assert all(recorded[f"layers.{top}"])
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        forward(model, ids, mask, int(columns), shared)
    adapted_all = models.add_lora(bare(tiny_base), config.Lora(rank=4, alpha=8.0))
    everything: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: everything.append(t.numel()) or t, lambda t: t):
        forward(adapted_all, ids, mask, int(columns), shared)
    assert sum(saved) < 0.6 * sum(everything)


def test_without_its_adapter_a_policy_is_where_it_started(tiny_base: models.Base) -> None:
    """As by PEFT's own context, and as it was after an error. Traps: an adapter that stays off, or that a block within
    turns on again."""
    model, ids = policy_of(tiny_base, lora=True), torch.randint(2, 17, (2, 9))
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        with model.disable_adapter():
            start = model(input_ids=ids).logits
            with adapters_off(model):
                assert torch.equal(model(input_ids=ids).logits, start)
            assert torch.equal(model(input_ids=ids).logits, start)
        with pytest.raises(ValueError, match="exactly one of"), adapters_off(model):
            model()
        assert not torch.allclose(tuned, start)
        assert torch.equal(model(input_ids=ids).logits, tuned)


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
        logps, entropies = forward(model, ids, mask, int(columns), Shared(9))
        logps.sum().backward()
        results.append((logps.detach(), entropies.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)
    assert positions[1] == 4 + 2 + 3
    assert positions[0] > positions[1]
    assert not chunked_logprob._use_triton(torch.device("cpu"))  # the kernels themselves stay in torch
