"""The command line: what goes where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from toy import EOS, MASK, Toy
from words import WORDS, tokenizer_json

from dcompile import cli
from dcompile.driver import compile as driver
from dcompile.errors import CheckpointError, OutputError
from dcompile.options import Options

SUPPORT = str(Path(toy.__file__).parent)


@pytest.fixture(autouse=True)
def keep_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def artifact(tmp_path: Path, code: bytes) -> str:
    return str(toy.write(tmp_path / "toy.dcx", Toy(batch=2), code))


@pytest.fixture
def talking(tmp_path: Path, code: bytes) -> str:
    files = {"tokenizer/tokenizer.json": tokenizer_json()}
    return str(toy.write(tmp_path / "talking.dcx", Toy(), code, **files))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    assert call(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


# run


def test_json_is_one_object_and_nothing_else(
    artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt-ids", "1,3, 4", "--gen-length", "12", "--threshold", "0.5", "--json"]
    assert call("run", artifact, *asked) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    found = json.loads(out)
    wanted, forwards = toy.decode(Toy(), [1, 3, 4], 12, 0.5)
    keys = "tokens all_tokens text forwards tokens_per_forward seconds tokens_per_second"
    assert list(found) == keys.split()
    assert (found["all_tokens"], found["forwards"]) == (wanted, forwards)
    assert found["tokens"] == (wanted[: wanted.index(EOS)] if EOS in wanted else wanted)
    assert found["text"] is None and found["seconds"] > 0


def test_prompts_are_answered_in_order(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [[1], [3, 4, 5], [8, 9], [], [10] * 9]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps({"prompt_ids": ids}) for ids in prompts) + "\n")
    asked = ["--prompts", str(file), "--gen-length", "8", "--json", "--no-early-stop"]
    assert call("run", artifact, *asked) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = [toy.decode(Toy(), ids, 8, early_stop=False) for ids in prompts]
    assert [(line["all_tokens"], line["forwards"]) for line in lines] == wanted


def test_a_queue_is_answered_first_done_first(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [[1], [3, 4, 5], [8, 9], [], [10] * 9]
    file = tmp_path / "queue.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts))
    asked = ["--queue", str(file), "--gen-length", "8", "--no-early-stop"]
    assert call("run", artifact, *asked) == 0
    out, err = capsys.readouterr()
    lines = {line["index"]: line for line in map(json.loads, out.splitlines())}
    assert err == "" and sorted(lines) == list(range(5))
    for index, ids in enumerate(prompts):
        found = (lines[index]["all_tokens"], lines[index]["forwards"])
        assert found == toy.decode(Toy(), ids, 8, early_stop=False)
    assert fails(capsys, 1, "run", artifact, "--queue", "/no/such").startswith("RequestError")


def test_text(talking: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", talking, "--prompt", "a b", "--gen-length", "8", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == "" and set(out.split()) <= {*WORDS}
    assert call("run", talking, "--prompt", "a b", "--gen-length", "8") == 0
    assert capsys.readouterr().err.count(" forwards, ") == 1


def test_a_stream_adds_up_to_the_result(
    artifact: str, talking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, asked in [(artifact, ["--prompt-ids", "5,3"]), (talking, ["--prompt", "a b c"])]:
        ask = ["run", path, *asked, "--gen-length", "24", "-q"]
        for more in ([], ["--no-early-stop"], ["--temperature", "1", "--seed", "3"]):
            assert call(*ask, *more) == 0
            whole = capsys.readouterr().out
            assert call(*ask, *more, "--stream") == 0
            assert capsys.readouterr().out == whole
    assert call("run", artifact, "--prompt-ids", "5,3", "--json", "--stream") == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert err.strip()


def test_a_stream_of_several(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt_ids": [1]}\n{"prompt_ids": [3]}\n')
    ask = ["run", artifact, "--prompts", str(file), "--gen-length", "8", "-q"]
    assert call(*ask, "--stream", "--no-early-stop") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line[:3] for line in lines) == ["[0]", "[0]", "[1]", "[1]"]


def test_the_length_may_be_left_out(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", artifact, "--prompt-ids", "1,3,4", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["all_tokens"]) == 28


def test_any_parameter_can_be_set(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for asked in (["--threshold", "0.2"], ["--set", "threshold=0.2"]):
        assert call("run", artifact, "--prompt-ids", "1", "--gen-length", "8", "-q", *asked) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--prompt", "text"], "no tokenizer"),
        (["--prompt-ids", str(MASK)], "mask id"),
        (["--prompt-ids", "99"], "outside the vocabulary"),
        (["--prompt-ids", "1", "--gen-length", "7"], "use 4 or 8"),
        (["--prompt-ids", "1", "--gen-length", "0"], "0 tokens"),
        (["--prompt-ids", "1", "--gen-length", "400"], "--max-length"),
        (["--prompt-ids", "1", "--threshold", "2"], "at most 1"),
        (["--prompt-ids", "1", "--temperature", "nan"], "temperature"),
        (["--prompt-ids", "1", "--steps", "4"], "it has: threshold"),
        (["--prompt-ids", "1", "--set", "seed=4"], "it has: threshold"),
        (["--prompt-ids", "1", "--seed", str(1 << 70)], "64 bits"),
        (["--prompts", "/no/such/file"], "/no/such/file"),
    ],
)
def test_a_named_error(
    asked: list[str], words: str, artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails(capsys, 1, "run", artifact, *asked)
    assert words in err and err.startswith("RequestError: ")


@pytest.mark.parametrize(
    "line", ["hello", "[]", "{}", '{"prompt": 3}', '{"prompt": "a", "prompt_ids": [1]}', "[" * 9999]
)
def test_a_bad_line_is_named(
    line: str, artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt_ids": [1]}\n' + line)
    assert f"{file}:2" in fails(capsys, 1, "run", artifact, "--prompts", str(file), "--json")


def test_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", str(tmp_path / "none.dcx"), "--prompt-ids", "1"]
    assert fails(capsys, 1, *asked).startswith("ArtifactError: there is no such artifact")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "a.dcx"],
        ["run", "a.dcx", "--prompt", "a", "--prompt-ids", "1"],
        ["run", "a.dcx", "--prompt", "a", "--queue", "b.jsonl"],
        ["run", "a.dcx", "--queue", "b.jsonl", "--stream"],
        ["run", "a.dcx", "--prompt-ids", "1,x"],
        ["run", "a.dcx", "--prompt-ids", "1", "--gen-length", "many"],
        ["run", "a.dcx", "--prompt-ids", "1", "--set", "threshold"],
        ["run", "a.dcx", "--prompt-ids", "1", "--threads", "0"],
        ["run", "a.dcx", "--colour"],
        ["verify", "a.dcx"],
        ["model", "--colour"],
        ["--colour"],
        ["model", "--batch", "x"],
        [],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


# compile


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def compile_checkpoint(path: Path, options: Options, out: Path, progress: Any) -> Path:
        progress("trace")
        calls.append((path, options, out))
        return out

    monkeypatch.setattr(driver, "compile_checkpoint", compile_checkpoint)
    return calls


def test_a_checkpoint_needs_no_subcommand(
    compiled: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("some/model.pt") == 0
    assert call("compile", "some/model.pt") == 0
    assert call("-o", "there.dcx", "some/folder/") == 0
    out, err = capsys.readouterr()
    assert out == "" and err == "wrote model.dcx\nwrote model.dcx\nwrote there.dcx\n"
    assert compiled[0] == compiled[1] == (Path("some/model.pt"), Options(), Path("model.dcx"))
    assert compiled[2] == (Path("some/folder"), Options(), Path("there.dcx"))


def test_a_folder_may_have_a_dot(compiled: list[Any], tmp_path: Path) -> None:
    (tmp_path / "LLaDA-1.5").mkdir()
    assert call(str(tmp_path / "LLaDA-1.5"), "-q") == 0
    assert compiled[0][2] == Path("LLaDA-1.5.dcx")


def test_every_option_arrives(compiled: list[Any]) -> None:
    flags = (
        "--target cpu --dtype bfloat16 --max-length 512 --batch 2 --block-length 32 "
        "--policy threshold --cache vicinity --look-back 3 --look-ahead 4 --warmup 5 "
        "--refresh-every 6 --no-cross-block --smoothing 0.3 --mask-id 7 --eos-id 8 --eos-id 9 --check "
        "--stop-after fuse_moe --skip a --skip b --threads 3"
    )
    assert call("model", *flags.split(), "--quiet") == 0
    wanted = Options(
        target="cpu",
        dtype="bfloat16",
        max_length=512,
        batch=2,
        block_length=32,
        policy="threshold",
        cache="vicinity",
        look_back=3,
        look_ahead=4,
        warmup=5,
        cross_block=False,
        refresh_every=6,
        smoothing=0.3,
        mask_id=7,
        eos_ids=(8, 9),
        check=True,
        stop_after="fuse_moe",
        skip=("a", "b"),
        threads=3,
    )
    assert compiled[0][1] == wanted


@pytest.mark.parametrize("error", [CheckpointError("x", remedy="y"), OutputError("full")])
def test_an_error_of_the_compiler(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(driver, "compile_checkpoint", fail)
    err = fails(capsys, 1, "model")
    assert err == f"{type(error).__name__}: {error}\n"


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import toy, torch
from dcompile import cli
from dcompile.driver import compile as driver
from dcompile.runtime.artifact import write_artifact
def tensors():
    yield "weight", torch.zeros(3)
    print("begun", flush=True)
    time.sleep(60)
def compile_checkpoint(path, options, out, progress):
    write_artifact(out, toy.manifest(toy.Toy()), toy.plan(toy.Toy()), tensors(), {{}})
driver.compile_checkpoint = compile_checkpoint
cli.main(["model", "-o", {out!r}])
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["out.dcx", "out"])
def test_an_interrupt_leaves_nothing(
    number: signal.Signals, status: int, name: str, tmp_path: Path
) -> None:
    text = SLOW.format(tests=SUPPORT, out=str(tmp_path / name))

    def hear_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores them

    with subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        assert len(os.listdir(tmp_path)) == 1
        process.send_signal(number)
        _, err = process.communicate()
    assert (process.returncode, "Traceback" in err) == (status, False)
    assert os.listdir(tmp_path) == []


# the process


def dcompile(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dcompile", *arguments]
    return subprocess.run(command, text=True, **{"capture_output": True, **settings})


def test_the_process(artifact: str, tmp_path: Path) -> None:
    done = dcompile("run", artifact, "--prompt-ids", "1", "--gen-length", "4", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["all_tokens"] == toy.decode(Toy(), [1], 4)[0]
    done = dcompile(str(tmp_path / "no-model"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == ""


def test_a_closed_pipe_is_quiet(artifact: str) -> None:
    read, write = os.pipe()
    os.close(read)
    for more in (["--json"], ["--stream"]):
        asked = ["run", artifact, "--prompt-ids", "1", "--gen-length", "4", "-q", *more]
        done = dcompile(*asked, capture_output=False, stdout=write, stderr=subprocess.PIPE)
        assert done.stderr == "" and done.returncode == 1
    os.close(write)


def test_running_loads_no_compiler(artifact: str) -> None:
    text = f"""
import sys
from dcompile.cli import main
try:
    main(["run", {artifact!r}, "--prompt-ids", "1", "--gen-length", "4", "-q"])
except SystemExit as done:
    assert not done.code
parts = {{name.split(".")[1] for name in sys.modules if name.startswith("dcompile.")}}
assert parts == {{"cli", "cubin", "driver", "errors", "options", "runtime", "untrusted"}}, parts
assert not {{"transformers", "torch._inductor", "torch._dynamo"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("run", "explain", "verify", "bench", "demo"))
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("dcompile ")
