"""How the work of each family is cut into tiles: what was tuned, or a default by shape; and the candidates.

Candidates are plain data; `gate.py` refuses those that spill or need more shared memory than a chip
has, and what remains is timed on a GPU.  The depth and the splits fix the order of a row's sum, so
a plan uses one configuration for all of its row counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dcompile.codegen.triton.tuned import find


@dataclass(frozen=True)
class Tiles:
    """`rows` x `columns` of the result, `depth` of the sum, in `splits` runs (attend: of `depth` keys)."""

    rows: int
    columns: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 3

    def unsplit(self) -> Tiles:
        return replace(self, splits=1)


@dataclass(frozen=True)
class Architecture:
    """What a choice of tiles depends on."""

    processors: int  # streaming multiprocessors of the largest chip of its kind
    shared: int  # bytes of shared memory that one block may use
    warps: int  # that one multiprocessor holds at once
    blocks: int  # that one multiprocessor holds at once


ARCHITECTURES: Mapping[int, Architecture] = {
    80: Architecture(108, 166912, 64, 32),
    86: Architecture(84, 101376, 48, 16),
    89: Architecture(128, 101376, 48, 24),
    90: Architecture(132, 232448, 64, 32),
    100: Architecture(148, 232448, 64, 32),
    120: Architecture(170, 101376, 48, 24),
}

# float32 products run without tensor cores and serve as a reference: small tiles keep them in registers.
FLOAT32 = Tiles(16, 32, 32, warps=4, stages=2)


def _tuned(family: str, arch: int, dtype: str, **sizes: int) -> Tiles | None:
    found = find(family, arch, dtype, **sizes)
    return None if found is None else Tiles(**found)


def linear_tiles(n: int, k: int, dtype: str, arch: int) -> Tiles:
    """Enough programs to fill the chip once: narrow tiles first, then runs of the sum."""
    if (found := _tuned("linear", arch, dtype, n=n, k=k)) is not None:
        return found
    if dtype == "f32":
        return FLOAT32
    processors = ARCHITECTURES[arch].processors
    columns = 64 if n >= 64 * processors else 32
    programs = -(-n // columns)
    splits = 1
    while programs * splits < processors and k // (2 * splits) >= 512 and splits < 8:
        splits *= 2
    return Tiles(32, columns, 128, splits, 4, 4)


def gated_tiles(n: int, k: int, dtype: str, arch: int) -> Tiles:
    """Of a product [rows, 2 n] whose halves meet in one program, so that its sum has one run."""
    if (found := _tuned("gated", arch, dtype, n=n, k=k)) is not None:
        return found.unsplit()
    return linear_tiles(2 * n, k, dtype, arch).unsplit()


def gate_up_tiles(n: int, k: int, experts: int, dtype: str, arch: int) -> Tiles:
    if (found := _tuned("gate_up", arch, dtype, n=n, k=k, e=experts)) is not None:
        return found
    if dtype == "f32":
        return FLOAT32
    return Tiles(16, 64, 128, warps=4, stages=3 if ARCHITECTURES[arch].shared > 150_000 else 2)


def down_tiles(n: int, k: int, experts: int, dtype: str, arch: int) -> Tiles:
    if (found := _tuned("down", arch, dtype, n=n, k=k, e=experts)) is not None:
        return found
    if dtype == "f32":
        return FLOAT32
    return Tiles(16, 64, 128, warps=4, stages=4 if ARCHITECTURES[arch].shared > 150_000 else 3)


def vocab_tiles(vocab: int, hidden: int, dtype: str, arch: int) -> Tiles:
    """`splits` programs share the vocabulary; two a processor hide each other's reductions."""
    if (found := _tuned("vocab_choice", arch, dtype, v=vocab, d=hidden)) is not None:
        return found
    splits = 2 * ARCHITECTURES[arch].processors
    if dtype == "f32":
        return replace(FLOAT32, splits=splits)
    return Tiles(32, 64, 128, splits, 4, 4)


def mixture_tiles(width: int, vocab: int, dtype: str, arch: int) -> Tiles:
    """Of a mixture of embeddings: a product [rows, vocab] x [vocab, width], split over the vocabulary."""
    if dtype == "f32":
        return replace(FLOAT32, splits=min(8, -(-vocab // 1024)))
    columns = -(-width // 64)
    splits = min(8, max(1, 2 * ARCHITECTURES[arch].processors // columns), -(-vocab // 1024))
    return Tiles(32, 64, 64, splits, 4, 3)


def attend_tiles(
    window: int, heads: int, groups: int, head_size: int, dtype: str, arch: int
) -> Tiles:
    """`window` rows of a sequence usually run together; window x heads / groups queries share a key head."""
    if (found := _tuned("attend", arch, dtype, h=heads, g=groups, d=head_size)) is not None:
        return found
    vectors = window * (heads // groups)
    if dtype == "f32":
        return Tiles(16, 16 if head_size > 64 else 32, 256, warps=4, stages=1)
    rows = 16
    while rows < min(vectors, 64):
        rows *= 2
    # Without warp-group products the queries lie in registers too, and wide tiles of scores spill.
    wide = rows == 64 and arch in (90, 100)
    return Tiles(rows, 64 if wide else 32, 256, warps=4, stages=2)


def shrunk(
    tiles: Tiles, times: int, *, least_rows: int = 16, columns: bool = True, depth: bool = True
) -> Tiles:
    """The tiles that are tried after `times` refusals of the gate: halved in what the kernel lets be halved.

    Fewer columns first, which hold most registers; then shallower stages of the pipeline; then rows.
    Where nothing is left to halve the tiles stay as they are.
    """
    for _ in range(times):
        smaller = [
            (columns and tiles.columns > 32, replace(tiles, columns=tiles.columns // 2)),
            (depth and tiles.depth > 64, replace(tiles, depth=tiles.depth // 2)),
            (tiles.stages > 2, replace(tiles, stages=tiles.stages - 1)),
            (tiles.rows >= 2 * least_rows, replace(tiles, rows=tiles.rows // 2)),
            (columns and tiles.columns > 16, replace(tiles, columns=tiles.columns // 2)),
            (depth and tiles.depth > 32, replace(tiles, depth=tiles.depth // 2)),
        ]
        tiles = next((found for allowed, found in smaller if allowed), tiles)
    return tiles


def _grid(rows: tuple[int, ...], columns: tuple[int, ...], depths: tuple[int, ...]) -> list[Tiles]:
    return [
        Tiles(r, c, d, warps=w, stages=s)
        for r in rows
        for c in columns
        for d in depths
        for w in (4, 8)
        for s in (2, 3, 4)
    ]


def candidates(family: str, tiles: Tiles) -> list[Tiles]:
    """What tuning may try for a family, beginning with its default `tiles`; duplicates left out."""
    if family in ("linear", "gated"):
        grid = _grid((16, 32), (32, 64, 128), (64, 128, 256))
        splits = (1, 2, 4, 8) if family == "linear" else (1,)
        found = [replace(t, splits=s) for t in grid for s in splits]
    elif family in ("gate_up", "down"):
        found = _grid((16, 32), (32, 64, 128), (64, 128))
    elif family == "vocab_choice":
        grid = _grid((16, 32), (32, 64, 128), (64, 128))
        found = [replace(t, splits=s * tiles.splits // 2) for t in grid for s in (1, 2, 4)]
    elif family == "attend":
        found = _grid((16, 32, 64), (32, 64, 128), (128, 256, 512))
    else:
        found = []
    return list(dict.fromkeys([tiles, *found]))
