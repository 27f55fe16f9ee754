"""maskgit_plus: Dream's schedule over the whole canvas, the most confident positions first.

The oldest order of all: what is likeliest is likeliest to be right, and helps the others most
(MaskGIT, arXiv 2202.04200). The schedule is that of `entropy` (Dream 7B, arXiv 2508.15487).
"""

from __future__ import annotations

from dcompile.policies.entropy import schedule

POLICY = schedule("maskgit_plus", "low_confidence")
