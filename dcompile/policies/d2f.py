"""d2f: commit every candidate above the threshold, the best where there is none (2508.09192).

D2F runs several blocks at once, and its rule is `threshold` with a strict comparison. A block that
is only half activated must not be forced: it commits nothing below the threshold, since the blocks
before it will still tell it more. The step makes that difference, by its input `full`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dcompile.policies.base import Choice, Policy


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """c > threshold; the step's progress guarantee adds the best of a block that commits none."""
    return choice.confidence > parameters["threshold"][:, None]


POLICY = Policy("d2f", commit, {"threshold": 0.9})
