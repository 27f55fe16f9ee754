"""The step in ONNX: checked, run by onnxruntime, equal to the reference, the same from both sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import MASK

from dcompile.errors import BuildError, OptionError, OutputError
from dcompile.export import command, onnx_file, run_onnx
from dcompile.export.command import Asked, export
from dcompile.export.onnx_file import write_onnx
from dcompile.export.source import open_source
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner

# Between them these have all that the others have: experts of both kinds, shift, biases, block-causal masks.
ENOUGH = [
    *("llada_moe", "llada2", "dream"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("llada", "sdar", "sdar_moe")),
]
SMALL = {"num_hidden_layers": 1, "moe_layer_freq": [1]}
PROMPTS = [[1, 2, 3, 4, 5], [7] * 11, [8]]


def onnx_of(made: Any, entry: str = "window", **changes: Any) -> Path:
    out = made.folder.parent / f"{entry}-{'-'.join(map(str, changes.values()))}.onnx"
    if not out.exists():
        export(Asked(made.artifact, out, "onnx", entry=entry, options=Options(**changes)))
    return Path(out)


def reference_logits(made: Any, ids: np.ndarray[Any, Any], block: np.ndarray[Any, Any]) -> Any:
    checkpoint = open_checkpoint(made.folder)
    model = checkpoint.reference().double()
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None])[0]
    at = np.maximum(block - 1, 0) if checkpoint.spec.shift else block
    return logits[torch.from_numpy(at)].numpy()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5),
        pytest.param(torch.float16, 3e-3, marks=pytest.mark.slow),
        # Computed in float32; most families round the rotary tables to the model's dtype.
        pytest.param(torch.bfloat16, 3e-3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", ENOUGH)
def test_the_step_is_the_reference(
    make: Any, family: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Two sequences of different lengths in one batch: all positions, then a window over kept keys."""
    made = make(family, dtype)
    path = onnx_of(made)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert all(o.type.tensor_type.HasField("shape") for o in inferred.graph.output)
    called = {n.op_type for n in model.graph.node if n.domain == "dcompile"}
    assert {"attend", "choose", "add_rms_norm"} <= called
    assert called <= {f.name for f in model.functions if f.domain == "dcompile"}
    assert ("moe_ffn_silu" in called) == ("moe" in family or family == "llada2")

    step = run_onnx.Step(path, threads=1)
    n = step.facts["block_length"]
    rng = np.random.default_rng(7)
    lengths = [n + 9, n + 2] if step.facts["model"]["block_length"] is None else [2 * n, n]
    longest = max(lengths)
    canvas = rng.integers(0, 95, (2, longest))
    blocks = np.stack([np.arange(size - n, size) for size in lengths])
    for i in (0, 1):
        hidden = rng.permutation(n)[: max(n // 2, 1)]
        canvas[i, blocks[i][hidden]] = MASK
    state = step.state(longest)
    held = {k: np.repeat(v, 2, 0) for k, v in state.items()}
    given = {name: np.zeros(2) for name in step.inputs}
    given |= {"threshold": np.full(2, 0.9), "lengths": np.array(lengths), "block_positions": blocks}
    everything = np.broadcast_to(np.arange(longest), (2, longest))
    step.outputs.append("logits")
    first = step({**given, **held, "canvas": canvas, "positions": everything})
    for i in (0, 1):
        wanted = reference_logits(made, canvas[i, : lengths[i]], blocks[i])
        close(first["logits"][i], wanted, tolerance)
        live = canvas[i, blocks[i]] == MASK
        own = wanted if dtype == torch.float32 else first["logits"][i].astype(np.float64)
        assert (first["token"][i] == np.where(live, without_mask(own).argmax(-1), -1)).all()
        changed = first["new.canvas"][i] != canvas[i]
        assert (changed[blocks[i]] == first["commit"][i]).all() and changed.sum() >= 1

    # The same tokens again, now the blocks' rows only: nothing may move, beyond rounding.
    shift = int(step.facts["model"]["shift"])
    window = np.stack([np.arange(b[0] - shift, b[-1] + 1) for b in blocks])
    held = {k: first[f"new.{k}"] for k in held}
    second = step({**given, **held, "canvas": canvas, "positions": window})
    close(second["logits"], first["logits"], tolerance)
    for name in held:
        close(second[f"new.{name}"], first[f"new.{name}"], tolerance)
    if dtype != torch.float16:
        assert (second["token"] == first["token"]).all()


def without_mask(logits: Any) -> Any:
    out = logits.copy()
    out[:, MASK] = -np.inf
    return out


def close(found: Any, wanted: Any, tolerance: float) -> None:
    wanted = wanted.astype(np.float64)
    error = np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < tolerance, error


@pytest.mark.parametrize("family", ENOUGH)
def test_onnxruntime_generates_our_tokens(make: Any, family: str) -> None:
    made = make(family)
    step = run_onnx.Step(onnx_of(made), threads=1)
    runner = Runner.load(made.artifact)
    seen = set()
    for prompt in PROMPTS:
        for settings in ({}, {"temperature": 0.7, "seed": 3}, {"threshold": 0.05}):
            ours = runner.generate([prompt], gen_length=16, **settings)[0]  # type: ignore[arg-type]
            found, forwards = run_onnx.generate(step, prompt, 16, **settings)  # type: ignore[arg-type]
            assert found == ours.all_tokens
            assert forwards == ours.forwards
            seen.add(tuple(found))
    assert len(seen) > len(PROMPTS)


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "none"},
        {"cache": "prefix"},
        {"cache": "active"},
        {"cache": "vicinity", "warmup": 2, "look_back": 3, "look_ahead": 2},
        {"cache": "periodic", "refresh_every": 3},
    ],
    ids=lambda options: options["cache"],
)
def test_every_cache_chooses_our_rows(make: Any, options: dict[str, Any]) -> None:
    """One model serves all: rows are an input."""
    made = make("dream")
    step = run_onnx.Step(onnx_of(made), threads=1)
    step.facts["loop"].update(options)
    runner = Runner.load(made.artifact)
    from dcompile.runtime.decode.caches import cache_policy

    runner.cache = cache_policy(options, None)
    for prompt in PROMPTS:
        ours = runner.generate([prompt], gen_length=21, threshold=0.1)[0]
        assert run_onnx.generate(step, prompt, 21, threshold=0.1) == (
            ours.all_tokens,
            ours.forwards,
        )


