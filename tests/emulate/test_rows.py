"""Every form of the PTX table can be parsed and decoded: what prints can be emulated."""

from __future__ import annotations

import pytest

from sapper import emulate
from sapper.targets.ptx.rows import Form
from tests.targets.ptx_probes import forms, module

FORMS = forms()


@pytest.mark.parametrize("part", range(8))
def test_probes_are_decoded(part: int) -> None:
    some: list[Form] = FORMS[part::8]
    text, told = module("sm_90a", (9, 0), some)
    text = text.replace(" .param .b32 passed;\n", " .param .b32 passed;\n bra done;\n")
    loaded = emulate.load(text)
    assert len(told) > len(some) * 0.9
    for kernel in loaded.kernels:
        loaded.launch(kernel, block=(128,), arguments=[bytes(128)])
