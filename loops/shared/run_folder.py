"""The folder of a run: one process at a time has it, and nothing that another run wrote is overwritten."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def take_folder(names: Sequence[Path], resume_from: str) -> tuple[IO, Path, dict | None]:
    """The first of `names` that this run may have: (claim, folder, identity of the run in it).

    The identity is that of a run which may start anew there: {} where none may, None where the folder is empty. Raises
    ValueError where another process runs there, or it cannot be written, or holds files and is not resumed.
    """
    problem = ""
    for folder in names:
        with writing_to(folder):
            claim, taken = claim_folder(folder), list_contents(folder)
            inside = Path(resume_from).resolve().parent.parent == folder.resolve()
            if claim is None:
                problem = f"output_dir {folder} is in use by another process: wait for it, or give another one."
            elif taken and (resume_from == "none" or resume_from not in ("latest", "best") and not inside):
                problem = f"output_dir {folder} already holds files ({taken}): give another, or resume_from: latest."
                release_claim(claim)
            else:
                ended = (folder / "model").exists()
                known = {} if ended else read_json(folder / "provenance.json").get("identity", {})
                return claim, folder, known if taken else None
    raise ValueError(problem)


def list_contents(folder: Path) -> str:
    """Names of the files in a folder, for messages: none where all are hidden, or a save that was cut off left them."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    empty = (folder / "checkpoints").is_dir() and all(p.name[0] == "." for p in (folder / "checkpoints").iterdir())
    shown = [name for name in names if name[0] != "." and not (empty and name == "checkpoints")]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def claim_folder(folder: Path) -> IO | None:
    """An open file that this process has locked until it ends; None where another process has the lock.

    It lies in the folder, or in the nearest one above that is there. File systems without locks give it to everybody.
    """
    folder = folder.resolve()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    name = ".claim" if place == folder else f".claim-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    file = open(place / name, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise BlockingIOError  # its holder is just leaving
    except (BlockingIOError, PermissionError, FileNotFoundError):
        file.close()
        return None
    except OSError:
        pass
    atexit.register(release_claim, file)
    return file


def release_claim(claim: IO | None) -> None:
    """Give a folder back: remove the file, then the lock."""
    if claim is not None and not claim.closed:
        Path(claim.name).unlink(missing_ok=True)
        claim.close()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Errors of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written ({error.strerror}): give another one.") from error


def read_json(path: Path) -> dict:
    """A JSON file's mapping; empty where there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}
