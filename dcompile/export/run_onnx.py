"""Generate text with a denoising step in ONNX: onnxruntime and numpy, and tokenizers for text.

python run_onnx.py step.onnx --prompt-ids 1,2,3 --gen-length 64
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Array = np.ndarray[Any, Any]
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class Step:
    """A loaded model: one call is one denoising iteration."""

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.facts: dict[str, Any] = json.loads(
            self.session.get_modelmeta().custom_metadata_map["dcompile"]
        )
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs() if item.name != "logits"]

    def state(self, length: int) -> dict[str, Array]:
        """Zeros for what one sequence carries from iteration to iteration, beside its canvas."""
        out: dict[str, Array] = {}
        for name in self.outputs:
            name = name.removeprefix("new.")
            if name in self.inputs and name != "canvas":
                item = self.inputs[name]
                sizes = {"batch": 1, "length": length}
                out[name] = np.zeros([sizes.get(d, d) for d in item.shape], TYPES[item.type])
        return out

    def __call__(self, given: dict[str, Array]) -> dict[str, Array]:
        feeds: dict[str, Array] = {
            name: given[name].astype(TYPES[i.type]) for name, i in self.inputs.items()
        }
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))


def generate(
    step: Step,
    prompt: Sequence[int],
    gen_length: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    early_stop: bool = True,
    cache: str | None = None,
    **parameters: float,
) -> tuple[list[int], int]:
    """The generated ids of one prompt (every position) and the forwards that it took.

    Whole blocks are computed, and the answer is cut at `gen_length`.
    """
    model, n = step.facts["model"], step.facts["block_length"]
    span, mask = model["block_length"], model["mask_id"]
    knobs = {**step.facts["policy"]["parameters"], **parameters}
    unknown = set(knobs) - set(step.facts["policy"]["parameters"])
    end = len(prompt) + gen_length
    choice = {**step.facts["loop"], **({} if cache is None else {"cache": cache})}
    aligned = choice.get("aligned")
    aligned = span is not None if aligned is None else bool(aligned)
    total = end + (-end % max(n, span or 1) if aligned else -gen_length % n)
    fixed = choice.get("manager") == "canvas" and gen_length != n
    if unknown or total > step.facts["max_length"] or fixed:
        raise ValueError(
            f"the model takes {step.facts['max_length']} positions, blocks of {n} and the parameters "
            f"{sorted(step.facts['policy']['parameters'])}"
        )
    canvas = np.full((1, total), mask, np.int64)
    canvas[0, : len(prompt)] = prompt
    held = step.state(total)
    policy = {item["name"]: item["reset"] for item in step.facts["policy"]["state"]}
    begin = len(prompt) - len(prompt) % n if aligned else len(prompt)
    previous, tick = None, 0
    while begin < end:
        block = np.arange(begin, begin + n)
        for name in [name for name, reset in policy.items() if reset == "block"]:
            held[name][:] = 0
        given = {
            "lengths": np.array([total]),
            "block_positions": block[None],
            "entered": (canvas[:, block] == mask).sum(1),
            "temperature": np.array([temperature]),
            "seed": np.array([seed]),
            "prompt_end": np.array([len(prompt)]),
            **{name: np.array([value]) for name, value in knobs.items()},
        }
        place = {"begin": begin, "total": total, "previous": previous, "span": span, "n": n}
        iteration, done, before = 0, False, canvas[0, block]
        while not done:
            ids = canvas[0, block]
            clocks = {"iteration": iteration, "tick": tick}
            rows = positions(choice, {**place, **clocks}, ids, before, mask, int(model["shift"]))
            given |= {name: np.array([value]) for name, value in clocks.items()}
            out = step({**given, "canvas": canvas, "positions": rows[None], **held})
            held = {name: out[f"new.{name}"] for name in held}
            canvas, done, before = out["new.canvas"], bool(out["done"][0]), ids
            iteration, tick = iteration + 1, tick + 1
        stop = first_end(canvas[0, len(prompt) : min(begin + n, end)], model["eos_ids"])
        if early_stop and stop is not None:
            canvas[0, len(prompt) + stop : end] = canvas[0, len(prompt) + stop]
            break
        previous, begin = begin, begin + n
        if stores_blocks(choice) and begin < end and begin % (span or 1) == 0:
            # A forward that decides nothing: it stores the finished block's keys and values.
            rows = np.arange(previous - previous % (span or 1), begin)
            out = step({**given, "canvas": canvas, "positions": rows[None], **held})
            held |= {name: out[f"new.{name}"] for name in held if name not in policy}
            tick += 1
    return canvas[0, len(prompt) : end].tolist(), tick


def positions(
    choice: dict[str, Any], at: dict[str, Any], ids: Array, before: Array, mask: int, shift: int
) -> Array:
    """Which positions an iteration computes, by the cache policy; the others keep what they have."""
    begin, end, total, span = at["begin"], at["begin"] + at["n"], at["total"], at["span"] or 1
    floor = begin - begin % span
    ceiling = total if at["span"] is None else min(end + -end % span, total)
    entering, everything, block = at["iteration"] == 0, (0, total), (begin, end)
    match choice.get("cache", "none"):
        case "none":
            rows = (0, ceiling)
        case "prefix":
            rows = everything if entering else (begin, total)
        case "dual":
            rows = everything if entering else block
        case "vicinity":
            near = max(begin - choice["look_back"], 0), min(end + choice["look_ahead"], total)
            rows = everything if entering or at["tick"] < choice["warmup"] else near
        case "periodic":
            rows = everything if at["iteration"] % choice["refresh_every"] == 0 else block
        case "block":
            first = at["previous"] is None or stores_blocks(choice)
            start = 0 if at["previous"] is None else floor if first else at["previous"]
            rows = (start - start % span, ceiling) if entering else (floor, ceiling)
        case "active" if not entering:
            deciding = np.flatnonzero(ids == mask) + begin
            changed = np.flatnonzero(ids != before) + begin
            return np.union1d(np.union1d(deciding, changed), np.maximum(deciding - shift, 0))
        case "active":
            rows = everything
        case other:
            raise ValueError(f"there is no cache {other!r}")
    # A shifted model chooses a block's first token by the row before it.
    return np.arange(min(rows[0], max(begin - shift, 0)), rows[1])


def stores_blocks(choice: dict[str, Any]) -> bool:
    return choice.get("cache") == "block" and choice.get("cross_block") is False


def first_end(tokens: Array, eos_ids: Sequence[int]) -> int | None:
    at = np.flatnonzero(np.isin(tokens, eos_ids))
    return int(at[0]) if len(at) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt", help="text, encoded with the tokenizer beside the model")
    parser.add_argument("--prompt-ids", help="1,2,3")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", help="none, prefix, dual, active or block; default: as exported")
    parser.add_argument("--no-early-stop", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args()
    if (asked.prompt is None) == (asked.prompt_ids is None):
        parser.error("give one of --prompt and --prompt-ids")
    path = Path(asked.model)
    tokenizer: Any = None
    if asked.prompt is not None or path.with_name(f"{path.stem}.tokenizer.json").is_file():
        tokenizer = load_tokenizer(path.with_name(f"{path.stem}.tokenizer.json"))
    if asked.prompt is None:
        prompt = [int(part) for part in asked.prompt_ids.split(",") if part.strip()]
    else:
        prompt = tokenizer.encode(asked.prompt).ids
    step = Step(path, asked.threads)
    every, forwards = generate(
        step,
        prompt,
        asked.gen_length,
        temperature=asked.temperature,
        seed=asked.seed,
        early_stop=not asked.no_early_stop,
        cache=asked.cache,
        **dict(_settings(asked.set)),
    )
    tokens = every[: first_end(np.array(every), step.facts["model"]["eos_ids"])]
    text = None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
    found = {"tokens": tokens, "all_tokens": every, "text": text, "forwards": forwards}
    sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")


def load_tokenizer(path: Path) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _settings(texts: Sequence[str]) -> Iterator[tuple[str, float]]:
    for text in texts:
        name, _, value = text.partition("=")
        yield name.replace("-", "_"), float(value)


if __name__ == "__main__":
    main()
