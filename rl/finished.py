"""The finished runs in models/final/, by name."""

from pathlib import Path

from rl import record
from rl.config_read import nearest
from rl.errors import UserError
from rl.record import Record


def names(root: Path) -> list[str]:
    """Names of the finished runs, sorted; what is still being moved there has a hidden name."""
    found = (path.parent.name for path in (root / "models" / "final").glob("*/run.json"))
    return sorted(name for name in found if not name.startswith("."))


def find(root: Path, name: str) -> tuple[Path, Record]:
    """Folder and record of the run called `name`, or with that folder.

    Raises UserError when there is none, with the nearest name, or what to do about one that is not finished.
    """
    own = Path(name).name
    folder = root / "models" / "final" / own
    if own and (folder / "run.json").is_file():
        return folder, record.read(folder)
    if own and (root / "models" / "checkpoints" / own / "run.json").is_file():
        raise UserError(f"{name}: that run is not finished; go on with it: nox -s train -- ITS CONFIG --resume")
    known = names(root)
    hint = nearest(own, known) if known else "there is none yet, make one: nox -s train -- configs/grpo.toml"
    raise UserError(f"{name}: no such run in models/final; {hint}")
