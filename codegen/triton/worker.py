"""Compiles variants in a process of its own: `python -m dcompile.codegen.triton.worker`.

Reads one JSON object a line, {"variant": ..., "arch": 90, "stem": "path without suffix"}, and writes
`stem.cubin` and `stem.json` for each; the JSON comes last, so that whoever sees it may read both.
A failure of the compiler can end the process (it aborts, or prints whole programs), hence the process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dcompile.codegen.triton.variant import Variant
from dcompile.cubin import read_cubin

ALIGNED = [["tt.divisibility", 16]]


def resolve(name: str) -> Any:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def source_of(variant: Variant) -> ASTSource:
    """The variant as the compiler takes it: a type, a value or an alignment for every parameter."""
    kernel = resolve(variant.kernel)
    types = {p.name: p.type for p in variant.arguments}
    constants = {
        name: resolve(value) if isinstance(value, str) else value
        for name, value in variant.constants
    }
    names = list(kernel.arg_names)
    assert [n for n in names if n in types] == list(types), f"{variant.name}: order of arguments"
    assert set(names) == set(types) | set(constants), f"{variant.name}: {set(names)}"
    aligned = {p.name for p in variant.arguments if p.aligned}
    return ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs=constants,
        attrs={(i,): ALIGNED for i, n in enumerate(names) if n in aligned},
    )


def compile_variant(variant: Variant, arch: int) -> tuple[bytes, dict[str, Any]]:
    """The cubin, and what is known of it: resources, parameters, instructions."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    with contextlib.redirect_stdout(io.StringIO()):  # the compiler prints the PTX of a failure
        compiled = triton.compile(
            source_of(variant), target=GPUTarget("cuda", arch, 32), options=options
        )
    cubin, metadata = compiled.asm["cubin"], compiled.metadata
    facts = asdict(read_cubin(cubin))
    facts |= {"dynamic_shared": metadata.shared, "warps": metadata.num_warps}
    facts |= {"scratch": getattr(metadata, "global_scratch_size", 0) or 0}
    facts |= {"arch": arch, "instructions": instructions(compiled.asm["ptx"])}
    return cubin, facts


def instructions(ptx: str) -> dict[str, int]:
    """How often the kinds of instruction that the gate asks for stand in the PTX."""
    loads = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    ]
    copies = [
        int(size) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, 0x(\w+)", ptx)
    ]
    return {
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"\btcgen05\.mma", ptx)),
        "wide_loads": sum(size >= 16 for size in loads) + sum(size == 10 for size in copies),
        "narrow_loads": sum(size == 2 for size in loads),
        "async_copies": len(copies),
    }


def main() -> None:
    # The path of a source file would otherwise stand in the cubin.
    knobs.compilation.disable_line_info = True
    for line in sys.stdin:
        task = json.loads(line)
        stem = Path(task["stem"])
        cubin, facts = compile_variant(Variant.from_json(task["variant"]), task["arch"])
        _write(stem.with_suffix(".cubin"), cubin)
        _write(stem.with_suffix(".json"), json.dumps(facts).encode())


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


if __name__ == "__main__":
    main()
