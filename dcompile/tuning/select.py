"""Which tiles are worth timing: what surely does not fit or fills no chip is left out before it is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from dcompile.codegen.triton import gate
from dcompile.codegen.triton.aot import Compiled, compile_variants
from dcompile.codegen.triton.tiles import ARCHITECTURES, Tiles, candidates
from dcompile.codegen.triton.variant import Variant
from dcompile.errors import BuildError
from dcompile.tuning.problems import Problem

Built = list[Compiled]


def shared_bytes(problem: Problem, tiles: Tiles) -> int:
    """What the stages of a pipeline hold at least, in bytes of bfloat16."""
    s = problem.sizes
    if problem.shape.family == "attend":
        width = s["d"]
        return 2 * (tiles.rows * width + 2 * tiles.stages * tiles.columns * width)
    parts = 2 if problem.shape.family in ("gated", "gate_up") else 1
    return 2 * max(1, tiles.stages - 1) * tiles.depth * (tiles.rows + parts * tiles.columns)


def worth_trying(problem: Problem, arch: int, most: int) -> list[Tiles]:
    """The default first, then at most `most` - 1 others, spread evenly over what may be good."""
    default, chip = problem.default(arch), ARCHITECTURES[arch]
    family, sizes = problem.shape.family, problem.sizes
    found = []
    for tiles in candidates(family, default)[1:]:
        if shared_bytes(problem, tiles) > chip.shared:
            continue
        if family in ("linear", "gated"):
            programs = -(-sizes["n"] // tiles.columns) * tiles.splits
            # A chip that is not filled streams at a part of its rate; many waves gain nothing.
            if not chip.processors // 2 <= programs <= 8 * chip.processors and tiles.splits > 1:
                continue
            if sizes["k"] < tiles.depth * tiles.splits:
                continue
        found.append(tiles)
    step = max(1.0, len(found) / max(1, most - 1))
    chosen = [found[int(i * step)] for i in range(min(len(found), most - 1))]
    return [default, *chosen]


def compiled(problem: Problem, arch: int, tiles: Sequence[Tiles]) -> list[Built | str]:
    """For each tiles the binaries of the problem's launches, or why there are none."""
    lists = [variants(problem, arch, each) for each in tiles]
    flat = list(dict.fromkeys(v for each in lists for v in each))
    with suppress(BuildError):  # whose it was is seen below; the others are kept
        compile_variants(flat, arch)
    return [_built(each, arch) for each in lists]


def variants(problem: Problem, arch: int, tiles: Tiles) -> list[Variant]:
    """The kernels of a problem's launches, named apart from those of other tiles."""
    return [step.variant for step in problem.lowering(arch, tiles).steps]


def _built(wanted: list[Variant], arch: int) -> Built | str:
    try:
        made = compile_variants(wanted, arch, jobs=1)
    except BuildError as error:
        return error.what
    refused = [problem for one in made for problem in gate.problems(one)]
    return refused[0] if refused else made
