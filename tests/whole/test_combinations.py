"""Every cell of the table runs, ends, and is as exact as it says; the document has the table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from quick import compile_quickly

from dcompile.decoding.rules import CACHES, MANAGERS, RULES, allowed
from dcompile.decoding.tables import KINDS, Cell, cells, updated
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.policies import policy_names
from dcompile.runtime.decode.caches import cache_policy
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.decode.sequence import Result

DOCUMENT = Path(__file__).parents[2] / "docs" / "decoding.md"
FAMILY = {True: "llada", False: "sdar"}
BLOCK, LENGTH = 8, 16
PROMPTS = [[5, 3, 8, 1, 7, 2, 9], [], [11] * 9, [4, 6, 4, 2, 90, 31, 77, 50, 12, 13, 18]]
# Low enough that a random model is sometimes sure, high enough that it is not always.
KNOBS = {
    "threshold": 0.1,
    "threshold_low": 0.05,
    "threshold_edit": 0.2,
    "threshold_remask": 0.1,
    "post_steps": 3,
    "factor": 1.2,
    "steps": 5,
}


def same_compile(cell: Cell) -> tuple[object, ...]:
    """Cells that differ only in the cache have one artifact: the loop chooses rows."""
    return cell.span, cell.policy, cell.manager, cell.smoothing


def groups() -> Iterator[object]:
    """Lists of such cells. One of each policy always, over managers and kinds; the others are slow."""
    every = [cell for span in KINDS.values() for cell in cells(span)]
    found = [list(group) for _, group in groupby(every, same_compile)]
    policies = policy_names()
    for index, group in enumerate(found):
        first = group[0]
        peers = [g for g in found if g[0].policy == first.policy]
        always = group is peers[policies.index(first.policy) % len(peers)]
        name = first.name.rpartition("-")[0]
        yield pytest.param(
            group, id=f"{index:02}-{name}", marks=() if always else [pytest.mark.slow]
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cells")
    return {family: write_checkpoint(root / family, family) for family in FAMILY.values()}


def options_of(cell: Cell, block: int) -> Options:
    n = LENGTH if cell.manager == "canvas" else block
    return Options(
        max_length=64,
        batch=3,
        block_length=n,
        policy=cell.policy,
        manager=cell.manager,
        cache=cell.cache,
        smoothing=0.3 if cell.smoothing else None,
        look_back=3,
        look_ahead=2,
        warmup=2,
        refresh_every=3,
    )


@pytest.mark.parametrize("group", list(groups()))
def test_a_cell_runs_and_ends(group: list[Cell], folders: dict[str, Path], tmp_path: Path) -> None:
    first = group[0]
    folder = folders[FAMILY[first.span is None]]
    block = open_checkpoint(folder).spec.block_length or BLOCK
    made = compile_quickly(folder, options_of(first, block), tmp_path / "model.dcx")
    runner = Runner.load(made, verify=False)
    blocks = LENGTH // runner.limits.block_length + 1  # the first may begin inside the prompt
    bound = LENGTH + (KNOBS["post_steps"] + 1) * blocks
    found = {}
    for cell in group:
        runner.cache = cache_policy(options_of(cell, block).record(), runner.limits.span)
        found[cell.cache] = generate(runner)
        for result in found[cell.cache]:
            assert len(result.all_tokens) == LENGTH
            assert runner.limits.mask_id not in result.all_tokens
            assert result.forwards <= bound
    for cell in group:
        same = [r.all_tokens for r in found[cell.cache]] == [r.all_tokens for r in found["none"]]
        assert same or not cell.exact, cell.name
    if first.span is None:
        reusing = [tokens(found[cell.cache]) for cell in group if not cell.exact]
        assert any(each != tokens(found["none"]) for each in reusing), "no cache approximates?"


def generate(runner: Runner) -> list[Result]:
    knobs = {name: KNOBS[name] for name in runner.limits.parameters if name in KNOBS}
    return runner.generate(PROMPTS, gen_length=LENGTH, early_stop=False, **knobs)


def tokens(results: Sequence[Result]) -> list[list[int]]:
    return [result.all_tokens for result in results]


def test_the_cells_are_those_that_the_compiler_takes(folders: dict[str, Path]) -> None:
    for span in KINDS.values():
        spec = open_checkpoint(folders[FAMILY[span is None]]).spec
        listed = {(c.policy, c.manager, c.cache, c.smoothing) for c in cells(span)}
        spec = replace(spec, block_length=span)
        taken = {
            cell
            for cell in product(policy_names(), MANAGERS, CACHES, (False, True))
            if allowed(*cell[:3], spec, smoothing=cell[3]) is None
        }
        assert listed == taken and listed


def test_the_document_is_current() -> None:
    text = DOCUMENT.read_text()
    wanted = updated(text)
    if os.environ.get("DCOMPILE_ACCEPT_GOLDEN"):
        DOCUMENT.write_text(wanted)
        text = wanted
    assert text == wanted, "run python -m dcompile.decoding.tables docs/decoding.md, or make golden"
    assert all(rule.reason[1:] in text for rule in RULES)
    with pytest.raises(ValueError, match="has no lines"):
        updated("nothing")
