"""`dcompile run`: what goes where, in which order, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy
from commands import call, fails
from texts import write_tokenizer
from toy import EOS, MASK, Toy
from words import WORDS

from dcompile.cli.printed import Stream, summary
from dcompile.runtime.decode.sequence import Result

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c"
"""What ends a line for Python, and none in JSON."""


def test_json_is_one_object_and_nothing_else(
    artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt-ids", "1,3, 4", "--gen-length", "12", "--threshold", "0.5", "--json"]
    assert call("run", artifact, *asked) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    found = json.loads(out)
    wanted, forwards = toy.decode(Toy(), [1, 3, 4], 12, 0.5)
    keys = "tokens all_tokens text forwards tokens_per_forward seconds tokens_per_second"
    assert list(found) == keys.split()
    assert (found["all_tokens"], found["forwards"]) == (wanted, forwards)
    assert found["tokens"] == (wanted[: wanted.index(EOS)] if EOS in wanted else wanted)
    assert found["text"] is None and found["seconds"] > 0


def test_any_length_is_generated(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", artifact, "--prompt-ids", "1,3,4", "-n", "7", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["all_tokens"] == toy.decode(Toy(), [1, 3, 4], 8)[0][:7]


def test_prompts_are_answered_in_order(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [[1], [3, 4, 5], [8, 9], [], [10] * 9]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps({"prompt_ids": ids}) for ids in prompts) + "\n")
    asked = ["--prompts", str(file), "--gen-length", "8", "--json", "--no-early-stop"]
    assert call("run", artifact, *asked) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = [toy.decode(Toy(), ids, 8, early_stop=False) for ids in prompts]
    assert [(line["all_tokens"], line["forwards"]) for line in lines] == wanted


def test_a_queue_is_answered_first_done_first(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [[1], [3, 4, 5], [8, 9], [], [10] * 9]
    file = tmp_path / "queue.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts))
    asked = ["--queue", str(file), "--gen-length", "8", "--no-early-stop"]
    assert call("run", artifact, *asked) == 0
    out, err = capsys.readouterr()
    lines = {line["index"]: line for line in map(json.loads, out.splitlines())}
    assert err == "" and sorted(lines) == list(range(5))
    for index, ids in enumerate(prompts):
        found = (lines[index]["all_tokens"], lines[index]["forwards"])
        assert found == toy.decode(Toy(), ids, 8, early_stop=False)
    assert fails(capsys, 1, "run", artifact, "--queue", "/no/such").startswith("RequestError")


def test_text(talking: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", talking, "--prompt", "a b", "--gen-length", "8", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == "" and set(out.split()) <= {*WORDS}
    assert call("run", talking, "--prompt", "a b", "--gen-length", "8") == 0
    assert capsys.readouterr().err.count(" forwards, ") == 1


def test_a_stream_adds_up_to_the_result(
    artifact: str, talking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, asked in [(artifact, ["--prompt-ids", "5,3"]), (talking, ["--prompt", "a b c"])]:
        ask = ["run", path, *asked, "--gen-length", "24", "-q"]
        for more in ([], ["--no-early-stop"], ["--temperature", "1", "--seed", "3"]):
            assert call(*ask, *more) == 0
            whole = capsys.readouterr().out
            assert call(*ask, *more, "--stream") == 0
            assert capsys.readouterr().out == whole
    assert call("run", artifact, "--prompt-ids", "5,3", "--json", "--stream") == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert err.strip()


def test_a_stream_of_several(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt_ids": [1]}\n{"prompt_ids": [3]}\n')
    ask = ["run", artifact, "--prompts", str(file), "--gen-length", "8", "-q"]
    assert call(*ask, "--stream", "--no-early-stop") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line[:3] for line in lines) == ["[0]", "[0]", "[1]", "[1]"]


def test_the_length_may_be_left_out(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", artifact, "--prompt-ids", "1,3,4", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["all_tokens"]) == 28


def test_any_parameter_can_be_set(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for asked in (["--threshold", "0.2"], ["--set", "threshold=0.2"]):
        assert call("run", artifact, "--prompt-ids", "1", "--gen-length", "8", "-q", *asked) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--prompt", "text"], "no tokenizer"),
        (["--prompt-ids", str(MASK)], "mask id"),
        (["--prompt-ids", "99"], "outside the vocabulary"),
        (["--prompt-ids", "1", "--gen-length", "0"], "0 tokens"),
        (["--prompt-ids", "1", "--gen-length", "400"], "--max-length"),
        (["--prompt-ids", "1", "--threshold", "2"], "at most 1"),
        (["--prompt-ids", "1", "--temperature", "nan"], "temperature"),
        (["--prompt-ids", "1", "--steps", "4"], "it has: threshold"),
        (["--prompt-ids", "1", "--set", "seed=4"], "it has: threshold"),
        (["--prompt-ids", "1", "--seed", str(1 << 70)], "64 bits"),
        (["--prompts", "/no/such/file"], "/no/such/file"),
    ],
)
def test_a_named_error(
    asked: list[str], words: str, artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails(capsys, 1, "run", artifact, *asked)
    assert words in err and err.startswith("RequestError: ")


@pytest.mark.parametrize(
    "line", ["hello", "[]", "{}", '{"prompt": 3}', '{"prompt": "a", "prompt_ids": [1]}', "[" * 9999]
)
def test_a_bad_line_is_named(
    line: str, artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt_ids": [1]}\n' + line)
    assert f"{file}:2" in fails(capsys, 1, "run", artifact, "--prompts", str(file), "--json")


def test_only_a_line_feed_ends_a_line(
    talking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"a{end} b"}, ensure_ascii=False) for end in SEPARATORS]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n \n{")
    assert f"{file}:{len(lines) + 2}" in fails(capsys, 1, "run", talking, "--prompts", str(file))
    file.write_bytes(file.read_bytes()[:-1])
    assert call("run", talking, "--prompts", str(file), "--gen-length", "4", "--json") == 0
    assert len(capsys.readouterr().out.split("\n")) == len(lines) + 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "no characters"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "not JSON"),
    ],
)
def test_a_line_that_is_no_text_is_named(
    line: bytes, words: str, talking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    err = fails(capsys, 1, "run", talking, "--prompts", str(file))
    assert words in err and f"{file}:2" in err


def test_a_stream_ends_with_what_was_held_back(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, {})
    runner: Any = SimpleNamespace(
        decode=tokenizer.decode, limits=SimpleNamespace(eos_ids=frozenset())
    )
    for several in (False, True):
        out = io.StringIO()
        stream = Stream(runner, out, several)
        torn = tokenizer.encode("a🦙")[:3]
        for token in torn:
            stream(0, [token])
        stream.end()
        pieces = out.getvalue().replace("[0] ", "").replace("\n", "")
        assert pieces == tokenizer.decode(torn) == "a\ufffd"


def test_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", str(tmp_path / "none.dcx"), "--prompt-ids", "1"]
    assert fails(capsys, 1, *asked).startswith("ArtifactError: there is no such artifact")


@pytest.mark.parametrize(
    ("kept", "decoded", "forwards", "words"),
    [
        (6, 16, 1, "6 tokens kept of 16 decoded in 1 forward, 16.00 a forward; 3.0 kept a second"),
        (16, 16, 5, "16 tokens in 5 forwards, 3.20 a forward; 8.0 a second"),
        (0, 7, 3, "0 tokens kept of 7 decoded in 3 forwards, 2.33 a forward; 0.0 kept a second"),
    ],
)
def test_the_summary_multiplies(kept: int, decoded: int, forwards: int, words: str) -> None:
    tokens = list(range(kept))
    result = Result(tokens, tokens, None, forwards, decoded / forwards, 2.0, kept / 2.0)
    assert summary(result) == words


@pytest.mark.parametrize("ask", [["--prompt", "a \udcff"], ["--prompts", "{file}"]])
def test_bytes_that_are_no_text_are_refused(
    ask: list[str], talking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "\\ud800"}\n')
    asked = [part.format(file=file) for part in ask]
    assert "no characters" in fails(capsys, 1, "run", talking, *asked)
