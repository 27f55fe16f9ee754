"""Compiles an artifact's kernels for the GPU that is here, where Triton is installed.

The runtime knows nothing of the compiler: `install` hands it this function.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from dcompile.runtime.artifact import Artifact
from dcompile.runtime.cuda.code import hooks
from dcompile.runtime.cuda.table import table_of

PRINTED = "kernels/source/emitted.py"


def install() -> None:
    """Let the runtime compile what an artifact lacks, if Triton is there."""
    hooks.compile = compile_kernels if find_spec("triton") is not None else None


def compile_kernels(artifact: Artifact, arch: int) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """The kernels of an artifact for sm_`arch`: its table, and the binaries by their names in it.

    Made from the artifact's own table and printed functions and this installation's kernels.  Tiles are
    those of another chip: what spills here is slow, not refused.  Raises BuildError.
    """
    from dcompile.codegen.triton.aot import compile_variants
    from dcompile.codegen.triton.variant import Variant

    table = {name: dict(entry) for name, entry in table_of(artifact).items()}
    sources = {"emitted": artifact.text(PRINTED)} if PRINTED in artifact.names else {}
    variants = [
        Variant.from_json({**entry, "name": name, "grid": (1, 1, 1)})
        for name, entry in table.items()
    ]
    compiled = compile_variants(variants, arch, sources)
    files = {}
    for one in compiled:
        file = f"kernels/sm_{arch}/{one.variant.name}.cubin"
        files[file] = one.cubin
        binary = {
            "file": file,
            "entry": one.entry,
            "registers": one.registers,
            "stack": one.stack,
            "static_shared": one.static_shared,
            "dynamic_shared": one.dynamic_shared,
            "warps": one.warps,
            "scratch": one.scratch,
            "parameters": [list(p) for p in one.parameters],
        }
        entry = table[one.variant.name]
        entry["binaries"] = {**entry["binaries"], f"sm_{arch}": binary}
    return table, files
