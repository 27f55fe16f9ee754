"""Calibration on the toy: shares counted again, the choice, and defaults that are written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from toy import EOS, MASK, VOCAB, Toy

from dcompile import cli
from dcompile.decoding.calibrate import Calibration, Trial, calibrate, record
from dcompile.errors import OptionError, RequestError
from dcompile.runtime.decode import caches
from dcompile.runtime.decode.loop import Runner

DRAW = random.Random(11)
TOKENS = [token for token in range(VOCAB) if token != MASK]
PROMPTS = [DRAW.choices(TOKENS, k=length) for length in range(1, 9)]


def before_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def test_agreement_is_counted_against_the_uncached_decode(tmp_path: Path, code: bytes) -> None:
    case = Toy(cache="dual", batch=3)
    runner = toy.load(tmp_path, case, code)
    found = calibrate(runner, PROMPTS, gen_length=8, agreement=0.5, thresholds=(0.3, 1.0))
    assert runner.cache is caches.dual
    reference = [toy.decode(Toy(), prompt, 8, 1.0) for prompt in PROMPTS]
    assert found.reference_forwards == sum(forwards for _, forwards in reference) / len(PROMPTS)
    for trial in found.trials:
        tried = [toy.decode(case, prompt, 8, trial.threshold) for prompt in PROMPTS]
        same = sum(
            before_end(a) == before_end(b) for (a, _), (b, _) in zip(tried, reference, strict=True)
        )
        assert trial.agreement == same / len(PROMPTS)
        assert trial.forwards == sum(forwards for _, forwards in tried) / len(PROMPTS)


def test_without_a_cache_the_reference_agrees_with_itself(tmp_path: Path, code: bytes) -> None:
    found = calibrate(toy.load(tmp_path, Toy(), code), PROMPTS, gen_length=8, agreement=1.0)
    assert found.trials[-1].agreement == 1.0 and found.chosen is not None


@given(
    shares=st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=1, max_size=6),
    wanted=st.sampled_from([0.4, 0.9, 1.0]),
)
def test_every_threshold_from_the_chosen_one_on_agrees(shares: list[float], wanted: float) -> None:
    trials = tuple(Trial(i / 8, share, 1.0) for i, share in enumerate(shares))
    found = Calibration(10, wanted, 2.0, trials)
    chosen = found.chosen
    good = [all(share >= wanted for share in shares[i:]) for i in range(len(shares))]
    assert chosen == (trials[good.index(True)] if True in good else None)
    assert found.text().count("<") == (chosen is not None)


@pytest.mark.parametrize("folder", [True, False])
def test_recorded_defaults_are_used(folder: bool, tmp_path: Path, code: bytes) -> None:
    path = toy.write(tmp_path / ("toy" if folder else "toy.dcx"), Toy(), code)
    before = Runner.load(path).artifact
    record(path, {"threshold": 0.3})
    runner = Runner.load(path)
    assert runner.limits.parameters == {"threshold": 0.3}
    assert runner.artifact.manifest["files"] == before.manifest["files"]
    results = runner.generate(PROMPTS, gen_length=8)
    assert [r.all_tokens for r in results] == [toy.decode(Toy(), p, 8, 0.3)[0] for p in PROMPTS]
    with pytest.raises(OptionError, match="it has: threshold"):
        record(path, {"steps": 3.0})


def test_refuses(tmp_path: Path, code: bytes) -> None:
    runner = toy.load(tmp_path, Toy(), code)
    with pytest.raises(RequestError, match="no share"):
        calibrate(runner, PROMPTS, gen_length=8, agreement=1.5)
    with pytest.raises(RequestError, match="no prompt"):
        calibrate(runner, [], gen_length=8)


def test_the_command(tmp_path: Path, code: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = toy.write(tmp_path / "toy.dcx", Toy(), code)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS))

    def call(*more: str) -> int:
        with pytest.raises(SystemExit) as caught:
            cli.main(["calibrate", str(path), "--prompts", str(file), "--gen-length", "8", *more])
        return int(caught.value.code or 0)

    assert call("--agreement", "0.99") == 0
    out, err = capsys.readouterr()
    chosen = next(float(line.split()[0]) for line in out.splitlines() if line.endswith("<"))
    assert out.count("%") == 11 and f"--threshold {chosen:g}" in err
    assert call("--record", "-q") == 0
    assert Runner.load(path).limits.parameters["threshold"] == chosen
    assert call("--agreement", "7") == 1


def test_the_command_says_that_none_agrees(
    tmp_path: Path, code: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy.write(tmp_path / "toy.dcx", Toy(cache="dual", block=8), code)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS))
    with pytest.raises(SystemExit) as caught:
        cli.main(["calibrate", str(path), "--prompts", str(file), "--gen-length", "16"])
    assert caught.value.code == 1
    assert "no threshold agrees" in capsys.readouterr().err
