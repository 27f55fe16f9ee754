"""The harness's model class, under a stand-in for the harness: it is too large to install for tests.

The stand-in has what the class uses of it; `test_lm_eval_harness.py` has the real one, where it is there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dcompile.demo import MODEL, heldout
from dcompile.driver.compile import compile_checkpoint
from dcompile.errors import RequestError
from dcompile.options import Options

NAME = "dcompile.integrations.lm_eval"


@dataclass(frozen=True)
class Instance:
    args: tuple[Any, ...]


class LM:
    def __init__(self) -> None:
        self.started = True


@pytest.fixture
def integration(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, imported with a harness of three modules."""
    registered: dict[str, type] = {}

    def register_model(name: str) -> Callable[[type], type]:
        return lambda cls: registered.setdefault(name, cls)

    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.__main__": {"cli_evaluate": lambda: registered},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    assert registered == {"dcompile": module.DcompileLM}
    yield module
    sys.modules.pop(NAME, None)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    options = Options(max_length=128, batch=8, block_length=16, policy="likelihood", cache="dual")
    path = tmp_path_factory.mktemp("scored") / "model.dcx"
    return str(compile_checkpoint(MODEL, options, path))


def test_it_generates_until(integration: ModuleType, artifact: str) -> None:
    model = integration.DcompileLM(artifact=artifact, max_gen_toks=30, threshold=0.9)
    assert model.started
    examples = heldout()[::32]
    asked = {"until": ["\n"], "do_sample": False, "temperature": 0.0}
    found = model.generate_until([Instance((e.prompt, asked)) for e in examples])
    right = sum(text.strip() == e.answer for text, e in zip(found, examples, strict=True))
    assert right >= len(examples) - 1
    stop = found[0][1]
    cut = model.generate_until([Instance((examples[0].prompt, {"until": [stop, found[0] + "x"]}))])
    assert cut == [found[0].partition(stop)[0]]
    long = "x" * 300 + examples[0].prompt
    assert len(model.generate_until([Instance((long, {"max_gen_toks": 1000}))])) == 1


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, (48, 0.0)),
        ({"max_gen_toks": 16}, (16, 0.0)),
        ({"max_new_tokens": 16}, (16, 0.0)),
        ({"max_tokens": 16}, (16, 0.0)),
        ({"max_completion_tokens": "16"}, (16, 0.0)),
        ({"max_gen_toks": None, "max_tokens": 32}, (32, 0.0)),
        ({"max_gen_toks": 32, "max_new_tokens": 16}, (32, 0.0)),
        ({"max_gen_toks": None, "do_sample": None, "temperature": None}, (48, 0.0)),
        ({"do_sample": True, "temperature": None}, (48, 1.0)),
        ({"do_sample": True, "temperature": 0.5, "until": None}, (48, 0.5)),
        ({"do_sample": False, "temperature": 0.5}, (48, 0.0)),
    ],
    ids=str,
)
def test_every_name_of_a_length_is_read_and_null_is_the_default(
    integration: ModuleType, artifact: str, asked: dict[str, Any], wanted: tuple[int, float]
) -> None:
    model = integration.DcompileLM(artifact=artifact, max_gen_toks=48)
    assert model._wanted(asked) == wanted
    assert len(model.generate_until([Instance((heldout()[0].prompt, asked))])) == 1


def test_answers_are_likelier_than_others_and_greedy(
    integration: ModuleType, artifact: str
) -> None:
    model = integration.DcompileLM(artifact=artifact, mc_samples=8)
    examples = heldout()[::64]
    answers = [e.answer for e in examples]
    requests = [Instance((e.prompt, a)) for e in examples for a in answers]
    scores = model.loglikelihood(requests)
    for i, example in enumerate(examples):
        row = scores[i * len(answers) : (i + 1) * len(answers)]
        best = max(range(len(answers)), key=lambda j: row[j][0])
        assert answers[best] == example.answer and row[best][1]
        assert not any(greedy for j, (_, greedy) in enumerate(row) if j != best)
    (rolling,) = model.loglikelihood_rolling([Instance(("sum: 1 + 2 =",))])
    assert rolling < 0


def test_a_space_before_an_answer_belongs_to_it(integration: ModuleType, artifact: str) -> None:
    model = integration.DcompileLM(artifact=artifact)
    context, continuation = model._pair("ab ", "cd")
    assert model.runner.decode(context) == "ab" and model.runner.decode(continuation) == " cd"
    assert model._pair("", "cd")[0] == []


def test_chats_are_rendered_once(integration: ModuleType, artifact: str) -> None:
    model = integration.DcompileLM(artifact=artifact)
    text = model.apply_chat_template([{"role": "user", "content": "sum: 1 + 2"}])
    assert text == "sum: 1 + 2 =" and model.chat_template(True) and not model.chat_template()
    assert model.tokenizer_name
    assert model.generate_until([Instance((text, {"until": "\n"}))]) == ["3"]


def test_it_says_what_a_likelihood_needs(integration: ModuleType, tmp_path: Path) -> None:
    plain = compile_checkpoint(MODEL, Options(max_length=64), tmp_path / "plain.dcx")
    model = integration.DcompileLM(artifact=str(plain))
    with pytest.raises(RequestError, match="--policy likelihood"):
        model.loglikelihood([Instance(("a", "b"))])


def test_the_command_line_is_the_harness_s_own(integration: ModuleType) -> None:
    assert integration.main() is None
