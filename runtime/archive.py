"""The files of an artifact, mapped into memory: a folder, or a zip file of stored entries."""

from __future__ import annotations

import mmap
from pathlib import Path

from dcompile.errors import ArtifactError
from dcompile.runtime.pages import ask_for_large
from dcompile.untrusted import stored_members

MANIFEST = "manifest.json"
SUFFIX = ".dcx"
_REMEDY = "compile the model again, or copy the artifact again from where it came"


class Archive:
    """Files by name; a read gives a view of the mapped bytes, shared with other processes."""

    def read(self, name: str) -> memoryview:
        raise NotImplementedError


class Folder(Archive):
    def __init__(self, root: Path) -> None:
        self.root = root
        self._maps: dict[str, memoryview] = {}

    def read(self, name: str) -> memoryview:
        if name not in self._maps:
            self._maps[name] = self.map_file(name)
        return self._maps[name]

    def map_file(self, name: str) -> memoryview:
        path = self.root
        for part in name.split("/"):
            path = path / part
            # A link could name any file of the machine as part of the artifact.
            if path.is_symlink():
                raise self._broken("the artifact contains a link", path)
        if not path.is_file():
            raise self._broken("a file of the artifact is missing", path)
        return map_file(path)

    def _broken(self, what: str, path: Path) -> ArtifactError:
        return ArtifactError(what, where=str(path), remedy=_REMEDY)


class ZipFile(Archive):
    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = map_file(path)
        try:
            self._spans = stored_members(self._data)
        except ValueError as error:
            raise self._broken(f"the artifact is damaged: {error}") from error

    def _broken(self, what: str) -> ArtifactError:
        return ArtifactError(what, where=str(self.path), remedy=_REMEDY)

    def read(self, name: str) -> memoryview:
        if name not in self._spans:
            raise self._broken(f"a file of the artifact is missing: {name}")
        start, end = self._spans[name]
        return self._data[start:end]


def open_archive(path: Path) -> Archive:
    """Open what is at `path`, or say why it cannot be an artifact."""
    remedy = "name the folder or the .dcx file that `dcompile CHECKPOINT -o ...` wrote"
    if not path.exists():
        raise ArtifactError("there is no such artifact", where=str(path), remedy=remedy)
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            what = f"the folder is not an artifact: it has no {MANIFEST}"
            raise ArtifactError(what, where=str(path), remedy=remedy)
        return Folder(path)
    if not path.is_file():
        raise ArtifactError("this is neither a folder nor a file", where=str(path), remedy=remedy)
    if bytes(map_file(path)[:4]) != b"PK\3\4":
        raise ArtifactError("the file is not an artifact", where=str(path), remedy=remedy)
    return ZipFile(path)


def map_file(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return memoryview(b"")
            found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        what = f"the artifact cannot be read: {error.strerror or error}"
        raise ArtifactError(what, where=str(path)) from error
    ask_for_large(found)  # weights are one long stream; this is still the shared page cache
    return memoryview(found)
