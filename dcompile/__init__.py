"""dcompile: an ahead-of-time compiler for diffusion language models.

runner = dcompile.compile("checkpoint/", max_length=512)
runner = dcompile.load("model.dcx")
results = runner.generate(["prompt"], gen_length=64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcompile.driver.compile import compile_model as compile
    from dcompile.options import Options
    from dcompile.runtime.decode.loop import Runner

    load = Runner.load

__all__ = ["Options", "Runner", "compile", "load"]


def __getattr__(name: str) -> object:
    """Public names, loaded on first use: the runtime must not pull in the compiler."""
    if name == "compile":
        from dcompile.errors import naming_missing

        with naming_missing("dcompile.compile"):
            from dcompile.driver.compile import compile_model
        return compile_model
    if name == "Options":
        from dcompile.options import Options

        return Options
    if name in ("Runner", "load"):
        from dcompile.driver.missing_kernels import install
        from dcompile.runtime.decode.loop import Runner

        install()
        return Runner if name == "Runner" else Runner.load
    raise AttributeError(f"module 'dcompile' has no attribute {name!r}")
