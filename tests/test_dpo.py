"""DPO and KTO: TRL's losses on our rows against few-line float64 references, the reference policy, whole runs."""

import ast
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_helper import tiny_run
from preference_helper import LABELLED, PAIRS, built, disturb, logp, loss_of, make_config, make_job, plain
from run_helper import train_until_ctrl_c
from safetensors.numpy import load_file

from rl import models, train
from rl.algorithms import dpo, kto
from rl.errors import UserError
from rl.trl_fields import VALUES

BETA = 0.7


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# (difference of log-ratios, chosen's and rejected's log-ratio, their lengths with EOS) -> loss of one pair
REFERENCES = {
    "sigmoid": lambda d, c, r, nc, nr: -math.log(sigmoid(BETA * d)),
    "hinge": lambda d, c, r, nc, nr: max(0.0, 1 - BETA * d),
    "ipo": lambda d, c, r, nc, nr: (c / nc - r / nr - 1 / (2 * BETA)) ** 2,
    "robust": lambda d, c, r, nc, nr: (0.9 * -math.log(sigmoid(BETA * d)) + 0.1 * math.log(sigmoid(-BETA * d))) / 0.8,
    "apo_zero": lambda d, c, r, nc, nr: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    "apo_down": lambda d, c, r, nc, nr: sigmoid(BETA * c) + 1 - sigmoid(BETA * d),
    "sppo_hard": lambda d, c, r, nc, nr: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "nca_pair": lambda d, c, r, nc, nr: (
        -math.log(sigmoid(BETA * c)) - 0.5 * math.log(sigmoid(-BETA * c)) - 0.5 * math.log(sigmoid(-BETA * r))
    ),
    "sigmoid_norm": lambda d, c, r, nc, nr: -math.log(sigmoid(BETA * (c / nc - r / nr))),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", REFERENCES)
def test_dpo_loss_is_its_formula_against_the_start(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lora: bool
) -> None:
    """Traps: a prompt token or padding in the sums, a missing EOS, a reference that moves with the policy."""
    args = {"loss_type": kind, "beta": BETA, "label_smoothing": 0.1 if kind == "robust" else 0.0}
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", "dpo", lora=lora, trainer=args), PAIRS, tmp_path)
    start = plain(job.model)
    trainer = built(monkeypatch, dpo, job)
    disturb(trainer.model, seed=1)
    policy = plain(trainer.model)
    losses = []
    for row in PAIRS:
        c, r = (
            logp(policy, job.tokenizer, row["prompt"], row[k]) - logp(start, job.tokenizer, row["prompt"], row[k])
            for k in ("chosen", "rejected")
        )
        losses.append(REFERENCES[kind](c - r, c, r, len(row["chosen"]) + 1, len(row["rejected"]) + 1))
    assert max(losses) - min(losses) > 1e-3  # the rows tell formulas apart
    assert loss_of(trainer, len(PAIRS)) == pytest.approx(np.mean(losses), abs=2e-5)


def test_every_loss_that_is_accepted_has_a_gradient(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that TRL takes in the config and knows nothing of later would fail in the middle of a run."""
    args = {"beta": BETA, "label_smoothing": 0.1}
    trainer = built(
        monkeypatch, dpo, make_job(tiny_base, make_config(tmp_path / "x", "dpo", trainer=args), PAIRS, tmp_path)
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    seen = []
    for kind in VALUES["dpo", "loss_type"]:
        trainer.loss_types, trainer.loss_weights = [kind], [1.0]
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in trainer.model.parameters() if p.grad is not None))
        assert 1e-4 < norm < math.inf, kind
        seen.append(norm)
    assert len(seen) == 15


def test_losses_add_up_with_their_weights(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(**args: Any) -> float:
        settings = make_config(tmp_path / "x.toml", "dpo", trainer={"beta": BETA, **args})
        trainer = built(monkeypatch, dpo, make_job(tiny_base, settings, PAIRS, tmp_path))
        disturb(trainer.model, seed=1)
        return loss_of(trainer, len(PAIRS))

    both = loss(loss_type=["sigmoid", "hinge"], loss_weights=[0.25, 2.0])
    assert both == pytest.approx(0.25 * loss(loss_type="sigmoid") + 2 * loss(loss_type="hinge"), abs=1e-5)


def test_precomputed_reference_gives_the_same_loss(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for ahead in (False, True):
        args = {"precompute_ref_log_probs": ahead, "beta": BETA}
        trainer = built(
            monkeypatch, dpo, make_job(tiny_base, make_config(tmp_path / "x", "dpo", trainer=args), PAIRS, tmp_path)
        )
        assert (trainer.ref_model is None) == ahead
        disturb(trainer.model, seed=1)
        losses.append(loss_of(trainer, len(PAIRS)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_reference_of_an_adapter_that_goes_on_is_where_it_stood(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: with the adapter merely switched off, a second run would be held to the base, not to its own start."""
    job = make_job(
        tiny_base, make_config(tmp_path / "x.toml", "dpo", lora=True, trainer={"beta": BETA}), PAIRS, tmp_path
    )
    disturb(job.model, seed=3, size=0.2)  # an adapter that another run has trained
    trainer = built(monkeypatch, dpo, job)
    assert loss_of(trainer, len(PAIRS)) == pytest.approx(math.log(2), abs=1e-6)  # policy = reference: no margin yet
    trainer.model.delete_adapter("ref")  # what TRL does without it: the reference is the base
    assert abs(loss_of(trainer, len(PAIRS)) - math.log(2)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "seed", "positive"), [("kto", 1, False), ("kto", 2, True), ("apo_zero_unpaired", 2, True)]
)
def test_kto_loss_is_its_formula(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int, positive: bool
) -> None:
    """KL from each prompt with its neighbour's completion, at least 0 (both sides of 0 are tested), and the weights."""
    count = len(LABELLED)
    args = {"loss_type": kind, "beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    args |= {"per_device_train_batch_size": count}
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", "kto", trainer=args), LABELLED, tmp_path)
    start = plain(job.model)
    trainer = built(monkeypatch, kto, job)
    disturb(trainer.model, seed=seed)
    policy = plain(trainer.model)
    eos = job.tokenizer.eos_token
    rows = [(row["prompt"], row["completion"].removesuffix(eos), row["label"]) for row in trainer.train_dataset]
    assert sorted(rows) == sorted((r["prompt"], r["completion"], r["label"]) for r in LABELLED)

    def ratio(prompt: str, completion: str) -> float:
        return logp(policy, job.tokenizer, prompt, completion) - logp(start, job.tokenizer, prompt, completion)

    raw = float(np.mean([ratio(rows[i][0], rows[i - 1][1]) for i in range(count)]))
    assert (raw > 0) == positive
    z = max(0.0, raw) if kind == "kto" else 0.0
    losses = [
        1.5 * (1 - sigmoid(BETA * (ratio(p, c) - z))) if good else 0.5 * (1 - sigmoid(BETA * (z - ratio(p, c))))
        for p, c, good in rows
    ]
    assert loss_of(trainer, count) == pytest.approx(np.mean(losses), abs=2e-5)


def test_kto_rows_of_one_question_are_no_neighbours_by_file_order(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: TRL reads KTO's rows in order; a file with right beside wrong would estimate the KL on matched pairs."""
    orders = []
    for seed in (0, 0, 1):
        settings = make_config(tmp_path / "x.toml", "kto", seed=seed)
        trainer = built(monkeypatch, kto, make_job(tiny_base, settings, LABELLED, tmp_path))
        orders.append(list(trainer.train_dataset["prompt"]))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != [row["prompt"] for row in LABELLED]


def test_sampled_rows_keep_their_tokens(
    tiny_base: models.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: decoded and tokenised again, a completion cut by length gets an EOS that the policy never said."""
    said, cut = [5, 6, 1], [7, 8, 9]
    rows = [
        {"id": i, "prompt": "1+2=", "chosen": "x", "rejected": "y"}
        | {"prompt_ids": [3, 4], "chosen_ids": said, "rejected_ids": cut}
        for i in "ab"
    ]
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", "dpo"), rows, tmp_path)
    batch = (trainer := built(monkeypatch, dpo, job)).data_collator(list(trainer.train_dataset))
    assert batch["input_ids"].tolist() == [[3, 4, *said]] * 2 + [[3, 4, *cut]] * 2
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1]] * 4

    labelled = [{"id": str(n), "prompt_ids": [n], "completion_ids": [n, n + 1], "label": n < 5} for n in range(3, 7)]
    labelled = [row | {"prompt": "x", "completion": "y"} for row in labelled]
    for kind in ("kto", "apo_zero_unpaired"):
        settings = make_config(
            tmp_path / "x.toml", "kto", trainer={"loss_type": kind, "per_device_train_batch_size": 2}
        )
        made = list(built(monkeypatch, kto, make_job(tiny_base, settings, labelled, tmp_path)).train_dataset)
        assert sorted(row["completion_ids"][0] for row in made) == [3, 4, 5, 6]
        assert all(row["completion_ids"] == [row["prompt_ids"][0], row["prompt_ids"][0] + 1] for row in made)
        if kind == "kto":  # within a batch of two, each gets the other's
            assert [row["KL_completion_ids"] for row in made] == [made[i]["completion_ids"] for i in (1, 0, 3, 2)]


@pytest.mark.parametrize(
    ("algorithm", "module", "rows", "missing"),
    [("dpo", dpo, LABELLED, "'chosen', 'rejected'"), ("kto", kto, PAIRS, "'completion', 'label'")],
)
def test_wrong_rows_are_named_with_the_columns_they_lack(
    tiny_base: models.Base, tmp_path: Path, algorithm: str, module: Any, rows: list, missing: str
) -> None:
    job = make_job(tiny_base, make_config(tmp_path / "x.toml", algorithm), rows, tmp_path)
    needs = f"{algorithm} needs prompt, {missing.replace(chr(39), '')}"
    with pytest.raises(UserError, match=f"has no column {missing}; {needs}"):
        module.train(job)


def test_loss_names_are_those_of_trls_source() -> None:
    """Leans on the comparisons in TRL 1.16's trainers, which would raise (or fall through) in the middle of a step."""
    import trl.trainer.dpo_trainer as dpo_source
    import trl.trainer.kto_trainer as kto_source

    def compared(module: Any, name: str) -> set[str]:
        found: set[str] = set()
        for node in ast.walk(ast.parse(Path(inspect.getfile(module)).read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
                left = getattr(node.left, "attr", getattr(node.left, "id", None))
                constants = [c.value for c in node.comparators if isinstance(c, ast.Constant)]
                found |= {c for c in constants if left == name and isinstance(c, str)}
        return found

    assert compared(dpo_source, "loss_type") == set(VALUES["dpo", "loss_type"])
    assert compared(dpo_source, "f_divergence_type") == set(VALUES["dpo", "f_divergence_type"])
    assert compared(kto_source, "loss_type") == set(VALUES["kto", "loss_type"])


# --- whole runs, which sample their pairs themselves

RUN = tiny_run(
    "{algorithm}",
    most=9,
    train_size=24,
    size=8,
    model="{lora}",
    rollout="samples = 32",
    trainer="per_device_train_batch_size = 4\nlearning_rate = 5e-3\nmax_steps = 5\nsave_steps = 2",
    metric="lenient",
)
LORA = "[model.lora]\nrank = 4\nalpha = 8.0"


def write(name: str, algorithm: str, lora: bool) -> Path:
    path = Path(f"{name}.toml")
    path.write_text(RUN.format(name=name, algorithm=algorithm, lora=LORA if lora else ""))
    return path


@pytest.mark.parametrize(("algorithm", "lora"), [("dpo", False), ("dpo", True), ("kto", False), ("orpo", False)])
def test_a_run_samples_its_pairs_once_and_resumes_to_the_same_weights(
    algorithm: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps: other pairs after a resume; a reference read from the checkpoint; the reference adapter in the result."""
    monkeypatch.chdir(tmp_path)
    assert train.main(write("whole", algorithm, lora)) == 0
    path = write("broken", algorithm, lora)
    train_until_ctrl_c(monkeypatch, path, 3)
    kept = Path("models/checkpoints/broken/pairs.jsonl")
    sampled = kept.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("rl.pairs.sample", lambda *_: pytest.fail("sampled again"))
        assert train.main(path, resume=True) == 0
    folders = [Path("models/final", name) for name in ("whole", "broken")]
    assert [(f / "pairs.jsonl").read_bytes() for f in folders] == [sampled, sampled]
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    whole, broken = (load_file(f / file) for f in folders)
    assert whole.keys() == broken.keys()
    for name, weight in whole.items():
        np.testing.assert_array_equal(broken[name], weight, err_msg=name)
    assert not (folders[0] / "ref").exists()
    records = [json.loads((f / "run.json").read_text()) for f in folders]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert records[0]["tokens"]["prompt"] == 24 * 32 * 4  # 32 samples to each of 24 prompts of four characters
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    if algorithm == "dpo":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # at the start the policy is its reference
        assert rows[-1]["rewards/margins"] > 0
