"""Compare a CUDA artifact's kernels with what the compiler makes: variants, printed functions, binaries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dcompile.codegen.targets import Target
from dcompile.codegen.triton.aot import compiler_version
from dcompile.errors import VerificationError
from dcompile.runtime.artifact import Artifact
from dcompile.untrusted import parse_json

if TYPE_CHECKING:
    from dcompile.codegen.cuda.lower import CudaLowered

_AGAIN = "compile the checkpoint again with this version"


def compare_kernels(artifact: Artifact, lowered: CudaLowered, target: Target) -> str:
    """Raise VerificationError at the first kernel that departs; a sentence otherwise.

    Binaries are compared bit by bit where the installed Triton is the one that made the artifact's: another
    makes others of the same kernels.
    """
    from dcompile.codegen.cuda.artifact import PRINTED, TABLE, build_cuda

    files = build_cuda(lowered, target.architectures)
    held, wanted = parse_json(artifact.bytes(TABLE)), json.loads(files[TABLE])
    for name in sorted({*held["kernels"], *wanted["kernels"]}):
        if _kernel(held, name) != _kernel(wanted, name):
            what = f"kernel {name} is not what this compiler launches"
            raise VerificationError(what, where=TABLE, remedy=_AGAIN)
    printed = artifact.text(PRINTED).encode() if PRINTED in artifact.names else None
    if printed != files.get(PRINTED):
        what = "the functions that were printed are not what this compiler prints"
        raise VerificationError(what, where=PRINTED, remedy=_AGAIN)
    count = len(wanted["kernels"])
    if held["triton"] != compiler_version():
        return (
            f"{count} kernels: equal; binaries not compared: made by Triton {held['triton']}, "
            f"{compiler_version()} is installed\n"
        )
    binaries = sorted(name for name in files if name.endswith(".cubin"))
    for name in binaries:
        if name not in artifact.names or bytes(artifact.bytes(name)) != files[name]:
            what = "a binary is not what its kernel compiles to"
            raise VerificationError(what, where=name, remedy=_AGAIN)
    if held != wanted:
        what = "what is said of the kernels is not what this compiler says"
        raise VerificationError(what, where=TABLE, remedy=_AGAIN)
    return f"{count} kernels, {len(binaries)} binaries: equal\n"


def _kernel(table: dict[str, Any], name: str) -> object:
    """A kernel but for its binaries."""
    entry = table["kernels"].get(name)
    return entry and {key: value for key, value in entry.items() if key != "binaries"}
