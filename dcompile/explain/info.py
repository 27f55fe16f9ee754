"""What an artifact or a checkpoint is, in words."""

from __future__ import annotations

from collections.abc import Iterator

from dcompile.explain.facts import Facts
from dcompile.options import Options


def in_words(facts: Facts) -> str:
    """The facts as a table of two columns."""
    rows = [*_model_rows(facts), *_decoding_rows(facts)]
    if facts["kind"] == "artifact":
        rows = [("artifact", _origin(facts)), *rows, *_artifact_rows(facts)]
    else:
        weights = (
            f"{facts['model']['parameters']:,} values, {_megabytes(facts['bytes']['weights'])}"
        )
        rows = [("checkpoint", facts["path"]), *rows, ("weights", weights)]
    return "".join(f"{name:<12}{words}\n" for name, words in rows)


def _origin(facts: Facts) -> str:
    return f"{facts['path']}, by dcompile {facts['dcompile']} (format {facts['format']})"


def _model_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    model = facts["model"]
    ends = ", ".join(map(str, model["eos_ids"])) or "none"
    yield "model", f"{model['family']}, {model['layers']} layers, {model['dtype']}"
    yield "vocabulary", f"{model['vocab_size']} tokens; mask {model['mask_id']}, end {ends}"
    span = model["attention_block"]
    yield "attention", "in both directions" if span is None else f"causal between blocks of {span}"
    texts = {"tokenizer": facts["tokenizer"], "chat template": facts["chat_template"]}
    yield "text", ", ".join(f"{'' if there else 'no '}{name}" for name, there in texts.items())


def _decoding_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    policy, cache = facts["policy"], facts["cache"]
    values = ", ".join(f"{k} {v:g}" for k, v in policy.get("parameters", {}).items())
    by_default = "" if facts["kind"] == "artifact" else "; unless compiled otherwise"
    yield "decoding", f"{facts['manager']}, blocks of {facts['block_length']}{by_default}"
    yield "policy", policy["name"] + (f": {values}" if values else "")
    yield "cache", f"{cache['name']}, {'exact' if cache['exact'] else 'approximate'}"
    count = facts["batch"]
    room = f"{facts['max_length']} positions, prompt and answer together"
    yield "room", f"{room}; {count} sequence{'s' * (count > 1)} at a time"


def _artifact_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    sizes, here = facts["bytes"], facts["runs_here"]
    yield "target", " ".join(filter(None, (facts["target"], facts["machine"])))
    held = ", ".join(f"{name} {_megabytes(size)}" for name, size in sizes["code"].items())
    yield "code", held + (f"; here: {here}" if here else "")
    folder = facts["weights_folder"]
    beside = f", in {folder}" if folder is not None else ""
    yield "weights", f"{_megabytes(sizes['weights'])}{beside}; all files {_megabytes(sizes['all'])}"
    default = Options().record()
    chosen = {k: v for k, v in facts["options"].items() if v != default.get(k)}
    yield "options", ", ".join(f"{k} {v}" for k, v in chosen.items()) or "all by default"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
