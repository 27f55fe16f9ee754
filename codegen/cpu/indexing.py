"""Sizes and places of elements as C text and as the ABI's."""

from __future__ import annotations

from dcompile.ir.sizes import Size


def abi_size(size: Size) -> str:
    """A size as the touches of a launch have it: `2*R+1`."""
    if isinstance(size, int):
        return str(size)
    terms = [f"{factor}*{name}" if name else str(factor) for name, factor in size.items()]
    return "+".join(term.removeprefix("1*") for term in terms).replace("+-", "-")


def c_size(size: Size) -> str:
    """A size as a C expression that can be multiplied."""
    if isinstance(size, int):
        return str(size)
    terms = [f"{factor} * {name}" if name else str(factor) for name, factor in size.items()]
    text = " + ".join(t.removeprefix("1 * ") for t in terms)
    return text if len(terms) == 1 and "*" not in text else f"({text})"


def indices_of(shape: list[str]) -> list[str]:
    """The loop variables of a nest over the shape."""
    return [f"i{d}" for d in range(len(shape))]


def linear(index: list[str], shape: list[str]) -> str:
    """The place of an element in contiguous memory."""
    text = ""
    for i, size in zip(index, shape, strict=True):
        text = i if not text else f"({text} * {size} + {i})"
    return text or "0"


def reshaped(index: list[str], new: list[str], old: list[str]) -> list[str]:
    """The index in the old shape of an element of the new one."""
    kept_new = [(i, s) for i, s in zip(index, new, strict=True) if s != "1"]
    kept_old = [s for s in old if s != "1"]
    if [s for _, s in kept_new] == kept_old:
        left = iter(i for i, _ in kept_new)
        return ["0" if s == "1" else next(left) for s in old]
    rest = linear(index, new)
    out = []
    for d, _ in enumerate(old):
        inner = " * ".join(old[d + 1 :]) or "1"
        text = f"(({rest}) / ({inner}))" if inner != "1" else f"({rest})"
        out.append(text if d == 0 else f"({text} % {old[d]})")
    return out
