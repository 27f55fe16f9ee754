"""A model small enough to write its plan by hand, and to decode with a slow loop beside it."""

from __future__ import annotations

import platform
import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcompile.runtime.artifact import write_artifact
from dcompile.runtime.decode.loop import Runner

VOCAB, MASK, EOS = 23, 7, 2
M64 = (1 << 64) - 1


def build(folder: Path) -> bytes:
    source, out = Path(__file__).with_name("toy.cpp"), folder / "toy.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", str(source), "-o", str(out)], check=True)
    return out.read_bytes()


@dataclass(frozen=True)
class Toy:
    """What the artifact is compiled for."""

    batch: int = 1
    length: int = 32
    block: int = 4
    span: int | None = None
    shift: bool = False
    cache: str = "none"
    look_back: int = 0
    look_ahead: int = 0
    warmup: int = 0
    refresh_every: int = 1
    cross_block: bool = True
    blocks: int = 1
    """More than one are pipelined, each of which commits a token an iteration."""

    @property
    def stores(self) -> bool:
        return self.cache == "block" and not self.cross_block

    @property
    def group(self) -> int:
        """Positions that are computed together: a block, or the mask's block around it."""
        return max(self.block, self.span or 1)

    def begin(self, prompt: int) -> int:
        return prompt if self.span is None else prompt // self.block * self.block

    def total(self, prompt: int, gen: int) -> int:
        if self.span is None:
            return prompt + gen
        unit = max(self.block, self.span)
        return (prompt + gen + unit - 1) // unit * unit


def plan(toy: Toy) -> dict[str, Any]:
    buffers: list[dict[str, Any]] = []
    index: dict[str, int] = {}

    def add(name: str, dtype: str, shape: list[Any], kind: str, **place: Any) -> None:
        index[name] = len(buffers)
        buffers.append(
            {"name": name, "dtype": dtype, "shape": shape, "place": {"kind": kind, **place}}
        )

    R, B, n = {"R": 1}, {"B": 1}, toy.block
    states = {"canvas": "canvas", "keys_0": "kv", "keys_1": "kv"}
    for name, holds in states.items():
        add(name, "i64", [toy.batch, toy.length], "state", holds=holds)
    for name in ("row_seq", "row_pos", "row_limit"):
        add(name, "i64", [R], "input")
    for name in ("block_pos", "choice_row"):
        add(name, "i64", [B, n], "input")
    for name in ("block_seq", "seed", "tick"):
        add(name, "i64", [B], "input")
    for name in ("threshold", "temperature"):
        add(name, "f32", [B], "input")
    add("h0", "i64", [R], "slot", slot=0)
    add("h1", "i64", [R], "slot", slot=1)
    add("h2", "i64", [R], "slot", slot=0)
    add("token", "i64", [B, n], "slot", slot=2)
    add("confidence", "f32", [B, n], "slot", slot=3)
    add("commit", "bool", [B, n], "slot", slot=4)
    add("open", "bool", [B, n], "slot", slot=5)
    add("some", "bool", [B], "slot", slot=6)
    add("done", "bool", [B], "slot", slot=7)
    add("weight", "f32", [3], "weight", tensor="weight")

    def buffer(name: str) -> dict[str, int]:
        return {"b": index[name]}

    def native(kernel: str, writes: list[str], names: str, *sizes: Any) -> dict[str, Any]:
        args: list[Any] = [*map(buffer, names.split()), *({"i": size} for size in sizes)]
        return {
            "name": kernel,
            "kernel": kernel,
            "where": "native",
            "args": args,
            "writes": [index[w] for w in writes],
        }

    def aten(kernel: str, writes: str, *args: Any) -> dict[str, Any]:
        return {
            "name": writes,
            "kernel": kernel,
            "where": "aten",
            "args": list(args),
            "writes": [index[writes]],
        }

    launches = [
        native("toy_embed", ["h0"], "h0 canvas row_seq row_pos", R, toy.length),
        *(
            native(
                "toy_layer",
                [f"h{k + 1}", f"keys_{k}"],
                f"h{k + 1} h{k} keys_{k} row_seq row_pos row_limit",
                R,
                toy.length,
            )
            for k in range(2)
        ),
        native(
            "toy_choose",
            ["token", "confidence", "commit", "open", "canvas"],
            "token confidence commit open canvas h2 block_seq block_pos choice_row "
            "threshold temperature seed tick",
            B,
            n,
            toy.length,
            VOCAB,
            MASK,
        ),
        aten("aten.any.dim", "some", buffer("open"), 1),
        aten("aten.logical_not.default", "done", buffer("some")),
    ]
    inputs = [b["name"] for b in buffers if b["place"]["kind"] == "input"]
    return {
        "symbols": ["R", "B"],
        "sizes": {
            **{"N": toy.batch, "L": toy.length, "n": n},
            **({"blocks": toy.blocks} if toy.blocks > 1 else {}),
        },
        "buffers": buffers,
        "slots": 8,
        "launches": launches,
        "regions": [
            {"kind": "native", "start": 0, "end": 4},
            {"kind": "aten", "start": 4, "end": 6},
        ],
        "inputs": {name: index[name] for name in inputs},
        "state": {name: index[name] for name in states},
        "outputs": {name: index[name] for name in ("done", "commit", "token", "confidence")},
    }


