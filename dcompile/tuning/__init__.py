"""`dcompile tune`: the tiles of an artifact's kernels, timed on a GPU; the fastest go into a table.

`problems` reads the shapes off an artifact, `select` says which tiles are worth a try, `placed` runs a
lowering on a device, `measure` times and compares.
"""

from __future__ import annotations

from dcompile.tuning.measure import Outcome, tune

__all__ = ["Outcome", "tune"]
