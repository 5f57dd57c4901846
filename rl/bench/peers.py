"""`nox -s bench -- --part peers`: this project beside all-MLX trainers, each in a process of its own.

Same weights, prompts, group, lengths and reward (`rl.rollouts.peers` says what a peer fixes otherwise): seconds a step,
new tokens a second, peak memory, and reward against wall time. Peers are installed by the user into a folder:
`python -m pip install --no-deps --target build/peers mlx-lm-lora==5.10.2 inductive-mlxrl==0.2.4`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rl import config as configs
from rl import device as devices
from rl import files, measured, record
from rl.bench import file as bench_file
from rl.bench.child import OURS
from rl.bench.rollouts import Budget
from rl.bench.table import spread, table
from rl.errors import RunFailed
from rl.report import smoothed

DISTRIBUTIONS = {"mlx-lm-lora": "mlx-lm-lora", "mlxrl": "inductive-mlxrl"}
INSTALL = "python -m pip install --no-deps --target build/peers mlx-lm-lora==5.10.2 inductive-mlxrl==0.2.4"
QUARTERS = (0.25, 0.5, 0.75, 1.0)
BUDGET = 480.0
LEAST_S = 60.0  # what one contestant leaves to each that is still to come, if there is as much
LIMIT = 1.3  # bar: this project's peak over that of mlx-lm-lora, both with as many rows in a backward pass
SMALLER = f"{OURS}, fewer rows at a time"  # in a backward pass: as many as mlx-lm-lora's
ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/study/precision-shared-4.toml"


@dataclass(frozen=True)
class Task:
    """What all train. `overrides` of the config at `path`, the learning rate among them."""

    name: str
    about: str
    path: Path
    overrides: list[str]
    smaller: list[str] | None = None  # overrides besides, of this project's run with fewer rows at a time

    def contestants(self) -> tuple[str, ...]:
        """In the order in which they run."""
        return (OURS, *DISTRIBUTIONS) if self.smaller is None else (OURS, *DISTRIBUTIONS, SMALLER)


@dataclass(frozen=True)
class Outcome:
    """Of one contestant: `rows` of step, wall_s, reward and tokens; peak bytes where it came to its end."""

    name: str
    version: str
    rows: list[dict[str, float]]
    memory: dict[str, int]
    note: str = ""

    def step_s(self) -> list[float]:
        """Seconds of every step after the first, in which kernels compile."""
        return [b["wall_s"] - a["wall_s"] for a, b in zip(self.rows, self.rows[1:], strict=False)]


def main(
    *,
    peers: Path | None = None,
    budget: float | None = None,
    out: Path | None = None,
    root: Path = ROOT,
    quick: bool = False,
) -> int:
    """Run every contestant on every task; write `bench-peers-<device>.md` and `.json` to `out` after each. Returns 0.

    peers: the folder they are installed in, build/peers if not given; those not there are named in the table and left
    out. budget: seconds for all of it; one that takes longer than its share is stopped, with what it did kept.
    """
    from rl.rollouts import device as mlx_device

    root = root.resolve()
    found = (peers or root / "build" / "peers").resolve()
    device = devices.pick({"metal": "mps"}.get(mlx_device.backend(), mlx_device.backend()))
    limit = Budget(budget or BUDGET)
    path = (out or root / ("build" if quick else "evals/published")) / f"bench-peers-{bench_file.device_name(device)}"
    told = f"nox -s bench -- --part peers --budget {budget or BUDGET:g}{' --quick' if quick else ''}"
    about = measured.about(told, device, root)
    (root / "build").mkdir(parents=True, exist_ok=True)
    results: list[tuple[Task, list[Outcome]]] = []
    with tempfile.TemporaryDirectory(prefix="peers-", dir=root / "build") as folder:
        todo = tasks(Path(folder), device.type, root, quick)
        prepare(todo[0], root)
        runs = [(task, name) for task in todo for name in task.contestants()]
        for number, (task, name) in enumerate(runs):
            if not results or results[-1][0] is not task:
                results.append((task, []))
            version = _version(name, found, root)
            print(f"peers: {task.name}, {name} ...", flush=True)
            if version is None:
                one = Outcome(name, "", [], {}, f"not installed there: `{INSTALL}`, then --peers-path build/peers")
            else:
                waiting = sum(_version(other, found, root) is not None for _, other in runs[number:])
                seconds = share(limit.left(), waiting)
                one = contestant(task, name, version, found, Path(folder) / f"{number}", seconds, device.type, root)
            results[-1][1].append(one)
            write(path, results, about)
    print(path.with_suffix(".md").read_text(), end="")
    if not any(one.rows for _, outcomes in results for one in outcomes if one.name == OURS):
        raise RunFailed(f"bench: this project's own run failed: {results[0][1][0].note}")
    return 0


def share(left: float, waiting: int) -> float:
    """Seconds for the next of `waiting`: what LEAST_S for each of the others leaves, and no less than an equal part."""
    return max(left / waiting, left - LEAST_S * (waiting - 1))


def prepare(task: Task, root: Path) -> None:
    """Make the base once, before anyone's time begins."""
    from rl import start

    start.find(configs.load(task.path, task.overrides), root, None)