def manifest(toy: Toy) -> dict[str, Any]:
    pipeline = {"tau_add": 0.3, "tau_activate": 0.9} if toy.blocks > 1 else {}
    return {
        "dcompile": "0",
        "target": "cpu",
        "machine": platform.machine(),
        "model": {
            "family": "toy",
            "vocab_size": VOCAB,
            "mask_id": MASK,
            "eos_ids": [EOS],
            "shift": toy.shift,
            "block_length": toy.span,
            "dtype": "float32",
            "max_positions": None,
        },
        "options": {
            "cache": toy.cache,
            "manager": "pipelined" if toy.blocks > 1 else "blockwise",
            "look_back": toy.look_back,
            "look_ahead": toy.look_ahead,
            "warmup": toy.warmup,
            "refresh_every": toy.refresh_every,
            "cross_block": toy.cross_block,
        },
        "policy": {"name": "threshold", "parameters": {"threshold": 0.9, **pipeline}, "state": []},
        "kernels": {"isas": {"any": {"requires": [], "files": ["kernels/any.so"]}}},
    }


def write(path: Path, toy: Toy, code: bytes, **files: bytes) -> Path:
    weights = [("weight", np.array([1, 2, 3], np.float32)), ("odd", np.arange(5, dtype=np.uint8))]
    written = {"kernels/any.so": code, "report.txt": b"a report\n", **files}
    write_artifact(path, manifest(toy), plan(toy), weights, written)
    return path


