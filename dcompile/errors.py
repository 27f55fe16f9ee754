"""Every error that a user can cause: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DcompileError(Exception):
    """Base of all named errors; the command line prints it and exits with 1."""

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        lines = [what]
        if where is not None:
            lines.append(f"  where  {where}")
        if remedy is not None:
            lines.append(f"  try    {remedy}")
        super().__init__("\n".join(lines))
        self.what, self.where, self.remedy = what, where, remedy


class CheckpointError(DcompileError):
    """A checkpoint's file is missing, unreadable, truncated, or of an unknown kind."""


class ConfigError(DcompileError):
    """A key of the model's config is missing, contradicts another, or has an unknown value."""


class TensorError(DcompileError):
    """A checkpoint's tensor is missing, surplus, or has another shape or dtype than the config says."""


class UnknownArchitecture(DcompileError):
    """The config names a model that no frontend defines."""


class UnsupportedModel(DcompileError):
    """The model cannot be traced, or its step has an operator that no stage can take."""


class MixesPositions(UnsupportedModel):
    """An operator outside attention lets one position see another, so K/V reuse would be wrong."""


class DataDependentShape(UnsupportedModel):
    """A shape of the step is known only when the data is."""


class OptionError(DcompileError):
    """A compile-time option has a value that makes no sense, alone or with another."""


class PolicyError(OptionError):
    """A decoding policy raises, or returns what no step can take: named with its file and line."""


class RequestError(DcompileError):
    """A generation request cannot be served: its prompt, length or a run-time setting is out of range."""


class Full(DcompileError):
    """An engine takes no more requests now: its waiting list is full, or it is about to end."""


class ArtifactError(DcompileError):
    """An artifact is damaged, altered, of another version, or made for another machine."""


class WrongArchitecture(ArtifactError):
    """An artifact holds no code for this machine's GPU."""


class DeviceError(DcompileError):
    """There is no GPU or no driver, or the driver refuses what is asked."""


class BuildError(DcompileError):
    """The machine lacks something that emitting code needs, such as a C++ compiler."""


class MissingPackage(DcompileError):
    """A package that running artifacts does not need is needed, and not installed."""


class OutputError(DcompileError):
    """The artifact could not be written; nothing half-made was left behind."""


class VerificationError(DcompileError):
    """An artifact departs from the checkpoint that it is said to come from."""


class ContractError(DcompileError):
    """A pass broke the graph contract: a bug of the pass, reported with its name and the node."""


_EXTRAS = {"torch": "compile", "safetensors": "compile", "triton": "cuda", "onnx": "export"}


@contextmanager
def naming_missing(who: str) -> Iterator[None]:
    """Where `who` lacks a package of an extra, raise MissingPackage, which says what installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        what = f"{who} needs {package}, which is not installed"
        raise MissingPackage(what, remedy=f"pip install 'dcompile[{_EXTRAS[package]}]'") from error
