"""Weights outside of an artifact: a folder beside it, bound by hash."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from dcompile.errors import ArtifactError
from dcompile.runtime.archive import Archive, Folder
from dcompile.untrusted import is_safe

_AGAIN = "compile the model again, or copy the weights again from where they came"


class Sidecar:
    """The folder in the making: under a temporary name, then one rename to the name of its content.

    Two artifacts of equal weights share one. An artifact that is replaced leaves its own behind, since another
    may name it; it can be removed when none does.
    """

    def __init__(self, artifact: Path) -> None:
        self._artifact = artifact
        self._temporary = (
            artifact.parent / f".{artifact.name}.{os.getpid()}-{uuid4().hex}.weights.tmp"
        )
        self._files: dict[str, dict[str, object]] = {}

    def add(self, name: str, pieces: list[memoryview]) -> None:
        digest, size = hashlib.sha256(), 0
        path = self._temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for piece in pieces:
                digest.update(piece)
                size += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        self._files[name] = {"sha256": digest.hexdigest(), "bytes": size}

    def finish(self) -> dict[str, Any]:
        """Move the folder into place; what the manifest says of it."""
        self._temporary.mkdir(exist_ok=True)
        content = json.dumps(self._files, sort_keys=True).encode()
        name = f"{self._artifact.stem}.weights-{hashlib.sha256(content).hexdigest()[:16]}"
        place = self._artifact.parent / name
        if place.exists():
            # The same content by name; who damaged it gets it anew.
            old = self._temporary.with_suffix(".old")
            os.rename(place, old)
            os.rename(self._temporary, place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self._temporary, place)
        return {"folder": name, "files": self._files}

    def discard(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


def temporary(path: Path, what: str = "artifact") -> Path:
    """A name beside `path` that says which process of which machine is writing there."""
    owner = f"{platform.node()}-{os.getpid()}-{uuid4().hex}"
    return path.parent / f".{path.name}.{what}.{owner}.tmp"


def sweep(path: Path) -> None:
    """Remove what killed writers of this machine left beside `path`."""
    for left in path.parent.glob(
        f".{glob.escape(path.name)}.*.{glob.escape(platform.node())}-*.tmp"
    ):
        process = left.name.rsplit("-", 2)[-2]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(
                missing_ok=True
            )


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def exchange(a: Path, b: Path) -> bool:
    """Let two paths trade their names in one step (Linux: renameat2), so that neither is ever missing."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, swap = -100, 2
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def sync(path: Path) -> None:
    """Have a file's bytes on the disk, so that its new name never stands for less after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_sidecar(
    manifest: Mapping[str, Any], artifact: Path, given: Path | None
) -> tuple[Archive, Mapping[str, Any]] | None:
    """The folder of an artifact's weights, and what they must be; None where they are inside.

    `given` is where they were moved to. Raises ArtifactError where they are not there.
    """
    external = manifest.get("external")
    if external is None:
        if given is not None:
            what = "the artifact holds its own weights"
            raise ArtifactError(what, where=str(artifact), remedy="leave --weights out")
        return None
    folder = external.get("folder") if isinstance(external, dict) else None
    files = external.get("files") if isinstance(external, dict) else None
    if not (isinstance(folder, str) and is_safe(folder) and isinstance(files, dict)):
        what = "the manifest does not say where the weights are"
        raise ArtifactError(what, where=str(artifact), remedy="compile the model again")
    place = given or artifact.resolve().parent / folder
    if not place.is_dir():
        raise ArtifactError(
            f"the weights of {artifact.name} are not there: it needs {len(files)} files of {folder}",
            where=str(place),
            remedy="put the folder beside the artifact, or say where it is: --weights FOLDER",
        )
    return Folder(place), files
