"""The runs that a person names: finished ones in models/final/, unfinished ones in models/checkpoints/."""

from pathlib import Path

from rl import record
from rl.config.reading import nearest
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


def folder(text: str, root: Path = Path(), *, unfinished: bool = False) -> Path:
    """The folder of the run `text`; one still going on, or left unfinished, only with `unfinished`.

    A run that trains anew beside its older result is the one meant. Raises UserError naming the nearest run.
    """
    places = [root / "models" / "checkpoints"] if unfinished else []
    places.append(root / "models" / "final")
    if text and Path(text).name == text:
        for place in places:
            if (place / text / "run.json").is_file():
                return place / text
    for given in (Path(text), root / text):
        if text and (given / "run.json").is_file():
            return given
    if text and Path(text).is_dir():
        raise UserError(f"{text}: no run.json there, so it is no run of this project")
    known = sorted({path.parent.name for place in places for path in place.glob("[!.]*/run.json")})
    where = " or ".join(str(place.relative_to(root)) for place in reversed(places))
    if not known:
        raise UserError(f"{text}: {where} holds no run; make one: nox -s train -- configs/grpo.toml")
    raise UserError(f"{text}: no such run in {where}, {nearest(Path(text).name, known)}")
