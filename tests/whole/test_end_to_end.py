"""A checkpoint in, tokens out: every family, against a plain decode of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, write_checkpoint, write_model_pt
from slow import decode

import dcompile
from dcompile.driver.compile import compile_checkpoint
from dcompile.frontends.checkpoint import Checkpoint, open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner
from dcompile.verify.command import verify

PROMPTS = [[1, 2, 3, 4, 5], [7] * 11, [3, 1, 4, 1, 5, 9, 2, 6], [8]]
LENGTH = 16


@dataclass(frozen=True)
class Made:
    checkpoint: Checkpoint
    folder: Path
    artifact: Path

    @property
    def block(self) -> int:
        return self.checkpoint.spec.block_length or 8


Make = Callable[..., Made]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[tuple[object, ...], Made] = {}

    def build(family: str, **options: object) -> Made:
        key = (family, *sorted(options.items()))
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            folder = write_checkpoint(root / "checkpoint", family)
            checkpoint = open_checkpoint(folder)
            block = None if checkpoint.spec.block_length else 8
            settings = {"max_length": 96, "batch": 3, "block_length": block, **options}
            artifact = compile_checkpoint(folder, Options(**settings), root / "model.dcx")  # type: ignore[arg-type]
            made[key] = Made(checkpoint, folder, artifact)
        return made[key]

    return build


def plain(made: Made, prompt: list[int], **policy: float) -> tuple[list[int], int]:
    spec = made.checkpoint.spec
    return decode(
        made.checkpoint.reference(),
        prompt,
        LENGTH,
        made.block,
        spec.mask_id,
        aligned=spec.block_length is not None,
        shift=spec.shift,
        **policy,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_none_is_the_plain_model(make: Make, family: str) -> None:
    made = make(family, cache="none")
    runner = dcompile.load(made.artifact)
    results = runner.generate(PROMPTS, gen_length=LENGTH, threshold=0.03, early_stop=False)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert (result.all_tokens, result.forwards) == plain(made, prompt, threshold=0.03)


@pytest.mark.parametrize("manager", ["blockwise", "canvas"])
def test_blocks_of_other_places_and_lengths(make: Make, manager: str) -> None:
    """Aligned blocks in a bidirectional model; all positions as one block."""
    asked = {"aligned": True} if manager == "blockwise" else {"block_length": LENGTH}
    made = make("llada_moe", cache="none", manager=manager, **asked)
    results = dcompile.load(made.artifact).generate(
        PROMPTS, gen_length=LENGTH, threshold=0.03, early_stop=False
    )
    block, aligned = asked.get("block_length", 8), "aligned" in asked
    for prompt, result in zip(PROMPTS, results, strict=True):
        wanted = decode(
            made.checkpoint.reference(), prompt, LENGTH, block, 129, threshold=0.03, aligned=aligned
        )
        assert (result.all_tokens, result.forwards) == wanted


@pytest.mark.parametrize("family", ["llada2", "sdar", "sdar_moe"])
def test_block_is_exact_on_block_causal_models(make: Make, family: str) -> None:
    made = make(family, cache="block")
    results = dcompile.load(made.artifact).generate(
        PROMPTS, gen_length=LENGTH, threshold=0.03, early_stop=False
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert (result.all_tokens, result.forwards) == plain(made, prompt, threshold=0.03)


@pytest.mark.parametrize("family", ["llada2", "sdar_moe"])
def test_the_cross_block_update_saves_a_forward_a_block(make: Make, family: str) -> None:
    """Blocks stored by a forward of their own give the same tokens, one forward a block later."""
    crossed, stored = (make(family, cache="block", cross_block=on) for on in (True, False))
    asked = {"gen_length": 2 * crossed.block, "threshold": 0.03, "early_stop": False}
    pairs = zip(
        PROMPTS,
        *(dcompile.load(made.artifact).generate(PROMPTS, **asked) for made in (crossed, stored)),
        strict=True,
    )
    for prompt, one, two in pairs:
        blocks = 2 + (len(prompt) % crossed.block > 0)
        assert one.all_tokens == two.all_tokens
        assert two.forwards - one.forwards == blocks - 1


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_is_the_schedule(make: Make, steps: int) -> None:
    made = make("llada_moe", cache="none", policy="steps")
    results = dcompile.load(made.artifact).generate(
        PROMPTS, gen_length=LENGTH, steps=float(steps), early_stop=False
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert (result.all_tokens, result.forwards) == plain(made, prompt, steps=steps)


@pytest.mark.parametrize("cache", ["dual", "prefix", "vicinity", "periodic", "active"])
def test_a_result_does_not_depend_on_its_neighbours(make: Make, cache: str) -> None:
    made = make("llada_moe", cache=cache)
    runner = dcompile.load(made.artifact)
    together = runner.generate(PROMPTS, gen_length=LENGTH, threshold=0.03, early_stop=False)
    for prompt, result in zip(PROMPTS, together, strict=True):
        (alone,) = runner.generate([prompt], gen_length=LENGTH, threshold=0.03, early_stop=False)
        assert (alone.all_tokens, alone.forwards) == (result.all_tokens, result.forwards)


def test_temperature_is_reproducible_and_moves_tokens(make: Make) -> None:
    runner = dcompile.load(make("llada_moe", cache="none").artifact)

    def sample(seed: int) -> list[list[int]]:
        found = runner.generate(PROMPTS, gen_length=LENGTH, temperature=1.5, seed=seed)
        return [list(r.all_tokens) for r in found]

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_bfloat16_stays_near_the_plain_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "llada_moe", dtype=torch.bfloat16)
    artifact = compile_checkpoint(
        folder, Options(max_length=64, block_length=8), tmp_path / "model.dcx"
    )
    assert "equal" in verify(artifact, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_accepts_what_was_compiled(make: Make, family: str) -> None:
    made = make(family, cache="none")
    assert "confidences within" in verify(made.artifact, made.folder)


def test_model_pt_and_folder_artifact(tmp_path: Path) -> None:
    path = write_model_pt(tmp_path / "model.pt", "llada_moe")
    out = compile_checkpoint(path, Options(max_length=64, block_length=8), tmp_path / "out")
    assert (out / "manifest.json").is_file()
    assert len(Runner.load(out).generate([[1, 2]], gen_length=8)[0].all_tokens) == 8


def test_the_same_compile_gives_the_same_bytes(make: Make, tmp_path: Path) -> None:
    made = make("llada_moe", cache="none")
    again = compile_checkpoint(
        made.folder,
        Options(max_length=96, batch=3, block_length=8, cache="none"),
        tmp_path / "again.dcx",
    )
    first, second = Runner.load(made.artifact).artifact, Runner.load(again).artifact
    assert first.manifest["files"] == second.manifest["files"]


def test_check_passes_on_every_pass(make: Make, tmp_path: Path) -> None:
    made = make("llada2", cache="none")
    options = Options(max_length=96, check=True)
    compile_checkpoint(made.folder, options, tmp_path / "checked.dcx")
