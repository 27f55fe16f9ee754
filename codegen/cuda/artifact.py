"""The files of a CUDA artifact: cubins behind the gate, what describes them, sources to be read."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from torch.fx import Node

from dcompile.codegen.cuda.lower import CudaLowered
from dcompile.codegen.cuda.select import EMITTED
from dcompile.codegen.triton import gate
from dcompile.codegen.triton.aot import Compiled, compile_variants, compiler_version
from dcompile.codegen.triton.assemble import PACKAGE
from dcompile.codegen.triton.tuned import recorded
from dcompile.codegen.triton.variant import Variant

TABLE = "kernels.json"
SOURCES = "kernels.py"
PRINTED = "kernels/source/emitted.py"


def build_cuda(lowered: CudaLowered, architectures: Sequence[int]) -> dict[str, bytes]:
    """Every file but the plan and the weights.  Raises BuildError with all that the gate refuses."""
    sources = {EMITTED: lowered.emitted} if lowered.emitted else {}
    compiled = [
        one for arch in architectures for one in compile_variants(lowered.variants, arch, sources)
    ]
    gate.check(compiled)
    files = {binary_path(one): one.cubin for one in compiled}
    files[TABLE] = (json.dumps(_table(lowered, compiled), indent=1) + "\n").encode()
    if lowered.emitted:
        files[PRINTED] = lowered.emitted.encode()
    return files


def binary_path(one: Compiled) -> str:
    return f"kernels/sm_{one.arch}/{one.variant.name}.cubin"


def _table(lowered: CudaLowered, compiled: Sequence[Compiled]) -> dict[str, Any]:
    """What the runtime reads: see "CUDA artifact" in docs/formats.md."""
    kernels: dict[str, Any] = {}
    for variant in lowered.variants:
        text = variant.to_json()
        del text["grid"], text["name"]
        kernels[variant.name] = {**text, "binaries": {}}
    for one in compiled:
        kernels[one.variant.name]["binaries"][f"sm_{one.arch}"] = {
            "file": binary_path(one),
            "entry": one.entry,
            "registers": one.registers,
            "stack": one.stack,
            "static_shared": one.static_shared,
            "dynamic_shared": one.dynamic_shared,
            "warps": one.warps,
            "scratch": one.scratch,
            "parameters": [list(p) for p in one.parameters],
            "instructions": dict(one.instructions),
        }
    arches = sorted({one.arch for one in compiled})
    found = {f"sm_{arch}": recorded(lowered.variants, arch) for arch in arches}
    # Which entries of the table of tiles the kernels follow, with their times.
    tuned = {name: entries for name, entries in found.items() if entries}
    return {
        **{"triton": compiler_version(), "tuned": tuned},
        **{"refused_tiles": lowered.refused, "kernels": kernels},
    }


def readable_sources(lowered: CudaLowered, lines: Mapping[Node, str]) -> str:
    """kernels.py: each kernel under the lines of the graph that it stands for, in the order of launches.

    `lines` is the graph before its values were bound.  To be read, not run: what the runtime launches
    are the cubins, and what they were compiled from is the packages' own modules and emitted.py.
    """
    out = [
        '"""The kernels of this plan, each under the graph lines that its first launch stands for."""',
        "",
        "import triton",
        "import triton.language as tl",
    ]
    shown: set[str] = set()
    for variant in lowered.variants:
        launches = [item for item in lowered.launches if item.kernel == variant.name]
        functions = [variant.kernel, *(v for _, v in variant.constants if isinstance(v, str))]
        texts = [t for name in functions for t in _closure(name, lowered.emitted, shown)]
        out += [
            "",
            "",
            f"# {'-' * 96}",
            f"# {variant.name}: {variant.kernel.removeprefix(PACKAGE + '.')}",
        ]
        if launches:
            out.append(f"# {len(launches)} launches, first over {_grid(launches[0].grid)}")
            out += [f"#   {lines[n]}" for n in launches[0].covers if n in lines]
        out.append(f"# {_constants(variant)}")
        for text in texts:
            out += ["", "", text]
    return "\n".join(out) + "\n"


def _grid(grid: Sequence[object]) -> str:
    return " x ".join(json.dumps(axis) for axis in grid)


def _constants(variant: Variant) -> str:
    words = [f"{name}={value}" for name, value in variant.constants if value is not None]
    return f"{variant.num_warps} warps, {variant.num_stages} stages; {', '.join(words)}"


def _closure(name: str, emitted: str, shown: set[str]) -> Iterator[str]:
    """The source of a function, after that of those that it calls; each only once."""
    if name in shown:
        return
    shown.add(name)
    module, _, function = name.partition(":")
    sources, imported = _functions(emitted if module == EMITTED else _module(module))
    tree = ast.parse(sources[function])
    called = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for other in sorted(called - {function}):
        if other in sources:
            yield from _closure(f"{module}:{other}", emitted, shown)
        elif other in imported:
            yield from _closure(f"{imported[other]}:{other}", emitted, shown)
    yield sources[function]


@cache
def _module(name: str) -> str:
    package, _, stem = name.rpartition(".")
    return resources.files(package).joinpath(f"{stem}.py").read_text()


@cache
def _functions(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """The device functions of a module, and where those that it imports are."""
    tree = ast.parse(text)
    rows = text.splitlines()
    found = {
        n.name: "\n".join(rows[n.decorator_list[0].lineno - 1 : n.end_lineno])
        for n in tree.body
        if isinstance(n, ast.FunctionDef) and n.decorator_list
    }
    imported = {
        alias.name: n.module
        for n in tree.body
        if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith(PACKAGE)
        for alias in n.names
    }
    return found, imported
