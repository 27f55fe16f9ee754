"""Places in the batch: a slot's tokens, and what lies beside them that the next request must not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcompile.errors import ArtifactError
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.requests import Limits

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slot:
    """One place in the batch."""

    index: int
    canvas: Ints
    """Its token ids, [positions], shared with the executor."""
    mask_id: int
    executor: Backend
    scrubbed: Sequence[tuple[str, bool]]
    """State that a request must not inherit, each with whether a block must not either."""

    def admit(self, prompt: Sequence[int]) -> None:
        """Begin a request: its tokens, masks behind them, zeros in what is not to be inherited.

        Keys and values stay: a request's first iteration computes all that it reads.
        """
        self.canvas[: len(prompt)] = prompt
        self.canvas[len(prompt) :] = self.mask_id
        for name, _ in self.scrubbed:
            self.executor.clear(name, self.index)
        self.push()

    def enter(self) -> None:
        """Begin a block."""
        for name, each_block in self.scrubbed:
            if each_block:
                self.executor.clear(name, self.index)

    def push(self) -> None:
        """The host wrote here."""
        self.executor.push(self.index)

    def pull(self) -> None:
        """The host is about to read here."""
        self.executor.pull(self.index)


def slots_of(artifact: Artifact, executor: Backend, limits: Limits) -> list[Slot]:
    """The slots of a loaded artifact; raises ArtifactError where its plan has no fitting tokens."""
    where = str(artifact.path)
    names = artifact.plan.holding("canvas")
    held = np.asarray(executor.state[names[0]]) if len(names) == 1 else np.zeros((0, 0))
    if held.shape != (limits.batch, limits.max_length):
        raise ArtifactError("the plan has no canvas of slots and positions", where=where)
    if held.dtype != np.int64:
        raise ArtifactError("the plan's canvas does not hold 64-bit ids", where=where)
    scrubbed = _scrubbed(artifact)
    return [Slot(at, line, limits.mask_id, executor, scrubbed) for at, line in enumerate(held)]


def _scrubbed(artifact: Artifact) -> list[tuple[str, bool]]:
    try:
        listed = artifact.manifest["policy"].get("state", ())
        resets = {str(item["name"]): item.get("reset", "block") for item in listed}
    except (TypeError, KeyError, AttributeError) as error:
        what = "the manifest's list of the policy's state cannot be read"
        raise ArtifactError(what, where=str(artifact.path)) from error
    names = artifact.plan.holding("policy", "soft")
    return [(name, resets.get(name) == "block") for name in names]
