"""How large the code is, by folder, beside the figures kept in `ratchet.json`: `make lint` prints it.

It never fails: a rise is explained in the commit that brings it.  `python tests/ratchet.py --keep`
keeps the figures of now.
"""

from __future__ import annotations

import ast
import io
import json
import statistics
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).with_suffix(".json")
TOPS = ("dcompile", "passes", "codegen", "runtime", "tests", "bench")
LEFT_OUT = ("golden", "typing", "results")


@dataclass(frozen=True)
class Size:
    """Of one folder with all below it; functions in lines, comments in per cent of the lines."""

    files: int
    lines: int
    median: int
    p90: int
    longest_function: int
    longest_file: int
    comments: float


def sources(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*.py")
        if not any(part in LEFT_OUT for part in path.relative_to(ROOT).parts)
    )


def functions(tree: ast.AST) -> Iterator[int]:
    """The length of each function, with its decorators and docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield (node.end_lineno or node.lineno) - first + 1


def comments(text: str) -> int:
    """Lines with a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def size_of(paths: Sequence[Path]) -> Size:
    """The figures of some files; a blank line is none."""
    texts = [path.read_text() for path in paths]
    lengths = [sum(bool(line.strip()) for line in text.splitlines()) for text in texts]
    found = sorted(length for text in texts for length in functions(ast.parse(text))) or [0]
    return Size(
        files=len(paths),
        lines=sum(lengths),
        median=round(statistics.median(found)),
        p90=found[int(0.9 * (len(found) - 1))],
        longest_function=found[-1],
        longest_file=max(len(text.splitlines()) for text in texts),
        comments=round(100 * sum(map(comments, texts)) / max(sum(lengths), 1), 1),
    )


def measured() -> dict[str, Size]:
    """Each top folder, and of the package each folder below it."""
    out = {}
    for top in TOPS:
        folder = ROOT / top
        out[top] = size_of(sources(folder))
        for inner in sorted(p for p in folder.iterdir() if p.is_dir()) if top in TOPS[:4] else ():
            if paths := sources(inner):
                out[f"{top}/{inner.name}"] = size_of(paths)
    return out


def table(now: Mapping[str, Size], kept: Mapping[str, Size]) -> Iterator[str]:
    """The top folders, and whatever below them changed; what it was stands in brackets."""
    names = [field.name for field in fields(Size)]
    yield f"{'':22}" + "".join(f"{name.replace('_', ' '):>18}" for name in names)
    for folder in sorted({*now, *kept}):
        if folder not in now:
            yield f"{folder:22}{'gone':>18}"
        elif "/" not in folder or now[folder] != kept.get(folder):
            yield f"{folder:22}" + "".join(
                f"{_cell(getattr(now[folder], n), kept.get(folder), n):>18}" for n in names
            )


def _cell(value: float, kept: Size | None, name: str) -> str:
    before = None if kept is None else getattr(kept, name)
    return f"{value}" if before == value else f"{value} ({'new' if before is None else before})"


def main() -> None:
    now = measured()
    if "--keep" in sys.argv[1:]:
        text = json.dumps({folder: asdict(size) for folder, size in now.items()}, indent=1)
        KEPT.write_text(text + "\n")
    kept = {folder: Size(**size) for folder, size in json.loads(KEPT.read_text()).items()}
    print("\n".join(table(now, kept)))


if __name__ == "__main__":
    main()
