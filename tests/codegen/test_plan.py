"""Regions: every launch is in one."""

from __future__ import annotations

from planned import Model, planned

from dcompile.codegen.cpu.lower import lower


def test_regions_cover_the_launches() -> None:
    plan = lower(planned(Model())).plan
    assert [(r["kind"], r["start"]) for r in plan["regions"]] == [("native", 0)]
    assert plan["regions"][-1]["end"] == len(plan["launches"])
