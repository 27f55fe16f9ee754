"""From a planned program to the files of an artifact, for each kind of machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dcompile.codegen.cpu.build import ISA_FLAGS, build, build_library, isas, library_sources
from dcompile.codegen.cpu.lower import Lowered, emitted_sources, lower
from dcompile.codegen.launches import Launch
from dcompile.codegen.targets import Target
from dcompile.codegen.triton.aot import compiler_version
from dcompile.ir.program import Program
from dcompile.ir.show import show_node

if TYPE_CHECKING:
    from dcompile.codegen.cuda.lower import CudaLowered


@dataclass(frozen=True)
class Code:
    """What a target made of a program."""

    plan: Mapping[str, Any]
    stored: list[tuple[str, str, str]]  # (tensor, input, layout) of every weight and constant
    launches: list[Launch]
    files: Mapping[str, bytes]  # that the runtime loads
    texts: Mapping[str, str]  # that people read
    manifest: Mapping[str, Any] = field(default_factory=dict)  # target, machine, kernels


class Backend(Protocol):
    """Compiles for one target.  Raises UnsupportedModel and BuildError."""

    def __call__(self, program: Program) -> Code: ...


def backend_of(target: Target) -> Backend:
    return CPU() if target.kind == "cpu" else CUDA(target)


def lower_cuda(program: Program, target: Target) -> CudaLowered:
    """What a CUDA artifact is made of; raises BuildError without Triton."""
    compiler_version()  # before any module that needs Triton: it says what to install
    from dcompile.codegen.cuda.lower import lower as lower_to_kernels

    return lower_to_kernels(program, target.architectures, gated=True)


@dataclass(frozen=True)
class CPU:
    """The native library, and functions printed as C++, for every instruction set."""

    def __call__(self, program: Program) -> Code:
        lowered = lower(program)
        files = self._files(lowered)
        texts = {"kernels.cpp": lowered.source}
        texts |= {f"kernels/source/{name}": text for name, text in library_sources().items()}
        variants = {
            isa: {
                "requires": list(ISA_FLAGS[isa]),
                "files": [name for name in files if name.startswith(f"kernels/{isa}/")],
            }
            for isa in isas()
        }
        manifest = {"target": "cpu", "machine": platform.machine(), "kernels": {"isas": variants}}
        return Code(lowered.plan, lowered.stored, lowered.launches, files, texts, manifest)

    def _files(self, lowered: Lowered) -> dict[str, bytes]:
        out = {f"kernels/{isa}/library.so": code for isa, code in build_library().items()}
        if lowered.source:
            for isa, code in build(emitted_sources(lowered.source)).items():
                out[f"kernels/{isa}/step.so"] = code
        return out


@dataclass(frozen=True)
class CUDA:
    """Triton kernels as cubins of the asked architectures; the host may be any."""

    target: Target

    def __call__(self, program: Program) -> Code:
        lowered = lower_cuda(program, self.target)
        from dcompile.codegen.cuda import artifact as cuda

        lines = {n: show_node(n, program) for n in program.nodes() if n.op == "call_function"}
        files = cuda.build_cuda(lowered, self.target.architectures)
        manifest = {
            "target": "cuda",
            "machine": "any",
            "kernels": {"table": cuda.TABLE, "architectures": list(self.target.architectures)},
        }
        texts = {cuda.SOURCES: cuda.readable_sources(lowered, lines)}
        return Code(lowered.plan, lowered.stored, lowered.launches, files, texts, manifest)
