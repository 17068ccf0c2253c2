"""Files that are whole or not there: every writer of the package writes through here."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from canvas_engineering.checked import checked_path

try:
    import fcntl
except ImportError:  # Windows: files are replaced whole there too, and leftovers of killed writers stay
    fcntl = None

_UNFINISHED = re.compile(r"\.canvas_engineering-[0-9a-f]{16}\.tmp")
_LOCK = ".canvas_engineering.lock"


def replace_file(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file in one step, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a file that replaces ``path`` when the block ends; an error leaves ``path`` unchanged.

    The content goes to a temporary file beside the target and is on the disk before that is renamed, so a reader, or a
    crash at any moment, finds the old file or the new one. A link stays, and what it points at is replaced; a file that
    is there keeps its rights; a new one gets those that the process gives to any file. A device or a pipe is written to
    as it is. Temporary files in the folder whose writers were killed are removed.

    Raises:
        OSError: the file cannot be written.
        ValueError: no path.
    """
    path = checked_path(path, "path")
    try:
        before = os.stat(path)
    except FileNotFoundError:
        before = None
    if before is not None and not stat.S_ISREG(before.st_mode):
        with open(path, "wb") as file:  # says so where it is a folder
            yield file
        return
    target = Path(os.path.realpath(path))
    _remove_leftovers(target.parent)
    # what replaces a private file is private before its first byte
    handle, temporary = _unfinished(target.parent, 0o666 if before is None else 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            if before is not None:
                _take_rights(file.fileno(), temporary, target, before)
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine may keep the new name and not the content
            if fcntl is not None:  # the lock says that the temporary file has a writer: it is held until there is none
                os.replace(temporary, target)
        if fcntl is None:  # Windows renames closed files only
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def _take_rights(handle: int, temporary: Path, target: Path, before: os.stat_result) -> None:
    """Copies owner and group as far as the process may set them, then mode, access lists and attributes."""
    if hasattr(os, "fchown"):
        for owner in (before.st_uid, -1):
            with contextlib.suppress(PermissionError):
                os.fchown(handle, owner, before.st_gid)
                break
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile: nothing is left to keep
        shutil.copystat(target, temporary)
    os.utime(temporary)


def _unfinished(folder: Path, mode: int) -> tuple[int, Path]:
    """Returns a new temporary file: its descriptor, which holds its lock, and its path."""
    while True:
        # a new name each time: another process may still remove the last one by name
        temporary = folder / f".canvas_engineering-{secrets.token_hex(8)}.tmp"
        handle, _ = _locked(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        if handle is not None:
            return handle, temporary


def _locked(path: Path, flags: int, mode: int = 0o666) -> tuple[int | None, bool]:
    """Opens a file and waits for its lock: the descriptor, which holds it until it is closed, and whether there are
    locks here. No descriptor where the file was removed before the lock was had."""
    handle = os.open(path, flags, mode)
    try:
        if fcntl is None:
            return handle, False
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, True
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):  # a file system without locks
            return handle, False
        os.close(handle)
        raise
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None, True


def _remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of a folder that no writer holds the lock of: theirs was killed."""
    if fcntl is None:
        return
    names = []
    with contextlib.suppress(OSError):  # a folder may be ours to write and not to list
        names = os.listdir(folder)
    for name in filter(_UNFINISHED.fullmatch, names):
        with contextlib.suppress(OSError):  # held by its writer, gone already, or not ours to open
            handle = os.open(folder / name, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(folder / name)
            finally:
                os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Puts the folder's names on the disk, where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Locks a folder against other processes until the block ends. Yields whether that is possible: where
    there are no locks, the block runs all the same, and is not to remove what others may be at."""
    lock, handle = folder / _LOCK, None
    while handle is None:
        handle, alone = _locked(lock, os.O_CREAT | os.O_RDWR)
    try:
        yield alone
    finally:
        if alone:
            with contextlib.suppress(OSError):
                os.unlink(lock)
            if fcntl is not None:  # a process that was forked meanwhile holds the descriptor too
                fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
