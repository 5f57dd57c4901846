"""`papers/README.md`: every study with its claims and outcomes, and for every published method the config to run it.

Made from the studies' report.json, the docstrings of rl/algorithms and the configs; a test compares.
"""

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

from papers import study as studies
from rl import algorithms, files
from rl.config.reading import read_toml

INTRO = """# papers

Studies that anyone can re-run. A folder holds `paper.toml` (runs, claims and what they are from), `report.typ`, and
what is made of them: `results/` (a file a run), `tables/`, `figures/`, `report.pdf`. This page is generated, by
`nox -s paper -- index`.

```
nox -s paper -- papers/SLUG               # makes the runs that are missing, judges the claims, sets the PDF
nox -s paper -- papers/SLUG --check       # judges the committed results again and sets the PDF: seconds, no network
nox -s paper -- papers/SLUG --quick       # all of it at toy size, below build/
nox -s paper -- papers/SLUG --import DIR  # takes the run folders of another machine, also a part of them
nox -s paper -- run papers/SLUG --jobs 7 --threads 2 --budget 540 --out DIR   # only the runs, several at a time
                                          # --again, with any: also those that have a valid result
nox -s paper -- new SLUG                  # starts a study from the template
```

A claim *holds* where the whole interval of its test lies on its side of the threshold, *does not hold* where it lies on
the other, and is *undecided* in between, with the number of seeds or questions that would decide it; `papers/claims.py`
has the formulas. A claim that fails stays.
"""
METHODS = """## Methods

The config that reproduces each method of `rl/algorithms` on a policy of a million parameters in a minute or two, and
others that use it. What each file says of the paper, and of the departures from it, stands at its top.
"""


def text(root: Path) -> str:
    """The page."""
    parts = [INTRO, "## Studies\n"]
    for slug in studies.slugs(root):
        parts.append(_study(root, slug))
    return "\n".join([*parts, METHODS, *_methods(root), ""])


def write(root: Path) -> bool:
    """Write the page; whether it changed."""
    path, made = root / "papers" / "README.md", text(root)
    if path.is_file() and path.read_text(encoding="utf-8") == made:
        return False
    files.write_text(path, made)
    return True


def _study(root: Path, slug: str) -> str:
    found = studies.load(studies.find(root, slug), root)
    path = found.folder / "report.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = [f"### [{found.title}]({slug}/)", "", found.question, ""]
    if facts.get("machine"):
        lines += [
            f"{facts['date']}, {facts['machine']}, {facts['facts']['Cost']}. [Report]({slug}/report.pdf). "
            f"`{facts['command']}`",
            "",
        ]
    else:
        lines += [f"Not run yet. `nox -s paper -- papers/{slug}`", ""]
    if facts.get("outdated"):
        lines += [f"**{len(facts['outdated'])} results are outdated.**", ""]
    known = {one["name"]: one for one in facts.get("claims", ())}
    lines += ["| claim | source | measured | outcome |", "|---|---|---|---|"]
    for claim in found.claims:
        one = known.get(claim.name, {"measured": "–", "words": "not run"})
        cells = [claim.say, claim.source, one["measured"], f"**{one['words']}**"]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _methods(root: Path) -> list[str]:
    used: dict[str, list[str]] = {}
    for path in sorted((root / "configs").rglob("*.toml")):
        try:
            algorithm = read_toml(path)["trainer"]["algorithm"]
        except (KeyError, tomllib.TOMLDecodeError):
            continue
        used.setdefault(algorithm, []).append(path.relative_to(root / "configs").as_posix())
    lines = ["| method | config | also |", "|---|---|---|"]
    for name in algorithms.ALGORITHMS:
        own = f"tiny/{name}.toml"
        configs = used.get(name, [])
        first = own if own in configs else next(iter(configs), None)
        also = [link(path) for path in configs if path != first and path.startswith(("tiny/", "smollm2/"))]
        cells = [about(root, name), link(first) if first else "none", ", ".join(also)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def link(path: str) -> str:
    """A config by its path below configs/."""
    return f"[{path.removesuffix('.toml')}](../configs/{path})"


def about(root: Path, name: str) -> str:
    """The first paragraph of an algorithm's docstring, on one line."""
    source = (root / "rl" / "algorithms" / f"{name}.py").read_text(encoding="utf-8")
    return " ".join((ast.get_docstring(ast.parse(source)) or name).split("\n\n")[0].split())
