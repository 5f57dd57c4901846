"""docs/setup.md and its pictures: commands that exist, versions that are pinned, pictures of what is printed."""

import html
import re
from pathlib import Path

from rl import pictures

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "setup.md").read_text(encoding="utf-8")


def shown(name: str) -> str:
    """The text of a picture, its lines in order."""
    picture = (ROOT / pictures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    parts = re.findall(r'<text class="duet-r\d+" x="[^"]*" y="([^"]*)"[^>]*>([^<]*)</text>', picture)
    lines: dict[str, str] = {}
    for height, part in parts:
        lines[height] = lines.get(height, "") + html.unescape(part)
    return "\n".join(lines.values()).replace("\xa0", " ")


def test_the_page_shows_every_picture_and_each_shows_its_command() -> None:
    assert set(re.findall(r"\(pictures/([\w-]+)\.svg\)", TEXT)) == set(pictures.PICTURES)
    for name, (title, _) in pictures.PICTURES.items():
        assert f"$ {title}" in shown(name)
    assert "verdict: fits with --set" in " ".join(shown("plan-small").split())
    assert "verdict: fits" in shown("plan")
    assert "torch device" in shown("doctor")


def test_a_picture_is_what_the_command_prints_now() -> None:
    """The one whose output no machine and no version changes."""
    title, command = pictures.PICTURES["error"]
    text = pictures.output(command)
    assert text.startswith("error: --set: [trainer] unknown key 'num_generation'")
    kept = (ROOT / pictures.FOLDER / "error.svg").read_text(encoding="utf-8")
    assert kept == pictures.picture(title, text)


def test_commands_and_versions_of_the_page_are_those_of_the_project() -> None:
    pinned = re.search(r'"(nox\[uv\]==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned
    assert set(re.findall(r'"(nox\[[^"]+)"', TEXT)) == {pinned.group(1)}
    sessions = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    assert set(re.findall(r"nox -s (\w+)", TEXT)) <= set(sessions)
    assert (ROOT / ".python-version").read_text().strip() == "3.13"
    for link in re.findall(r"\]\((\.\./[^)]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists()
