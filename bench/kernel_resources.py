"""How long do a model's kernels take to compile without a GPU, and what do they need of the chip?

    python bench/kernel_resources.py --model llada_moe --arch 90 --json FILE

Compiles the whole set into an empty folder, so that nothing kept is used, on every core; then prints
registers, spills and shared memory of each.  The widths are those of the real checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from kernel_shapes import MODELS, lowerings, variants

from dcompile.codegen.kernels import gate
from dcompile.codegen.kernels.aot import Compiled, compile_variants, compiler_version

COLUMNS = ("registers", "spilled", "shared", "tensor ops", "128-bit loads", "cubin KB")


def facts(compiled: Compiled) -> dict[str, object]:
    """A row of the table: bytes a thread are spilled, bytes a block are shared."""
    found = compiled.instructions
    return {
        **{"kernel": compiled.variant.name, "registers": compiled.registers},
        **{"spilled": compiled.stack, "shared": compiled.dynamic_shared + compiled.static_shared},
        **{"tensor ops": found["mma"] + found["wgmma"] + found["tcgen05"]},
        **{"128-bit loads": found["wide_loads"], "cubin KB": round(len(compiled.cubin) / 1024)},
        "refused": list(gate.problems(compiled)),
    }


def child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llada_moe")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = variants(lowerings(MODELS[options.model], options.arch))
    with tempfile.TemporaryDirectory() as folder:
        began, before = time.perf_counter(), child_seconds()
        compiled = compile_variants(wanted, options.arch, folder=Path(folder))
        wall, cpu = time.perf_counter() - began, child_seconds() - before
    rows = [facts(c) for c in compiled]
    table = Table("kernel", *COLUMNS, title=f"{options.model}, sm_{options.arch}")
    for row in rows:
        table.add_row(str(row["kernel"]), *(str(row[c]) for c in COLUMNS))
    console = Console(width=140)
    console.print(table)
    console.print(
        f"{len(rows)} kernels, {wall:.1f} s on {os.cpu_count()} cores, {cpu:.1f} CPU seconds"
    )
    if options.json:
        made = {"model": options.model, "arch": options.arch, "triton": compiler_version()}
        made |= {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({**made, "kernels": rows}, indent=1) + "\n")
    if any(row["refused"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
