"""Opens an artifact: refuses, with the reason, what this machine cannot run as it was written."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcompile.errors import ArtifactError
from dcompile.runtime import weights
from dcompile.runtime.archive import MANIFEST, Archive, open_archive
from dcompile.runtime.plan import Plan
from dcompile.runtime.processor import cpu_flags
from dcompile.runtime.sidecar import open_sidecar
from dcompile.runtime.writing import FORMAT, ArtifactWriter, seal, write_artifact
from dcompile.untrusted import is_safe, parse_json

__all__ = ["Artifact", "ArtifactWriter", "open_artifact", "write_artifact"]

_AGAIN = "compile the model again, or copy the artifact again from where it came"
_HERE = "compile the model again on this machine"
TARGETS = ("cpu", "cuda")


@dataclass
class Artifact:
    """A checked artifact; its files and tensors are views of the mapped bytes."""

    path: Path
    manifest: Mapping[str, Any]
    plan: Plan
    isa: str
    """The variant of the native code that is run; none on a GPU."""
    _archive: Archive = field(repr=False)
    _sidecar: Archive | None = field(default=None, repr=False)
    _tensors: dict[str, weights.Entry] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The files, without the manifest."""
        return tuple(self.manifest["files"])

    def bytes(self, name: str) -> memoryview:
        if self._sidecar is not None and name in self.manifest["external"]["files"]:
            return self._sidecar.read(name)
        if name not in self.manifest["files"]:
            raise ArtifactError(f"the artifact has no file {name!r}", where=str(self.path))
        return self._archive.read(name)

    def text(self, name: str) -> str:
        try:
            return str(self.bytes(name), "utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{name} is not text", where=str(self.path)) from error

    @property
    def kernel_files(self) -> tuple[str, ...]:
        """The shared libraries of the variant chosen for this machine."""
        return tuple(self.manifest["kernels"]["isas"][self.isa]["files"])

    @property
    def describes_kernels(self) -> bool:
        """Whether the code must say what its kernels touch; format 1 is from before it did."""
        return bool(self.manifest["format"] >= 2)

    @property
    def token_ids(self) -> int:
        """How many different ids the canvas may hold."""
        model = self.manifest["model"]
        vocab, mask = model.get("vocab_size"), model.get("mask_id")
        for number in (vocab, mask):
            if type(number) is not int or not 0 <= number < 1 << 31:
                what = "the manifest's vocab_size or mask_id is no count"
                raise ArtifactError(what, where=str(self.path), remedy=_AGAIN)
        return int(max(vocab, mask + 1))

    @property
    def tensors(self) -> Mapping[str, weights.Entry]:
        return self._tensors

    def weights(self, name: str) -> weights.Array:
        """A weight or constant over the mapped file; it must not be written to."""
        entry = self._tensors[name]
        return weights.mapped(self.bytes(entry.file), entry)


def open_artifact(
    path: str | Path, verify: bool = True, weights_at: str | Path | None = None
) -> Artifact:
    """Open and check; `verify=False` leaves out the hashes of the files, and nothing else.

    `weights_at` is the folder of weights that lie outside the artifact, where they were moved.
    """
    path = Path(path)
    archive = open_archive(path)
    manifest = _manifest(archive, path)
    _check_files(archive, manifest["files"], path, verify)
    sidecar = open_sidecar(manifest, path, None if weights_at is None else Path(weights_at))
    if sidecar is not None:
        _check_files(*sidecar, path, verify)
    plan = Plan.read(_json(archive, "plan.json", path), f"{path}: plan.json")
    on_gpu = manifest["target"] == "cuda"
    if any((launch.where == "cuda") != on_gpu for launch in plan.launches):
        what = f"the plan launches what does not run on the target, {manifest['target']}"
        raise ArtifactError(what, where=f"{path}: plan.json", remedy=_AGAIN)
    isa = "" if on_gpu else _choose_isa(manifest, path)
    artifact = Artifact(path, manifest, plan, isa, archive, sidecar and sidecar[0])
    for name, entry in _entries(artifact):
        if name in artifact._tensors:
            raise ArtifactError(f"tensor {name!r} is there twice", where=str(path), remedy=_AGAIN)
        artifact._tensors[name] = entry
    plan.check_weights({name: entry.bytes for name, entry in artifact._tensors.items()})
    return artifact


