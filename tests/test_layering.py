"""Arrows between folders, packaging, and a runtime that starts without the compiler."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("dcompile", "passes", "codegen", "runtime")

# Each folder, and the others that it may name; a loose file of dcompile/ stands for itself.
# `codegen` and `runtime` are the shared files there; that those reach into a target's folder only to
# open it is `OPENS_A_TARGET`.
RUNTIME = {"runtime", "runtime.decode"}
MAY_IMPORT: Mapping[str, set[str]] = {
    "errors": set(),
    "untrusted": set(),
    "cubin": set(),
    "ir": {"ir.operators", "errors"},
    "ir.operators": {"ir.work"},
    "ir.work": set(),
    "passes": {"passes.moe", "ir", "ir.operators", "errors"},
    "passes.moe": {"ir"},
    "codegen": {"codegen.cpu", "codegen.cuda", "codegen.triton", "ir", "errors"},
    "codegen.cpu": {"codegen", "ir", "ir.operators", "errors"},
    "codegen.cuda": {
        *{"codegen", "codegen.kernels", "codegen.triton", "ir", "ir.operators", "errors"},
    },
    "codegen.kernels": {"codegen.triton"},
    "codegen.triton": {"cubin", "errors"},
    "runtime": {"runtime.cpu", "runtime.cuda", "errors", "untrusted"},
    "runtime.cpu": {"runtime", "errors"},
    "runtime.cuda": {"runtime", "cubin", "errors", "untrusted"},
    "runtime.decode": {"runtime", "errors"},
    "frontends": {"ir", "errors", "untrusted"},
    "policies": {"errors"},
    "options": {"codegen", "errors"},
    "step": {"frontends", "ir", "ir.operators", "policies", "errors"},
    "decoding": {"options", "policies", *RUNTIME, "errors"},
    "driver": {
        *{"step", "decoding", "options", "policies", "frontends", "passes", "ir", "errors"},
        *{"ir.operators", "codegen", "codegen.triton", *RUNTIME, "runtime.cuda"},
    },
    # Of the operators what they cost, and nothing that needs torch.
    "cost": {
        *{"codegen", "codegen.cpu", "codegen.cuda", "codegen.triton", "ir.work"},
        *{"runtime", "runtime.cpu", "errors"},
    },
    # A verb reads what is below it, never another verb.
    "explain": {"cost", "driver", "options", "frontends", "ir", *RUNTIME, "errors", "untrusted"},
    "profile": {"cost", *RUNTIME, "runtime.cuda", "errors"},
    "bench": {
        *{"cost", "driver", "options", "frontends", "ir", "ir.operators", "ir.work", *RUNTIME},
        "errors",
    },
    "export": {
        *{"driver", "options", "codegen", "step", "ir", "ir.operators", "runtime"},
        *{"errors", "untrusted"},
    },
    "tuning": {
        *{"driver", "options", "codegen.triton", "codegen.kernels", "errors"},
        *{"runtime", "runtime.cuda"},
    },
    "verify": {
        *{"driver", "options", "step", "frontends", "ir", "ir.operators", "errors", "untrusted"},
        *{"codegen", "codegen.cpu", "codegen.cuda", "codegen.triton", *RUNTIME},
    },
    "demo": {"driver", "step", "options", "frontends", "runtime.decode"},
    "integrations": {"decoding", "runtime.decode", "errors"},
    "cli": {
        *{"bench", "decoding", "demo", "explain", "export", "profile", "tuning", "verify"},
        *{"driver", "options", *RUNTIME, "errors"},
    },
    "__main__": {"cli"},
    "": {"driver", "options", "runtime.decode", "errors"},
}
# The only shared files that name a target's folder: they choose one.
OPENS_A_TARGET = {"codegen.backends", "runtime.opening"}
LOADS_BY_TARGET = {"codegen.cpu", "codegen.cuda", "runtime.cpu", "runtime.cuda"}


@cache
def modules() -> Mapping[str, Path]:
    """Every module of the package, `dcompile.` left out."""
    found = {}
    for top in TOPS:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if parts[0] == "dcompile" else parts
            found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


def folder_of(module: str) -> str:
    """Where a module lies; a loose file of dcompile/ stands for itself."""
    is_package = modules()[module].name == "__init__.py"
    return module if is_package or "." not in module else module.rpartition(".")[0]


def imported(path: Path) -> Iterator[str]:
    """The modules of dcompile that a file names, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("dcompile.") in modules() else node.module for n in inner]
        else:
            continue
        yield from (n.removeprefix("dcompile.") for n in names if n.startswith("dcompile."))


@cache
def arrows() -> Mapping[str, set[str]]:
    return {name: set(imported(path)) - {name} for name, path in modules().items()}


def test_every_folder_has_its_arrows() -> None:
    assert {folder_of(name) for name in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows(folder: str) -> None:
    named = {
        folder_of(other)
        for module, others in arrows().items()
        if folder_of(module) == folder
        for other in others
    }
    assert named - {folder} <= MAY_IMPORT[folder]


def test_shared_files_do_not_know_a_target() -> None:
    for module, others in arrows().items():
        if folder_of(module) in ("codegen", "runtime") and module not in OPENS_A_TARGET:
            assert not {folder_of(other) for other in others} & LOADS_BY_TARGET, module


def test_targets_do_not_know_each_other() -> None:
    for module, others in arrows().items():
        family, _, target = folder_of(module).partition(".")
        if target in ("cpu", "cuda"):
            other_target = f"{family}.{'cuda' if target == 'cpu' else 'cpu'}"
            assert other_target not in {folder_of(other) for other in others}, module


def test_nothing_goes_in_circles() -> None:
    """Not among modules, imports inside functions and for types among them, nor among folders."""
    folders: dict[str, set[str]] = {}
    for module, others in arrows().items():
        mine = folder_of(module)
        # The one exception: what opens a target stands above it, and lies beside what is below it.
        mine = module if module in OPENS_A_TARGET else mine
        folders.setdefault(mine, set()).update(
            o if o in OPENS_A_TARGET else folder_of(o) for o in others
        )
    for graph in (arrows(), {k: v - {k} for k, v in folders.items()}):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" -> ".join(error.args[1]))


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = set()
    for top in TOPS:
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "dcompile" else ("dcompile", *parts)))
    assert listed == found


def test_the_runtime_loads_no_compiler() -> None:
    code = (
        "import sys, dcompile.runtime.decode.loop; "
        "print([m for m in sys.modules if m.startswith(('dcompile.passes', 'dcompile.codegen', "
        "'dcompile.frontends', 'dcompile.ir', 'dcompile.step', 'transformers', 'torch._inductor'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
