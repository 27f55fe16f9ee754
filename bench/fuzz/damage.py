"""Damaged and hostile artifacts and checkpoints: each must be a named error, or proven equal.

A case is a base and operations on its files, as data. Artifacts keep their hashes, or are sealed again as
somebody would who knows how; native code is only damaged where hashes are kept, since an artifact is a program.
What still loads is proven: an artifact by its tokens and bytes, else by `verify` against its checkpoint; a
checkpoint by running the planned program beside the plain module, both with the damaged weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint, write_model_pt

from dcompile.driver.compile import compile_checkpoint
from dcompile.driver.origin import open_origin
from dcompile.errors import DcompileError, VerificationError
from dcompile.explain.command import explain, remarks
from dcompile.frontends.files import open_state_dict
from dcompile.options import Options
from dcompile.runtime.artifact import open_artifact
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.writing import seal
from dcompile.verify.command import (
    Compiled,
    compare_layers,
    compare_plan,
    compare_tensors,
    compile_again,
)
from dcompile.verify.stages import Stages, cases
from fuzz.children import Outcome, run_case

Case = dict[str, Any]
Op = list[Any]

HANG = 5.0
BASES = (
    "dcx",
    "folder",
    "sealed",
    "packed",
    "hf",
    "shards",
    "pt",
    "pt_members",
    "pt2",
    "pt2_members",
)
ARTIFACTS = ("dcx", "folder", "sealed", "packed")
PROMPTS = [[1, 2, 3, 4, 5], [9]]
OPTIONS = Options(max_length=48, block_length=8, cache="dual", mask_id=129)
HOSTILE = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        255,
        65536,
        1 << 24,
        1 << 31,
        (1 << 31) - 1,
        1 << 40,
        1 << 62,
    ),
    *(1 << 63, -(1 << 63), 10**30, 0.0, -0.5, 1e308, float("nan"), float("inf")),
    *("", "..", "../../etc/passwd", "/dev/zero", "\u0000", "a" * 5000, "nan", "__import__('os')"),
    *(
        [],
        {},
        [[]],
        [1, 2, 3],
        {"R": 1 << 40},
        {"": -1},
        {"b": 0},
        {"b": 99999},
        {"i": -1},
        {"x": {}},
    ),
]


class Damage:
    """Draws, applies and judges damage; what it damages is made once, under a temporary folder."""

    def __init__(self, folder: Path | None = None) -> None:
        shared = Path("/dev/shm")
        root = folder or Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
        self.root = root
        self._owned = folder is None
        self.base = root / "base"
        self._make()
        self.files = {base: sorted(_files(self.base / base)) for base in BASES}
        self.places = cache(self._places)
        self.again = compile_again(self.base / "hf", self.recorded)
        self.wanted = _tokens(self.base / "dcx" / "model.dcx")
        self._made: dict[str, Compiled] = {}
        for name in ("pt", "pt2"):
            self._made[name] = compile_again(self.base / name / f"model.{name}", self.recorded)
        self._made |= {"hf": self.again, "shards": self.again}

    def __del__(self) -> None:
        if self._owned:
            shutil.rmtree(self.root, ignore_errors=True)

    def _make(self) -> None:
        base = self.base
        for name in BASES:
            (base / name).mkdir(parents=True)
        sizes = {"num_hidden_layers": 1, "moe_layer_freq": [1], "num_experts": 4}
        write_checkpoint(base / "hf", "llada_moe", **sizes)
        write_checkpoint(base / "shards", "llada_moe", sharded=True, **sizes)
        compile_checkpoint(base / "hf", OPTIONS, base / "dcx" / "model.dcx")
        for name in ("folder", "sealed", "packed"):
            with zipfile.ZipFile(base / "dcx" / "model.dcx") as file:
                file.extractall(base / name / "model")
        self.recorded = open_artifact(base / "dcx" / "model.dcx").manifest["options"]
        write_model_pt(base / "pt" / "model.pt", "llada_moe", **sizes)
        length = torch.export.Dim("length", min=2, max=48)
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Embedding(131, 16),
            torch.nn.Linear(16, 16),
            torch.nn.SiLU(),
            torch.nn.Linear(16, 131),
        )
        ids = torch.ones(1, 9, dtype=torch.int64)
        exported = torch.export.export(module.eval(), (ids,), dynamic_shapes=({1: length},))
        torch.export.save(exported, base / "pt2" / "model.pt2")
        for name in ("pt", "pt2"):
            with zipfile.ZipFile(base / name / f"model.{name}") as file:
                file.extractall(base / f"{name}_members")

    def _places(self, base: str, name: str) -> list[list[Any]]:
        """Paths of all values in a JSON file."""
        out: list[list[Any]] = []
        _walk(json.loads((self.base / base / name).read_bytes()), [], out)
        return out

    # drawing

    def draw(self, seed: int) -> Case:
        rng = random.Random(seed)
        weights = {"sealed": 4, "hf": 2, "shards": 1.5, "pt2_members": 2, "dcx": 2}
        base = rng.choices(BASES, [weights.get(b, 1) for b in BASES])[0]
        count = rng.choice([1, 1, 1, 1, 2, 3])
        return {"base": base, "ops": [self._op(rng, base) for _ in range(count)]}

    def _op(self, rng: random.Random, base: str) -> Op:
        hashed = base in ("dcx", "folder")
        names = self.files[base]
        if not hashed:
            names = [n for n in names if not n.endswith(".so")]
        texts = [n for n in names if n.endswith(".json")]
        tensors = [n for n in names if n.endswith(".safetensors")]
        if texts and rng.random() < 0.55:
            # The small files are many; what is launched stands in one.
            heavy = {
                "plan.json": 8,
                "manifest.json": 6,
                "model.json": 8,
                "config.json": 5,
                "program.json": 2,
            }
            name = rng.choices(texts, [heavy.get(n.rpartition("/")[2], 1) for n in texts])[0]
            places = self.places(base, name)
            place = rng.choice(places)
            if rng.random() < 0.12:
                return ["drop_key", name, place]
            if rng.random() < 0.25:
                return ["move", name, rng.choice(places), place]
            return ["set", name, place, rng.randrange(len(HOSTILE))]
        if tensors and rng.random() < 0.3:
            name = rng.choice(tensors)
            return ["header", name, rng.random(), rng.randrange(len(HOSTILE) + 4)]
        name = rng.choice(names)
        size = (self.base / base / name).stat().st_size
        at = rng.randrange(max(1, size))
        # The ends are where formats keep what they are.
        at = rng.choice([at, at, min(size - 1, at % 512), max(0, size - 1 - at % 4096)])
        kind = rng.choices(
            ["flip", "cut", "add", "zero", "copy", "swap", "drop", "link", "fifo", "dir", "text"],
            [8, 3, 1, 2, 2, 2, 1, 1, 0.5, 0.5, 2],
        )[0]
        if kind == "flip":
            return ["flip", name, at, rng.randrange(8), rng.choice([1, 1, 4])]
        if kind in ("cut", "add"):
            return [kind, name, at if kind == "cut" else rng.choice([1, 22, 4096])]
        if kind == "zero":
            return ["zero", name, at, rng.choice([1, 8, 64, 4096])]
        if kind == "copy":
            return ["copy", name, rng.randrange(max(1, size)), at, rng.choice([4, 46, 512])]
        if kind == "swap":
            return ["swap", name, rng.choice(names)]
        if kind == "link":
            return [
                "link",
                name,
                rng.choice(["/etc/passwd", "/dev/zero", ".", name.rpartition("/")[2]]),
            ]
        if kind == "text":
            return [
                "text",
                name,
                at,
                rng.choice(['"', "{", "]", "9" * 40, "null", "-", "\\u0000", "[" * 5000]),
            ]
        return [kind, name]

    # applying

    def apply(self, case: Case, out: Path) -> Path:
        """Write the damaged files under `out`; the path that a user would name."""
        base = case["base"]
        for name in self.files[base]:
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(self.base / base / name, target)
        for op in case["ops"]:
            _apply(op, out)
        if base in ("sealed", "packed"):
            _seal(out / "model")
        if base in ("pt_members", "pt2_members"):
            return _pack(out, out.parent / f"model.{base.partition('_')[0]}")
        if base == "packed":
            return _pack(out / "model", out.parent / "model.dcx")
        if base in ("hf", "shards"):
            return out
        return out / {"dcx": "model.dcx", "pt": "model.pt", "pt2": "model.pt2"}.get(base, "model")

    def run(self, case: Case) -> Outcome:
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            out = Path(folder) / "damaged"
            out.mkdir()
            path = self.apply(case, out)
            size = sum(f.lstat().st_size for f in [*out.rglob("*"), path] if f.is_file())
            judge = self._artifact if case["base"] in ARTIFACTS else self._checkpoint
            return run_case(lambda: judge(case, path), HANG, size)

    # judging

    def _artifact(self, case: Case, path: Path) -> tuple[str, str]:
        try:
            tokens = _tokens(path)
            explain(path)
            remarks(path, "all", None)
            artifact = open_artifact(path)
            if tokens == self.wanted and _contents(path) == _contents(
                self.base / "dcx" / "model.dcx"
            ):
                return "equal", "bytes"
            again = self.again
            if artifact.manifest["options"] != self.recorded:
                again = compile_again(
                    self.base / "hf", artifact.manifest["options"], run_model=False
                )
                compare_tensors(artifact, again)
                compare_plan(artifact, again)
                return "equal", "verified with its own options"
            compare_tensors(artifact, again)
            compare_plan(artifact, again)
            compare_layers(Runner.load(path, threads=1), again)
            return "equal", "verified"
        except DcompileError as error:
            return "named", f"{type(error).__name__}: {error.what}"

    def _checkpoint(self, case: Case, path: Path) -> tuple[str, str]:
        kind = case["base"].partition("_")[0]
        try:
            origin = open_origin(path, OPTIONS)
            known = self._made[kind]
            if kind == "pt2" or not self._same_model(kind, path):
                compile_again(path, self.recorded)
                return "equal", "compiled again, each stage beside the module"
            stages = Stages(
                _module(path), origin.read, known.stages.parameters, cases(known.program.shape, 128)
            )
            stages.begin(known.program)
            return "equal", "the planned program beside the module"
        except DcompileError as error:
            if isinstance(error, VerificationError) and "own logits" not in str(error):
                return "failed", str(error)
            return "named", f"{type(error).__name__}: {error.what}"

    def _same_model(self, kind: str, path: Path) -> bool:
        """Whether only tensors differ, so that the base's planned program is the damaged one's too."""
        base = self.base / kind
        if kind == "pt":
            return _config(path) == _config(base / "model.pt")
        beside = [name for name in self.files[kind] if not name.endswith(".safetensors")]
        return all(
            (path / n).is_file() and (path / n).read_bytes() == (base / n).read_bytes()
            for n in beside
        )

    def simpler(self, case: Case) -> list[Case]:
        ops = case["ops"]
        return [{**case, "ops": ops[:i] + ops[i + 1 :]} for i in range(len(ops)) if len(ops) > 1]

    def group(self, case: Case) -> str:
        return str(case["base"])


def _config(path: Path) -> object:
    return open_state_dict(path)[0]


def _module(path: Path) -> torch.nn.Module:
    from dcompile.frontends.checkpoint import open_checkpoint

    return open_checkpoint(path, mask_id=OPTIONS.mask_id).reference()


def _files(folder: Path) -> list[str]:
    return [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]


def _walk(value: Any, path: list[Any], out: list[list[Any]]) -> None:
    if path:
        out.append(path)
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        _walk(item, [*path, key], out)


def _tokens(path: Path) -> list[Any]:
    runner = Runner.load(path, threads=1)
    results = runner.generate(PROMPTS, gen_length=16)
    text = runner.encode("ab c") if runner.tokenizer.present else None
    return [[r.all_tokens, r.text] for r in results] + [text]


def _contents(path: Path) -> dict[str, str]:
    artifact = open_artifact(path)
    out = {name: hashlib.sha256(artifact.bytes(name)).hexdigest() for name in artifact.names}
    rest = {k: v for k, v in artifact.manifest.items() if k not in ("files", "sha256")}
    return out | {"manifest.json": json.dumps(rest, sort_keys=True)}


def _replace(path: Path, data: bytes) -> None:
    """Write anew: the file is a link to the base's."""
    path.unlink()
    path.write_bytes(data)


