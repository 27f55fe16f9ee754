"""What a plan can be compiled for, as the user writes it: cpu, cuda, cuda:sm_90, cuda:sm_80,sm_90."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dcompile.codegen.triton.tiles import ARCHITECTURES
from dcompile.errors import OptionError

# The chips that such models are served on; cubins of sm_80 run on 86 and 89 as well where they fit.
DEFAULT_ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Target:
    """A kind of machine, and of CUDA the architectures whose cubins an artifact holds."""

    kind: Literal["cpu", "cuda"]
    architectures: tuple[int, ...] = ()

    def __str__(self) -> str:
        names = ",".join(f"sm_{a}" for a in self.architectures)
        return f"{self.kind}:{names}" if names else self.kind


def parse_target(text: str) -> Target:
    """Raises OptionError where there is no such target; `auto` is cpu."""
    kind, _, rest = text.partition(":")
    if text in ("auto", "cpu"):
        return Target("cpu")
    if kind != "cuda" or text.endswith(":"):
        raise _unknown(text)
    if not rest:
        return Target("cuda", DEFAULT_ARCHITECTURES)
    found = []
    for word in rest.split(","):
        number = word.strip().removeprefix("cuda:").removeprefix("sm_")
        if not number.isdigit() or int(number) not in ARCHITECTURES:
            raise _unknown(text)
        found.append(int(number))
    return Target("cuda", tuple(sorted(set(found))))


def _unknown(text: str) -> OptionError:
    known = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
    return OptionError(
        f"target {text!r} is not supported",
        remedy=f"--target cpu, cuda, or cuda:sm_90,... with any of {known}",
    )
