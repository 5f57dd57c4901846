"""Text made from published runs (`evals.published`): a section for each experiment, and the README's short tables.

An *experiment* is a run's name without `-seed<N>`. Pure functions: the same runs give the same bytes.
"""

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rl import record, report
from rl.errors import UserError

if TYPE_CHECKING:
    from evals.published import Published

START = re.compile(r"\s*<!--\s*published:\s*(\S+?)\s*-->\s*")
END = re.compile(r"\s*<!--\s*end\s*-->\s*")
AGAIN = "python -m evals published"
INTRO = f"""# Published runs

Made by `{AGAIN}` from the files under `runs/` alone; `python -m evals check` says whether it still follows from them.

Scores are shares of right answers on held-out questions, decoded greedily and graded by the run's own verifier, before
and after training. ± is one standard error over the questions; a run's interval is paired by question (95 %, ±1.96
standard errors of the differences), the mean's covers the seeds (95 %, Student's t). Time is the whole run's, both
measurements included; tokens/s are sampled tokens over rollout time and |Δlogp| is between trainer and sampler, means
over the steps.
"""


def fill(text: str, found: Sequence["Published"]) -> tuple[str, list[str]]:
    """The text with each block `<!-- published: NAME -->` … `<!-- end -->` made anew, and the NAMEs nothing matches.

    NAME is an experiment or a pattern (`smollm2-*`). An empty block nothing matches stays empty, and markers inside
    fenced code are left alone. Raises UserError for a block without an end.
    """
    lines, unmatched, body = [], [], ""
    opened, name, fence = 0, "", ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        start, tick = START.fullmatch(line), re.match(r"\s*(```|~~~)", line)
        if opened and start:
            break
        if opened and END.fullmatch(line):
            matching = groups([one for one in found if fnmatchcase(one.experiment, name)])
            unmatched += [] if matching else [name]
            family = re.search(r"[*?[]", name) is not None
            shown = _short(matching, family) if matching else [f"No run of `{name}` is published yet.\n"]
            lines += ["\n", *shown, "\n", line] if matching or body.strip() else [body, line]
            opened = 0
        elif opened:
            body += line
        else:
            lines.append(line)
            if tick and fence in ("", tick[1]):
                fence = "" if fence else tick[1]
            elif start and not fence:
                opened, name, body = number, start[1], ""
    if opened:
        raise UserError(f"README.md: line {opened}: <!-- published: {name} --> has no <!-- end -->; add that line")
    return "".join(lines), unmatched


def groups(found: Sequence["Published"]) -> list[list["Published"]]:
    """The runs of each experiment, by seed; experiments by name."""
    names = sorted({one.experiment for one in found})
    return [sorted((one for one in found if one.experiment == n), key=lambda one: one.run.seed) for n in names]


def seeds(group: Sequence["Published"]) -> tuple[report.Seeds, report.Seeds]:
    """The tables over seeds, the runs' own metric first. Raises UserError unless only the seed differs."""
    records = [one.run for one in group]
    own = report.seeds_table(records)
    return own, report.seeds_table(records, next(metric for metric in report.METRICS if metric != own.metric))


def section(group: list["Published"]) -> str:
    """One experiment: a row a run, the mean over seeds, and what it takes to make them again."""
    own, other = seeds(group)
    head = ["run", "seed", "n", f"{own.metric} before", f"{own.metric} after", f"{own.metric} difference [95 %]"]
    head += [f"{other.metric} before", f"{other.metric} after", "well-formed before", "well-formed after"]
    head += ["steps", "time", "device", "mean |Δlogp|", "tokens/s"]
    rows = [_row(one.run, own.metric, other.metric) for one in group]
    if len(group) > 1:
        means = [_over(table, column) for table in (own, other) for column in ("before", "after")]
        well = [_mean([one.raw["result"]["wellformed"][when] for one in group]) for when in ("before", "after")]
        cells = [*means[:2], report.interval(own.mean["difference"]), *means[2:], *well]
        rows.append([f"mean of {len(group)}", "", "", *cells, *[""] * 5])
    constants = _per_run(group, [_constant(one, "always giving it scores") for one in group])
    commands = _per_run(group, [_code(one.run.command) if one.run.command else "not recorded" for one in group])
    links = [f"[curves of seed {one.run.seed}](runs/{one.run.name}/curves.png)" for one in group]
    links += [f"[its completions](runs/{one.run.name}/samples.jsonl)" for one in group if len(group) == 1]
    for one in group:
        for path in one.measured:
            shown = f"lm-eval, seed {one.run.seed}: {path.with_suffix('').as_posix()}"
            links.append(f"[{shown}](runs/{one.run.name}/results/{path.as_posix()})")
    return "\n".join(
        [
            *(f"## {group[0].experiment}", "", *_table(head, rows), ""),
            *(line for note in dict.fromkeys(one.note for one in group if one.note) for line in (note, "")),
            f"- Commonest held-out answer: {constants}.",
            f"- Command: {commands}",
            f"- Commit: {_per_run(group, [_commit(one.run) for one in group])}",
            f"- Packages: {_per_run(group, [_packages(one.run) for one in group])}",
            f"- {', '.join(links)}",
            "",
        ]
    )


