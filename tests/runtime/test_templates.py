"""Chat templates beside the library that they are written for."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts import write_tokenizer
from transformers import PreTrainedTokenizerFast

from dcompile.errors import RequestError
from dcompile.runtime.tokens import Tokenizer

LLADA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not tools) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>' + tool_call.name + (tool_call.arguments | tojson(indent=1)) }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>' + message.content + '</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLADA2 = """\
{% set ns = namespace(last=-1, thinking='off') %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% if messages[0].role != 'system' %}
    {{- '<role>SYSTEM</role>detailed thinking ' + ns.thinking + '<|role_end|>' }}
{% endif %}
{% for m in messages %}
    {% if m.role not in dict(user=1, system=1, assistant=1) %}{% continue %}{% endif %}
    {{- '<role>' + m.role.upper() + '</role>' }}
    {%- if m.content is string %}{{ m.content }}{% elif m.content %}
        {%- for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
    {%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content.strip('\\n') + '</think>' }}{% endif %}
    {%- if loop.index0 == ns.last %}{{ '<!>' }}{% endif %}
    {{- '<|role_end|>' }}
{% endfor %}
{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}
"""
SIGNS = """\
{{ messages | tojson }} {{ messages | tojson(ensure_ascii=True, sort_keys=True) }}
{{ messages | tojson(separators=(',', ':')) }} {{ dict.fromkeys('ab', 1) }} {{ strftime_now('%Y') }}
  {% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}<{{ m.content }}>{% endgeneration %}
  {{ x }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}
{{ bos_token }}{{ pad_token is defined }}{{ documents }}{{ tools is none }}
"""
TEMPLATES = {"llada": LLADA, "chatml": CHATML, "llada2": LLADA2, "signs": SIGNS}

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}
TURNS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "hi 你好 <&>"}],
    "system": [{"role": "system", "content": "be short"}, {"role": "user", "content": " a\n"}],
    "several": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "\nwhy\n"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "thinking": "so"},
    ],
    "null": [
        {"role": "user", "content": "1 + é"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": None},
        {"role": "assistant", "content": "2", "tool_calls": None},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "é"}}}}]

Both = Callable[..., tuple[Tokenizer, PreTrainedTokenizerFast]]


@pytest.fixture
def both(tmp_path: Path) -> Both:
    """The runtime's tokenizer and the library's, of one folder."""
    numbers = count()

    def make(config: dict[str, Any] | None, **files: Any) -> tuple[Tokenizer, Any]:
        folder = tmp_path / str(next(numbers))
        ours = write_tokenizer(folder, config, **files)
        return ours, PreTrainedTokenizerFast.from_pretrained(folder)

    return make


def same(ours: Tokenizer, theirs: Any, messages: Any, **asked: Any) -> None:
    name = asked.pop("template", None)
    opened = {"add_generation_prompt": True, **asked}
    try:
        want = theirs.apply_chat_template(messages, tokenize=False, chat_template=name, **opened)
    except Exception:
        with pytest.raises(RequestError, match="template"):
            ours.render(messages, template=name, **opened)
        return
    assert ours.render(messages, template=name, **opened) == want


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", TURNS)
def test_renders_as_the_library(template: str, turns: str, both: Both) -> None:
    ours, theirs = both({"bos_token": "<|endoftext|>", "chat_template": TEMPLATES[template]})
    messages = TURNS[turns]
    for asked in ({}, {"add_generation_prompt": False}, {"tools": TOOLS}, {"documents": TOOLS}):
        same(ours, theirs, messages, **asked)


def test_null_prints_nothing(both: Both) -> None:
    ours, _ = both({"chat_template": "{{ messages[0].content }}|{{ messages[0].role }}"})
    assert ours.render([{"role": "user", "content": None}]) == "|user"


@pytest.mark.parametrize(
    "named",
    [
        {"default": "d", "tool_use": "t {{ tools | length }}", "rag": "r {{ documents }}"},
        {"default": "d", "rag": "r"},
        {"rag": "r"},
    ],
    ids=len,
)
@pytest.mark.parametrize("listed", [False, True])
def test_templates_have_names(named: dict[str, str], listed: bool, both: Both) -> None:
    told = [{"name": n, "template": t} for n, t in named.items()] if listed else named
    ours, theirs = both({"chat_template": told})
    for name in (None, *named):
        for asked in ({}, {"tools": TOOLS}, {"tools": []}, {"documents": TOOLS}):
            same(ours, theirs, TURNS["one"], template=name, **asked)
    with pytest.raises(RequestError, match=r"no chat template 'other'\n.*rag"):
        ours.template("other")


@pytest.mark.parametrize("default", [False, True])
def test_templates_may_have_files_of_their_own(default: bool, both: Both) -> None:
    files = {f"additional_chat_templates/{name}__jinja": name for name in ("tool_use", "rag")}
    if default:
        files["chat_template__jinja"] = "file"
    ours, theirs = both({"chat_template": "config"}, **files)
    for name in (None, "rag"):
        for asked in ({}, {"tools": TOOLS}):
            same(ours, theirs, TURNS["one"], template=name, **asked)


class Colour(enum.StrEnum):
    RED = "red"


@dataclass
class Place:
    x: int


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        np.float32(0.5),
        np.int64(3),
        np.arange(2),
        Place(1),
        (1, 2.5),
        object,
        b"a",
        True,
    ],
    ids=repr,
)
def test_templates_see_plain_values(value: Any, both: Both) -> None:
    ours, theirs = both({"chat_template": "{{ messages[0].content }} {{ messages | tojson }}"})
    same(ours, theirs, [{"role": "user", "content": value}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(_x=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ namespace(self=1).self }}",
        "{{ dict.__init__ }}",
        "{{ dict.mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages | tojson(indent='x') }}",
        "{% generation %}",
        "{{ strftime_now(1) }}",
        "{{ messages[9].content.x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_sandbox_is_what_the_library_has(template: str, both: Both) -> None:
    ours, theirs = both({"chat_template": template})
    same(ours, theirs, TURNS["one"])


@pytest.mark.parametrize("messages", [[], ["hi"], [None]])
def test_a_conversation_is_a_list_of_messages(messages: Any, both: Both) -> None:
    ours, _ = both({"chat_template": "{{ messages }}"})
    with pytest.raises(RequestError, match="list of messages"):
        ours.render(messages)
