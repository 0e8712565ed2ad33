"""What a path of ``backstay://`` means: job, run, folder, and the step that the files of the folder belong to.

Must not touch what is stored.
"""

from __future__ import annotations

import re
from typing import Final

from backstay.stores.file_store import FileStore

SCHEME: Final = "backstay"
_STEP: Final = re.compile(r"(?:.*[^a-z])?(?:global_?step|step|iter(?:ation)?|checkpoint|ckpt|epoch)s?[-_=]?(\d+)", re.I)
_NUMBER: Final = re.compile(r"(\d+)")


def split_path(path: str) -> tuple[str, str]:
    """``job/run_id`` and the rest of a path without its scheme; both empty if it names no run."""
    parts = path.split("/", 2)
    if len(parts) < 2:
        return "", ""
    return f"{parts[0]}/{parts[1]}", parts[2] if len(parts) == 3 else ""


def folder_of(name: str) -> tuple[str, int | None]:
    """The folder that is one snapshot, and its step.

    The first part that names its number (``step-100``, ``checkpoint-5``), else the first that is only a number, else the first
    part, without a step. A number within a name (``llama3``, ``subdir0``) is part of the name.
    """
    parents = name.split("/")[:-1]
    for pattern in (_STEP, _NUMBER):
        for index, parent in enumerate(parents):
            if found := pattern.fullmatch(parent):
                return "/".join(parents[: index + 1]), int(found.group(1))
    return (parents[0] if parents else ""), None


def step_of(name: str, store: FileStore) -> int | None:
    """The step that a file belongs to: its folder's, else one more than the newest; None: it lies in no folder."""
    folder, step = folder_of(name)
    if not folder or step is not None:
        return step
    if store.open_folder == folder and store.open_step is not None:
        return store.open_step
    return max(store.newest_step, store.open_step or 0) + 1


def enter_step(name: str, store: FileStore) -> int | None:
    """The step of a file to write; the first file of a later step seals the one before."""
    step = step_of(name, store)
    before = store.open_step
    if step is not None and before is not None and step > before:
        store.commit(before, is_sealing=True)
    if step is not None:
        store.open_folder = folder_of(name)[0]
    return step


def move(store: FileStore, name: str, new_name: str) -> None:
    """Rename an open file, or a folder of open files, which takes the new folder's step if nothing else is open.

    Raises:
        UsageError: it would get into a step that is sealed, or beside files of another one.
    """
    moved = {n: new_name + n[len(name) :] for n in store.open_names() if n == name or n.startswith(f"{name}/")}
    if not moved:
        return
    folder, step = folder_of(next(iter(moved.values())))
    if folder and step is None:
        is_whole = store.holds_only(moved)
        step = store.open_step if is_whole and store.open_step is not None else step_of(f"{folder}/x", store)
    store.move(moved, step)
    if folder:
        store.open_folder = folder
