"""lm-eval's results as they are published, and evals/published/tables/ made from them alone.

Results of a run lie in evals/published/runs/RUN/results/, those of other models in evals/published/results/NAME/; the
samples beside them are packed, since the tables need each question's mark.
"""

import gzip
from collections.abc import Iterable
from pathlib import Path

from evals import tables_read, tables_text

ABOUT = """## lm-eval

Scores by lm-eval, with differences paired by question, are in [tables/results.md](tables/results.md) (also as
[CSV](tables/results.csv), [LaTeX](tables/results.tex) and [JSON](tables/results.json)), made from the results published
here: `runs/<run>/results/` and `results/<model>/`, samples beside them.
"""


def files(root: Path) -> list[tuple[str, Path]]:
    """(published name, result file) of all published results."""
    folder = root / "evals" / "published"
    found = [(path.parent.name, path) for path in sorted((folder / "runs").glob("[!.]*/results"))]
    found += [(path.name, path) for path in sorted((folder / "results").glob("[!.]*"))]
    return [(name, path) for name, results in found for path in tables_read.result_files(results)]


def texts(root: Path) -> dict[Path, str]:
    """Every table's text by path, none where no result is published. Raises UserError for a broken result."""
    found = files(root)
    if not found:
        return {}
    made = tables_text.tables(check(found))
    folder = root / "evals" / "published" / "tables"
    named = tables_text.files(made, lambda path: path.relative_to(root).as_posix())
    return {folder / name: text for name, text in named.items()}


def bench_texts(root: Path) -> dict[Path, str]:
    """The table of each published bench-evals-*.json by path. Raises UserError for a broken one."""
    found = sorted((root / "evals" / "published").glob("bench-evals-*.json"))
    if not found:
        return {}
    from evals import bench  # knows of devices and versions: nothing that other tables need

    return {path.with_suffix(".md"): bench.table(path) for path in found}


def bench_about(tables: Iterable[Path]) -> str:
    """The section that names the bench tables."""
    links = ", ".join(f"[{path.stem.removeprefix('bench-evals-')}]({path.name})" for path in tables)
    return f"## lm-eval: speed\n\nlm-eval's own `hf` model against ours in MLX, on one device in turns: {links}.\n"


def check(found: Iterable[tuple[str, Path]]) -> list[tables_read.Result]:
    """The results. Raises UserError for a broken one, and for two versions of one task."""
    results = tables_read.load(found)
    tables_read.check_versions(results)
    return results


def packed(results: Path, measured: Iterable[Path]) -> dict[Path, bytes]:
    """The files to publish of a folder's result files `measured`, by path below it; the same bytes each time."""
    made: dict[Path, bytes] = {}
    for path in measured:
        made[path] = (results / path).read_bytes()
        samples = tables_read.samples_bytes(results / path)
        made[path.with_name(f"{path.stem}.samples.jsonl.gz")] = gzip.compress(samples, mtime=0)
    return made
