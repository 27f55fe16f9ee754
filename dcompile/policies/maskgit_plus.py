"""maskgit_plus: Dream's schedule over the whole canvas, the most confident positions first."""

from __future__ import annotations

from dcompile.policies.entropy import schedule

POLICY = schedule("maskgit_plus", "low_confidence")
