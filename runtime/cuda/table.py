"""The artifact's kernels, from kernels.json, held to what their cubins say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcompile.cubin import CubinFacts, read_cubin
from dcompile.errors import ArtifactError, WrongArchitecture
from dcompile.runtime.artifact import Artifact
from dcompile.untrusted import parse_json

TABLE = "kernels.json"
POINTER = 8
SCALARS: Mapping[str, str] = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
"""Triton's type -> how struct packs it."""
_ITEMS = {"fp32", "bf16", "fp16", "fp64", "i64", "i32", "i16", "i8", "u8", "i1"}
_SIZES = {"i32": 4, "i64": 8, "fp32": 4, "fp64": 8}
_WARPS = 32
_REMEDY = "compile the model again"


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    aligned: bool

    @property
    def pointer(self) -> bool:
        return self.type.startswith("*")

    @property
    def size(self) -> int:
        return POINTER if self.pointer else _SIZES[self.type]


@dataclass(frozen=True)
class Entry:
    """One kernel, with its binary for one architecture."""

    name: str
    kernel: str
    """module:function"""
    arguments: tuple[Argument, ...]
    warps: int
    file: str
    entry: str
    registers: int
    stack: int
    static_shared: int
    dynamic_shared: int
    parameters: tuple[tuple[int, int, int], ...]

    @property
    def threads(self) -> int:
        return 32 * self.warps


def layout(arguments: Sequence[Argument]) -> tuple[tuple[int, int, int], ...]:
    """(ordinal, offset, size) of each argument as the driver takes them: each at a multiple of its size.

    Two pointers always follow, to scratch that Triton may ask for; null where it asks for none.
    """
    out, at = [], 0
    for ordinal, size in enumerate([*(a.size for a in arguments), POINTER, POINTER]):
        at += -at % size
        out.append((ordinal, at, size))
        at += size
    return tuple(out)


def table_of(artifact: Artifact) -> Mapping[str, Any]:
    """The `kernels` of kernels.json, as they stand."""
    where = f"{artifact.path}: {TABLE}"
    try:
        kernels = parse_json(artifact.bytes(TABLE))["kernels"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError("the kernels' table is damaged", where=where, remedy=_REMEDY) from error
    if not isinstance(kernels, dict):
        raise ArtifactError("the kernels' table is damaged", where=where, remedy=_REMEDY)
    return kernels


def architectures(kernels: Mapping[str, Any]) -> list[int]:
    """The architectures that every kernel has a binary for."""
    try:
        each = [{int(n.removeprefix("sm_")) for n in k["binaries"]} for k in kernels.values()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError("the kernels' table is damaged", where=TABLE, remedy=_REMEDY) from error
    return sorted(set.intersection(*each)) if each else []


def entry_of(kernels: Mapping[str, Any], name: str, arch: int) -> Entry:
    """The kernel `name` with its binary for sm_`arch`, every field checked for its kind."""
    where = f"{TABLE}: {name}"
    try:
        item = kernels[name]
        binary = item["binaries"][f"sm_{arch}"]
        entry = Entry(
            name=name,
            kernel=_text(item["kernel"]),
            arguments=tuple(
                Argument(_text(a["name"]), _type(a["type"]), a["aligned"] is True)
                for a in item["arguments"]
            ),
            warps=_count(binary["warps"], 1, _WARPS),
            file=_text(binary["file"]),
            entry=_text(binary["entry"]),
            registers=_count(binary["registers"], 0, 255),
            stack=_count(binary["stack"]),
            static_shared=_count(binary["static_shared"]),
            dynamic_shared=_count(binary["dynamic_shared"]),
            parameters=tuple(tuple(map(_count, p)) for p in binary["parameters"]),  # type: ignore[misc]
        )
        if binary["scratch"] != 0:
            raise ValueError("it needs scratch memory, which no artifact's kernel may")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"the kernels' table is damaged: {error!r}"
        raise ArtifactError(what, where=where, remedy=_REMEDY) from error
    return entry


def check_entry(entry: Entry, cubin: bytes, arch: int, shared_limit: int) -> None:
    """Raise ArtifactError where the table says anything else than the cubin, or more than the GPU has."""

    def broken(what: str) -> ArtifactError:
        return ArtifactError(what, where=f"kernel {entry.name} ({entry.file})", remedy=_REMEDY)

    try:
        facts: CubinFacts = read_cubin(cubin)
    except ValueError as error:
        raise broken(f"a kernel's code cannot be read: {error}") from error
    if facts.arch != arch:
        raise broken(f"its code is for sm_{facts.arch}, the table says sm_{arch}")
    for name in ("entry", "registers", "stack", "static_shared", "parameters"):
        says, has = getattr(entry, name), getattr(facts, name)
        if says != has:
            raise broken(f"the table says {name} {says}, its code has {has}")
    if facts.parameters != layout(entry.arguments):
        what = f"its code takes parameters at {facts.parameters}"
        raise broken(f"{what}, its arguments lie at {layout(entry.arguments)}")
    used = entry.static_shared + entry.dynamic_shared
    if used > shared_limit:
        raise broken(f"it needs {used} bytes of shared memory, the GPU has {shared_limit}")


def choose(kernels: Mapping[str, Any], arch: int, device: str, path: str) -> None:
    """Raise WrongArchitecture where the artifact has no binaries for this GPU."""
    held = architectures(kernels)
    if arch in held:
        return
    names = ", ".join(f"sm_{each}" for each in held) or "none"
    raise WrongArchitecture(
        f"the artifact holds kernels for {names}; this GPU is sm_{arch} ({device})",
        where=path,
        remedy=f"compile the model with --target cuda:sm_{arch}, or install Triton here, "
        "which compiles the artifact's kernels on the spot",
    )


def _type(text: Any) -> str:
    if not isinstance(text, str) or (
        text not in SCALARS and not (text[:1] == "*" and text[1:] in _ITEMS)
    ):
        raise ValueError(f"no type of an argument: {text!r}")
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _count(value: Any, least: int = 0, most: int = 1 << 24) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no count from {least} to {most}")
    return value
