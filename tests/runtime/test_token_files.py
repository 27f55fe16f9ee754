"""A tokenizer of drawn files beside the library's own reading of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import ADDED, write_tokenizer
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers import PreTrainedTokenizerFast

from dcompile.errors import ArtifactError
from dcompile.runtime.tokens import Tokenizer

NEW = ("<|eot_id|>", "<role>", "[MASK]", "ab", "é")
ROLES = ("bos_token", "eos_token", "pad_token", "mask_token")
OWN = ("image_token", "think_token")
TEMPLATE = "|".join(f"{{{{ {role} }}}}" for role in (*ROLES, *OWN)) + "{{ messages[0].content }}"
TEXTS = [
    "a<|eot_id|>b <role> [MASK]x<|im_start|>",
    " ab  é<|endoftext|>\n<|im_end|>é ab",
    "cab e\u0301 [mask]",
]

texts = st.sampled_from([*ADDED, *NEW])
flags = st.fixed_dictionaries(
    {},
    optional={f: st.booleans() for f in ("lstrip", "rstrip", "single_word", "normalized")},
)


@st.composite
def described(draw: st.DrawFn, special: bool = True) -> dict[str, Any]:
    told = {"content": draw(texts), **draw(flags)}
    return told | ({"special": draw(st.booleans())} if special else {})


def roles(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from((*ROLES, *OWN)), values, max_size=4)


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    """The files beside tokenizer.json, each of which may be missing."""
    config: dict[str, Any] = draw(roles(texts | st.none()))
    config |= draw(
        st.sampled_from([{}, {}, {"add_bos_token": True}, {"split_special_tokens": True}])
    )
    config |= draw(
        st.just({})
        | st.fixed_dictionaries({"extra_special_tokens": st.lists(texts, max_size=2)})
        | st.fixed_dictionaries({"additional_special_tokens": st.lists(texts, max_size=2)})
        | st.fixed_dictionaries(
            {"extra_special_tokens": st.dictionaries(st.sampled_from(OWN), texts)}
        )
    )
    if draw(st.booleans()):
        known = {str(256 + i): {"content": text, "special": True} for i, text in enumerate(ADDED)}
        more = draw(st.lists(described(), max_size=3, unique_by=lambda token: token["content"]))
        config["added_tokens_decoder"] = known | {
            str(259 + i): token for i, token in enumerate(more) if token["content"] not in ADDED
        }
    files: dict[str, Any] = {}
    if draw(st.booleans()):
        files["special_tokens_map__json"] = draw(roles(texts | described(special=False)))
        files["special_tokens_map__json"] |= draw(
            st.just({})
            | st.fixed_dictionaries({"additional_special_tokens": st.lists(texts, max_size=2)})
            | st.fixed_dictionaries({"extra_special_tokens": st.lists(texts, max_size=2)})
        )
    if draw(st.booleans()):
        added = draw(st.lists(st.sampled_from(NEW), unique=True))
        first = draw(st.sampled_from([259, 259, 261]))
        files["added_tokens__json"] = {text: first + i for i, text in enumerate(added)}
    return {"config": draw(st.just(None)) if draw(st.integers(0, 9)) == 0 else config, **files}


def library(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def added(tokenizer: HuggingFaceTokenizer) -> dict[int, str]:
    """By id, with every flag."""
    return {n: repr(token) for n, token in tokenizer.get_added_tokens_decoder().items()}


@settings(max_examples=200, deadline=None)
@given(drawn())
def test_ids_and_roles_are_those_of_the_library(files: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        ours = write_tokenizer(Path(name), chat_template__jinja=TEMPLATE, **files)
        theirs = library(Path(name))
        assert added(ours._tokenizer()) == added(theirs._tokenizer)
        for text in TEXTS:
            ids = theirs(text)["input_ids"]
            assert ours.encode(text) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        messages = [{"role": "user", "content": "hi"}]
        assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_a_token_only_in_added_tokens_json_is_one_token(tmp_path: Path) -> None:
    ours = write_tokenizer(tmp_path, {}, added_tokens__json={"<|eot_id|>": 259})
    assert ours.encode("<|eot_id|>") == [259] == library(tmp_path)("<|eot_id|>")["input_ids"]


def test_a_token_only_in_the_decoder_is_one_token(tmp_path: Path) -> None:
    decoder = {"259": {"content": "<|eot_id|>", "special": True}}
    ours = write_tokenizer(tmp_path, {"added_tokens_decoder": decoder})
    assert ours.encode("<|eot_id|>") == [259] == library(tmp_path)("<|eot_id|>")["input_ids"]
    assert ours.decode([259]) == ""


def test_a_role_only_in_the_map_is_seen_by_the_template(tmp_path: Path) -> None:
    ours = write_tokenizer(
        tmp_path,
        {"chat_template": "{{ bos_token }}"},
        special_tokens_map__json={"bos_token": {"content": "<|im_start|>"}},
    )
    assert ours.encode("hi", chat=True) == [257]


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": {"259": {"content": 3}}}, {}),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, {}),
        ({"bos_token": 3}, {}),
        ({}, {"added_tokens__json": {"a": "b"}}),
        ({}, {"added_tokens__json": {"a": None}}),
        ({}, {"special_tokens_map__json": {"bos_token": {"lstrip": True}}}),
    ],
)
def test_files_that_name_no_tokens_are_refused(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any]
) -> None:
    ours: Tokenizer = write_tokenizer(tmp_path, config, **files)
    with pytest.raises(ArtifactError, match="do not say which tokens"):
        ours.encode("a")
