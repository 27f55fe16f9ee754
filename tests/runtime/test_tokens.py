"""Text in and out, with a tokenizer of ten words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy
from toy import MASK, Toy
from words import GENERATION, TEMPLATE, tokenizer_json

from dcompile.errors import ArtifactError, RequestError
from dcompile.runtime.decode.loop import Runner


def runner(path: Path, code: bytes, config: object = None, **files: str) -> Runner:
    written = {"tokenizer/tokenizer.json": tokenizer_json()}
    if config is not None:
        written["tokenizer/tokenizer_config.json"] = json.dumps(config).encode()
    written |= {f"tokenizer/{name}": text.encode() for name, text in files.items()}
    return Runner.load(toy.write(path / "a.dcx", Toy(), code, **written))


def test_text_and_back(tmp_path: Path, code: bytes) -> None:
    run = runner(tmp_path, code)
    assert run.encode("a b c") == [0, 3, 4, 5]
    assert run.decode([3, 2, 4]) == "a b"
    (result,) = run.generate(["a b c"], gen_length=4)
    assert result.all_tokens == toy.decode(Toy(), [0, 3, 4, 5], 4)[0]
    assert result.text == run.decode(result.tokens)


def test_chat_adds_only_what_the_template_says(tmp_path: Path, code: bytes) -> None:
    for name, config, files in [
        ("a", {"chat_template": TEMPLATE + GENERATION}, {}),
        ("b", {"chat_template": [{"name": "default", "template": TEMPLATE + GENERATION}]}, {}),
        ("c", {}, {"chat_template.jinja": TEMPLATE + GENERATION}),
        ("d", None, {"chat_template.jinja": TEMPLATE + GENERATION}),
    ]:
        (tmp_path / name).mkdir()
        run = runner(tmp_path / name, code, config, **files)
        assert run.encode("a b", chat=True) == [6, 8, 3, 4, 9, 8]


def test_the_template_sees_special_tokens(tmp_path: Path, code: bytes) -> None:
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<eos>",
        "chat_template": "{{bos_token}} {{messages[0].content | tojson | length}} {{eos_token}}",
    }
    assert runner(tmp_path, code, config).encode("<a>", chat=True) == [0, 5, 2]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no') }}", "refuses: no"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        ("{{ messages.append(1) }}", "failed"),
        ("{% for %}", "failed"),
        ("{{ 1 / 0 }}", "failed"),
        ("{{ undefined.field }}", "failed"),
    ],
)
def test_a_template_can_do_no_harm(template: str, words: str, tmp_path: Path, code: bytes) -> None:
    with pytest.raises(RequestError, match=words):
        runner(tmp_path, code, {"chat_template": template}).encode("a", chat=True)


def test_refuses(tmp_path: Path, code: bytes) -> None:
    run = runner(tmp_path, code, {})
    with pytest.raises(RequestError, match="no chat template"):
        run.encode("a", chat=True)
    with pytest.raises(RequestError, match=f"token id {MASK} is the mask id"):
        run.generate(["a <mask>"], gen_length=4)
    (tmp_path / "b").mkdir()
    with pytest.raises(ArtifactError, match="config cannot be read"):
        runner(tmp_path / "b", code, **{"tokenizer_config.json": "{"}).encode("a", chat=True)
    broken = toy.write(tmp_path / "c", Toy(), code, **{"tokenizer/tokenizer.json": b"{}"})
    with pytest.raises(ArtifactError, match="tokenizer cannot be read"):
        Runner.load(broken).encode("a")
