"""`dcompile profile`: a generation seen from inside, down to each launch.

A request is served some rounds plainly and some rounds timed, in turn, so that what timing costs is
itself measured, and once more to look at what each iteration ran over. `cost` computes bytes and FLOPs
from the plan and that; `summary` adds up; `table`, `trace` and `page` show.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcompile.profile.collect import Capture, Progress, Request, capture, load_runner
from dcompile.runtime.decode.loop import Runner

__all__ = ["Capture", "profile_artifact"]

RANDOM_PROMPT = 32


def profile_artifact(
    artifact: Path,
    prompts: Sequence[str | Sequence[int]] = (),
    gen_length: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    rounds: int = 3,
    threads: int | None = None,
    progress: Progress = lambda text: None,
) -> Capture:
    """Generate from an artifact and see how; without prompts from one of random tokens.

    `arguments` are those of `Runner.generate`.  Raises DcompileError as that does.
    """
    progress("loading")
    runner, load, before = load_runner(artifact, threads)
    ids = [runner.encode(prompt) for prompt in prompts] or [_random_prompt(runner)]
    length = gen_length
    if length is None:
        length = runner.limits.default_length(max(map(len, ids)), 128)
    # An end of sequence would make the length of the work a matter of luck.
    asked = {"early_stop": False, **(arguments or {})}
    return capture(runner, Request(ids, length, asked), load, rounds, progress, before)


def _random_prompt(runner: Runner) -> list[int]:
    limits = runner.limits
    draw = random.Random(0)
    special = {limits.mask_id, *limits.eos_ids}
    ordinary = [i for i in range(min(limits.vocab_size, 1 << 16)) if i not in special]
    length = min(RANDOM_PROMPT, max(limits.max_length - limits.block_length, 0))
    return [draw.choice(ordinary) for _ in range(length)]
