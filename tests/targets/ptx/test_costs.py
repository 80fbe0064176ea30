"""Costs of PTX: figures that whitepapers and the programming guide give, and that every form has one."""

from __future__ import annotations

import pytest

from sapper.targets.ptx.costs import SCHEDULERS, cost_of, rate
from sapper.targets.ptx.instructions import TABLE
from sapper.targets.ptx.rows import form
from sapper.targets.ptx.target import TARGETS, known_targets


@pytest.mark.parametrize("level", known_targets())
def test_each_form_has_a_cost(level: str) -> None:
    for row in TABLE.rows.values():
        for text in row.mnemonics(8):
            cost = cost_of(TABLE.form(text), level)
            assert cost.issues >= 1 and (cost.cycles > 0) == bool(cost.unit), text


@pytest.mark.parametrize(("level", "ghz", "tera"), [("sm_80", 1.41, 312), ("sm_86", 1.695, 125), ("sm_89", 2.52, 362),
                                                    ("sm_90a", 1.83, 989)])
def test_tensor_cores_reach_the_peak_of_the_data_sheet(level: str, ghz: float, tera: float) -> None:
    """Dense bf16 of an A100, A10, L40S and H100 SXM, at their boost clocks."""
    product = cost_of(form("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"), level)
    peak = TARGETS[level].processors * ghz * product.operations / product.cycles / 1e3
    assert peak == pytest.approx(tera, rel=0.03)


@pytest.mark.parametrize(("level", "ghz", "tera"), [("sm_80", 1.41, 19.5), ("sm_86", 1.695, 31.2),
                                                    ("sm_90a", 1.98, 67)])
def test_fused_multiply_adds_reach_theirs(level: str, ghz: float, tera: float) -> None:
    fma = cost_of(form("fma.rn.f32"), level)
    assert TARGETS[level].processors * ghz * fma.operations / fma.cycles / 1e3 == pytest.approx(tera, rel=0.03)
    assert fma.cycles >= fma.issues / SCHEDULERS


def test_memory_and_what_is_wide() -> None:
    assert cost_of(form("ld.global.v4.b32"), "sm_80").cycles == 4 * cost_of(form("ld.global.b32"), "sm_80").cycles == 4
    assert cost_of(form("ld.global.v4.b32"), "sm_80").loaded_bytes == 512
    assert cost_of(form("ld.shared.b32"), "sm_80").loaded_bytes == 0
    assert cost_of(form("st.global.b16"), "sm_80").stored_bytes == 64
    assert cost_of(form("cp.async.cg.shared.global"), "sm_80").loaded_bytes == 512
    assert cost_of(form("add.s64"), "sm_80").issues == 2 and cost_of(form("mul.lo.s64"), "sm_80").issues == 3
    group = cost_of(form("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"), "sm_90a")
    assert group.operations == 2 * 64 * 256 * 4  # a warp's quarter
    assert rate("tensor", "sm_90a") == 2 * rate("tensor", "sm_80")
