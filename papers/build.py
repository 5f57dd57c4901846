"""From results to a report: claims judged, tables, figures and `report.json` written, the PDF set by typst.

Everything here follows from paper.toml, results/ and report.typ alone: no clock, no network, no training.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papers import claims, figures, jobs, machine, results, tables
from papers.claims import Verdict
from papers.jobs import Job
from papers.results import Kept
from papers.study import Study
from rl import files
from rl.errors import RunFailed, UserError

SHOWN = ("torch", "transformers", "trl", "mlx", "mlx-lm", "peft", "numpy")


def build(study: Study, root: Path, quick: bool = False) -> list[Verdict]:
    """Write tables/, figures/, report.json and report.pdf of a study; returns the verdicts. Raises UserError."""
    plan = jobs.plan(study, quick)
    kept = results.load(study, root, plan, quick)
    outdated = results.outdated(plan, kept, study, root, quick)
    found = by_run(study, plan, kept)
    single = singles(study, plan, quick)
    runs = [spec.name for spec in study.runs]
    stale: dict[str, str] = {}
    for job in plan:
        if job.name in outdated:
            stale.setdefault(job.run, f"{job.stem}: {outdated[job.name]}")
    verdicts = [claims.judge(claim, found, runs, single, stale) for claim in study.claims]
    where = results.folder(study, root, quick)
    made = [tables.make(study, table, found, single) for table in study.tables]
    for table in [tables.verdicts(verdicts), *made]:
        tables.write(table, where / "tables")
    for figure in study.figures:
        figures.write(study, figure, found, single, where / "figures")
    files.write_json(where / "report.json", _facts(study, plan, kept, outdated, verdicts, made, quick))
    _set(study, root, where)
    return verdicts


def by_run(study: Study, plan: Sequence[Job], kept: Mapping[str, Kept]) -> dict[str, list[Kept]]:
    """Results by run, in the order of their seeds."""
    found: dict[str, list[Kept]] = {spec.name: [] for spec in study.runs}
    for job in sorted(plan, key=lambda job: job.seed):
        if job.name in kept:
            found[job.run].append(kept[job.name])
    return found


def singles(study: Study, plan: Sequence[Job], quick: bool) -> list[str]:
    """Runs that are made once on purpose: what others start from."""
    if quick:
        return [spec.name for spec in study.runs if len(study.run(spec.name).seeds or study.seeds) == 1]
    return [spec.name for spec in study.runs if len([job for job in plan if job.run == spec.name]) == 1]


def _facts(
    study: Study,
    plan: Sequence[Job],
    kept: Mapping[str, Kept],
    outdated: Mapping[str, str],
    verdicts: Sequence[Verdict],
    made: Sequence[tables.Made],
    quick: bool,
) -> dict[str, Any]:
    """All that the report prints, as text: numbers are made here and nowhere else."""
    records = [one.record for one in kept.values()]
    machines = sorted({machine.in_words(one.machine) for one in kept.values()})
    slots = sorted({(one.machine.get("slots"), one.machine.get("cores_a_run")) for one in kept.values()}, key=str)
    commits = sorted({_commit(one.record.git) for one in kept.values()})
    versions = sorted({f"{name} {one.record.packages.get(name)}" for one in kept.values() for name in SHOWN
                       if one.record.packages.get(name)})  # fmt: skip
    unlocked = sorted(
        {
            f"{name} {one.record.packages.get(name)} (locked: {one.lock[name]})"
            for one in kept.values()
            for name in one.lock
            if one.record.packages.get(name) not in (None, one.lock[name])
        }
    )
    seconds = sum(record.wall_s for record in records)
    facts = {
        "Runs": f"{len(kept)} of {len(plan)} made, seeds {', '.join(map(str, sorted({job.seed for job in plan})))}",
        "Machine": "; ".join(machines) or "none yet",
        "Trained on": "; ".join(sorted({record.device.partition(",")[0] for record in records})) or tables.NONE,
        "At once": "; ".join(f"{n} runs on {c} cores each" for n, c in slots if n) or tables.NONE,
        "Cost": f"{_hours(seconds)} of training in all" if records else tables.NONE,
        "Dates": _dates([record.finished or "" for record in records]),
        "Commit": ", ".join(commits) or tables.NONE,
        "Versions": ", ".join(versions) or tables.NONE,
    }
    if unlocked:
        facts["Not as locked"] = ", ".join(unlocked)
    return {
        "title": study.title,
        "question": study.question,
        "slug": study.slug,
        "command": f"nox -s paper -- papers/{study.slug}",
        "toy": quick,
        "date": max((record.finished or "" for record in records), default="")[:10],
        "machine": "; ".join(machines),
        "seconds": round(seconds),
        "facts": facts,
        "outdated": [f"{job.stem}: {outdated[job.name]}" for job in plan if job.name in outdated],
        "missing": len(plan) - len(kept),
        "counts": {name: sum(one.outcome == name for one in verdicts) for name in claims.OUTCOMES},
        "claims": [_claim(one) for one in verdicts],
        "tables": {one.name: {"caption": one.caption, "head": one.head, "rows": one.rows} for one in made},
        "figures": {one.name: one.caption for one in study.figures},
        "runs": [_run(study, run, plan, kept, outdated) for run in dict.fromkeys(job.run for job in plan)],
    }


def _claim(one: Verdict) -> dict[str, Any]:
    found = one.measured
    return {
        "name": one.claim.name,
        "say": one.claim.say,
        "source": one.claim.source,
        "test": one.claim.test,
        "outcome": one.outcome,
        "words": tables.outcome(one),
        "measured": tables.shown(found.estimate) if found else tables.NONE,
        "n": _sizes(found) if found else tables.NONE,
        "outdated": list(one.outdated),
    }


def _sizes(found: claims.Measured) -> str:
    parts = [(found.seeds, "seeds"), (found.questions, "questions")]
    return ", ".join(f"{n} {what}" for n, what in parts if n) or tables.NONE


def _run(
    study: Study, run: str, plan: Sequence[Job], kept: Mapping[str, Kept], outdated: Mapping[str, str]
) -> list[str]:
    """A row of the list of runs: the run, its config with overrides, steps, mean seconds, how many are made."""
    own = [job for job in plan if job.run == run]
    made = [kept[job.name] for job in own if job.name in kept]
    shown = [text for text in own[0].overrides if not text.startswith(("run.name=", "run.seed="))]
    if later := study.run(run).as_long_as:
        shown.append(f"as long as {later}")
    steps = sorted({one.record.steps for one in made})
    old = sum(job.name in outdated for job in own)
    return [
        run,
        " ".join([own[0].config.as_posix(), *shown]),
        "–".join(map(str, steps[:1] + steps[1:][-1:])) or tables.NONE,
        f"{sum(one.record.wall_s for one in made) / len(made):.0f}" if made else tables.NONE,
        f"{len(made)} of {len(own)}" + (f", {old} outdated" if old else ""),
    ]


def _commit(git: dict[str, Any] | None) -> str:
    if not git:
        return "not known"
    return f"{git['commit'][:10]}{' with changes' if git.get('dirty') else ''}"


def _dates(finished: Sequence[str]) -> str:
    days = sorted({one[:10] for one in finished if one})
    return tables.NONE if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _set(study: Study, root: Path, where: Path) -> None:
    """The PDF, from the study's report.typ. Raises RunFailed with typst's own words."""
    import typst

    source = study.folder / "report.typ"
    if not source.is_file():
        raise UserError(f"papers/{study.slug}/report.typ: no such file; `nox -s paper -- new NAME` shows one")
    folder = "/" + Path(os.path.relpath(where, root)).as_posix()
    try:
        made = typst.compile(
            str(source), root=str(root), format="pdf", ignore_system_fonts=True, sys_inputs={"folder": folder}
        )
    except RuntimeError as error:
        raise RunFailed(f"papers/{study.slug}/report.typ: {error}") from None
    files.write_bytes(where / "report.pdf", made)
