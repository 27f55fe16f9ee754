"""The real lm-evaluation-harness on a local task file; only where it is installed (`dcompile[eval]`)."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from dcompile.demo import MODEL, heldout
from dcompile.driver.compile import compile_checkpoint
from dcompile.options import Options

evaluator = pytest.importorskip("lm_eval.evaluator", reason="pip install 'dcompile[eval]'")

GENERATE = """
task: local_answers
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 32}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOOSE = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def test_the_harness_scores_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    examples = heldout()[::16]
    others = [*examples[1:], examples[0]]
    questions = tmp_path / "questions.jsonl"
    lines = [
        {"prompt": e.prompt, "answer": e.answer, "gold": place, "choices": both[:: 1 - 2 * place]}
        for e, o in zip(examples, others, strict=True)
        for place, both in [(len(e.prompt) % 2, [e.answer, o.answer])]
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in (("answers", GENERATE), ("choices", CHOOSE)):
        (tasks / f"{name}.yaml").write_text(text.replace("QUESTIONS", str(questions)))
    options = Options(max_length=128, batch=8, block_length=16, policy="likelihood", cache="dual")
    artifact = compile_checkpoint(MODEL, options, tmp_path / "model.dcx")
    results = tmp_path / "results"
    asked = f"--model dcompile --model_args artifact={artifact},threshold=0.9,mc_samples=8"
    rest = f"--tasks local_answers,local_choices --include_path {tasks} --output_path {results}"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *asked.split(), *rest.split()])
    importlib.import_module("dcompile.integrations.lm_eval").main()
    (written,) = results.rglob("results*.json")
    scores = json.loads(written.read_text())["results"]
    assert scores["local_answers"]["exact_match,none"] >= 1 - 1 / len(examples)
    assert scores["local_choices"]["acc,none"] == 1.0
    assert "local_answers" in capsys.readouterr().out