def _apply(op: Op, folder: Path) -> None:
    kind, path = op[0], folder / op[1]
    if not path.is_file() or path.is_symlink():
        return
    if kind in ("drop", "link", "fifo", "dir"):
        path.unlink()
        if kind == "link":
            path.symlink_to(op[2])
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "dir":
            path.mkdir()
        return
    data = bytearray(path.read_bytes())
    _CHANGES[kind](data, op[2:], folder, path)
    if path.exists():
        _replace(path, bytes(data))


def _flip(data: bytearray, args: Op, folder: Path, path: Path) -> None:
    at, bit, times = args
    for i in range(times):
        if data:
            data[(at + 37 * i) % len(data)] ^= 1 << bit


def _swap(data: bytearray, args: Op, folder: Path, path: Path) -> None:
    other = folder / args[0]
    if other.is_file() and other != path and not other.is_symlink():
        mine, data[:] = bytes(data), other.read_bytes()
        _replace(other, mine)


def _header(data: bytearray, args: Op, folder: Path, path: Path) -> None:
    """Change a value of a safetensors header, or its length."""
    length = int.from_bytes(data[:8], "little")
    share, which = args
    if which >= len(HOSTILE):
        claim = [0, length + 1, 1 << 40, (1 << 64) - 1][which - len(HOSTILE)]
        data[:8] = claim.to_bytes(8, "little")
        return
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return
    places: list[list[Any]] = []
    _walk(header, [], places)
    place = places[int(share * len(places))]
    _at(header, place[:-1])[place[-1]] = HOSTILE[which]
    text = json.dumps(header).encode()
    data[: 8 + length] = len(text).to_bytes(8, "little") + text


