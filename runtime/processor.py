"""What this process may use of the processor it runs on."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_CPUINFO = Path("/proc/cpuinfo")
# asm/prctl.h and the number of the state component: a process has AMX's tiles only after it asked.
_SYS_ARCH_PRCTL, _REQUEST, _TILES = 158, 0x1023, 18


def cpu_flags() -> frozenset[str]:
    """What the processor can do, in the kernel's words (`avx2`, `avx512_bf16`, `amx_bf16`, ...).

    AMX is among it only where the kernel lets this process have the tiles; asking for them is done here.
    """
    flags = _listed()
    if "amx_tile" in flags and not _granted():
        log.warning("the processor has AMX, but the kernel refuses its tiles: using AVX-512")
        flags = frozenset(f for f in flags if not f.startswith("amx_"))
    return flags


def _listed() -> frozenset[str]:
    try:
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


@cache
def _granted() -> bool:
    """Ask for the tiles, for all threads of this process."""
    try:
        return bool(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _REQUEST, _TILES) == 0)
    except (OSError, AttributeError):
        return False