def test_the_full_entry_needs_no_keys(make: Any) -> None:
    made = make("llada_moe")
    path = onnx_of(made, "full")
    step = run_onnx.Step(path, threads=1)
    assert not any(name.startswith(("keys", "values", "positions")) for name in step.inputs)
    runner = Runner.load(made.artifact)
    from dcompile.runtime.decode.caches import none

    runner.cache = none
    for prompt in PROMPTS:
        ours = runner.generate([prompt], gen_length=16, threshold=0.1)[0]
        assert run_onnx.generate(step, prompt, 16, threshold=0.1)[0] == ours.all_tokens


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llada_moe", torch.float32),
        ("llada_moe", torch.bfloat16),
        pytest.param("llada2", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("dream", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_artifact_and_checkpoint_give_the_same_bytes(
    make: Any, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = make(
        family, dtype, config=SMALL if dtype == torch.bfloat16 and "moe" in family else None
    )
    path = onnx_of(made)
    made_of = export(Asked(made.folder, tmp_path / "step.onnx", "onnx", options=made.options))
    assert sorted(p.name for p in made_of.files) == sorted(p.name for p in tmp_path.iterdir())
    for file in made_of.files:
        twin = path.with_name(file.name.replace("step", path.stem))
        assert file.read_bytes() == twin.read_bytes()
    assert any("float32" in note for note in made_of.notes) == (dtype == torch.bfloat16)


def test_many_weights_lie_beside_the_model(make: Any, tmp_path: Path) -> None:
    """As over 2 GiB, with a lower limit."""
    made = make("llada_moe")
    source = open_source(made.artifact, Options(), lambda _: None)
    out = tmp_path / "step.onnx"
    out.write_bytes(b"old")
    files = write_onnx(source, out, "window", torch.float32, inline_bytes=10_000)
    assert sorted(p.name for p in files) == sorted(p.name for p in tmp_path.iterdir())
    assert out.stat().st_size < onnx_of(made).stat().st_size / 2
    onnx.checker.check_model(str(out), full_check=True)
    onnx.shape_inference.infer_shapes_path(str(out), str(tmp_path / "inferred.onnx"))
    model = onnx.load(out, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert len(outside) > 10
    a, b = (run_onnx.Step(path, 1) for path in (out, onnx_of(made)))
    assert run_onnx.generate(a, [4, 5], 16) == run_onnx.generate(b, [4, 5], 16)


def test_the_loop_needs_no_torch_and_no_dcompile(make: Any, tmp_path: Path) -> None:
    """The copy beside the model, in a process where neither can be imported."""
    made = make("llada_moe")
    path = onnx_of(made)
    refuse = "import sys; [sys.modules.__setitem__(name, None) for name in ('torch', 'dcompile')]\n"
    refuse += (
        "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    asked = ["--prompt", "ab c", "--gen-length", "16", "--set", "threshold=0.1", "--seed", "4"]
    done = subprocess.run(
        [sys.executable, "-c", refuse, str(path.with_name("run_onnx.py")), str(path), *asked],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found = json.loads(done.stdout)
    ours = Runner.load(made.artifact).generate(["ab c"], gen_length=16, threshold=0.1, seed=4)[0]
    assert found["all_tokens"] == ours.all_tokens
    assert found["tokens"] == ours.tokens
    assert found["text"] == ours.text
    assert found["forwards"] == ours.forwards


def test_what_cannot_be_exported_is_named(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("llada_moe")
    out = tmp_path / "step.onnx"
    cases: list[tuple[Asked, type[Exception], str]] = [
        (Asked(made.artifact, out, "onnx", entry="rows"), OptionError, "no entry"),
        (
            Asked(made.artifact, out, "onnx", options=Options(policy="steps")),
            OptionError,
            "when it was compiled",
        ),
        (
            Asked(made.artifact, out, "onnx", options=Options(dtype="bfloat16")),
            OptionError,
            "computes in float32",
        ),
        (Asked(made.artifact, tmp_path / "no" / "x.onnx", "onnx"), OutputError, "no folder"),
    ]
    for asked, kind, words in cases:
        with pytest.raises(kind, match=words):
            export(asked)
    out.mkdir()
    with pytest.raises(OutputError, match="no file"):
        export(Asked(made.artifact, out, "onnx"))
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"'onnx'(.|\n)*pip install 'dcompile\[export\]'"):
        export(Asked(made.artifact, tmp_path / "y.onnx", "onnx"))
    assert [p.name for p in tmp_path.iterdir()] == ["step.onnx"]


def test_a_failure_while_writing_leaves_the_old_model(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("llada_moe")
    out = tmp_path / "step.onnx"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    text = '<ir_version: 10, opset_import: ["": 18]> g (float x) => (float y) { y = Abs(x) }'
    tiny = onnx_file.onnx_ir.from_proto(onnx.parser.parse_model(text))
    monkeypatch.setattr(onnx_file, "portable", lambda *_: SimpleNamespace(weights=()))
    monkeypatch.setattr(onnx_file, "onnx_model", lambda _: tiny)
    monkeypatch.setattr(onnx_file.onnx_ir, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        export(Asked(made.artifact, out, "onnx"))
    assert [p.name for p in tmp_path.iterdir()] == ["step.onnx"]
    assert out.read_bytes() == b"old"
    monkeypatch.undo()
    monkeypatch.setattr(onnx_file, "portable", lambda *_: SimpleNamespace(weights=()))
    monkeypatch.setattr(onnx_file, "onnx_model", lambda _: tiny)
    export(Asked(made.artifact, out, "onnx"))
    assert onnx.load(out).graph.node[0].op_type == "Abs"


@pytest.mark.parametrize("policy", ["credit", pytest.param("edit", marks=pytest.mark.slow)])
def test_policies_with_memory_and_questions_run_too(make: Any, policy: str) -> None:
    """State in and out beside the keys; the model asked about tokens of the policy's own."""
    made = make("llada_moe", config=SMALL, policy=policy)
    step = run_onnx.Step(onnx_of(made), threads=1)
    runner = Runner.load(made.artifact)
    for prompt in PROMPTS:
        ours = runner.generate([prompt], gen_length=16)[0]
        assert run_onnx.generate(step, prompt, 16) == (ours.all_tokens, ours.forwards)


@pytest.mark.slow
def test_more_than_two_gigabytes(make: Any, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 1, "moe_layer_freq": [1], "hidden_size": 1024}
    made = make("llada_moe", config={**config, "vocab_size": 300_000})
    out = export(Asked(made.artifact, tmp_path / "step.onnx", "onnx")).files
    data = tmp_path / "step.onnx.data"
    assert data in out and data.stat().st_size > 2 << 30
    assert (tmp_path / "step.onnx").stat().st_size < 1 << 20
    step = run_onnx.Step(tmp_path / "step.onnx", threads=1)
    ours = Runner.load(made.artifact).generate([[1, 2, 3]], gen_length=8)[0]
    assert run_onnx.generate(step, [1, 2, 3], 8) == (ours.all_tokens, ours.forwards)
