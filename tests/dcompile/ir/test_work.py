"""Work of operators over operands that are packed, read in part, or in no memory."""

from __future__ import annotations

from dcompile.ir.work import Extent, Operands, Touched, Work, formulas

NOWHERE = 0


def linear(weight_bytes: float, y_bytes: float = 4 * 3 * 6) -> Work:
    given = {
        "input": Extent((3, 5), 4 * 3 * 5),
        "weight": Extent((6, 5), weight_bytes),
        "y": Extent((3, 6), y_bytes),
    }
    return formulas.linear(Operands(given), Touched())


def test_bytes_of_a_weight_are_its_tensors_in_any_layout() -> None:
    plain, quantised = linear(4 * 6 * 5), linear(23)
    assert (plain.streamed, quantised.streamed) == (120, 23)
    assert plain.bytes - quantised.bytes == 97
    assert plain.flops == quantised.flops == 2 * 3 * 6 * 5


def test_what_is_fused_away_is_computed_and_not_moved() -> None:
    whole, fused = linear(120), linear(120, NOWHERE)
    assert whole.bytes - fused.bytes == 4 * 3 * 6
    assert (whole.flops, whole.streamed) == (fused.flops, fused.streamed)


def test_experts_without_a_row_are_not_read() -> None:
    experts, hidden, width, rows, k = 8, 4, 6, 5, 2
    given = Operands(
        {
            "x": Extent((rows, hidden), 80),
            "experts": Extent((rows, k), 40),
            "gate_up": Extent((experts, 2 * width, hidden), 800),
            "down": Extent((experts, hidden, width), 400),
        }
    )
    looked = formulas.moe_ffn(given, Touched(experts=3, slots=9))
    assert looked.streamed == 3 * 150 and looked.flops == 6 * 9 * hidden * width
    guessed = formulas.moe_ffn(given, Touched())
    assert guessed.flops == 6 * rows * k * hidden * width
    assert guessed.streamed == 1200 * (1 - (1 - k / experts) ** rows)


def test_attention_streams_the_keys_of_earlier_iterations() -> None:
    slots, length, groups, size, rows, heads = 2, 10, 3, 4, 5, 6
    cache = Extent((slots, length, groups, size), slots * length * 24)
    out = Extent((rows, heads, size), 480)
    given = Operands({"o": out, "q": out, "keys": cache, "values": cache})
    work = formulas.attend(given, Touched(fresh=rows, seen=rows * 8, read=8))
    assert work.flops == 4 * rows * 8 * heads * size
    assert work.bytes == 2 * 480 + 8 * 48 and work.streamed == (8 - rows) * 48


def test_rows_of_a_table_are_its_share() -> None:
    given = {"weight": Extent((100, 8), 1600), "out": Extent((5, 8), 80)}
    work = formulas.embedding(Operands({**given, "indices": Extent((5,), 40)}), Touched())
    assert work == Work(bytes=5 * 16 + 80 + 40, flops=0)


def test_candidates_that_are_decided_are_not_computed() -> None:
    given = {"x": Extent((2, 4, 8), 256), "weight": Extent((50, 8), 999)}
    some = formulas.vocab_choice(Operands(given), Touched(live=3))
    every = formulas.vocab_choice(Operands(given), Touched())
    assert some.flops == 2 * 3 * 50 * 8 and every.flops == 2 * 8 * 50 * 8
    assert some.streamed == every.streamed == 999 and every.bytes - some.bytes == 5 * 32
