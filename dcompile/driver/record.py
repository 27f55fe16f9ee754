"""What the passes of a compile did: text, counts and times of each, remarks, and a line as it begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch.fx import Node

from dcompile.driver.pipeline import name_of
from dcompile.ir.meta import facts
from dcompile.ir.program import Pass, Program
from dcompile.ir.remarks import Remark
from dcompile.ir.show import show, target_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What one pass did."""

    name: str
    changed: int
    nodes_before: int
    nodes_after: int
    seconds: float
    text: str  # the program after it


@dataclass
class Recorder:
    """Observes: keeps a record of each pass that changed something, and remarks what it made."""

    records: list[Record] = field(default_factory=list)
    _known: set[Node] = field(default_factory=set)
    _start: float = 0.0

    def before(self, program: Program, item: Pass) -> None:
        self._known, self._start = set(program.nodes()), time.perf_counter()

    def after(self, program: Program, item: Pass, changed: int) -> None:
        seconds = time.perf_counter() - self._start
        name, before, after = name_of(item), len(self._known), len(program.graph.nodes)
        log.info("%s: %d places, %d -> %d nodes", name, changed, before, after)
        if changed:
            program.remarks += _made(program, name, self._known)
            self.records.append(Record(name, changed, before, after, seconds, show(program)))


@dataclass(frozen=True)
class Announcer:
    """Observes: says the name of each pass as it begins."""

    say: Callable[[str], None]

    def before(self, program: Program, item: Pass) -> None:
        self.say(name_of(item))

    def after(self, program: Program, item: Pass, changed: int) -> None:
        pass


def _made(program: Program, name: str, known: set[Node]) -> Iterator[Remark]:
    """What a pass put in place of other nodes: fused operators, and products."""
    for node in program.nodes():
        if node in known or node.op != "call_function":
            continue
        target = target_name(node)
        if target.startswith("dcompile.") or target == "linear.default":
            where = facts(node).origin or node.name
            what = target.removeprefix("dcompile.").removesuffix(".default")
            yield Remark(name, where, f"made {what} ({node.name})", "passed")
