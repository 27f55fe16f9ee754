"""A stage's graph as a picture: a DOT text of our own, laid out by graphviz.

Layout of a layered graph is what `dot` is for, and it is in every distribution; the Python packages around
it need it as well, and those that do not (grandalf, networkx) draw a step of a few hundred nodes as a knot.
A layer that repeats the one before it is one box.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dcompile.errors import OptionError, OutputError

_CALL = re.compile(r"(\w+): (.+?) = ([\w.]+)\((.*)\)(?:  # (\S+))?(?:  @\S+)?$")
_INPUT = re.compile(r"(\w+): (.+?)  # (weight|constant|state|step)$")
_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)(?:\.|$)")
_STYLE = """  rankdir=TB; bgcolor="transparent"; fontname="Helvetica"; color="gray70"; fontcolor="gray40";
  node [shape=box, style="rounded,filled", fillcolor=white, color=gray60, fontname=Helvetica, fontsize=10];
  edge [color="gray50", arrowsize=0.6];"""


@dataclass(frozen=True)
class Drawn:
    """A node of a stage's text: its name, value, operator, arguments that are nodes, and layer."""

    name: str
    value: str
    target: str
    reads: tuple[str, ...]
    layer: int | None


def dot(stage: str) -> str:
    """The graph of a stage's text, without weights and constants, in the DOT language."""
    nodes = list(_nodes(stage))
    boxes = _folded(nodes)
    lines = ["digraph step {", _STYLE]
    drawn: dict[int | None, list[str]] = {}
    for node in nodes:
        if node.name not in boxes:
            fused = ', fillcolor="lightyellow"' if node.target.startswith("dcompile.") else ""
            shape = ", shape=ellipse" if not node.target else ""
            called = node.target.removeprefix("dcompile.").removesuffix(".default")
            text = f"{called or node.name}\\n{node.value}"
            drawn.setdefault(node.layer, []).append(f'{node.name} [label="{text}"{fused}{shape}];')
    for layer, texts in drawn.items():
        body = "\n".join(f"    {text}" for text in texts)
        label = f'subgraph cluster_{layer} {{ label="layer {layer}";\n{body}\n  }}'
        lines.append(body if layer is None else f"  {label}")
    lines += [f'  {box} [label="{label}", shape=box3d];' for box, label in _labels(boxes).items()]
    lines += [f"  {a} -> {b};" for a, b in _edges(nodes, boxes)]
    return "\n".join([*lines, "}"]) + "\n"


def draw(stage: str, file: Path) -> None:
    """Write the graph to FILE.svg or FILE.dot; raises OptionError where dot is needed and absent."""
    if file.suffix not in (".svg", ".dot"):
        raise OptionError(f"{file.name} is no picture", remedy="name it FILE.svg or FILE.dot")
    text = dot(stage)
    if file.suffix == ".svg":
        if shutil.which("dot") is None:
            remedy = f"apt-get install graphviz, or name it {file.with_suffix('.dot').name}"
            raise OptionError("the layout needs graphviz, which is not installed", remedy=remedy)
        made = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True)
        if made.returncode:
            raise OptionError(f"graphviz refused the graph: {made.stderr.strip()[:200]}")
        text = made.stdout
    try:
        file.write_text(text)
    except OSError as error:
        raise OutputError(f"it could not be written: {error.strerror}", where=str(file)) from error


def _nodes(stage: str) -> Iterator[Drawn]:
    known: set[str] = set()
    for line in stage.splitlines():
        if found := _INPUT.match(line):
            name, value, kind = found.groups()
            if kind in ("state", "step"):
                known.add(name)
                yield Drawn(name, value, "", (), None)
        elif found := _CALL.match(line):
            name, value, target, args, origin = found.groups()
            reads = tuple(dict.fromkeys(a for a in re.findall(r"[A-Za-z_]\w*", args) if a in known))
            layer = _LAYER.search(origin or "")
            known.add(name)
            yield Drawn(name, value, target, reads, int(layer.group(1)) if layer else None)


def _folded(nodes: list[Drawn]) -> dict[str, tuple[int, int, int]]:
    """Nodes of layers that repeat the one before -> (first, last, the layer that is drawn)."""
    kinds: dict[int, list[tuple[str, str]]] = {}
    for node in nodes:
        if node.layer is not None:
            kinds.setdefault(node.layer, []).append((node.target, node.value))
    runs: dict[int, tuple[int, int, int]] = {}
    for layer in sorted(kinds):
        if kinds.get(layer - 1) == kinds[layer]:
            first, _, shown = runs.get(layer - 1, (layer, layer, layer - 1))
            for each in range(first, layer + 1):
                runs[each] = (first, layer, shown)
    return {n.name: runs[n.layer] for n in nodes if n.layer is not None and n.layer in runs}


def _labels(boxes: dict[str, tuple[int, int, int]]) -> dict[str, str]:
    return {
        _box(run): (f"layer {run[0]}" if run[0] == run[1] else f"layers {run[0]} to {run[1]}")
        + f"\\nas layer {run[2]}"
        for run in boxes.values()
    }


def _box(run: tuple[int, int, int]) -> str:
    return f"layers_{run[0]}_{run[1]}"


def _edges(
    nodes: list[Drawn], boxes: dict[str, tuple[int, int, int]]
) -> dict[tuple[str, str], None]:
    """Each edge once, in order; edges inside a box are not drawn."""
    place = {n.name: _box(boxes[n.name]) if n.name in boxes else n.name for n in nodes}
    edges = ((place[read], place[n.name]) for n in nodes for read in n.reads)
    return dict.fromkeys(edge for edge in edges if edge[0] != edge[1])
