"""Tiny artifacts and their checkpoints, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options


@dataclass(frozen=True)
class Made:
    folder: Path
    artifact: Path
    options: Options


Make = Callable[..., Made]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[tuple[object, ...], Made] = {}

    def build(
        family: str,
        dtype: torch.dtype = torch.float32,
        config: dict[str, object] | None = None,
        **changes: object,
    ) -> Made:
        key = (family, dtype, repr(config or {}), *sorted(changes.items()))
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            folder = write_checkpoint(root / "checkpoint", family, dtype=dtype, **(config or {}))
            block = None if family in ("llada2", "sdar", "sdar_moe") else 8
            settings = {"max_length": 64, "batch": 2, "block_length": block, **changes}
            options = Options(**settings)  # type: ignore[arg-type]
            artifact = compile_checkpoint(folder, options, root / "model.dcx")
            made[key] = Made(folder, artifact, options)
        return made[key]

    return build
