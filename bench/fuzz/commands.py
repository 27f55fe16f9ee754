"""Random command lines from a grammar of valid and invalid values: never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, get_type_hints

import typer
from checkpoints import write_checkpoint, write_model_pt

from dcompile.cli import app, main
from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from fuzz.children import Outcome, run_case

Case = dict[str, Any]

NUMBERS = [
    "0",
    "1",
    "2",
    "8",
    "-1",
    "3.5",
    "nan",
    "1e400",
    "9999999999999999999999",
    "",
    "x",
    "0x10",
]
TEXTS = [
    "",
    "a b",
    "\u00e9\u4e2d",
    "\udcff",
    "-",
    "--",
    "a=b",
    "threshold=0.5",
    "threshold=",
    "=1",
    "x" * 3000,
    "\n",
    "%s{}",
]
WORDS = [
    "threshold",
    "steps",
    "factor",
    "dynamic",
    "missing.py:x",
    "cpu",
    "cuda",
    "auto",
    "float32",
    "bfloat16",
    "none",
    "dual",
    "block",
    "active",
    "fuse_moe",
    "reuse_kv",
    "missed",
    "passed",
    "all",
    "onnx",
    "pt2",
    "folder",
    "dcx",
    "eager",
    "compile",
    "likelihood",
    "edit",
    "remask",
    "credit",
    "low_confidence",
    "random",
]
PATHS = [
    "{dcx}",
    "{dcx}",
    "{dcx}",
    "{folder}",
    "{hf}",
    "{hf}",
    "{pt}",
    "{broken}",
    "{empty}",
    "{text}",
    "{prompts}",
    "{bad_prompts}",
    "{policy}",
    "{out}",
    "{out}.dcx",
    "{out}/no/such",
    "/dev/null",
    "/",
    ".",
    "..",
    "{dcx}/x",
    "",
    "{hf}/config.json",
    "{binary}",
]
PROMPTS = ["1,2,3", "1", "", "1,,2", "a,b", "-5", "99999", "1," * 500, "1.5"]


class Commands:
    """Calls the command line's own `main` in a child; files that it may name are made once."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        root = self.root
        write_checkpoint(root / "hf", "llada_moe", num_hidden_layers=1, moe_layer_freq=[1])
        write_model_pt(root / "model.pt", "sdar")
        options = Options(max_length=48, block_length=8, cache="dual", policy="threshold")
        compile_checkpoint(root / "hf", options, root / "model.dcx")
        with zipfile.ZipFile(root / "model.dcx") as file:
            file.extractall(root / "folder")
        whole = (root / "model.dcx").read_bytes()
        (root / "broken.dcx").write_bytes(whole[: len(whole) // 2])
        (root / "empty").mkdir()
        (root / "text.txt").write_text("hello\n")
        (root / "binary").write_bytes(bytes(range(256)) * 9)
        (root / "prompts.jsonl").write_text('{"prompt": "a b"}\n\n{"prompt_ids": [1, 2]}\n')
        (root / "bad.jsonl").write_text('{"prompt": 3}\n[\n{"prompt_ids": [1e400, null, {}]}\n')
        (root / "policy.py").write_text("raise ValueError('no policy')\n")
        self.names = {
            "dcx": "model.dcx",
            "folder": "folder",
            "hf": "hf",
            "pt": "model.pt",
            "broken": "broken.dcx",
            "empty": "empty",
            "text": "text.txt",
            "prompts": "prompts.jsonl",
            "bad_prompts": "bad.jsonl",
            "policy": "policy.py",
            "binary": "binary",
        }
        self.commands = _commands()

    def __del__(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def draw(self, seed: int) -> Case:
        rng = random.Random(seed)
        # `demo` takes nothing and is long; `calibrate` and `bench` are what they are for.
        name = rng.choice([n for n in self.commands if n != "demo"])
        arguments, options = self.commands[name]
        line = [name] if rng.random() < 0.95 else []
        for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4])):
            flags, kind = rng.choice(options)
            line.append(rng.choice(flags))
            if kind != "flag" and rng.random() < 0.97:
                line.append(_value(rng, flags[0], kind))
        paths = [_value(rng, "", kind) for kind in arguments if rng.random() < 0.95]
        at = rng.randint(min(1, len(line)), len(line)) if rng.random() < 0.1 else min(1, len(line))
        line[at:at] = paths
        if rng.random() < 0.05:
            line.append(rng.choice(["--what", "-z", "--", *TEXTS]))
        return {"line": line}

    def run(self, case: Case) -> Outcome:
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            return run_case(lambda: self._call(case, Path(folder)), 60, 256 << 20, asleep=600)

    def _call(self, case: Case, folder: Path) -> tuple[str, str]:
        os.chdir(folder)
        places = {name: str(self.root / file) for name, file in self.names.items()}
        places["out"] = str(folder / "out")
        line = [_fill(part, places) for part in case["line"]]
        out = io.StringIO()
        sys.stdin = io.StringIO("a b\n/clear\n\nc\n")  # what `chat` reads; this is a child
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                main(line)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            said = out.getvalue()
            if "Traceback" in said:
                return "traceback", said[-1500:]
            kinds = {0: "done", 1: "named", 2: "usage"}
            if code == 1 and not said.strip():
                return "other", "it failed and said nothing"
            return kinds.get(code, "other"), said.strip().partition("\n")[0][:200]
        return "done", ""

    def simpler(self, case: Case) -> list[Case]:
        line = case["line"]
        one = [line[:i] + line[i + 1 :] for i in range(len(line))]
        two = [line[:i] + line[i + 2 :] for i in range(len(line) - 1)]
        return [{"line": less} for less in (*two, *one)]

    def group(self, case: Case) -> str:
        line = case["line"]
        return line[0] if line and line[0] in self.commands else "compile"


