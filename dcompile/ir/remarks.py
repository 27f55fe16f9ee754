"""What passes say of their work: a file of its own, since those who read it later have no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Remark:
    """Why a pass left a place alone, or what it made there, in a sentence for the user.

    A pass says what it missed; what it made the pipeline sees.
    """

    pass_name: str
    where: str
    text: str
    kind: Literal["missed", "passed"] = "missed"
