"""`dcompile chat`: turns in the model's template, remembered until they are cleared."""

from __future__ import annotations

import io
import os
import pty
import sys
from pathlib import Path

import pytest
import toy
from commands import call, fails
from toy import Toy
from words import GENERATION, TEMPLATE, tokenizer_json

from dcompile.cli.conversation import Conversation
from dcompile.errors import RequestError
from dcompile.runtime.decode.loop import Runner


@pytest.fixture
def chatting(tmp_path: Path, code: bytes) -> str:
    files = {
        "tokenizer/tokenizer.json": tokenizer_json(),
        "tokenizer/chat_template.jinja": (TEMPLATE + GENERATION).encode(),
    }
    return str(toy.write(tmp_path / "chatting.dcx", Toy(length=128), code, **files))


def typing(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


def test_a_turn_is_answered_knowing_those_before(chatting: str) -> None:
    runner = Runner.load(chatting)
    conversation = Conversation(runner, None, 4, {})
    first = conversation.answer("a b").text
    second = conversation.answer("c").text
    said = f"user : a b assistant : {first} user : c assistant :"
    ids = runner.tokenizer.encode(said, special=False)
    (alone,) = runner.generate([ids], gen_length=4)
    assert second == alone.text and len(conversation.turns) == 4
    conversation.clear()
    assert conversation.answer("a b").text == first


def test_the_system_is_told_first(chatting: str) -> None:
    runner = Runner.load(chatting)
    conversation = Conversation(runner, "b", 4, {})
    conversation.answer("a")
    conversation.clear()
    ids = runner.tokenizer.encode("system : b user : c assistant :", special=False)
    (alone,) = runner.generate([ids], gen_length=4)
    assert conversation.answer("c").text == alone.text


def test_a_turn_that_fails_is_forgotten(chatting: str) -> None:
    conversation = Conversation(Runner.load(chatting), None, 4, {})
    conversation.answer("a")
    before = list(conversation.turns)
    with pytest.raises(RequestError, match="--max-length"):
        conversation.answer("a " * 200)
    assert conversation.turns == before


def test_lines_are_answered_in_order(
    chatting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, b"a b\n\nc\n/clear\na b\n")
    assert call("chat", chatting, "-n", "4") == 0
    out, err = capsys.readouterr()
    conversation = Conversation(Runner.load(chatting), None, 4, {})
    wanted = [conversation.answer("a b").text, conversation.answer("c").text]
    assert out.splitlines() == [*wanted, wanted[0]] and err == ""


def test_no_chat_template_is_said_by_name(
    talking: str, artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (talking, artifact):
        err = fails(capsys, 1, "chat", path)
        assert "no chat template" in err and path in err and "dcompile run" in err


@pytest.mark.parametrize("typed", [b"\xff\n", b"a " * 300 + b"\n"])
def test_what_cannot_be_answered_has_a_name(
    typed: bytes, chatting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, typed)
    assert fails(capsys, 1, "chat", chatting).startswith("RequestError: ")


def test_a_person_sees_blocks_and_may_begin_again(chatting: str) -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "dcompile", "chat", chatting, "-n", "8"])
    seen = _until(terminal, b"> ")
    for line in (b"a b\n", b"a " * 300 + b"\n", b"/clear\n"):
        os.write(terminal, line)
        seen += _until(terminal, b"> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert status == 0 and b"Traceback" not in seen
    assert b" a forward; " in seen and b"/clear begins again" in seen


def _until(terminal: int, mark: bytes) -> bytes:
    """What the terminal shows, up to a line that begins with `mark` and waits there."""
    seen = b""
    while not seen.rpartition(b"\n")[2].endswith(mark):
        seen += os.read(terminal, 4096)
    return seen
