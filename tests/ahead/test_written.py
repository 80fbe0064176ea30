"""Functions of a model's file that are written by hand: checked as they are made."""

from __future__ import annotations

import pytest

from sapper.ahead.written import written
from sapper.assembly.errors import AssemblyError

GOOD = """
    push rbx
    sub rsp, 32
    mov rbx, rdi
    mov qword ptr [rsp + 8], rsi
    call twice
    add rbx, qword ptr [rsp + 8]
    mov rax, rbx
    add rsp, 32
    pop rbx
    ret
twice:
    add rbx, rbx                    # what lies in rbx here is the caller's business
    ret
"""


def test_a_routine_is_checked_where_it_is_called() -> None:
    made = written("f", GOOD)
    assert [i.row.mnemonic for i in made.machine.body if hasattr(i, "row")].count("call") == 1


@pytest.mark.parametrize(("find", "put", "kind", "line"), [
    ("    pop rbx\n    ret\ntwice", "    ret\ntwice", "stack", 9),
    ("sub rsp, 32", "sub rsp, 24", "stack", 9),
    ("    mov qword ptr [rsp + 8], rsi\n", "", "undefined", 5),
    ("    mov rbx, rdi\n", "", "undefined", 11),
    ("    push rbx\n    sub rsp, 32", "    sub rsp, 40", "callee-saved", 9),
    ("    add rbx, rbx ", "    add rbx, r10 ", "undefined", 12),
    ("    add rbx, rbx ", "    push rbx ", "undefined", 6),
    ("    add rbx, rbx ", "    jb twice ", "flags", 12),
    ("    add rbx, rbx ", "    call twice ", "loop", 12),
    ("    mov rax, rbx\n", "    mov rax, r15\n", "undefined", 7),
    ("    add rsp, 32\n", "    vpxor ymm0, ymm0, ymm0\n    add rsp, 32\n", "mixing", 11),
    ("    ret\ntwice", "    ret\n    mov eax, 1\n    ret\ntwice", "unreachable", 11),
], ids=["pop left out", "too little given back", "slot never written", "register of the caller", "another depth",
        "register that holds nothing", "push in a routine", "flags of nobody", "calls itself",
        "register of the caller's", "upper halves", "dead code"])
def test_a_slip_is_refused_at_its_line(find: str, put: str, kind: str, line: int) -> None:
    assert GOOD.count(find) == 1
    with pytest.raises(AssemblyError) as caught:
        written("f", GOOD.replace(find, put))
    assert caught.value.kind == kind, caught.value
    assert caught.value.location is not None and caught.value.location.line == line, caught.value