def _edit(change: Callable[[Any, Op], None]) -> Callable[[bytearray, Op, Path, Path], None]:
    def apply(data: bytearray, args: Op, folder: Path, path: Path) -> None:
        try:
            value = json.loads(data)
            change(value, args)
            data[:] = json.dumps(value).encode()
        except (ValueError, KeyError, IndexError, TypeError):
            pass  # an operation before this one took the place away

    return apply


def _at(value: Any, path: list[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def _set(value: Any, args: Op) -> None:
    place, which = args
    _at(value, place[:-1])[place[-1]] = HOSTILE[which]


def _move(value: Any, args: Op) -> None:
    source, place = args
    _at(value, place[:-1])[place[-1]] = _at(value, source)


def _drop_key(value: Any, args: Op) -> None:
    (place,) = args
    del _at(value, place[:-1])[place[-1]]


def _cut(data: bytearray, args: Op, folder: Path, path: Path) -> None:
    del data[args[0] :]


def _zero(data: bytearray, args: Op, folder: Path, path: Path) -> None:
    at, count = args
    data[at : at + count] = bytes(len(data[at : at + count]))


def _copy(data: bytearray, args: Op, folder: Path, path: Path) -> None:
    source, at, count = args
    part = data[source : source + count]
    data[at : at + len(part)] = part


def _text(data: bytearray, args: Op, folder: Path, path: Path) -> None:
    at, text = args
    data[at : at + len(text)] = text.encode()


def _add(data: bytearray, args: Op, folder: Path, path: Path) -> None:
    data += bytes(args[0])


_CHANGES = {
    "flip": _flip,
    "swap": _swap,
    "header": _header,
    "set": _edit(_set),
    "move": _edit(_move),
    "drop_key": _edit(_drop_key),
    "cut": _cut,
    "zero": _zero,
    "copy": _copy,
    "text": _text,
    "add": _add,
}


def _seal(folder: Path) -> None:
    """Give the manifest the hashes of what is there, and its own, as far as it can still be read."""
    path = folder / "manifest.json"
    if not path.is_file():
        return  # opening a pipe would wait for ever
    try:
        body = json.loads(path.read_bytes())
        for name, claim in body["files"].items():
            file = folder / name
            if isinstance(claim, dict) and file.is_file() and not file.is_symlink():
                data = file.read_bytes()
                claim.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        body["sha256"] = seal(body)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return
    if path.is_file() and not path.is_symlink():
        _replace(path, json.dumps(body).encode())


def _pack(folder: Path, out: Path) -> Path:
    with zipfile.ZipFile(out, "w") as file:
        for name in sorted(_files(folder)):
            if (folder / name).is_file() and not (folder / name).is_symlink():
                file.writestr(name, (folder / name).read_bytes())
    return out
