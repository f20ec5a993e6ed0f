# SPDX-License-Identifier: Apache-2.0
"""Folders that are built once, in full or not at all, and named after a hash of their sources."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

KEY_LENGTH = 16


def cache_folder() -> Path:
    """Return $NVDIMM_LAB_CACHE, or nvdimm-driver/lab in the user's cache folder."""
    explicit = os.environ.get("NVDIMM_LAB_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvdimm-driver" / "lab"


def digest(files: Iterable[Path], *extra: str) -> str:
    """Return a key that changes with the name, mode or content of any of `files`, and with `extra`."""
    state = hashlib.sha256()
    for file in sorted(files):
        state.update(f"{file.name}\0{file.stat().st_mode:o}\0".encode())
        state.update(hashlib.sha256(file.read_bytes()).digest())
    for text in extra:
        state.update(hashlib.sha256(text.encode()).digest())
    return state.hexdigest()[:KEY_LENGTH]


def cached(cache: Path, name: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return `cache`/`name`-`key`. If it does not exist, `make` fills it; other builders wait meanwhile."""
    folder = cache / f"{name}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{name}.lock"):
        if folder.is_dir():
            return folder
        partial = cache / f"{name}.partial"
        _remove(partial)
        partial.mkdir()
        make(partial)
        partial.rename(folder)
    return folder


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
