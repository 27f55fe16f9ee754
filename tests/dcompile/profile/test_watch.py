"""Watches see each step of a generation, and change nothing of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toy
from toy import MASK, Toy

from dcompile.profile.watch import Observer, Timer
from dcompile.runtime.decode.loop import Runner

PROMPTS = [[1, 3, 5], [4], [9, 9, 9, 9, 1]]
ARGUMENTS = {"gen_length": 12, "threshold": 0.7, "early_stop": False}


@pytest.fixture
def runner(tmp_path: Path, code: bytes) -> Runner:
    return toy.load(tmp_path, Toy(batch=2, cache="dual"), code)


def test_a_timer_times_every_launch_inside_its_iteration(runner: Runner) -> None:
    plain = runner.generate(PROMPTS, **ARGUMENTS)
    runner.watch = timer = Timer(runner.executor)
    timed = runner.generate(PROMPTS, **ARGUMENTS)
    assert [r.all_tokens for r in timed] == [r.all_tokens for r in plain]
    assert sum(each.B for each in timer.iterations) == sum(r.forwards for r in plain)
    end = 0.0
    for each in timer.iterations:
        assert end == each.begin <= each.start <= each.end
        assert each.seconds.shape == (len(runner.executor.plan.launches),)
        assert (each.seconds > 0).all() and each.seconds.sum() <= each.end - each.start
        end = each.end


def test_an_observer_sees_tokens_where_they_are_committed(runner: Runner) -> None:
    plain = runner.generate(PROMPTS, **ARGUMENTS)
    runner.watch = observer = Observer(runner.executor, {})
    runner.generate(PROMPTS, **ARGUMENTS)
    found: dict[int, dict[int, int]] = {0: {}, 1: {}, 2: {}}
    for seen in observer.iterations:
        for slot, prompt in seen.prompts.items():
            fresh = np.flatnonzero((seen.before[slot] == MASK) & (seen.after[slot] != MASK))
            assert np.isfinite(seen.confidence[slot, fresh]).all()
            found[prompt] |= {int(at): int(seen.after[slot, at]) for at in fresh}
    for prompt, result in zip(PROMPTS, plain, strict=True):
        tokens = found[PROMPTS.index(prompt)]
        assert [tokens[at] for at in sorted(tokens)] == result.all_tokens
        assert min(tokens) == len(prompt)


def test_a_probe_sees_a_buffer_that_a_later_launch_overwrites(runner: Runner) -> None:
    plan = runner.executor.plan
    index = {buffer.name: at for at, buffer in enumerate(plan.buffers)}
    assert plan.buffers[index["h0"]].slot == plan.buffers[index["h2"]].slot
    runner.watch = observer = Observer(runner.executor, {0: index["h0"], 2: index["h2"]})
    plain = runner.generate(PROMPTS, **ARGUMENTS)
    for seen in observer.iterations:
        assert seen.probes[0].shape == seen.probes[2].shape == (seen.R,)
        assert not np.array_equal(seen.probes[0], seen.probes[2])
    runner.watch = None
    again = runner.generate(PROMPTS, **ARGUMENTS)
    assert [r.all_tokens for r in plain] == [r.all_tokens for r in again]
