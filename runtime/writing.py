"""Writes an artifact: everything under a temporary name beside it, then one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dcompile.errors import OutputError
from dcompile.runtime.archive import MANIFEST, SUFFIX
from dcompile.runtime.sidecar import Sidecar, exchange, sweep, sync, temporary
from dcompile.runtime.weights import ALIGN, Array, shards
from dcompile.untrusted import is_safe

FORMAT = 2
"""1: as first released. 2: native code describes its kernels, and weights may lie elsewhere."""
# Any id will do that no tool knows: it marks bytes whose only use is their number.
_PADDING_FIELD = 0xD935
_LOCAL_HEADER, _ZIP64_FIELD = 30, 20


def seal(body: Mapping[str, Any]) -> str:
    """What a manifest says about itself: a digest of all the rest of it, in its order."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, separators=(",", ":")).encode()).hexdigest()


class ArtifactWriter:
    """One artifact in the making: a folder, or a zip file where the name ends in `.dcx`.

    Until `finish` returns, whatever was at `path` is untouched; left without it, nothing remains. With
    `external` the weights go to a folder beside the artifact, named by their content and bound by their hashes.
    """

    def __init__(self, path: str | Path, external: bool = False) -> None:
        self.path = Path(path)
        self._sidecar = Sidecar(self.path) if external else None
        self._files: dict[str, dict[str, object]] = {}
        self._tensors: set[str] = set()
        self._shards = 0
        self._zip: zipfile.ZipFile | None = None
        self._finished = False
        self._check_target()
        self._temporary = temporary(self.path)

    def _check_target(self) -> None:
        path, archive = self.path, self.path.suffix == SUFFIX
        if not path.name or not path.parent.is_dir():
            raise OutputError("there is no folder to write to", where=str(path.parent))
        if not path.exists():
            return
        if archive and not path.is_file():
            raise OutputError("the output exists and is no regular file", where=str(path))
        if not archive and not path.is_dir():
            remedy = f"name it {path.name}{SUFFIX} for a single file"
            raise OutputError("a folder cannot replace a file", where=str(path), remedy=remedy)
        if not archive and any(path.iterdir()) and not (path / MANIFEST).is_file():
            remedy = "name another folder"
            raise OutputError("the folder is not an artifact", where=str(path), remedy=remedy)

    def __enter__(self) -> Self:
        with self._named_errors():
            sweep(self.path)
            if self.path.suffix == SUFFIX:
                self._zip = zipfile.ZipFile(self._temporary, "x", zipfile.ZIP_STORED)
            else:
                self._temporary.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            self._discard()

    def add_bytes(self, name: str, data: bytes | memoryview) -> str:
        """Write one file; its sha256."""
        return self._add(name, [memoryview(data)])

    def add_weights(self, tensors: Iterable[tuple[str, Array]]) -> None:
        """Write tensors as they come; their names are unique over the whole artifact."""
        for pieces in shards(self._unique(tensors)):
            name = f"weights/{self._shards:05}.safetensors"
            if self._sidecar is None:
                self._add(name, pieces)
            else:
                with self._named_errors():
                    self._sidecar.add(name, pieces)
            self._shards += 1
            del pieces

    def _unique(self, tensors: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
        for item in tensors:
            if item[0] in self._tensors:
                raise ValueError(f"tensor {item[0]!r} is written twice")
            self._tensors.add(item[0])
            yield item
            del item

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, with the files' hashes and its own, and move all into place."""
        body: dict[str, Any] = {"format": FORMAT, **manifest, "files": self._files}
        if self._sidecar is not None:
            with self._named_errors():
                body["external"] = self._sidecar.finish()
        body["sha256"] = seal(body)
        self.finish_as((json.dumps(body, indent=1) + "\n").encode())

    def finish_as(self, manifest: bytes) -> None:
        """Write a manifest that lists these very files already, and move all into place."""
        listed = {name: item["sha256"] for name, item in json.loads(manifest)["files"].items()}
        if listed != {name: item["sha256"] for name, item in self._files.items()}:
            raise ValueError("the manifest lists other files")
        self._write(MANIFEST, [memoryview(manifest)])
        with self._named_errors():
            if self._zip is not None:
                self._zip.close()
                sync(self._temporary)
                os.replace(self._temporary, self.path)
            else:
                self._replace_folder()
        self._finished = True

    def _replace_folder(self) -> None:
        if self.path.exists() and exchange(self._temporary, self.path):
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        old = self._temporary.with_suffix(".old")
        if self.path.exists():
            os.rename(self.path, old)
        try:
            os.rename(self._temporary, self.path)
        except BaseException:
            if old.exists():
                os.rename(old, self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _add(self, name: str, pieces: list[memoryview]) -> str:
        if not is_safe(name) or name in self._files or name == MANIFEST:
            raise ValueError(f"no name for a file of an artifact: {name!r}")
        digest = self._write(name, pieces)
        self._files[name] = {"sha256": digest, "bytes": sum(piece.nbytes for piece in pieces)}
        return digest

    def _write(self, name: str, pieces: list[memoryview]) -> str:
        digest = hashlib.sha256()
        with self._named_errors(), self._open(name) as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        if self._zip is None:
            with self._named_errors():
                sync(self._temporary / name)
        return digest.hexdigest()

    def _open(self, name: str) -> IO[bytes]:
        if self._zip is None:
            path = self._temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
        entry = zipfile.ZipInfo(name)
        entry.external_attr = 0o644 << 16
        assert self._zip.fp is not None
        header = self._zip.fp.tell() + _LOCAL_HEADER + len(name.encode()) + _ZIP64_FIELD + 4
        padding = -header % ALIGN
        field = _PADDING_FIELD.to_bytes(2, "little") + padding.to_bytes(2, "little")
        entry.extra = field + bytes(padding)
        return self._zip.open(entry, "w", force_zip64=True)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "free some space there, or write to another place"
            what = f"the artifact could not be written: {error.strerror or error}"
            raise OutputError(what, where=str(self.path), remedy=remedy) from error

    def _discard(self) -> None:
        if self._sidecar is not None:
            self._sidecar.discard()
        if self._zip is not None:
            # Closing would write a directory for entries that may be half there.
            file, self._zip.fp = self._zip.fp, None
            if file is not None:
                _close_quietly(file)
            self._temporary.unlink(missing_ok=True)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)


def _close_quietly(file: IO[bytes]) -> None:
    # What is still buffered goes nowhere: on a full disk, closing fails again.
    with suppress(OSError):
        file.close()


def write_artifact(
    path: str | Path,
    manifest: Mapping[str, Any],
    plan: Mapping[str, Any],
    weights: Iterable[tuple[str, Array]],
    files: Mapping[str, bytes],
) -> None:
    """Write a whole artifact at once."""
    with ArtifactWriter(path) as writer:
        writer.add_bytes("plan.json", (json.dumps(plan, indent=1) + "\n").encode())
        for name, data in files.items():
            writer.add_bytes(name, data)
        writer.add_weights(weights)
        writer.finish(manifest)
