"""What the compiler did and left alone, read back from an artifact."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from rich.console import Console

from dcompile import cli
from dcompile.driver.compile import compile_checkpoint
from dcompile.explain.command import _style, explain, kernel_table, remarks, stage_after
from dcompile.explain.graph import dot
from dcompile.explain.times import pass_times
from dcompile.options import Options, WatchedOptions
from dcompile.runtime.artifact import open_artifact


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    return write_checkpoint(
        folder / "checkpoint", "llada_moe", num_hidden_layers=4, moe_layer_freq=[1] * 4
    )


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    options = Options(max_length=64, block_length=8, cache="dual", look_back=3)
    return compile_checkpoint(checkpoint, options, checkpoint.parent / "model.dcx")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["explain", *arguments])
    return int(caught.value.code or 0), *capsys.readouterr()


def test_missed_and_passed_remarks(artifact: Path) -> None:
    missed, passed = (remarks(artifact, kind).splitlines() for kind in ("missed", "passed"))
    first = "layers.0.input_layernorm: missed fuse_add_rms_norm: what is normed is no sum"
    assert missed == [first]
    fused = [line for line in passed if " fuse_moe: made moe_ffn " in line]
    assert [line.partition(":")[0] for line in fused] == [
        f"layers.{k}.mlp.experts" for k in range(4)
    ]
    every = remarks(artifact, "all").splitlines()
    assert sorted(every) == sorted(missed + passed)
    assert remarks(artifact, "passed", "fuse_moe").count("fuse_moe") == 8
    assert remarks(artifact, "missed", "fuse_moe") == "no missed remarks\n"


def test_every_fused_operator_of_the_last_stage_was_remarked_upon(artifact: Path) -> None:
    stage = stage_after(open_artifact(artifact), None)
    wanted = re.findall(r"^(\w+): .* = dcompile\.(?!add_noise)\w+\(", stage, re.M)
    told = set(re.findall(r"\((\w+)\)$", remarks(artifact, "passed"), re.M))
    assert len(wanted) > 20 and set(wanted) <= told


def test_options_that_nobody_read(artifact: Path) -> None:
    text = explain(artifact)
    section = text[text.index("options that nobody read") : text.index("stages  ")]
    assert "look_back = 3, given in vain" in section and "warmup = 4\n" in section
    for read in ("cache", "block_length", "max_length", "dtype", "policy", "threads", "target"):
        assert f"  {read} =" not in section


def test_an_option_is_read_where_the_cache_policy_asks_for_it(checkpoint: Path) -> None:
    options = Options(max_length=64, block_length=8, cache="vicinity", look_back=3)
    out = compile_checkpoint(checkpoint, options, checkpoint.parent / "vicinity.dcx")
    section = explain(out).partition("options that nobody read")[2]
    assert "look_back" not in section and "warmup" not in section and "refresh_every" in section


def test_copies_of_watched_options_remember_together() -> None:
    first = WatchedOptions.of(Options(batch=3))
    second = first.changed(dtype="float32")
    assert "batch" in first.unread and second.record()["batch"] == 3
    second.validate()
    assert "batch" in first.unread
    assert second.batch == 3 and "batch" not in first.unread and "dtype" in first.unread


def test_the_kernel_table_counts_every_launch(artifact: Path) -> None:
    opened = open_artifact(artifact)
    rows = [line.split() for line in kernel_table(opened).splitlines()[1:]]
    assert sum(int(row[1]) for row in rows) == len(opened.plan.launches)
    assert all(row[3] in opened.names for row in rows), "a kernel of ours has its source inside"


def test_the_kernel_table_says_what_a_forward_streams(artifact: Path) -> None:
    opened = open_artifact(artifact)
    streamed = {row[0]: row[2] for row in map(str.split, kernel_table(opened).splitlines()[1:])}
    weights = sum(opened.tensors[f"layers_{k}_q_k_v.packed"].bytes for k in range(4))
    assert float(streamed["linear_f32"]) * 1e6 > weights > 0
    keys = 4 * 2 * (64 - 8) * 2 * 16 * 4  # of 4 layers, but for the block's own: k, v, groups, size
    assert float(streamed["attend_f32"]) == pytest.approx(keys / 1e6, abs=0.005)
    assert streamed["silu_mul_f32" if "silu_mul_f32" in streamed else "rms_norm_f32"] == "-"


def test_times_are_of_the_same_passes(artifact: Path, checkpoint: Path) -> None:
    timed = [line.split()[:2] for line in pass_times(artifact, checkpoint).splitlines()[2:]]
    report = explain(artifact).partition("\n\n")[0].splitlines()[1:]
    assert timed == [line.split()[:2] for line in report]


def test_layers_that_repeat_are_one_box(artifact: Path) -> None:
    text = dot(stage_after(open_artifact(artifact), None))
    # The last layer computes fewer rows and the first has no residual before it: neither repeats.
    assert "layer 2\\nas layer 1" in text and text.count("box3d") == 1
    assert len(re.findall("subgraph cluster_", text)) == 3
    names = set(re.findall(r"^ *(\w+) \[label=", text, re.M))
    edges = re.findall(r"^  (\w+) -> (\w+);", text, re.M)
    assert edges and {end for edge in edges for end in edge} <= names
    assert all(a != b for a, b in edges) and len(edges) == len(set(edges))


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_the_graph_is_drawn(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ([], ["fuse_moe"]):
        code, _, err = call(capsys, str(artifact), *stage, "--graph", str(tmp_path / "g.svg"))
        assert (code, err) == (0, "")
        svg = (tmp_path / "g.svg").read_text()
        assert "<svg" in svg and "moe_ffn" in svg
        assert ("vocab_choice" in svg) == (not stage)


def test_without_graphviz_the_text_can_be_had(
    artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call(capsys, str(artifact), "--graph", str(tmp_path / "g.svg"))
    assert code == 1 and "graphviz" in err and "g.dot" in err
    assert call(capsys, str(artifact), "--graph", str(tmp_path / "g.dot"))[0] == 0
    assert (tmp_path / "g.dot").read_text().startswith("digraph")
    code, _, err = call(capsys, str(artifact), "--graph", str(tmp_path / "g.pdf"))
    assert code == 1 and "no picture" in err


def test_a_diff_is_coloured_on_a_terminal_only(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, plain, _ = call(capsys, str(artifact), "fuse_moe")
    assert code == 0 and plain == explain(artifact, "fuse_moe") and "\x1b" not in plain
    terminal = Console(
        force_terminal=True, highlight=False, soft_wrap=True, color_system="standard"
    )
    monkeypatch.setattr("dcompile.explain.command.Console", lambda **_: terminal)
    code, coloured, _ = call(capsys, str(artifact), "fuse_moe")
    assert code == 0 and "\x1b[32m+" in coloured and "\x1b[31m-" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    assert _style("--- stages/1") == "bold" and _style(" x") == ""


def test_wrong_names_say_which_there_are(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, str(artifact), "fuse_everything")
    assert code == 1 and "fuse_moe" in err
    code, _, err = call(capsys, str(artifact), "--remarks", "some")
    assert code == 1 and "missed" in err
