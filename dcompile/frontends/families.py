"""Which file defines the model that a config names."""

from __future__ import annotations

from collections.abc import Callable

from dcompile.errors import UnknownArchitecture
from dcompile.frontends import dream, llada, llada2, llada_moe, sdar
from dcompile.frontends.base import Config, Definition

Read = Callable[[Config], Definition]

FAMILIES: dict[str, Read] = {
    "LLaDAModelLM": llada.read,
    "LLaDAMoEModelLM": llada_moe.read,
    "LLaDA2MoeModelLM": llada2.read,
    "DreamModel": dream.read,
    "SDARForCausalLM": sdar.read,
    "SDARMoeForCausalLM": sdar.read_moe,
}


def family_of(config: Config) -> Read:
    """The reader for the architecture that the config names."""
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise config.error("architectures", f"a list with one of {', '.join(FAMILIES)}")
    if named[0] not in FAMILIES:
        raise UnknownArchitecture(
            f"no frontend defines the architecture {named[0]!r}",
            where=config.file,
            remedy=(
                f"known are {', '.join(FAMILIES)}; any other nn.Module compiles through the "
                "Python API: dcompile.compile(module, ...)"
            ),
        )
    return FAMILIES[named[0]]
