"""margin: Dream's schedule over the whole canvas, the positions of largest top-1 to top-2 margin first."""

from __future__ import annotations

from dcompile.policies.entropy import schedule

POLICY = schedule("margin", "margin")