def load(path: Path, toy: Toy, code: bytes) -> Runner:
    return Runner.load(write(path / "toy.dcx", toy, code))


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def rows_of(
    toy: Toy,
    b: int,
    total: int,
    iteration: int,
    tick: int,
    first: bool,
    x: Sequence[int],
    before: Sequence[int],
) -> list[int]:
    """Which rows run, from the table of the specification; a list, to be written another way."""
    e, n = b + toy.block, toy.block
    everything = list(range(total))
    if toy.span is not None:
        group = [p for p in everything if p // toy.span <= (e - 1) // toy.span]
        if toy.cache == "none":
            chosen = group
        else:
            start = b // toy.span
            if iteration == 0 and first:
                start = 0
            elif iteration == 0 and toy.cross_block:
                start = (b - n) // toy.span
            chosen = [p for p in group if p // toy.span >= start]
    elif (
        toy.cache == "none"
        or iteration == 0
        or (toy.cache == "vicinity" and tick < toy.warmup)
        or (toy.cache == "periodic" and iteration % toy.refresh_every == 0)
    ):
        chosen = everything
    elif toy.cache == "prefix":
        chosen = [p for p in everything if p >= b]
    elif toy.cache == "vicinity":
        chosen = [p for p in everything if b - toy.look_back <= p < e + toy.look_ahead]
    elif toy.cache == "active":
        deciding = {p for p in range(b, e) if x[p] == MASK}
        changed = {p for p in range(b, e) if x[p] != before[p]}
        return sorted(deciding | changed | {max(p - toy.shift, 0) for p in deciding})
    else:
        chosen = [p for p in everything if b <= p < e]
    return sorted({*chosen, max(b - 1, 0)}) if toy.shift else chosen


def decode(
    toy: Toy,
    prompt: Sequence[int],
    gen: int,
    threshold: float = 0.9,
    *,
    early_stop: bool = True,
    seed: int | None = None,
    rows: Callable[..., list[int]] = rows_of,
) -> tuple[list[int], int]:
    """Generated ids and the number of iterations, one sequence at a time, nothing vectorised."""
    P, total = len(prompt), toy.total(len(prompt), gen)
    x = [*prompt, *[MASK] * (total - P)]
    keys = [[0] * total, [0] * total]
    b, tick, first = toy.begin(P), 0, True
    while b < P + gen:
        iteration, before = 0, list(x)
        while MASK in x[b : b + toy.block]:
            h = _forward(toy, x, keys, rows(toy, b, total, iteration, tick, first, x, before))
            before = list(x)
            _commit(toy, x, h, b, threshold, seed, tick)
            iteration, tick = iteration + 1, tick + 1
        done = x[P : min(b + toy.block, P + gen)]
        if early_stop and EOS in done:
            at = done.index(EOS)
            return [*done[:at], *[EOS] * (gen - at)], tick
        b, first = b + toy.block, False
        if toy.stores and b % (toy.span or 1) == 0 and b < P + gen:
            _forward(toy, x, keys, [p for p in range(total) if b - toy.group <= p < b])
            tick += 1
    return x[P : P + gen], tick


def _forward(toy: Toy, x: list[int], keys: list[list[int]], rows: list[int]) -> dict[int, int]:
    h = {p: mix(x[p] * 1000003 + p) for p in rows}
    for layer in keys:
        for p in rows:
            layer[p] = mix((h[p] + 1) & M64)
        for p in rows:
            limit = len(x) if toy.span is None else min((p // toy.span + 1) * toy.span, len(x))
            h[p] = mix((h[p] + sum(layer[j] * (j + 1) for j in range(limit))) & M64)
    return h


def _commit(
    toy: Toy, x: list[int], h: dict[int, int], b: int, threshold: float, seed: int | None, tick: int
) -> None:
    chosen = {}
    for p in range(b, b + toy.block):
        if x[p] != MASK:
            continue
        v = (h[max(p - 1, 0) if toy.shift else p] + 17 * p) & M64
        if seed is not None:
            v ^= mix((seed * 31 + tick * 7919 + p) & M64)
        v = mix(v)
        token = (v >> 8) % (VOCAB - 1)
        chosen[p] = (((v >> 40) % 4096) / 4096, token + (token >= MASK))
    best = max(confidence for confidence, _ in chosen.values())
    bar = float(np.float32(threshold))
    for p, (confidence, token) in chosen.items():
        if confidence >= bar or confidence == best:
            x[p] = token


CACHES = [
    Toy(),
    Toy(cache="prefix"),
    Toy(cache="dual"),
    Toy(cache="vicinity", look_back=3, look_ahead=2, warmup=5),
    Toy(cache="vicinity", look_back=40, look_ahead=40),
    Toy(cache="periodic", refresh_every=2),
    Toy(cache="active"),
    Toy(cache="active", block=16, length=64),
    Toy(span=4),
    Toy(span=4, cache="block"),
    Toy(span=8, cache="block", block=4),
    Toy(span=2, cache="block", block=4),
    Toy(span=4, cache="block", cross_block=False),
    Toy(span=8, cache="block", block=4, cross_block=False),
    Toy(span=2, cache="block", block=4, cross_block=False),
]


def prompts_of(seed: int, lengths: list[int]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.choice([*range(7), *range(8, VOCAB)]) for _ in range(n)] for n in lengths]
