"""The same random weights in llama.cpp's diffusion program and in an artifact: time a step and a token.

python bench/speed/llamacpp.py --keep DIR --prepare [--seconds 400]    # again until it says that all is built
python bench/speed/llamacpp.py --keep DIR [--steps 16] [--threads 1 2] [--json FILE]

`--prepare` takes the source out of the registry's llama-cpp-python sdist, builds only `llama-diffusion-cli`
(cmake, ninja and a C++ compiler), and writes the mid model as a checkpoint, a GGUF file of architecture
`llada-moe` and artifacts.  Both sides decode the same prompt in blocks of 32 with the same number of steps,
greedily; llama.cpp has no cache for diffusion, so each of its steps runs the whole sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import models
import torch
from safetensors import safe_open

from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options
from dcompile.runtime.decode.loop import Runner

VERSION = "0.3.36"
PROMPT, GENERATED, BLOCK = 128, 64, 32
LENGTH = PROMPT + GENERATED
CMAKE = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_SERVER=OFF"),
)
NAMES = {  # GGUF's names of a layer's tensors
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
}


@dataclass(frozen=True)
class Contestant:
    """Milliseconds, medians over the runs; `computed` positions a step."""

    name: str
    threads: int
    step: float
    computed: float
    per_computed: float
    per_committed: float


# ---- llama.cpp: source, program, file


def source(folder: Path) -> Path:
    at = folder / "src"
    if not at.exists():
        name = f"llama-cpp-python=={VERSION}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", name]
        subprocess.run([*pip, "-d", str(folder)], check=True)
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(folder / "unpacked", filter="data")
        next((folder / "unpacked").iterdir()).rename(at)
    return at / "vendor" / "llama.cpp"


def build(folder: Path, seconds: float) -> bool:
    """Build for so long; True once the program is there. What was built stays."""
    program = folder / "build"
    if not (program / "build.ninja").exists():
        command = ["cmake", "-S", str(source(folder)), "-B", str(program), "-G", "Ninja", *CMAKE]
        subprocess.run(command, check=True)
    command = ["cmake", "--build", str(program), "-j1", "--target", "llama-diffusion-cli"]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(
                process.pid, signal.SIGINT
            )  # all of it, or the next build would meet this one's
            return False
    if code:
        raise SystemExit(f"{' '.join(command)} failed with {code}")
    return True


def characters() -> list[str]:
    """The 256 byte tokens of GPT-2's vocabulary, in the order of the bytes."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def write_gguf(folder: Path, checkpoint: Path, sizes: models.Sizes) -> Path:
    path = folder / "mid.gguf"
    if path.exists():
        return path
    sys.path.insert(0, str(source(folder) / "gguf-py"))
    import gguf

    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llada-moe")
    _describe(writer, sizes)
    _vocabulary(writer, gguf, sizes.vocab)
    tensors = _Tensors(checkpoint)
    for name in tensors.names():
        _add(writer, gguf, name, tensors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _describe(writer: Any, s: models.Sizes) -> None:
    for name, value in {
        "context_length": 8192,
        "embedding_length": s.hidden,
        "block_count": s.layers,
        "feed_forward_length": 4 * s.hidden,
        "expert_feed_forward_length": s.inner,
        "head_count": s.heads,
        "head_count_kv": s.heads,
        "expert_count": s.experts,
        "expert_used_count": s.top_k,
        "rope_dimension_count": s.hidden // s.heads,
        "rope_freq_base": 50000.0,
        "layer_norm_rms_eps": 1e-5,
        "causal_attention": False,
        "diffusion_shift_logits": False,
        "vocab_size": s.vocab,
    }.items():
        getattr(writer, f"add_{name}")(value)


def _vocabulary(writer: Any, gguf: Any, size: int) -> None:
    """One token a byte and no merges, so that a prompt of n characters has n tokens."""
    kinds = gguf.TokenType
    tokens = [*characters(), *(f"<{i}>" for i in range(256, size))]
    types = [kinds.NORMAL] * size
    types[size - 2] = types[size - 1] = kinds.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llada-moe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["~ ~"])
    writer.add_eos_token_id(size - 2)
    writer.add_mask_token_id(size - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


class _Tensors:
    """A checkpoint's tensors under GGUF's names, read when asked; experts stacked."""

    def __init__(self, checkpoint: Path) -> None:
        self.files = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self.files |= dict.fromkeys(file.keys(), file)
        self.layers = 1 + max(int(n.split(".")[2]) for n in self.files if ".layers." in n)
        self.experts = 1 + max(int(n.split(".")[5]) for n in self.files if ".experts." in n)

    def names(self) -> list[str]:
        layer = [*NAMES, *(f"mlp.experts.{p}_proj" for p in ("gate", "up", "down"))]
        ends = ["model.embed_tokens", "model.norm", "lm_head"]
        return ends + [f"model.layers.{i}.{n}" for i in range(self.layers) for n in layer]

    def read(self, name: str) -> torch.Tensor:
        if ".experts." not in name:
            return self.files[f"{name}.weight"].get_tensor(f"{name}.weight")
        head, tail = name.split(".experts.")
        each = (f"{head}.experts.{e}.{tail}.weight" for e in range(self.experts))
        return torch.stack([self.files[n].get_tensor(n) for n in each])


def _add(writer: Any, gguf: Any, name: str, tensors: _Tensors) -> None:
    """Matrices as they are; norms and routers as float32, as llama.cpp's converter has them."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if name in ends:
        to = ends[name]
    else:
        _, _, layer, rest = name.split(".", 3)
        part = rest.rpartition(".experts.")[2].removesuffix("_proj")
        to = f"blk.{layer}." + (f"ffn_{part}_exps" if ".experts." in rest else NAMES[rest])
    tensor = tensors.read(name)
    if tensor.dim() == 1 or to.endswith("ffn_gate_inp"):
        writer.add_tensor(f"{to}.weight", tensor.float().numpy())
        return
    kind = gguf.GGMLQuantizationType.BF16
    array = tensor.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(f"{to}.weight", array, raw_dtype=kind)


# ---- runs


def prompt_text() -> str:
    letters = [chr(c) for c in (*range(65, 91), *range(97, 123))]
    order = torch.randint(0, len(letters), (PROMPT,), generator=torch.Generator().manual_seed(1))
    return "".join(letters[i] for i in order.tolist())


def theirs(folder: Path, steps: int, threads: int) -> tuple[Contestant, list[int]]:
    """Run the program; `steps` a block. Blocks that lie in the prompt's share cost it a forward each."""
    program = folder / "build" / "bin" / "llama-diffusion-cli"
    blocks = LENGTH // BLOCK
    size = [str(LENGTH)] * 3
    command = [
        *(str(program), "-m", str(folder / "mid.gguf"), "-p", prompt_text(), "-t", str(threads)),
        *("-tb", str(threads), "-c", size[0], "-b", size[1], "-ub", size[2], "--temp", "0"),
        *("--top-k", "1", "--diffusion-block-length", str(BLOCK), "--diffusion-eps", "0"),
        *("--diffusion-algorithm", "4", "--diffusion-steps", str(steps * blocks)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    found = re.search(r"total time: ([\d.]+)ms", text)
    if not found:
        raise SystemExit(f"llama-diffusion-cli failed:\n{text[-2000:]}")
    forwards = steps * GENERATED // BLOCK + PROMPT // BLOCK
    step = float(found[1]) / forwards
    committed = step * steps / BLOCK
    tokens = [int(t) for t in re.findall(r"<(\d+)>", text[found.end() :])]
    return Contestant("llama.cpp", threads, step, LENGTH, step / LENGTH, committed), tokens


def ours(runner: Runner, name: str, steps: int) -> tuple[Contestant, list[int]]:
    ids = [ord(c) for c in prompt_text()]
    start = time.perf_counter()
    (result,) = runner.generate([ids], gen_length=GENERATED, steps=steps, early_stop=False)
    took = (time.perf_counter() - start) * 1e3
    # Entering a block, `dual` computes all positions; afterwards the block's.
    entering = GENERATED // BLOCK
    rows = LENGTH * result.forwards
    if name == "dual":
        rows = LENGTH * entering + BLOCK * (result.forwards - entering)
    step, threads = took / result.forwards, runner.executor.threads
    mean = rows / result.forwards
    return Contestant(name, threads, step, mean, took / rows, took / GENERATED), result.all_tokens


def prepare(folder: Path, seconds: float) -> None:
    checkpoint = folder / "mid_bfloat16"
    if not checkpoint.exists():
        models.write(checkpoint, models.MID)
    for cache in ("none", "dual"):
        if not (folder / f"{cache}.dcx").exists():
            options = Options(max_length=LENGTH, block_length=BLOCK, cache=cache, policy="steps")
            compile_checkpoint(checkpoint, options, folder / f"{cache}.dcx")
    source(folder)
    write_gguf(folder, checkpoint, models.MID)
    print("all is built" if build(folder, seconds) else "not done yet: run this again")


def measure(folder: Path, steps: int, threads: list[int], rounds: int) -> list[Contestant]:
    """Each contestant once a round, in turn; medians."""
    runners = {
        (cache, n): Runner.load(folder / f"{cache}.dcx", threads=n)
        for cache in ("none", "dual")
        for n in threads
    }
    runs: dict[tuple[str, int], list[Contestant]] = {}
    for _ in range(rounds):
        for n in threads:
            runs.setdefault(("llama.cpp", n), []).append(theirs(folder, steps, n)[0])
        for (cache, n), runner in runners.items():
            runs.setdefault((cache, n), []).append(ours(runner, cache, steps)[0])
    return [sorted(r, key=lambda c: c.step)[(len(r) - 1) // 2] for r in runs.values()]


def same_tokens(folder: Path) -> tuple[int, int]:
    """How many tokens of a block both decide alike where one forward decides them all."""
    _, a = theirs(folder, 1, 1)
    _, b = ours(Runner.load(folder / "none.dcx", threads=1), "none", 1)
    pairs = list(zip(a[:BLOCK], b[:BLOCK], strict=False))
    return sum(x == y for x, y in pairs), BLOCK


def table(found: list[Contestant]) -> str:
    rival = min((c for c in found if c.name == "llama.cpp"), key=lambda c: c.step)
    lines = [
        f"{'':12}{'threads':>8}{'ms/step':>10}{'rows':>7}{'us/row':>9}{'ms/token':>10}{'x':>7}"
    ]
    for c in found:
        lines.append(
            f"{c.name:12}{c.threads:8}{c.step:10.1f}{c.computed:7.0f}{c.per_computed * 1e3:9.0f}"
            f"{c.per_committed:10.2f}{rival.per_committed / c.per_committed:7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--steps", type=int, default=8, help="a block of 32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    if given.prepare:
        prepare(given.keep, given.seconds)
        return
    same, of = same_tokens(given.keep)
    found = measure(given.keep, given.steps, given.threads, given.rounds)
    print(
        f"prompt {PROMPT}, {GENERATED} generated in blocks of {BLOCK}, {given.steps} steps a block"
    )
    print(f"tokens that one forward decides alike: {same}/{of}")
    print(table(found))
    if given.json:
        report = {"steps": given.steps, "same_tokens": same, "runs": [asdict(c) for c in found]}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
