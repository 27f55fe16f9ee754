"""Our own facts about a node, in one typed record under one key of `node.meta`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

KEY = "dcompile"


@dataclass(frozen=True)
class Facts:
    """What passes know of a node beyond its value.

    `origin` is the path of the module that the node came from; `layer` the decoder layer that it
    belongs to, `role` what it does there ("q", "router", "head", ...).  `buffer` and `region` are set
    by the last passes: the place of the value, and the run of launches that computes it.
    """

    origin: str = ""
    layer: int | None = None
    role: str = ""
    buffer: str | None = None
    region: int | None = None


def facts(node: Node) -> Facts:
    found = node.meta.get(KEY)
    return found if isinstance(found, Facts) else Facts()


def note(node: Node, **changes: object) -> None:
    """Change some facts of a node and keep the others."""
    node.meta[KEY] = replace(facts(node), **changes)  # type: ignore[arg-type]
