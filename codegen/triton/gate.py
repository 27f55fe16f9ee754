"""What a compiled kernel must keep to before it may go into an artifact.

No spills; shared memory within the chip's limit (the compiler accepts more, only the loader refuses);
128-bit loads where rows are contiguous; tensor-core instructions where the kernel has a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dcompile.codegen.triton.aot import Compiled
from dcompile.codegen.triton.assemble import PACKAGE
from dcompile.codegen.triton.tiles import ARCHITECTURES
from dcompile.errors import BuildError

# Kernels that multiply matrices, and those that read whole rows, with the constant that says how long.
PRODUCTS = frozenset(
    (
        *("linear:linear", "linear:gated", "attend:attend", "route:route_product"),
        *("moe_ffn:gate_up", "moe_ffn:down", "vocab_choice:choose_partly"),
        *("soft_embed:soften", "soft_embed:mix"),
    )
)
ROW_LENGTH = {
    **{"linear:linear": "K", "linear:gated": "K", "route:route_product": "K"},
    **{"moe_ffn:gate_up": "K", "moe_ffn:down": "K", "vocab_choice:choose_partly": "D"},
    **{"soft_embed:soften": "D", "soft_embed:mix": "N"},
    **{"attend:attend": "SIZE", "norms:rms_norm": "D", "gather:gather_rows": "WIDTH"},
    **{"gather:canvas_embedding": "WIDTH", "silu_mul:activate_and_multiply": "F"},
}
HALF = ("*bf16", "*fp16")


def problems(compiled: Compiled) -> Iterator[str]:
    """What is wrong with a binary; nothing where it may be used."""
    if compiled.stack:
        yield f"spills: {compiled.stack} bytes of stack a thread, {compiled.registers} registers"
    shared, limit = compiled.dynamic_shared, ARCHITECTURES[compiled.arch].shared
    if shared + compiled.static_shared > limit:
        yield f"shared memory: {shared + compiled.static_shared} bytes, the chip has {limit}"
    kernel = compiled.variant.kernel.removeprefix(f"{PACKAGE}.")
    found = compiled.instructions
    tensor_cores = found["mma"] + found["wgmma"] + found["tcgen05"]
    if kernel in PRODUCTS and _is_half(compiled) and not tensor_cores:
        yield "a product without tensor-core instructions"
    if _has_wide_rows(compiled, kernel):
        if not found["wide_loads"]:
            yield "contiguous rows, but no 128-bit load"
        if found["narrow_loads"]:
            yield f"contiguous rows, but {found['narrow_loads']} loads of two bytes"


def check(compiled: Sequence[Compiled]) -> None:
    """Raise BuildError with every binary that the gate refuses, and why."""
    wrong = [
        f"{one.variant.name} for sm_{one.arch}: {problem}"
        for one in compiled
        for problem in problems(one)
    ]
    if wrong:
        several = f"{len(wrong)} kernels are refused" if len(wrong) > 1 else "a kernel is refused"
        raise BuildError(
            f"{several}: {'; '.join(wrong)}",
            where="the gate on compiled kernels (codegen/triton/gate.py)",
            remedy="choose other tiles (codegen/triton/tiles.py), or --target cpu",
        )


def _is_half(compiled: Compiled) -> bool:
    """Whether the product is of halves: weights say so, where there are any."""
    arguments = compiled.variant.arguments
    factors = [p for p in arguments if p.name == "w"] or arguments
    return any(p.type in HALF for p in factors)


def _has_wide_rows(compiled: Compiled, kernel: str) -> bool:
    """Rows are long enough for every thread, start at 16 bytes, and their pointers say so."""
    length = dict(compiled.variant.constants).get(ROW_LENGTH.get(kernel, ""))
    pointers = [p for p in compiled.variant.arguments if p.is_pointer]
    aligned = all(p.aligned for p in pointers)
    return isinstance(length, int) and length % 64 == 0 and length >= 128 and aligned