def _row(run: record.Record, own: str, other: str) -> list[str]:
    result: Any = run.result
    rollout = run.rollout or {}
    dlogp, speed = rollout.get("mean_abs_dlogp"), rollout.get("tokens_per_s")
    well = result["wellformed"]
    return [
        *(f"[{run.name}](runs/{run.name}/run.json)", str(run.seed), str(result[own]["after"]["n"])),
        *(report.plus_minus(result[own][when]) for when in ("before", "after")),
        report.interval(result[own]["difference"]),
        *(report.plus_minus(result[other][when]) for when in ("before", "after")),
        *(f"{well['before']:.3f}", f"{well['after']:.3f}", str(run.steps), report.duration(run.wall_s), run.device),
        *("–" if dlogp is None else f"{dlogp:.1e}", "–" if speed is None else f"{speed:,.0f}"),
    ]


def _short(groups: list[list["Published"]], family: bool) -> list[str]:
    """The README's table of one experiment, or of a family with the experiments' names in front.

    A family shows an experiment of several seeds by their mean alone, with the longest time: each run is a row of
    evals/published/README.md.
    """
    tables = [seeds(group) for group in groups]
    mixed = len({own.metric for own, _ in tables}) > 1
    rows = []
    for group, (own, other) in zip(groups, tables, strict=True):
        first = [group[0].experiment + (f" ({own.metric})" if mixed else "")] if family else []
        for one in group if not family or len(group) == 1 else []:
            result: Any = one.run.result
            score, beside = result[own.metric], result[other.metric]
            cells = [report.plus_minus(score["before"]), report.plus_minus(score["after"])]
            cells += [report.interval(score["difference"]), report.duration(one.run.wall_s)]
            cells += [f"{beside['before']['value']:.3f} → {beside['after']['value']:.3f}"]
            rows.append([*first, str(one.run.seed), *cells, *([_constant(one, "scores")] if family else [])])
        if len(group) > 1:
            longest = f"≤ {report.duration(max(one.run.wall_s for one in group))}" if family else ""
            means = [_over(own, "before"), _over(own, "after"), report.interval(own.mean["difference"]), longest]
            second = f"{other.mean['before']['value']:.3f} → {other.mean['after']['value']:.3f}"
            rows.append(
                [*first, f"mean of {len(group)}", *means, second, *([_constant(group[0], "scores")] if family else [])]
            )
    own, other = tables[0]
    head = [*(["run"] if family else []), "seed", "before", "after", "difference [95 %]", "time"]
    head += ["the other score" if mixed else other.metric]
    n = sorted({row.n for own, _ in tables for row in own.rows})
    lines = [f"{line}\n" for line in _table([*head, *(["commonest answer"] if family else [])], rows)]
    metric = "" if mixed else f"{own.metric.capitalize()} scores, greedy, "
    about = f"{metric}n = {' or '.join(map(str, n))} held-out questions; ± is one standard error, brackets are 95 % "
    about += "(a run's over the questions, a mean's over the seeds)."
    if not family:
        constants = _per_run(groups[0], [_constant(one, "always giving it scores") for one in groups[0]])
        about += f" Commonest answer: {constants}."
    return [*lines, "\n", f"{about}\n"]


def _constant(one: "Published", words: str) -> str:
    """The commonest held-out answer and the strict score of giving no other, so that a gain can be held against it."""
    counts = Counter(one.answers)
    answer = min(counts, key=lambda answer: (-counts[answer], answer))
    share = counts[answer] / len(one.answers)
    return f"{_code(answer)} ({counts[answer]} of {len(one.answers)}), {words} {share:.3f}"


def _over(table: report.Seeds, column: str) -> str:
    return _mean([getattr(row, column) for row in table.rows])


def _mean(values: Sequence[float]) -> str:
    """Mean and t interval over seeds; no interval where all are one value (the same start, the same questions)."""
    mean, bounds = report.mean_t(values)
    return f"{mean:.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds and len(set(values)) > 1 else "")


def _per_run(group: Sequence["Published"], texts: Sequence[str]) -> str:
    """One text where all runs share it, else each with the seeds it is of."""
    if len(set(texts)) == 1:
        return texts[0]
    seeds = {text: [str(one.run.seed) for one, own in zip(group, texts, strict=True) if own == text] for text in texts}
    return "; ".join(f"{text} (seed {', '.join(of)})" for text, of in seeds.items())


def _commit(run: record.Record) -> str:
    if not run.git:
        return "not recorded"
    dirty = {True: " with local changes", False: ""}.get(run.git.get("dirty"), " (as given; the tree was not checked)")
    return f"`{str(run.git.get('commit'))[:12]}`{dirty}"


def _packages(run: record.Record) -> str:
    versions = [f"{name} {run.packages[name]}" for name in record.COMPUTING if run.packages.get(name)]
    lock = {True: "all as locked", False: "not all as locked"}.get(run.packages_match_lock, "no lock to compare with")
    return ", ".join([f"Python {run.python}", *versions]) + f" ({lock})"


def _code(text: str) -> str:
    """Text in code quotes, on one line."""
    short = " ".join(text.split())
    short = short if len(short) <= 200 else f"{short[:199]}…"
    tick = "``" if "`" in short else "`"
    return tick + short + tick


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]
