"""A tokenizer of vocab.json and merges.txt beside the library's own classes for such files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import Folder
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from dcompile.errors import ConfigError
from dcompile.frontends.byte_bpe import with_tokenizer_json
from dcompile.frontends.checkpoint import open_checkpoint
from dcompile.runtime.tokens import Tokenizer as Written

TEXT = [
    "it's 1234 o'clock, I'LL see\n\n  you soon",
    "naïve café déjà vu",
    "def f(x):\n    return x",
]
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")


def files_of(folder: Path, kind: str) -> dict[str, bytes]:
    """What a repository of Dream holds of a tokenizer, for a small trained vocabulary."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXT * 3, vocab_size=320, min_frequency=2, show_progress=False)
    trained.save_model(str(folder))
    first = len(json.loads((folder / "vocab.json").read_text()))
    special = {"lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {str(first + i): {"content": t, **special} for i, t in enumerate(ADDED)}
    config = {
        "tokenizer_class": kind,
        "added_tokens_decoder": added,
        "eos_token": ADDED[0],
        "mask_token": ADDED[3],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made(files: Mapping[str, bytes]) -> Tokenizer:
    return Tokenizer.from_buffer(with_tokenizer_json(files)["tokenizer.json"])


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Qwen2Tokenizer]:
    folder = tmp_path_factory.mktemp("qwen2")
    files = files_of(folder, "DreamTokenizer")
    (folder / "tokenizer_config.json").write_text(
        files["tokenizer_config.json"].decode().replace("Dream", "Qwen2")
    )
    return made(files), Qwen2Tokenizer.from_pretrained(str(folder))


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from([*TEXT, *ADDED, "e\u0301", "\t", " ", "\r\n", "42", "ﬁ"]) | st.text()
    )
)
def test_ids_and_texts_are_those_of_the_class(
    qwen2: tuple[Tokenizer, Qwen2Tokenizer], text: list[str]
) -> None:
    ours, theirs = qwen2
    joined = "".join(text)
    ids = theirs(joined, add_special_tokens=False)["input_ids"]
    assert ours.encode(joined).ids == ids
    for skip in (True, False):
        want = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == want


def test_older_files_say_the_same(tmp_path: Path) -> None:
    files = files_of(tmp_path, "Qwen2Tokenizer")
    first = len(json.loads(files["vocab.json"]))
    texts = [*ADDED, "<caf\u00e9>"]
    for name, value in {
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"},
        "added_tokens.json": {text: first + i for i, text in enumerate(texts)},
        "special_tokens_map.json": {
            "eos_token": {"content": ADDED[0]},
            "additional_special_tokens": [*ADDED[1:3]],
        },
    }.items():
        (tmp_path / name).write_text(json.dumps(value))
    present = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    theirs = Qwen2Tokenizer.from_pretrained(str(tmp_path))
    for name, data in with_tokenizer_json(present).items():
        (tmp_path / name).write_bytes(data)
    ours = Written(Folder(tmp_path))
    for text in (*TEXT, *texts, "a<|im_end|> <cafe\u0301>b<|mask|>"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_another_class_has_other_words(tmp_path: Path) -> None:
    ours = made(files_of(tmp_path, "GPT2TokenizerFast"))
    theirs = GPT2Tokenizer.from_pretrained(str(tmp_path))
    for text in (*TEXT, "1234 e\u0301  \n x"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_what_is_not_known_stays_as_it_is(tmp_path: Path) -> None:
    files = files_of(tmp_path, "SomebodysTokenizer")
    assert with_tokenizer_json(files) == files
    whole = {**files, "tokenizer.json": b"{}"}
    assert with_tokenizer_json(whole) == whole


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("vocab.json", b"[]", "vocab.json"),
        ("vocab.json", b'{"a": -1}', "vocab.json"),
        ("vocab.json", b'{"a": "b"}', "vocab.json"),
        ("vocab.json", b'{"a": 0}', "merges.txt"),
        ("merges.txt", b"#version: 0.2\nnever seen\n", "merges.txt"),
        ("merges.txt", b"\xff\xfe", "merges.txt"),
        ("added_tokens.json", b'{"<|mask|>": 7000}', "<|mask|>"),
    ],
)
def test_files_that_contradict_each_other_are_named(
    tmp_path: Path, name: str, text: bytes, said: str
) -> None:
    files = {**files_of(tmp_path, "Qwen2Tokenizer"), name: text}
    if name == "added_tokens.json":
        del files["tokenizer_config.json"]
        files["tokenizer_config.json"] = b'{"tokenizer_class": "Qwen2Tokenizer"}'
    with pytest.raises(ConfigError) as error:
        with_tokenizer_json(files)
    assert said in str(error.value)


def test_a_checkpoint_without_tokenizer_json_takes_text(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "dream", "dream", vocab_size=400)
    (folder / "tokenizer.json").unlink()
    (tmp_path / "files").mkdir()
    for name, data in files_of(tmp_path / "files", "DreamTokenizer").items():
        (folder / name).write_bytes(data)
    checkpoint = open_checkpoint(folder)
    assert Tokenizer.from_buffer(checkpoint.tokenizer_files()["tokenizer.json"]).encode("it's").ids
