"""The command line as a process: signals, pipes, exit codes, what it loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
from toy import Toy

SUPPORT = str(Path(toy.__file__).parent)


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import numpy as np, toy
from dcompile import cli
from dcompile.driver import compile as driver
from dcompile.runtime.artifact import write_artifact
def tensors():
    yield "weight", np.zeros(3, np.float32)
    print("begun", flush=True)
    time.sleep(60)
def compile_checkpoint(path, options, out, progress):
    write_artifact(out, toy.manifest(toy.Toy()), toy.plan(toy.Toy()), tensors(), {{}})
driver.compile_checkpoint = compile_checkpoint
cli.main(["a/model", "-o", {out!r}])
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


@pytest.mark.parametrize("more", [[], ["--stream"], ["--json"]])
def test_a_closed_stream_loses_no_result(artifact: str, more: list[str]) -> None:
    asked = ["run", artifact, "--prompt-ids", "1", "--gen-length", "4", *more]
    wanted = dcompile(*asked)
    assert wanted.returncode == 0
    command = [sys.executable, "-m", "dcompile", *asked]
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], capture_output=True, text=True)
    assert done.returncode == 0
    if not more:  # others have times in them, or come as they are decided
        assert done.stdout == wanted.stdout
    assert done.stdout
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("OSError: the standard output")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("more", ["--stream", "--json"])
def test_a_full_disk_is_named(artifact: str, more: str) -> None:
    with open("/dev/full", "w") as full:
        done = dcompile(
            *("run", artifact, "--prompt-ids", "1", "--gen-length", "4", "-q", more),
            **{"capture_output": False, "stdout": full, "stderr": subprocess.PIPE},
        )
    assert (done.returncode, done.stderr) == (1, "OSError: No space left on device\n")


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