def _entries(artifact: Artifact) -> Iterator[tuple[str, weights.Entry]]:
    outside = artifact.manifest["external"]["files"] if artifact._sidecar is not None else ()
    for file in (*artifact.names, *outside):
        if file.startswith("weights/") and file.endswith(".safetensors"):
            yield from weights.entries(artifact.bytes(file), file)


def _json(archive: Archive, name: str, path: Path) -> dict[str, Any]:
    try:
        body = parse_json(archive.read(name))
    except ValueError as error:
        what = f"{name} is damaged: {error}"
        raise ArtifactError(what, where=str(path), remedy=_AGAIN) from error
    if not isinstance(body, dict):
        raise ArtifactError(f"{name} is no JSON object", where=str(path), remedy=_AGAIN)
    return body


def _manifest(archive: Archive, path: Path) -> dict[str, Any]:
    body = _json(archive, MANIFEST, path)

    def refuse(what: str, remedy: str) -> ArtifactError:
        return ArtifactError(what, where=str(path), remedy=remedy)

    if "format" not in body or "dcompile" not in body:
        raise refuse("this is not an artifact: its manifest is of something else", _AGAIN)
    if type(body["format"]) is not int or not 1 <= body["format"] <= FORMAT:
        what = f"the artifact has format {body['format']!r}, this dcompile reads 1 to {FORMAT}"
        raise refuse(what, f"compile the model again (it was dcompile {body['dcompile']})")
    if body.get("sha256") != seal(body):
        raise refuse("the manifest is damaged or was altered", _AGAIN)
    if body.get("target") not in TARGETS:
        what = f"the artifact was compiled for {body.get('target')!r}, this runtime runs {TARGETS}"
        raise refuse(what, "compile the model again with --target cpu")
    if body["target"] == "cpu" and body.get("machine") != platform.machine():
        what = f"the artifact is for {body.get('machine')!r}, this machine is {platform.machine()}"
        raise refuse(what, _HERE)
    for key in ("model", "options", "policy", "kernels", "files"):
        if not isinstance(body.get(key), dict):
            raise refuse(f"the manifest has no {key!r}", _AGAIN)
    return body


def _check_files(archive: Archive, files: Mapping[str, Any], path: Path, verify: bool) -> None:
    def check(item: tuple[str, Any]) -> None:
        name, claim = item
        where = f"{path}: {name}"
        if not is_safe(name) or not isinstance(claim, dict):
            raise ArtifactError("the manifest lists a file outside the artifact", where=where)
        data = archive.read(name)
        if data.nbytes != claim.get("bytes"):
            what = f"a file has {data.nbytes} bytes, the manifest says {claim.get('bytes')}"
            raise ArtifactError(what, where=where, remedy=_AGAIN)
        if verify and hashlib.sha256(data).hexdigest() != claim.get("sha256"):
            what = "a file is damaged or was altered: its hash differs from the manifest's"
            raise ArtifactError(what, where=where, remedy=_AGAIN)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, files.items()):
            pass


def _choose_isa(manifest: Mapping[str, Any], path: Path) -> str:
    isas, flags = manifest["kernels"].get("isas"), cpu_flags()
    lacking: list[str] = []
    try:
        for isa, variant in isas.items():
            missing = sorted(set(variant["requires"]) - flags)
            unlisted = sorted(set(variant["files"]) - set(manifest["files"]))
            if unlisted:
                what = f"variant {isa!r} names a file that is not there: {unlisted[0]}"
                raise ArtifactError(what, where=str(path), remedy=_AGAIN)
            if not missing:
                return str(isa)
            lacking.append(f"{isa} needs {', '.join(missing)}")
    except (AttributeError, KeyError, TypeError) as error:
        what = "the manifest's list of kernels cannot be read"
        raise ArtifactError(what, where=str(path), remedy=_AGAIN) from error
    why = "; ".join(lacking) or "there is none"
    what = f"no variant of the kernels runs on this processor: {why}"
    raise ArtifactError(what, where=str(path), remedy=_HERE)