def _fill(part: str, places: dict[str, str]) -> str:
    for name, path in places.items():
        part = part.replace("{" + name + "}", path)
    return part


def _commands() -> dict[str, tuple[list[str], list[tuple[list[str], str]]]]:
    """Each command's arguments by kind, and options with their kinds, as its function declares them."""
    out = {}
    for command in app.registered_commands:
        arguments: list[str] = []
        options: list[tuple[list[str], str]] = [(["--help"], "flag")]
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if name == "return":
                continue
            kind = str(hint.__origin__)
            kind = next((k for k in ("bool", "int", "float", "Path") if k in kind), "word")
            (declared,) = hint.__metadata__
            if isinstance(declared, typer.models.ArgumentInfo):
                arguments.append(kind)
            else:
                # In an annotation the first flag stands where the default otherwise does.
                first = [declared.default] if isinstance(declared.default, str) else []
                said = [*first, *(declared.param_decls or ())]
                flags = [flag for part in said for flag in part.split("/")]
                own = [f"--{name.replace('_', '-')}"]
                options.append((flags or own, "flag" if kind == "bool" else kind))
        out[command.name or command.callback.__name__] = (arguments, options)
    return out


def _value(rng: random.Random, flag: str, kind: str) -> str:
    if rng.random() < 0.08:
        return rng.choice([*NUMBERS, *TEXTS, *WORDS, *PATHS, *PROMPTS])
    if kind == "Path" or flag in (
        "--prompts",
        "--queue",
        "--checkpoint",
        "--compare",
        "--out",
        "-o",
    ):
        if flag in ("--out", "-o", "--trace", "--html", "--graph") and rng.random() < 0.8:
            return rng.choice(["{out}", "{out}.dcx", "{out}.svg", "{out}.json"])
        return rng.choice(PATHS)
    if kind in ("int", "float"):
        small = ["1", "2", "4", "8", "16"]
        return rng.choice(small) if rng.random() < 0.6 else rng.choice(NUMBERS)
    if flag == "--prompt-ids":
        return rng.choice(PROMPTS)
    if flag in ("--prompt", "--set"):
        return rng.choice(TEXTS)
    return rng.choice(WORDS)
