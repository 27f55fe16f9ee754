"""What runs an artifact's plan: the processor (`launch.py`) or a GPU (`cuda/executor.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dcompile.runtime.artifact import Artifact
from dcompile.runtime.launch import Executor
from dcompile.runtime.plan import Plan
from dcompile.runtime.state import Binding
from dcompile.runtime.turns import Turns


class Backend(Protocol):
    """An artifact ready to run, on whatever device; `Executor` says what each method does."""

    plan: Plan
    threads: int

    @property
    def state(self) -> Mapping[str, torch.Tensor]: ...

    def step(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]: ...

    def time_step(self, inputs: Mapping[str, torch.Tensor]) -> list[tuple[str, float]]: ...

    def fill(self, inputs: Mapping[str, torch.Tensor]) -> Binding: ...

    def bind(self, R: int, B: int) -> Binding: ...

    def launch(
        self,
        binding: Binding,
        seconds: npt.NDArray[np.float64] | None = None,
        part: tuple[int, int] | None = None,
    ) -> None: ...

    def repeat(self, binding: Binding, turns: int) -> Turns: ...

    def push(self, slot: int) -> None: ...

    def pull(self, slot: int) -> None: ...

    def clear(self, name: str, slot: int) -> None: ...


def open_backend(artifact: Artifact, threads: int | None = None) -> Backend:
    """What the artifact was compiled for; raises DcompileError where this machine has no such thing."""
    if artifact.manifest["target"] == "cpu":
        return Executor(artifact, threads)
    from dcompile.runtime.cuda.executor import CudaExecutor

    return CudaExecutor(artifact)
