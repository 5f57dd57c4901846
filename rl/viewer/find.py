"""The run that a person names: a folder, or a name in models/final or models/checkpoints."""

from pathlib import Path

from rl.config_read import nearest
from rl.errors import UserError


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