def tasks(folder: Path, kind: str, root: Path, quick: bool = False) -> list[Task]:
    """Sums, to learn; and long prompts with long completions, to be fast at. Sized by the device: `kind`."""
    from rl import models

    rows, group, steps, length = (32, 4, 8, 32) if kind == "cpu" else (64, 8, 32, 128)
    if quick:
        rows, group, steps, length = 8, 4, 2, 8
    common = ["trainer.lr_scheduler_type=constant", "trainer.loss_type=bnpo", "eval.size=16"]
    learn = [f"trainer.max_steps={steps}", f"trainer.save_steps={steps}", f"trainer.num_generations={group}"]
    learn += [f"trainer.per_device_train_batch_size={rows}", "run.name=peers-sums"]
    asked = f"{rows // group} prompts × {group}"
    sums = Task(
        "sums", f"two-shot `a + b =`, {asked}, at most 4 new tokens, {steps} steps", root / CONFIG, common + learn
    )
    config = configs.load(root / CONFIG)
    tokenizer = models.load_tokenizer(models.resolve_base(config, root))
    from rl.bench.models import prompt_texts

    prompt = 32 if quick else 256
    texts = prompt_texts(tokenizer, 32, prompt)
    data = folder / "long.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "answer": "0"}) + "\n" for text in texts))
    rows, group, steps = (8, 4, 3) if kind == "cpu" else (64, 8, 5)
    if quick:
        rows, group, steps = 8, 4, 2
    long = [f"trainer.max_steps={steps}", f"trainer.save_steps={steps}", f"trainer.num_generations={group}"]
    long += [f"trainer.per_device_train_batch_size={rows}", "run.name=peers-long", "eval.size=8"]
    long += [
        "data.source=jsonl",
        f"data.path={data}",
        "data.shots=0",
        "data.max_a=50",
        "data.max_b=9",
        "data.train_size=24",
    ]
    long += [f"rollout.max_completion_length={length}", "rollout.stop=[]", "reward.0.name=rl.bench.child:differing"]
    asked = f"{rows // group} prompts × {group}"
    about = f"prompts of {prompt} random words, {asked}, at most {length} new tokens, {steps} steps, EOS ends one"
    prompts = rows // group
    smaller = [f"trainer.per_device_train_batch_size={prompts}", "run.name=peers-smaller"]
    smaller += [f"trainer.{name}={group}" for name in ("gradient_accumulation_steps", "steps_per_generation")]
    return [sums, Task("long", about, root / CONFIG, [*common[:2], *long], smaller)]


