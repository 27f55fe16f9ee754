"""How long do a model's kernels take to compile without a GPU, and what do they need of the chip?

    python bench/gpu/kernel_resources.py --model llada_moe --target cuda:sm_90 --json FILE

Plans the step as `dcompile CHECKPOINT --target ...` does, over a checkpoint of the real widths that has
shapes and no values (a file of holes; two or three layers have all the kernels of many), and compiles
the whole set into an empty folder on every core, so that nothing kept is used.  Then registers,
spills and shared memory of each kernel; exits with 1 where the gate refuses one.

    python bench/gpu/kernel_resources.py --every FILE --date 2026-11-25 --machine "2 cores, no GPU"

Holds every model here to the gate on every architecture, one plan each, and writes FILE after each; what
FILE has already is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from checkpoints import SHAPES, make_config, write_tokenizer

from dcompile.codegen.cuda.lower import CudaLowered, lower
from dcompile.codegen.targets import parse_target
from dcompile.codegen.triton import gate
from dcompile.codegen.triton.aot import Compiled, compile_variants, compiler_version
from dcompile.codegen.triton.tiles import ARCHITECTURES
from dcompile.driver.origin import open_origin, trace_origin
from dcompile.driver.pipeline import run
from dcompile.driver.settle import settle
from dcompile.options import Options

COLUMNS = ("registers", "spilled", "shared", "tensor ops", "128-bit loads", "cubin KB")
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}
# Of the published configurations; what is not named is as in tests/support/checkpoints.py.
MODELS: dict[str, dict[str, object]] = {
    "llada_moe": {
        **{"hidden_size": 2048, "vocab_size": 157184, "num_experts": 64, "num_experts_per_tok": 8},
        **{"expert_intermediate_size": 1024, "max_position_embeddings": 8192, **HEADS},
    },
    "llada2": {
        **{"hidden_size": 2048, "vocab_size": 157184, "num_experts": 256, "num_experts_per_tok": 8},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64},
        **{"moe_intermediate_size": 512, "intermediate_size": 5120, "n_group": 8, "topk_group": 4},
        "max_position_embeddings": 8192,
    },
    "llada": {
        **{"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288},
        **{"vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096},
    },
    "dream": {
        **{"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4},
        **{"intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 8192},
    },
    "sdar_moe": {
        **{"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4},
        **{"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936},
        **{"moe_intermediate_size": 768, "max_position_embeddings": 8192},
    },
}


def write_holes(folder: Path, family: str) -> Path:
    """A checkpoint of a model's real widths whose tensors take no place on the disk."""
    config = make_config(family, torch.bfloat16, **MODELS[family])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, mask_token="<|mdm_mask|>")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in SHAPES[family](config).items():
        wide = name.endswith("expert_bias")
        size = prod(shape) * (4 if wide else 2)
        entry = {"dtype": "F32" if wide else "BF16", "shape": list(shape)}
        header[name] = {**entry, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def planned(family: str, target: str, length: int) -> CudaLowered:
    """The plan of a step, as the compiler makes it."""
    with tempfile.TemporaryDirectory() as folder:
        given = Options(target=target, max_length=length)
        origin = open_origin(write_holes(Path(folder, "checkpoint"), family), given)
        settled = settle(given, origin.spec)
        program = trace_origin(origin, settled, lambda _: None)
        run(program, settled.options)
        return lower(program, parse_target(target).architectures, gated=True)


def facts(compiled: Compiled) -> dict[str, object]:
    """A row of the table: bytes a thread are spilled, bytes a block are shared."""
    found = compiled.instructions
    return {
        **{"kernel": compiled.variant.name, "arch": compiled.arch},
        **{"registers": compiled.registers, "spilled": compiled.stack},
        **{"shared": compiled.dynamic_shared + compiled.static_shared},
        **{"tensor ops": found["mma"] + found["wgmma"] + found["tcgen05"]},
        **{"128-bit loads": found["wide_loads"], "cubin KB": round(len(compiled.cubin) / 1024)},
        "refused": list(gate.problems(compiled)),
    }


def every(path: Path, date: str, machine: str, length: int) -> bool:
    """Every model on every architecture, kept in a file; whether the gate took all of them."""
    made = {"date": date, "machine": machine, "triton": compiler_version(), "length": length}
    known = json.loads(path.read_text()) if path.exists() else {**made, "models": {}}
    for family in MODELS:
        for arch in ARCHITECTURES:
            done = known["models"].setdefault(family, {})
            if f"sm_{arch}" in done:
                continue
            lowered = planned(family, f"cuda:sm_{arch}", length)
            sources = {"emitted": lowered.emitted} if lowered.emitted else {}
            rows = [facts(one) for one in compile_variants(lowered.variants, arch, sources)]
            done[f"sm_{arch}"] = {
                **{"kernels": len(rows), "spilled": sum(int(str(r["spilled"])) for r in rows)},
                **{"most registers": max(int(str(r["registers"])) for r in rows)},
                **{"most shared": max(int(str(r["shared"])) for r in rows)},
                "limit of shared": ARCHITECTURES[arch].shared,
                **{"refused": [r for r in rows if r["refused"]]},
                "smaller tiles for": lowered.refused,
            }
            path.write_text(json.dumps(known, indent=1) + "\n")
            found = done[f"sm_{arch}"]
            Console().print(
                f"{family} sm_{arch}: {len(rows)} kernels, {len(found['refused'])} refused, "
                f"smaller tiles for {sorted(lowered.refused)}"
            )
    return not any(one["refused"] for model in known["models"].values() for one in model.values())


def child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llada_moe")
    parser.add_argument("--target", default="cuda:sm_90")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--every", type=Path, metavar="FILE")
    parser.add_argument("--date", default=f"{datetime.date.today()}")
    parser.add_argument("--machine", default=f"{platform.machine()}, {os.cpu_count()} cores")
    options = parser.parse_args()
    if options.every is not None:
        sys.exit(not every(options.every, options.date, options.machine, options.length))
    lowered = planned(options.model, options.target, options.length)
    sources = {"emitted": lowered.emitted} if lowered.emitted else {}
    compiled: list[Compiled] = []
    with tempfile.TemporaryDirectory() as folder:
        began, before = time.perf_counter(), child_seconds()
        for arch in parse_target(options.target).architectures:
            compiled += compile_variants(lowered.variants, arch, sources, folder=Path(folder))
        wall, cpu = time.perf_counter() - began, child_seconds() - before
    rows = [facts(c) for c in compiled]
    table = Table("kernel", "arch", *COLUMNS, title=f"{options.model}, {options.target}")
    for row in rows:
        table.add_row(*(str(row[c]) for c in ("kernel", "arch", *COLUMNS)))
    console = Console(width=140)
    console.print(table)
    layers = [item["layer"] for item in lowered.plan["launches"] if item["layer"] is not None]
    most = max(layers.count(layer) for layer in set(layers))
    console.print(
        f"{len(rows)} kernels, {wall:.1f} s on {os.cpu_count()} cores, {cpu:.1f} CPU seconds; "
        f"at most {most} launches a layer"
    )
    if options.json:
        made = {"model": options.model, "target": options.target, "triton": compiler_version()}
        made |= {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "cores": os.cpu_count()}
        made |= {"launches_a_layer": most}
        options.json.write_text(json.dumps({**made, "kernels": rows}, indent=1) + "\n")
    if any(row["refused"] for row in rows):
        for row in rows:
            for why in row["refused"]:  # type: ignore[attr-defined]
                console.print(f"{row['kernel']} sm_{row['arch']}: {why}")
        sys.exit(1)


if __name__ == "__main__":
    main()
