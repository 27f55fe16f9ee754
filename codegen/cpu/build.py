"""C++ sources -> shared objects, one for each instruction set, with the machine's own compiler.

What was built before is taken from the user's cache, by sources, flags and compiler.  The bytes
are reproducible: no paths, no times, no build ids.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources
from pathlib import Path

from dcompile.errors import BuildError

log = logging.getLogger(__name__)

# The flags in /proc/cpuinfo that a machine must have to take a variant, best variant first.
# sse4a stands for AMD: on Intel's cores vdpbf16ps has half the rate of float32 multiply-adds
# (measured on Emerald Rapids: 82 GFLOP/s against 168), so these are better off with avx512.
ISA_FLAGS: Mapping[str, tuple[str, ...]] = {
    "amx": (
        *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"),
        *("amx_tile", "amx_bf16", "avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"),
    ),
    "avx512bf16": (
        *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "sse4a"),
        *("avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"),
    ),
    "avx512": (
        *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
        *("avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"),
    ),
    "avx2": ("avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"),
    "base": (),
}

_MARCH: Mapping[str, tuple[str, ...]] = {
    "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "base": (),
}

# No fast-math: NaN and infinity must come through.  No contraction: the kernels say where a
# multiply-add is fused, so that equal rows get equal bits in every instance of a template.
_FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-fopenmp", "-fPIC", "-shared"),
    *("-fvisibility=hidden", "-g0", "-ffile-prefix-map=./=", "-Wl,--build-id=none", "-Wl,-s"),
    *("-w", "-Wno-psabi"),
)


def isas() -> tuple[str, ...]:
    """Return the variants that can be built on this machine, best first."""
    return tuple(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ("base",)


def runnable(cpu_flags: Sequence[str]) -> tuple[str, ...]:
    """Return the variants that run on a CPU with these flags, best first."""
    have = set(cpu_flags)
    return tuple(isa for isa in isas() if have.issuperset(ISA_FLAGS[isa]))


def library_sources() -> dict[str, str]:
    """Return the kernel library's sources by file name."""
    files = resources.files("dcompile.codegen.cpu").iterdir()
    return {f.name: f.read_text() for f in files if f.name.endswith((".cpp", ".h"))}


def library_abi() -> str:
    """Return what the kernel library says of its kernels, as its code exports it."""
    source = resources.files("dcompile.codegen.cpu").joinpath("abi_table.h").read_text()
    source = re.sub(r"//[^\n]*", "", source.replace("\\\n", ""))
    start = source.index("(T)") + len("(T)")
    of_type, _, rest = source[start:].partition("DC_EXPORT")
    texts = [_literals(of_type, t) for t in ("f32", "bf16", "f16")]
    return "".join([*texts, _literals(rest)])


def _literals(source: str, dtype: str = "") -> str:
    """The string literals of a macro's body one after the other, its T replaced."""
    found = re.findall(r'"([^"]*)"|(#T)', source)
    return "".join(dtype if name else text for text, name in found).replace("\\n", "\n")


def library_headers() -> dict[str, str]:
    """Return what emitted sources may include: the library's headers."""
    return {name: text for name, text in library_sources().items() if name.endswith(".h")}


def build_library(isas: Sequence[str] | None = None) -> dict[str, bytes]:
    """Build the kernel library for each instruction set."""
    return build(library_sources(), isas)


def build(sources: Mapping[str, str], isas: Sequence[str] | None = None) -> dict[str, bytes]:
    """Compile the `.cpp` files of `sources` into one shared object for each instruction set.

    The other files are headers, found by their names.  `isas` defaults to all that this kind of
    machine can build.
    """
    wanted = tuple(isas) if isas is not None else _all_isas()
    for isa in wanted:
        if isa not in ISA_FLAGS:
            raise BuildError(
                f"no instruction set is called {isa!r}", remedy=f"one of {', '.join(ISA_FLAGS)}"
            )
    compiler = _compiler()
    version = _version(compiler)
    with ThreadPoolExecutor(max_workers=2) as pool:
        built = pool.map(lambda isa: _build_one(sources, isa, compiler, version), wanted)
        return dict(zip(wanted, built, strict=True))


_all_isas = isas  # `build` has a parameter of that name


def _build_one(sources: Mapping[str, str], isa: str, compiler: str, version: str) -> bytes:
    path = _cache_folder() / f"{_digest(sources, isa, version)}.so"
    if path.exists():
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        code = _compile(sources, isa, compiler, Path(folder))
    _write_atomically(path, code)
    return code


def _compile(sources: Mapping[str, str], isa: str, compiler: str, folder: Path) -> bytes:
    for name, text in sources.items():
        (folder / name).write_text(text)
    units = sorted(name for name in sources if name.endswith(".cpp"))
    command = [compiler, *_FLAGS, *_MARCH[isa], "-I.", *units, "-o", "library.so"]
    log.info("compiling %s for %s", ", ".join(units), isa)
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise BuildError(
            f"the C++ compiler refused {', '.join(units)}:\n  " + "\n  ".join(lines[:12]),
            where=f"{compiler} for {isa}",
            remedy="g++ 11 or newer, or clang++ 15 or newer with libomp; CXX names the compiler",
        )
    return (folder / "library.so").read_bytes()


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(
        f"there is no C++ compiler ({', '.join(names)}) on the path",
        remedy="install one (apt-get install g++), or name it in the environment variable CXX",
    )


@cache
def _version(compiler: str) -> str:
    try:
        result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"the C++ compiler does not run: {error}", where=compiler, remedy="set CXX to another"
        ) from error
    return result.stdout


def _digest(sources: Mapping[str, str], isa: str, version: str) -> str:
    parts = [version, platform.machine(), *_FLAGS, *_MARCH[isa]]
    for name in sorted(sources):
        parts += [name, sources[name]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dcompile"


def _write_atomically(path: Path, code: bytes) -> None:
    """Keep the code for the next time; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("nothing is cached in %s: %s", path.parent, error)
