"""Options that make no sense are refused by name, before anything is traced or written."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from quick import compile_quickly

from dcompile.driver.compile import compile_checkpoint
from dcompile.driver.settle import settle
from dcompile.errors import DcompileError, OptionError
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner


@pytest.fixture(scope="module")
def bidirectional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("m"), "llada_moe")


@pytest.fixture(scope="module")
def block_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("b"), "sdar", block_size=4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 0},
        {"batch": 0},
        {"block_length": -1},
        {"threads": 0},
        {"look_back": -1},
        {"refresh_every": 0},
        {"cache": "everything"},
        {"dtype": "int8"},
        {"target": "tpu"},
        {"policy": "best"},
        {"policy": "missing.py:mine"},
        {"max_length": 1 << 20},
        {"max_length": 8, "block_length": 16},
        {"cache": "block"},
        {"skip": ("fuse_everything",)},
        {"skip": ("canonicalize",)},
        {"stop_after": "nothing"},
        {"smoothing": 0.0},
    ],
)
def test_refused(bidirectional: Path, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        compile_checkpoint(bidirectional, Options(**options), tmp_path / "m.dcx")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"cache": "dual"}, {"block_length": 8}])
def test_refused_for_block_causal_models(
    block_causal: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(OptionError):
        compile_checkpoint(block_causal, Options(**options), tmp_path / "m.dcx")  # type: ignore[arg-type]


def test_a_missing_folder_to_write_to(bidirectional: Path, tmp_path: Path) -> None:
    with pytest.raises(DcompileError):
        compile_checkpoint(
            bidirectional, Options(max_length=64, block_length=8), tmp_path / "no" / "m.dcx"
        )


def test_a_policy_of_the_user(bidirectional: Path, tmp_path: Path) -> None:
    from dcompile.runtime.decode.loop import Runner

    source = "def first(choice, parameters):\n    return choice.candidate.cumsum(-1) == 1\n"
    (tmp_path / "mine.py").write_text(source)
    options = Options(max_length=64, block_length=8, policy=f"{tmp_path / 'mine.py'}:first")
    out = compile_checkpoint(bidirectional, options, tmp_path / "m.dcx")
    (result,) = Runner.load(out).generate([[1, 2, 3]], gen_length=8, early_stop=False)
    assert result.forwards == 8


def test_auto_is_the_family_s_policy_with_its_threshold(
    bidirectional: Path, block_causal: Path, tmp_path: Path
) -> None:
    for folder in (bidirectional, block_causal):
        spec = open_checkpoint(folder).spec
        chosen = [settle(Options(policy=name, max_length=96), spec) for name in (None, "auto")]
        assert chosen[0] == chosen[1] and chosen[0].policy.name == spec.defaults.policy
    options = Options(policy="auto", max_length=96, block_length=8)
    runner = Runner.load(compile_quickly(bidirectional, options, tmp_path / "model.dcx"))
    assert runner.artifact.manifest["policy"]["name"] == "threshold"
    assert runner.limits.parameters["threshold"] == 0.8
