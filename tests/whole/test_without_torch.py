"""What runs artifacts runs where torch is not installed, with the same tokens; the rest says what it lacks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fake_cuda
import gpu_toy
import pytest
import toy
from checkpoints import write_checkpoint
from quick import compile_quickly
from toy import Toy, prompts_of

import dcompile
from dcompile.demo import MODEL
from dcompile.options import Options

ROOT = Path(__file__).parents[2]
PROMPT = "spell backward: window ="
BARRED = """
import sys

class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Barred())
"""
MEASURED = """
import resource, subprocess, sys

subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(f"{used.ru_utime + used.ru_stime:.2f} {used.ru_maxrss * 1024 / 1e6:.0f}", file=sys.stderr)
"""
"""What a command costs, told by a process that is small itself: a child begins with its parent's memory."""
COMMAND = BARRED + "from dcompile.cli import main\nmain(sys.argv[1:])\n"
ON_THE_FAKE_GPU = f"""{BARRED}
import json
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import fake_cuda, gpu_toy
from toy import Toy, prompts_of

fake = fake_cuda.load(Path(sys.argv[2]), Path(sys.argv[3]).parent)
fake.kernels = gpu_toy.Kernels(Toy(batch=2), Path(sys.argv[4]))
runner = gpu_toy.runner(Path(sys.argv[3]), fake)
results = runner.generate(prompts_of(5, [3, 9, 0, 4]), gen_length=12, threshold=0.7)
print(json.dumps([result.all_tokens for result in results]))
"""


def barred(*arguments: object, code: str = COMMAND) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def printed(*arguments: object) -> str:
    """What a command prints in a process that cannot import torch."""
    done = barred(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = Options(max_length=128, block_length=16)
    return compile_quickly(MODEL, options, tmp_path_factory.mktemp("shipped") / "model.dcx")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    folder = write_checkpoint(root / "checkpoint", "llada_moe")
    options = Options(max_length=32, block_length=8, cache="dual", dtype=request.param)
    return compile_quickly(folder, options, root / "model.dcx")


def test_the_shipped_model_answers(shipped: Path) -> None:
    wanted = dcompile.load(shipped).generate([PROMPT], gen_length=32)[0]
    asked = ("run", shipped, "--prompt", PROMPT, "--gen-length", 32)
    assert printed(*asked) == f"{wanted.text}\n" == "wodniw\n"
    told = json.loads(printed(*asked, "--json"))
    assert told["all_tokens"] == wanted.all_tokens


def test_a_queue_gives_the_same_tokens(small: Path, tmp_path: Path) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    wanted = [r.all_tokens for r in dcompile.load(small).generate(prompts, gen_length=16)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts))
    lines = printed("run", small, "--queue", file, "--gen-length", 16).splitlines()
    found = {item["index"]: item["all_tokens"] for item in map(json.loads, lines)}
    assert [found[index] for index in range(3)] == wanted


def test_explain_needs_no_torch(small: Path) -> None:
    assert "stages    traced, canonicalize" in printed("explain", small)
    assert "+moe_ffn" in printed("explain", small, "fuse_moe")
    assert "fuse_moe" in printed("explain", small, "--remarks", "all")


def test_profile_needs_no_torch(shipped: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    asked = ("--gen-length", 16, "--rounds", 1, "--threads", 1)
    found = json.loads(printed("profile", shipped, *asked, "--json", "--trace", trace))
    assert found["launches"] and found["machine"]["bandwidth"] > 0
    assert json.loads(trace.read_text())["traceEvents"]


def test_cuda_runs_without_torch(tmp_path: Path) -> None:
    """The same tokens as on the processor; the driver is a fake one."""
    case = Toy(batch=2)
    library = tmp_path / "toy.so"
    code = toy.build(tmp_path)
    artifact = gpu_toy.write(tmp_path / "gpu.dcx", case)
    runner = toy.load(tmp_path, case, code)
    wanted = runner.generate(prompts_of(5, [3, 9, 0, 4]), gen_length=12, threshold=0.7)
    (tmp_path / "built").mkdir()
    built = fake_cuda.build(tmp_path / "built")
    support = ROOT / "tests" / "support"
    done = barred(support, built, artifact, library, code=ON_THE_FAKE_GPU)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [result.all_tokens for result in wanted]


def test_an_operator_of_torch_is_named_when_the_plan_is_loaded(tmp_path: Path) -> None:
    path = toy.write(tmp_path / "toy.dcx", Toy(), toy.build(tmp_path))
    done = barred("run", path, "--prompt-ids", "1", "--gen-length", 4)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "MissingPackage: launch some (aten.any.dim) needs torch, which is not installed\n"
        "  try    pip install 'dcompile[compile]'\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (MODEL, "-o", "{out}"),
        ("export", "{model}", "-o", "{out}", "--format", "pt2"),
        ("verify", "{model}", MODEL),
        ("bench", "{model}"),
        ("explain", "{model}", "--times", MODEL),
        ("demo",),
    ],
    ids=lambda arguments: "compile" if arguments[0] is MODEL else arguments[0],
)
def test_what_needs_torch_says_so(
    arguments: Sequence[object], shipped: Path, tmp_path: Path
) -> None:
    places = {"model": shipped, "out": tmp_path / "out"}
    done = barred(*(str(each).format(**places) for each in arguments))
    command = "compile" if arguments[0] is MODEL else arguments[0]
    assert done.returncode == 1
    assert done.stderr == (
        f"MissingPackage: dcompile {command} needs torch, which is not installed\n"
        "  try    pip install 'dcompile[compile]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_public_names_load_no_torch() -> None:
    code = "import sys, dcompile; dcompile.load, dcompile.Runner, dcompile.Options"
    for text in (code, "import sys, dcompile.runtime", "import sys, dcompile.cli"):
        done = barred(code=f"{text}\nprint('torch' in sys.modules)")
        assert done.stdout == "False\n"


@pytest.mark.slow
def test_an_environment_that_only_runs(shipped: Path, tmp_path: Path) -> None:
    """The base install, from nothing: it has no torch, runs the shipped model, and tells its size."""
    source, place = tmp_path / "source", tmp_path / "environment"
    for folder in ("dcompile", "passes", "codegen", "runtime"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python, constraints = place / "bin" / "python", ROOT / "constraints.txt"
    install = [python, "-m", "pip", "install", "-q", "-c", constraints, source]
    subprocess.run(install, check=True, capture_output=True)
    missing = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in missing.stderr
    command = place / "bin" / "dcompile"
    asked = [command, "run", shipped, "--prompt", PROMPT, "--gen-length", "32", "--threads", "1"]
    for _ in range(2):  # the first one writes what Python keeps of each module
        done = subprocess.run([python, "-c", MEASURED, *asked], capture_output=True, text=True)
    assert done.stdout == "wodniw\n", done.stderr
    seconds, peak = done.stderr.splitlines()[-1].split()
    for arguments in (["explain"], ["profile", "--rounds", "1", "--threads", "1"]):
        (name, *options) = arguments
        again = subprocess.run([command, name, shipped, *options], capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    files = [file for file in place.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_blocks * 512 for file in files)
    print(f"{size / 1e6:.0f} MB on disk; start to text: {seconds} s of CPU time, {peak} MB at most")
    assert size < 300e6 and float(peak) < 90