def contestant(
    task: Task, name: str, version: str, peers: Path, folder: Path, seconds: float, kind: str, root: Path
) -> Outcome:
    """Run one in `folder` for at most `seconds`; its error's last line is the note where it failed."""
    folder.mkdir()
    job = folder / "job.json"
    ours = name in (OURS, SMALLER)
    overrides = task.overrides + (task.smaller or [] if name == SMALLER else [])
    given = {"name": OURS if ours else name, "config": str(task.path), "overrides": overrides, "peers_path": str(peers)}
    if not ours:
        given |= _work(task, kind, root)
    files.write_json(job, given)
    (folder / "models").mkdir()
    (folder / "models" / "base").symlink_to(root / "models" / "base")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    note = ""
    with (folder / "log").open("w") as log:
        try:
            child = [sys.executable, "-m", "rl.bench.child", str(job)]
            done = subprocess.run(
                child, cwd=folder, env=env, stdout=log, stderr=log, timeout=max(1.0, seconds), check=False
            )
            if done.returncode != 0:
                lines = [line for line in (folder / "log").read_text(errors="replace").splitlines() if line.strip()]
                note = f"failed: {_without_places(lines[-1]) if lines else done.returncode}"
        except subprocess.TimeoutExpired:
            note = f"stopped after {seconds:.0f} s, its share of the budget"
    memory = folder / "memory.json"
    return Outcome(name, version, _rows(folder, name), json.loads(memory.read_text()) if memory.is_file() else {}, note)


def _without_places(text: str) -> str:
    return " ".join(word for word in text.split() if not word.strip("'\"(").startswith("/"))[:160]


def _rows(folder: Path, name: str) -> list[dict[str, float]]:
    if name not in (OURS, SMALLER):
        return record.read_metrics(folder / "rows.jsonl")
    found = sorted(folder.glob("models/*/peers-*/metrics.jsonl"))  # in checkpoints while it runs, in final when done
    rows = record.read_metrics(found[-1]) if found else []
    told = sorted(folder.glob("models/*/peers-*/run.json"))
    args = json.loads(told[-1].read_text())["config"]["trainer"] if told else {}
    batch = args.get("per_device_train_batch_size", 0) * (args.get("steps_per_generation") or 1)
    return [
        {key: row[key] for key in ("step", "wall_s", "reward")}
        | {"tokens": round(row["completions/mean_length"] * batch)}
        for row in rows
        if "reward" in row
    ]


def _work(task: Task, kind: str, root: Path) -> dict[str, Any]:
    """The job of a peer: the very rows, weights and settings that this project's run resolves its config to."""
    from rl import data, models, start
    from rl.algorithms.seam import stop_ids

    config = configs.load(task.path, task.overrides)
    begin = start.find(config, root, None)
    tokenizer = models.load_tokenizer(begin.base)
    rows = [dict(row) for row in data.build(config).train]
    texts = [row["prompt"] for row in rows]
    lora, args = config.model.lora, config.trainer.args
    group = args["num_generations"]
    work = {
        # packed products are slow on MLX's CPU backend, where this project holds dequantized values too
        "model": str(begin.base.path if kind == "cpu" else begin.base.path / "mlx"),
        "tokenizer": str(begin.base.path),
        "texts": texts,
        "prompts": tokenizer(texts)["input_ids"],
        "prompts_a_step": args["per_device_train_batch_size"] // group,
        "group": group,
        "max_tokens": config.rollout.max_completion_length,
        "stop": stop_ids(tokenizer, config.rollout.stop),
        "steps": args["max_steps"],
        "learning_rate": args["learning_rate"],
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": list(lora.targets),
        "seed": config.run.seed,
    }
    return {"work": work, "rows": rows}


def _version(name: str, peers: Path, root: Path) -> str | None:
    """Installed in `peers` or, where not, beside this project; None where it is in neither."""
    if name in (OURS, SMALLER):
        git = record.git_state(root)
        return "unknown" if git is None else git["commit"][:12]
    wanted = DISTRIBUTIONS[name]
    for one in metadata.distributions(name=wanted, path=[str(peers), *sys.path]):
        return one.version
    return None


# --- table


def write(path: Path, results: Sequence[tuple[Task, list[Outcome]]], about: dict[str, str]) -> None:
    """Table and data, whole."""
    files.write_text(path.with_suffix(".md"), markdown(results, about))
    told = [{"task": task.name, "about": task.about, "outcomes": [asdict(o) for o in done]} for task, done in results]
    files.write_json(path.with_suffix(".json"), record.finite({"about": about, "results": told}))


