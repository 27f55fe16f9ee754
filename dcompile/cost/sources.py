"""What a kernel is made of: its source in the artifact, and the graph lines that its launches stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dcompile.cost.call import family
from dcompile.runtime.artifact import Artifact

EMITTED = "kernels.cpp"
LIBRARY = "kernels/source/"


@dataclass(frozen=True)
class Source:
    """Where in the artifact a kernel is written, and the text: all of an emitted function, the
    formula and the method of a library kernel."""

    file: str
    text: str


def source_of(artifact: Artifact, kernel: str) -> Source | None:
    """None where the artifact has no source of it, as of an operator of torch."""
    if EMITTED in artifact.names and (text := _function(artifact.text(EMITTED), kernel)):
        return Source(EMITTED, text)
    # The choice of tokens with more asked of it is described where the plain one is.
    stems = [family(kernel), family(kernel).removesuffix("_asked"), kernel.partition("_")[0]]
    for name in artifact.names:
        if name.startswith(LIBRARY) and (text := _section(artifact.text(name), stems)):
            return Source(name, text)
    return None


def _function(text: str, kernel: str) -> str:
    found = re.search(rf"^EXPORT void {re.escape(kernel)}\(.*?^}}", text, re.M | re.S)
    return found.group(0) if found else ""


def _section(text: str, stems: Sequence[str]) -> str:
    """The comment that says what a kernel computes: a line of it begins with the kernel's name."""
    named = "|".join(map(re.escape, stems))
    for block in re.findall(r"(?:^//[^\n]*\n)+", text, re.M):
        if re.search(rf"^// (?:{named}):", block, re.M):
            return str(block)
    return ""


def graph_lines(artifact: Artifact, places: Sequence[Place]) -> Iterator[str]:
    """The lines of the last stage that the launches at `places` stand for."""
    wanted = {node for place in places for node in place.nodes}
    stages = sorted(name for name in artifact.names if name.startswith("stages/"))
    for line in artifact.text(stages[-1]).splitlines() if stages else ():
        if line.partition(":")[0] in wanted:
            yield line


@dataclass(frozen=True)
class Place:
    """What a launch is and stands for."""

    name: str
    kernel: str
    layer: int | None
    role: str
    origin: str
    nodes: list[str]
