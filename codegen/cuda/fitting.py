"""Tiles that pass the gate: where a kernel is refused, its operator is launched with the next smaller ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dcompile.codegen.cuda.select import Site
from dcompile.codegen.triton import gate
from dcompile.codegen.triton.aot import compile_variants
from dcompile.codegen.triton.variant import Lowering, Variant

Refusals = dict[str, list[dict[str, list[str]]]]
"""A kernel's name -> for each choice of tiles that was refused, what the gate said by architecture."""
MOST = 8


def fit(
    sites: Iterable[Site], architectures: Sequence[int], sources: Mapping[str, str]
) -> Refusals:
    """Compile what the sites launch; those that the gate refuses get smaller tiles, until it takes them.

    A plan has one grid for all its architectures, so tiles must pass on each.  The same program and
    compiler give the same tiles.  What is refused to the end stays, for the gate at the build to name.
    """
    open_sites = [site for site in sites if site.make is not None]
    refusals: Refusals = {}
    for smaller in range(1, MOST + 1):
        refused = _refused([site.lowering for site in open_sites], architectures, sources)
        left = []
        for site in open_sites:
            names = [_content(s.variant) for s in site.lowering.steps]
            problems = [(n, refused[n]) for n in names if n in refused]
            if not problems or site.make is None:
                continue
            made = site.make(smaller=smaller)
            if made == site.lowering:
                continue
            for step, name in zip(site.lowering.steps, names, strict=True):
                if name in refused and refused[name] not in refusals.get(step.variant.name, []):
                    refusals.setdefault(step.variant.name, []).append(refused[name])
            site.lowering = made
            left.append(site)
        if not left:
            break
        open_sites = left
    return refusals


def _content(variant: Variant) -> str:
    """What tells a variant from others of the same name: a site's tiles may have become smaller."""
    return repr((variant.name, variant.constants, variant.arguments, variant.num_stages))


def _refused(
    lowerings: Sequence[Lowering], architectures: Sequence[int], sources: Mapping[str, str]
) -> dict[str, dict[str, list[str]]]:
    distinct = {_content(s.variant): s.variant for made in lowerings for s in made.steps}
    found: dict[str, dict[str, list[str]]] = {}
    for arch in architectures:
        compiled = compile_variants(list(distinct.values()), arch, sources)
        for content, one in zip(distinct, compiled, strict=True):
            if problems := list(gate.problems(one)):
                found.setdefault(content, {})[f"sm_{arch}"] = problems
    return found
