"""An exported folder to the Hugging Face hub, in one commit."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import RunFailed, UserError

if TYPE_CHECKING:
    from rl.display import Display

TRY = "or look at what would be uploaded with --dry-run"


def check_access(repo: str) -> str:
    """The user's name on the hub. Raises UserError, before anything is written, without a token or a network."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"--repo {repo}: HF_HUB_OFFLINE is set, so the hub cannot be reached: unset it, {TRY}")
    if get_token() is None:
        raise UserError(f"--repo {repo}: no token of the hub here: run `hf auth login` (or set HF_TOKEN), {TRY}")
    try:
        return str(HfApi().whoami()["name"])
    except HfHubHTTPError as error:
        raise UserError(f"--repo {repo}: the hub refused the token ({_line(error)}): run `hf auth login`") from error
    except Exception as error:  # the client raises its transport's own types
        raise UserError(f"--repo {repo}: the hub cannot be reached ({_line(error)}): try again, {TRY}") from error


def upload(folder: Path, repo: str, private: bool, display: "Display", *, dry_run: bool) -> None:
    """Create `repo` where it is missing and upload `folder` in one commit; with `dry_run` list its files instead.

    Raises RunFailed where the hub refuses or the network ends: the folder stays, and uploads later by hand.
    """
    from huggingface_hub import HfApi

    found = sorted(path for path in folder.rglob("*") if path.is_file())
    display.stage(f"{'would be uploaded' if dry_run else 'upload'} to {repo}{' (private)' if private else ''}")
    for path in found:
        display.note(f"{path.relative_to(folder)} ({path.stat().st_size / 1e6:,.2f} MB)")
    if dry_run:
        display.note(f"nothing was uploaded; the card is {folder / 'README.md'}")
        return
    try:
        api: Any = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{folder.name}, exported by duet")
    except Exception as error:
        raise RunFailed(
            f"{repo}: not uploaded ({_line(error)}); the files are in {folder}: `hf upload {repo} {folder}`"
        ) from error
    display.note(f"{done}")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
