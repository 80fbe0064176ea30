"""PTX as text: what the printer writes reads back to the same text, operands bound by name, refusals at their line."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Schedule, Tensor, f32, ptx, tiles
from sapper.assembly.errors import AssemblyError
from sapper.assembly.override import compile_by_hand
from sapper.assembly.warp import WarpAssembly
from sapper.codegen.machine import Immediate, Instruction
from sapper.codegen.pipeline import compile_kernel
from sapper.emulate import run
from sapper.emulate.by_hand import verify
from sapper.targets import target
from sapper.targets.ptx.instructions import TABLE
from sapper.targets.ptx.text import item_texts
from tests.strategies.amount import examples
from tests.strategies.malformed import mutations, refusals

N, = sp.dims("N"),
SM80 = target("sm_80")


def read(text: str, **names: Any) -> WarpAssembly:
    assembly = WarpAssembly("text", ptx.table)
    assembly.text(text, **names)
    return assembly


DECLARED = ".reg .b64 %rd<40>; .reg .b32 %r<40>; .reg .pred %p<40>; .reg .b16 %h<40>;"
"""As the printer declares registers."""


def plain_forms() -> list[Any]:
    """Of each row the first form whose operands are registers, addresses and integers."""
    found = []
    for row in TABLE.rows.values():
        form = TABLE.form(row.mnemonics(1)[0])
        if all(s.role in ("r", "w", "rw", "m", "i") and (s.role == "m" or s.bits in ptx.table.NAME_OF_BITS)
               for s in form.operands if s.role != "i"):
            found.append(form)
    return found


def test_a_form_of_each_row_reads_back() -> None:
    forms = plain_forms()
    assert len(forms) > 150
    for form in forms:
        made = WarpAssembly("printed", ptx.table)

        def register(spec: Any, made: WarpAssembly = made) -> Any:
            return made.new(ptx.table.NAME_OF_BITS[spec.bits])

        operands: list[Any] = []
        for spec in form.operands:
            if spec.role == "m":
                operands.append(ptx.ptr[made.b64() + 8])
            elif spec.role == "i":
                operands.append(1)
            else:
                operands.append(tuple(register(spec) for _ in range(spec.count)) if spec.count else register(spec))
        made.emit(form.mnemonic, operands, made.pred())
        (line,) = item_texts(made)
        again = read(f"{DECLARED}\n{line}")
        (item,) = (i for i in again.body if isinstance(i, Instruction))
        assert item.row.mnemonic == form.mnemonic and item_texts(again) == [line], line


def test_what_the_printer_makes_of_a_kernel_reads_back() -> None:
    @sp.kernel
    def softened(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.exp(x[n]) / (1.0 + sp.abs(x[n]))

    made = compile_kernel(softened, {}, dict.fromkeys("xy", "contiguous"), {"N": (1024, 16)}, SM80, None)
    body = made.text().partition("{\n")[2].rpartition("}")[0]
    # The words of the argument block have no registers that a text could name.
    lines = [line for line in body.splitlines() if "ld.param" not in line]
    again = read("\n".join(lines))
    printed = [line.partition("//")[0].strip() for line in lines if line.strip() and ".reg" not in line]

    def opcodes(texts: list[str]) -> list[str]:
        return [t.split(" ")[1 if t.startswith("@") else 0] for t in texts if t and not t.endswith(":")]

    assert opcodes(item_texts(again)) == opcodes(printed)
    assert [t for t in printed if "0f" in t] and \
        [t.split(", ")[-1] for t in item_texts(again) if "0f" in t] == [t.split(", ")[-1] for t in printed if "0f" in t]


@ptx.block("exp_as_text", inputs="f32", result="f32", implements="exp")
def exp_as_text(out: Any, x: Any) -> None:
    ptx.current().text("""
        .reg .f32 %n, %x, %f<2>;                     // as a compiler prints it
        max.NaN.f32 %x, @x, -104.0; min.NaN.f32 %x, %x, 89.0;
        mul.rn.f32 %n, %x, 0f3FB8AA3B;
        cvt.rni.f32.f32 %n, %n;                      /* x = (n + f) ln 2 */
        fma.rn.f32 %f0, %n, -0.693359375, %x;
        fma.rn.f32 %f0, %n, 0f395E8083, %f0;
        mul.rn.f32 %f0, %f0, 0f3FB8AA3B; ex2.approx.f32 %f0, %f0;
        { .reg .f32 %half; mul.rn.f32 %half, %n, 0.5; ex2.approx.f32 %half, %half;
          mul.rn.f32 %f1, %f0, %half; mul.rn.f32 @out, %f1, %half; }
    """, out=out, x=x)


def test_a_block_as_text_in_a_kernel() -> None:
    @sp.kernel
    def exponential(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.exp(x[n])

    x, y = np.linspace(-3, 3, 77, dtype=np.float32), np.zeros(77, np.float32)
    result = run(exponential, x, y, target="sm_80", schedule=Schedule(assembly=("exp_as_text",)))
    assert np.allclose(y, np.exp(x), rtol=1e-6)
    assert result.counters.instructions["ex2.approx.f32"] > 0


def make_scale() -> Any:
    @sp.kernel
    def scale(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = x[n] * 2.0 + 1.0

    return scale


def write_scale(a: Any, guard: str = "@!%out") -> None:
    """A kernel as text but for its arguments; guards, negated ones too, a loop, special registers."""
    worker, workers = a.worker()
    a.text(f"""
        .reg .b64 %at, %step, %here, %from, %to;  .reg .b32 %lane, %v;  .reg .pred %out, %more;
        mov.u32 %lane, %tid.x;
        and.b32 %lane, %lane, 0x1F;
        cvt.u64.u32 %at, %lane;
        shl.b64 %from, @worker, 5;
        add.s64 %at, %at, %from;
        shl.b64 %step, @workers, 5;
        setp.ge.s64 %out, %at, @n;
        @%out bra DONE;
    AGAIN:
        setp.ge.s64 %out, %at, @n;
        shl.b64 %here, %at, 2;
        add.s64 %from, @x, %here;   add.s64 %to, @y, %here;
        {guard} ld.global.f32 %v, [%from + 0];
        {guard} fma.rn.f32 %v, %v, 2.0, 0f3F800000;
        {guard} st.global.f32 [%to], %v;
        add.s64 %at, %at, %step;
        setp.lt.s64 %more, %at, @n;
        @%more bra AGAIN;
    DONE:
        ret;
    """, x=a.data("x"), y=a.data("y"), n=a.extent("N"), worker=worker, workers=workers)


def test_a_kernel_as_text() -> None:
    scale = make_scale()
    scale.assembly(family="ptx", features="sm_80", contiguous="x y")(lambda a: write_scale(a, ""))
    made = compile_by_hand(scale, scale.by_hand[0], SM80)
    assert verify(scale, made, SM80, run) >= 6


def test_a_negated_guard_is_a_predicate_of_its_own() -> None:
    text = ".reg .pred %p; .reg .b32 %r; setp.eq.s32 %p, 0, 1; @!%p mov.u32 %r, 1; selp.b32 %r, 1, 2, !%p;"
    assert item_texts(read(text)) == [
        "setp.eq.s32 %p1, 0, 1;", "not.pred %p2, %p1;", "@%p2 mov.u32 %r1, 1;", "not.pred %p3, %p1;",
        "selp.b32 %r1, 1, 2, %p3;"]
    bound = WarpAssembly("bound", ptx.table)
    p, r = bound.pred(), bound.b32()
    bound.text("@@inside mov.u32 @r, 1;", inside=p, r=r)
    assert item_texts(bound) == ["@%p1 mov.u32 %r1, 1;"]


def test_floats_by_their_bits_keep_them() -> None:
    made = read(".reg .f32 %f; .reg .f64 %d; mov.f32 %f, 0f7FC00001; mov.f64 %d, -0d3FF0000000000000; "
                "add.f32 %f, %f, -1.5;")
    values = [o.value for item in made.body if isinstance(item, Instruction) for o in item.operands
              if isinstance(o, Immediate)]
    assert values == [0x7FC00001, 0xBFF0000000000000, 0xBFC00000]


@pytest.mark.parametrize(("line", "kind", "message"), [
    ("fma.rn.f33 %f1, %f1, %f1, %f1;", "unknown-instruction", "near: .*fma.rn.f32"),
    ("add.f32 %f1, %f2;", "operands", "takes no such operands"),
    ("add.f32 %f1, %f2, %d1;", "operands", "takes no such operands"),
    ("add.f32 %f1, %f9, %f1;", "notation", "not declared"),
    ("add.f32 %f1, @x, %f1;", "notation", "@x is not bound"),
    ("add.f32 %f1, %f1, 0d3FF0000000000000;", "operands", "takes no such operands"),
    ("add.f32 %f1, %f1", "notation", "expected: +,"),
    ("bra NOWHERE;\nret;", "notation", "label NOWHERE is not in the text"),
    ("HERE: HERE: ret;\nret;", "notation", "a label is placed twice"),
    ("ld.global.f32 %f1, [table];", "notation", "bind the register with the address"),
    (".shared .b8 room[64];", "notation", "the directive .shared has no meaning here"),
    ("@%f1 mov.f32 %f1, %f2;", "operands", "which is no predicate"),
    ("mov.f32 %f1, 'a';", "notation", "expected PTX"),
    ("}", "notation", "a brace closes nothing"),
    ("{ mov.f32 %f1, %f2;", "notation", "a brace is not closed"),
    ("add.f32 %f1, %f2, %tid.x;", "operands", "takes no such operands"),
    ("add.f32 _, %f1, %f2;", "operands", "takes no such operands"),
    ("mov.u32 %f1, 09;", "notation", "found '09;.*', expected PTX"),
])
def test_what_is_refused_names_its_line(line: str, kind: str, message: str) -> None:
    with pytest.raises(AssemblyError, match=message) as found:
        read(f""".reg .f32 %f<4>;
            .reg .f64 %d<2>;
            {line}""")
    assert found.value.kind == kind
    here = read.__code__.co_firstlineno + 2  # the call of `text` in read
    assert found.value.location is not None and found.value.location.line == here + 2


PIECES = ["add.f32", "%f1", "%f9", ",", ";", "{", "}", "[", "]", "@", "!", "|", "_", "0f3F800000", "12", "-", "1.5",
          ".reg", ".b32", "<", ">", ":", "L", "bra", "ld.global.f32", "%tid", ".x", "(", "@x", "09", ".pragma", "+"]


TEXT = """.reg .b64 %at, %here; .reg .f32 %v<3>; .reg .pred %out;
    AGAIN: setp.ge.s64 %out, %at, @n;
    @!%out bra AGAIN;
    { .reg .b64 %here; shl.b64 %here, %at, 2; add.s64 %here, @x, %here; ld.global.f32 %v1, [%here + 16]; }
    fma.rn.f32 %v1, %v1, 2.0, 0f3F800000; st.global.v2.f32 [@x], {%v1, %v2};
    ret;"""


def test_a_thousand_malformed_texts() -> None:
    """Each gives instructions that print, or is refused."""
    def parse(text: str) -> None:
        assembly = WarpAssembly("mutant", ptx.table)
        assembly.text(text, x=assembly.b64(), n=assembly.b64())
        item_texts(assembly)

    found = refusals(mutations([TEXT], PIECES), parse, AssemblyError)
    assert 500 < len(found) < 1000


@given(st.lists(st.sampled_from(PIECES), max_size=14))
@settings(max_examples=examples(300), deadline=None)
def test_nonsense_gives_errors_of_its_own(words: list[str]) -> None:
    assembly = WarpAssembly("nonsense", ptx.table)
    with suppress(AssemblyError):
        assembly.text(".reg .f32 %f<4>; " + " ".join(words), x=assembly.b32())
