"""Variants -> cubins on any machine: no GPU, no driver; in child processes, kept by content.

The key of a binary holds everything that it depends on: the variant, the architecture, the sources
that its kernel and device functions come from, and the compiler's version, which fixes ptxas too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

from dcompile.codegen.triton.assemble import PACKAGE
from dcompile.codegen.triton.variant import Variant
from dcompile.errors import BuildError

log = logging.getLogger(__name__)

FORMAT = "1"  # of the kept files
WORKER = "dcompile.codegen.triton.worker"
# What a binary, and what is known of it, may depend on.
OWN = (PACKAGE, "dcompile.codegen.triton", "dcompile.cubin")


@dataclass(frozen=True)
class Compiled:
    """A binary of a variant for one architecture, with its resources.

    `parameters` are (ordinal, offset, size) as the binary has them: the variant's arguments, then
    always two more pointers, which are null where `scratch` is 0.  `stack` bytes a thread are spills.
    """

    variant: Variant
    arch: int
    cubin: bytes
    entry: str
    registers: int
    stack: int
    static_shared: int
    dynamic_shared: int
    warps: int
    scratch: int
    parameters: tuple[tuple[int, int, int], ...]
    instructions: Mapping[str, int]


def compile_variants(
    variants: Sequence[Variant],
    arch: int,
    sources: Mapping[str, str] | None = None,
    jobs: int | None = None,
    folder: Path | None = None,
) -> list[Compiled]:
    """Compile each variant for `arch` (80, 86, 89, 90, 100, 120), in order.

    `sources` holds emitted modules by the names that variants use.  Binaries are kept in `folder`,
    by default the user's cache.  Raises BuildError where Triton is missing or a kernel is refused.
    """
    emitted = dict(sources or {})
    kept = folder or _default_folder()
    kept.mkdir(parents=True, exist_ok=True)
    stems = [kept / key(variant, arch, emitted) for variant in variants]
    missing = {
        stem: variant
        for stem, variant in zip(stems, variants, strict=True)
        if not stem.with_suffix(".json").is_file()
    }
    if missing:
        log.info("compiling %d of %d kernels for sm_%d", len(missing), len(variants), arch)
        _compile(missing, arch, emitted, jobs or os.cpu_count() or 1)
    return [_read(stem, variant) for stem, variant in zip(stems, variants, strict=True)]


def key(variant: Variant, arch: int, sources: Mapping[str, str]) -> str:
    """The name under which a binary is kept."""
    functions = [variant.kernel, *(v for _, v in variant.constants if isinstance(v, str))]
    # The worker too: the facts that it reads off are kept beside the binary.
    modules = sorted({WORKER, *(name.partition(":")[0] for name in functions)})
    needed = {
        m: _functions_of(sources[m], [f.partition(":")[2] for f in functions if f.startswith(m)])
        for m in modules
        if m in sources and not m.startswith(PACKAGE)
    }
    given = {**sources, **needed}
    texts = {name: text for m in modules for name, text in _closure(m, given).items()}
    binary = replace(variant, name="", grid=(1, 1, 1)).to_json()  # neither is in it
    parts = [FORMAT, compiler_version(), arch, binary, sorted(texts.items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def compiler_version() -> str:
    """Triton's version; the wheel brings the ptxas that belongs to it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as missing:
        raise BuildError(
            "compiling for CUDA needs Triton, which is not installed",
            remedy="pip install triton (it needs no GPU); running an artifact needs none",
        ) from missing


def _closure(module: str, sources: Mapping[str, str]) -> dict[str, str]:
    """A module's text and, of our own (`OWN`) or emitted, that of all it imports."""
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = sources[name] if name in sources else _text(name)
            todo += [m for m in _imported(found[name]) if m.startswith(OWN) or m in sources]
    return found


def _functions_of(text: str, names: Sequence[str]) -> str:
    """A printed module without the functions that `names` do not call: what else it has is in no binary."""
    tree = ast.parse(text)
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    todo, wanted = list(names), set()
    while todo:
        if (name := todo.pop()) in functions and name not in wanted:
            wanted.add(name)
            todo += [n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)]
    kept = [n for n in tree.body if not isinstance(n, ast.FunctionDef) or n.name in wanted]
    used = {n.id for m in kept for n in ast.walk(m) if isinstance(n, ast.Name)}
    for node in kept:
        if isinstance(node, ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name) in used]
    tree.body = [
        n
        for n in kept
        if not isinstance(n, ast.Expr) and not (isinstance(n, ast.ImportFrom) and not n.names)
    ]
    return ast.unparse(tree)


@cache
def _text(module: str) -> str:
    package, _, name = module.rpartition(".")
    return resources.files(package).joinpath(f"{name}.py").read_text()


@cache
def _imported(text: str) -> tuple[str, ...]:
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    return tuple(n.module for n in nodes if n.module)


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dcompile" / "cubins"


def _compile(
    missing: Mapping[Path, Variant], arch: int, sources: Mapping[str, str], jobs: int
) -> None:
    """Share the work out among child processes; the first refusal is raised when all have ended."""
    tasks = [
        {"variant": variant.to_json(), "arch": arch, "stem": str(stem)}
        for stem, variant in missing.items()
    ]
    shares = [tasks[i::jobs] for i in range(min(jobs, len(tasks)))]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(shares)) as pool:
        for name, text in sources.items():
            Path(scratch, f"{name}.py").write_text(text)
        errors = list(pool.map(lambda share: _child(share, scratch), shares))
    for stem, variant in missing.items():
        if not stem.with_suffix(".json").is_file():
            raise BuildError(
                f"the kernel {variant.name} does not compile for sm_{arch}: {_reason(errors)}",
                where=variant.kernel,
                remedy="report it with the model's config; --target cpu works meanwhile",
            )


def _child(tasks: list[dict[str, object]], scratch: str) -> str:
    """Run one worker to its end; what it wrote to stderr where it failed."""
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        out = subprocess.run(
            [sys.executable, "-m", WORKER],
            input="\n".join(json.dumps(task) for task in tasks),
            env=_environment(scratch, own),
            capture_output=True,
            text=True,
        )
    return out.stderr if out.returncode else ""


def _environment(sources: str, own: str) -> dict[str, str]:
    """Nothing of the user's settings of Triton may reach a binary; its own cache is not used."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    env["TRITON_CACHE_DIR"] = own
    env["PYTHONPATH"] = os.pathsep.join(p for p in (sources, env.get("PYTHONPATH")) if p)
    return env


def _reason(errors: Sequence[str]) -> str:
    lines = [line for text in errors for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "the compiler ended without a word"


def _read(stem: Path, variant: Variant) -> Compiled:
    facts = json.loads(stem.with_suffix(".json").read_text())
    facts["parameters"] = tuple(tuple(p) for p in facts["parameters"])
    return Compiled(variant=variant, cubin=stem.with_suffix(".cubin").read_bytes(), **facts)
