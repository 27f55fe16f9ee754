"""Opens what an artifact was compiled for."""

from __future__ import annotations

from dcompile.runtime.artifact import Artifact
from dcompile.runtime.backend import Backend


def open_backend(artifact: Artifact, threads: int | None = None) -> Backend:
    """What the artifact was compiled for; raises DcompileError where this machine has no such thing."""
    if artifact.manifest["target"] == "cpu":
        from dcompile.runtime.cpu.executor import Executor

        return Executor(artifact, threads)
    from dcompile.runtime.cuda.executor import CudaExecutor

    return CudaExecutor(artifact)
