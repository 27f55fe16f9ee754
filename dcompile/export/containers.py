"""An artifact as a folder or as one `.dcx` file: the same files, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcompile.errors import ArtifactError, OutputError
from dcompile.runtime.archive import MANIFEST, SUFFIX, Archive, open_archive
from dcompile.runtime.writing import ArtifactWriter, seal
from dcompile.untrusted import is_safe, parse_json

_REMEDY = "compile the model again, or copy the artifact again from where it came"


def is_artifact(path: Path) -> bool:
    """Whether a path names an artifact rather than a checkpoint."""
    return path.suffix == SUFFIX or (path / MANIFEST).is_file()


def repack(source: Path, out: Path, container: str) -> Path:
    """Write the artifact `source` again at `out` as "folder" or "dcx", whatever it is now.

    Every file and the manifest keep their bytes, so there and back again gives the same artifact; for
    which machine it was made does not matter.  Raises ArtifactError where a file is not what the
    manifest says, OutputError where `out` cannot be written or its name is of the other container.
    """
    if (out.suffix == SUFFIX) != (container == "dcx"):
        wanted = f"{out.name}{SUFFIX}" if container == "dcx" else out.stem
        what = f"a {container} is not named {out.name}"
        raise OutputError(what, where=str(out), remedy=f"-o {out.parent / wanted}")
    archive = open_archive(source)
    manifest = bytes(archive.read(MANIFEST))
    files = _files(manifest, source)
    with ArtifactWriter(out) as writer:
        for name, claim in files.items():
            _check(archive, name, claim, source)
            if writer.add_bytes(name, archive.read(name)) != claim["sha256"]:
                raise _damaged("a file is damaged or was altered", f"{source}: {name}")
        writer.finish_as(manifest)
    return out


def _files(manifest: bytes, source: Path) -> dict[str, dict[str, Any]]:
    try:
        body = parse_json(manifest)
        if body["sha256"] != seal(body):
            raise _damaged("the manifest is damaged or was altered", str(source))
        return dict(body["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged("the manifest cannot be read", str(source)) from error


def _check(archive: Archive, name: str, claim: object, source: Path) -> None:
    if not is_safe(name) or not isinstance(claim, dict) or "sha256" not in claim:
        raise _damaged("the manifest lists a file outside the artifact", f"{source}: {name}")


def _damaged(what: str, where: str) -> ArtifactError:
    return ArtifactError(what, where=where, remedy=_REMEDY)