def markdown(results: Sequence[tuple[Task, list[Outcome]]], about: dict[str, str]) -> str:
    """The file: a table a task, with what others do better shown as it is: a ratio below 1."""
    lines = ["# All-MLX trainers on one machine", "", *(f"- {name}: {text}" for name, text in about.items()), ""]
    lines += [
        "SmolLM2-135M from its own 4-bit weights, LoRA on all seven products, GRPO without KL term, the same prompts, "
        "group, lengths, learning rate and reward; each in a process of its own, one after the other. Steps are timed "
        "from end to end, medians with (least–largest), the first left out. ÷: their seconds over this project's, "
        "above 1 this project is faster. On MLX's CPU backend all are given the fast BLAS that this project binds, and "
        "values instead of codes. Peaks: of the process's resident memory, where a trainer in torch has its libraries "
        "too; on CUDA also of what the allocators gave, torch's and MLX's peaks added.",
    ]
    for task, outcomes in results:
        lines += ["", f"## {task.name}: {task.about}", "", *_task(task, outcomes)]
    return "\n".join(lines) + "\n"


def memory_bar(outcomes: Sequence[Outcome]) -> list[str]:
    """The line that holds this project's peak against mlx-lm-lora's, where both had as many rows at a time."""
    found = {one.name: one.memory for one in outcomes if one.rows}
    if not {SMALLER, "mlx-lm-lora"} <= found.keys():
        return []
    ours, theirs = found[SMALLER], found["mlx-lm-lora"]
    kind = "allocated" if ours.get("allocated") and theirs.get("allocated") else "resident"
    if not ours.get(kind) or not theirs.get(kind):
        return []
    ratio = ours[kind] / theirs[kind]
    verdict = "met" if ratio <= LIMIT else "**missed**"
    return ["", f"Peak {kind}, {SMALLER}: {ratio:.2f} × mlx-lm-lora's; bar: at most {LIMIT}: {verdict}."]


def _task(task: Task, outcomes: Sequence[Outcome]) -> list[str]:
    ours = next((o.step_s() for o in outcomes if o.name == OURS), [])
    head = [
        "contestant",
        "version",
        "steps",
        "s a step",
        "÷",
        "new tokens/s",
        "peak resident, GB",
        "peak allocated, GB",
    ]
    rows = []
    for one in outcomes:
        step = one.step_s()
        if not step:
            rows.append([one.name, one.version, f"{len(one.rows)}", *["–"] * 5])
            continue
        speeds = [row["tokens"] / s for row, s in zip(one.rows[1:], step, strict=True)]
        ratio = f"{statistics.median(step) / statistics.median(ours):.2f}" if ours else "–"
        memory = [f"{one.memory[key] / 1e9:.2f}" if one.memory.get(key) else "–" for key in ("resident", "allocated")]
        rows.append(
            [one.name, one.version, f"{len(one.rows)}", spread(step).text(".3g"), ratio, spread(speeds).text(), *memory]
        )
    lines = table(head, rows)
    lines += ["", *(f"- {one.name}: {one.note}" for one in outcomes if one.note)]
    lines += memory_bar(outcomes)
    if task.name != "sums":
        return lines
    learned = [one for one in outcomes if one.step_s()]
    if not learned:
        return lines
    shortest = min(one.rows[-1]["wall_s"] - one.rows[0]["wall_s"] for one in learned)
    head = ["contestant", *(f"reward at {q:.0%} of its steps" for q in QUARTERS)]
    head += [f"at {q * shortest:.1f} s" for q in QUARTERS]
    rows = []
    for one in learned:
        rewards = smoothed([row["reward"] for row in one.rows], max(1, len(one.rows) // 10))
        times = [row["wall_s"] - one.rows[0]["wall_s"] for row in one.rows]
        by_step = [rewards[max(0, round(q * len(rewards)) - 1)] for q in QUARTERS]
        by_time = [rewards[sum(t <= q * shortest + 1e-9 for t in times) - 1] for q in QUARTERS]
        rows.append([one.name, *(f"{value:.3f}" for value in (*by_step, *by_time))])
    lines += ["", *table(head, rows), ""]
    lines += ["One seed each; seconds count from the end of the first step, in which kernels compile."]
    return lines
