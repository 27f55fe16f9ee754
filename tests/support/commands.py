"""Calls the command line inside of the test's process."""

from __future__ import annotations

import pytest

from dcompile import cli


def call(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """What a command that fails with `code` says on standard error, and there alone."""
    assert call(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err
