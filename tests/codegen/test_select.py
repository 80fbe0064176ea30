"""What selection emits, before allocation: folding, two-address forms, loops, constants, errors."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

import sapper.targets.x86_64.select as rules
from sapper.codegen.machine import Instruction, Label, MachineFunction, Memory
from sapper.codegen.select import SelectionError, select
from sapper.ir.nodes import Block, Builder, Function, Op, Value
from sapper.ir.types import (
    MASK,
    ROW_B32,
    ROW_F32,
    ROW_F64,
    ROW_I32,
    S64,
    DType,
    RowType,
    b32,
    bf16,
    f16,
    f32,
    f64,
    i16,
    i32,
    i64,
    u8,
)
from sapper.lane import two_by_two
from sapper.lane.ops import LANE_OPS, MATH
from sapper.targets.x86_64.target import TARGETS, Target

V3, V4 = TARGETS["v3"], TARGETS["v4"]
STRUCTURE = {"loop", "if", "tasks", "yield", "s_const", "splat_const"}
OF_THREADS = {
    "load_run", "store_run", "warp", "near_memory", "sync_warps", "async_copy", "async_commit", "async_wait",
    "load_matrix", "matrix_multiply", "signal_start", "signal_fence", "signal_arrive", "signal_expect",
    "signal_wait", "tensor_copy", "store_matrix", "store_fence", "tensor_store", "store_wait", "group_fence",
    "group_multiply", "group_multiply_rows", "group_commit", "group_wait", "register_budget", "asm_multiply",
    "sums_open", "sums_close", "sums_multiply", "sums_multiply_rows", "sums_signal", "sums_load", "sums_store",
    "sums_acquire", "sums_release", "hand_over", "take_over", "sync_cluster", "join", "unpack", "add2", "sub2", "mul2",
    "reciprocal"}
"""Lowered to only where the target's facts have runs, matrix instructions or joins, and pairs where it has them."""
ALWAYS_SPLIT = {"dot4_i8i8", "dot4_u8u8", "fma2_bf16"}
"""Written as others on every target, by split_dots.py."""
OF_FOUR_LANES = set(two_by_two.PRODUCTS.values())


def start(lanes: int = 16, slots: int = 4) -> tuple[Function, Builder, list[Value]]:
    function = Function("test", "lane")
    function.attributes = {"lanes": lanes, "slots": [f"scalar.{n}" for n in range(slots)], "scratch_bytes": 0}
    builder = Builder(function.body)
    return function, builder, [builder.value("arg", [], S64, slot=3 + n) for n in range(slots)]


def names(machine: MachineFunction) -> Counter[str]:
    return Counter(item.row.name for item in machine.body if isinstance(item, Instruction))


def instructions(machine: MachineFunction, name: str) -> list[Instruction]:
    return [i for i in machine.body if isinstance(i, Instruction) and i.row.name == name]


def inside_loop(machine: MachineFunction, label: str = ".loop1") -> list[Instruction]:
    """From a loop's label to the jump back to it."""
    first = next(n for n, i in enumerate(machine.body) if isinstance(i, Label) and i.name == label)
    found = []
    for item in machine.body[first + 1:]:
        if isinstance(item, Instruction):
            found.append(item)
            if item.row.control and item.operands and getattr(item.operands[0], "name", "") == label:
                return found
    raise AssertionError(f"no jump back to {label}")


def matmul(target: Target, rows: int, columns: int) -> MachineFunction:
    """acc[m][n] += a[m] * b[n] over k, panels of A and B."""
    lanes = target.lanes
    function, b, (a_start, b_start, c, depth) = start(lanes)
    zero = b.value("splat_const", [], ROW_F32, value=0.0)
    count = rows * columns
    loop = Op("loop", [b.value("s_const", [], S64, value=0), depth, a_start, b_start, *[zero] * count],
              [S64, S64, *[ROW_F32] * count], {"step": 1}, [Block([S64, S64, S64, *[ROW_F32] * count])])
    b.block.ops.append(loop)
    inner = Builder(loop.blocks[0])
    _, pa, pb, *acc = loop.blocks[0].arguments
    panel = [inner.value("load", [pb], ROW_F32, dtype=f32, disp=4 * lanes * n) for n in range(columns)]
    made = []
    for m in range(rows):
        x = inner.value("load_splat", [pa], ROW_F32, dtype=f32, disp=4 * m)
        made += [inner.value("fma", [x, panel[n], acc[m * columns + n]], ROW_F32) for n in range(columns)]
    steps = [inner.value("s_const", [], S64, value=4 * size) for size in (rows, lanes * columns)]
    inner.add("yield", [inner.value("s_add", [pa, steps[0]], S64), inner.value("s_add", [pb, steps[1]], S64), *made])
    for n, result in enumerate(loop.results[2:]):
        b.add("store", [result, c], dtype=f32, disp=4 * lanes * n)
    return select(function, rules, target)


def test_matmul_loop_v4_is_nothing_but_its_work() -> None:
    """14 x 32: two loads, 28 FMAs with broadcast operands, two pointers, one count; no moves."""
    body = inside_loop(matmul(V4, 14, 2))
    assert Counter(i.row.name for i in body) == {
        "vmovups.512": 2, "vfmadd231ps.512": 28, "add.64": 2, "sub.64": 1, "jg": 1}
    assert all(isinstance(i.operands[2], Memory) and i.operands[2].broadcast for i in body if "fma" in i.row.name)


def test_matmul_loop_v4_with_three_columns_broadcasts_into_a_register() -> None:
    body = inside_loop(matmul(V4, 8, 3))
    assert Counter(i.row.name for i in body) == {
        "vmovups.512": 3, "vbroadcastss.512": 8, "vfmadd231ps.512": 24, "add.64": 2, "sub.64": 1, "jg": 1}


@pytest.mark.parametrize(("rows", "columns", "spread"), [(14, 2, 2), (4, 2, 2), (2, 2, 2), (6, 4, 6), (3, 1, 0)])
def test_elements_stay_in_memory_as_far_as_there_are_loads(rows: int, columns: int, spread: int) -> None:
    """With a load for each multiply-add, as many elements of two as these leave loads for are operands of both; the
    others, evenly among them, are spread in a register. An element of one product never is, one of four always."""
    body = inside_loop(matmul(TARGETS["icelake-server"]._replace(folded_loads=1.0), rows, columns))
    counts = Counter(i.row.name for i in body)
    in_memory = [isinstance(i.operands[2], Memory) for i in body if "fma" in i.row.name]
    assert counts["vbroadcastss.512"] == spread
    assert sum(in_memory) == (rows - spread) * columns
    if columns == 2:
        assert counts["vmovups.512"] + spread + sum(in_memory) == rows * columns
    plain = Counter(i.row.name for i in inside_loop(matmul(TARGETS["icelake-server"], rows, columns)))
    assert plain["vbroadcastss.512"] == (rows if columns > 1 else 0)


def test_matmul_loop_v3() -> None:
    """6 x 16: AVX2 has no broadcast operands."""
    body = inside_loop(matmul(V3, 6, 2))
    assert Counter(i.row.name for i in body) == {
        "vmovups.256": 2, "vbroadcastss.256": 6, "vfmadd231ps.256": 12, "add.64": 2, "sub.64": 1, "jg": 1}


def test_loop_is_guarded_unless_it_provably_runs_and_aligned() -> None:
    def guards(bound: str) -> int:
        function, b, (p, n, _, _) = start()
        zero, four = (b.value("s_const", [], S64, value=v) for v in (0, 4))
        stop = {"argument": lambda: n, "constant": lambda: four,
                "max": lambda: b.value("s_max", [n, four], S64)}[bound]()
        loop = Op("loop", [zero, stop], [], {"step": 1}, [Block([S64])])
        b.block.ops.append(loop)
        inner = Builder(loop.blocks[0])
        inner.add("s_store", [loop.blocks[0].arguments[0], p], dtype=f64)
        inner.add("yield", [])
        machine = select(function, rules, V4)
        assert any(isinstance(i, Label) and i.align >= 32 for i in machine.body)
        return names(machine)["jge"]

    assert guards("argument") == 1
    assert guards("constant") == guards("max") == 0


def test_labels_of_axes_whose_names_end_in_digits_are_apart() -> None:
    """The fourth label of x22 is not the 24th of x2."""
    function, b, (p, n, _, _) = start()
    zero = b.value("s_const", [], S64, value=0)
    for axis in ["x22"] * 10 + ["x2"] * 30:
        loop = Op("loop", [zero, n], [], {"step": 1, "label": axis}, [Block([S64])])
        b.block.ops.append(loop)
        inner = Builder(loop.blocks[0])
        inner.add("s_store", [loop.blocks[0].arguments[0], p], dtype=f64)
        inner.add("yield", [])
    labels = Counter(i.name for i in select(function, rules, V4).body if isinstance(i, Label))
    assert len(labels) >= 40 and max(labels.values()) == 1


def test_inner_block_of_a_blocked_loop_needs_no_guard() -> None:
    """for i in range(0, n, 8): for j in range(i, min(i + 8, n))."""
    function, b, (p, n, _, _) = start()
    outer = Op("loop", [b.value("s_const", [], S64, value=0), n], [], {"step": 8}, [Block([S64])])
    b.block.ops.append(outer)
    o = Builder(outer.blocks[0])
    i = outer.blocks[0].arguments[0]
    stop = o.value("s_min", [o.value("s_add", [i, o.value("s_const", [], S64, value=8)], S64), n], S64)
    inner = Op("loop", [i, stop], [], {"step": 1}, [Block([S64])])
    o.block.ops.append(inner)
    x = Builder(inner.blocks[0])
    x.add("s_store", [inner.blocks[0].arguments[0], p], dtype=f64)
    x.add("yield", [])
    o.add("yield", [])
    assert names(select(function, rules, V4))["jge"] == 1


def test_loads_fold_only_where_no_store_is_between() -> None:
    for between in (False, True):
        function, b, (p, q, _, _) = start()
        x = b.value("load", [p], ROW_F32, dtype=f32)
        y = b.value("load", [q], ROW_F32, dtype=f32, disp=64)
        if between:
            b.add("store", [x, p], dtype=f32, disp=256)
        b.add("store", [b.value("sub", [x, y], ROW_F32), p], dtype=f32)
        machine = select(function, rules, V4)
        (subtract,) = instructions(machine, "vsubps.512")
        assert isinstance(subtract.operands[2], Memory) is not between
        assert names(machine)["vmovups.512"] == (4 if between else 2)


def test_scalars_are_added_to_where_they_lie() -> None:
    def added(between: bool = False, twice: bool = False, dtype: DType = i32, disp: int = 4) -> Counter[str]:
        function, b, (x, y, n, _) = start()
        place = {"scale": 4, "disp": 4, "indexed": True, "dtype": dtype}
        before = b.value("s_load", [x, n], S64, **place)
        if between:
            b.add("s_store", [n, y], dtype=dtype)
        total = b.value("s_add", [b.value("s_const", [], S64, value=3), before], S64)
        b.add("s_store", [total, x, n], **{**place, "disp": disp})
        if twice:
            b.add("s_store", [total, y], dtype=dtype)
        return names(select(function, rules, V4))

    assert added()["add.32"] == 1 and not added()["movsxd"] and not added()["mov.32"]
    assert added(dtype=i64)["add.64"] == 1 and not added(dtype=i64)["lea.64"]
    for apart in (added(between=True), added(twice=True), added(dtype=i16), added(disp=8)):
        assert not apart["add.32"]


def test_addresses_take_in_constants_and_sums() -> None:
    function, b, (p, i, j, _) = start()
    far = b.value("s_add", [i, b.value("s_const", [], S64, value=16)], S64)
    base = b.value("s_add", [p, j], S64)
    x = b.value("load", [p, far], ROW_F32, dtype=f32, scale=4, indexed=True, disp=8)
    b.add("store", [x, base], dtype=f32, disp=4)
    machine = select(function, rules, V4)
    load, store = instructions(machine, "vmovups.512")
    assert (load.operands[1].scale, load.operands[1].disp) == (4, 72)
    assert store.operands[0].index is not None and store.operands[0].disp == 4
    assert not {"add.64", "lea.64"} & set(names(machine))


@pytest.mark.parametrize(("target", "narrow"), [("zen5", ""), ("v4", "vpmovzxwd.512"), ("v3", "vbroadcasti128.256")])
def test_halves_of_a_line_are_taken_from_the_line(target: str, narrow: str) -> None:
    """By one instruction each where words are permuted in one operation; elsewhere each half by itself. narrow: by what
    instruction."""
    lanes = TARGETS[target].lanes
    function, b, (source, other, out, _) = start(lanes)
    for base, disp, beside in ((source, 64, {"beside": 1}), (source, 64 + 2 * lanes, {"beside": -1}), (other, 64, {})):
        row = b.value("load", [base], ROW_F32, dtype=bf16, masked=False, disp=disp, **beside)
        b.add("store", [row, out], dtype=f32, disp=2 * disp)
    machine = select(function, rules, TARGETS[target])
    permuted = [i for i in instructions(machine, f"vpermw.{TARGETS[target].vector_bits}")
                if isinstance(i.operands[-1], Memory)]
    assert len(permuted) == (0 if narrow else 2)
    assert all(i.operands[-1].disp == 64 and i.mask is not None and i.zeroing for i in permuted)
    if narrow:
        read = [i.operands[-1].disp for i in instructions(machine, narrow)]
        assert read == [64, 64 + 2 * lanes, 64]


def test_comparison_joins_its_branch() -> None:
    function, b, (p, i, _, _) = start()
    mask = b.value("cmp", [b.value("load", [p], ROW_F32, dtype=f32)] * 2, MASK, cond="lt")
    for condition in (b.value("s_cmp", [i, b.value("s_const", [], S64, value=7)], S64, cond="lt"),
                      b.value("mask_any", [mask], S64)):
        branch = Op("if", [condition], [], None, [Block(), Block()])
        b.block.ops.append(branch)
        Builder(branch.blocks[0]).add("s_store", [i, p], dtype=f64)
        for block in branch.blocks:
            Builder(block).add("yield", [])
    found = names(select(function, rules, V4))
    assert found["cmp.64"] == found["jge"] == found["kortestw"] == found["je"] == 1
    assert not any(name.startswith(("set", "test")) for name in found)


@pytest.mark.parametrize("target", [V3, V4], ids=["v3", "v4"])
def test_constants_are_hoisted_out_of_loops(target: Target) -> None:
    lanes = target.lanes
    function, b, (p, n, _, _) = start(lanes)
    loop = Op("loop", [b.value("s_const", [], S64, value=0), n], [], {"step": lanes}, [Block([S64])])
    b.block.ops.append(loop)
    inner = Builder(loop.blocks[0])
    i = loop.blocks[0].arguments[0]
    x = y = inner.value("load", [p, i], ROW_F32, dtype=f32, scale=4, indexed=True)
    for number in (0.5, 0.25, 0.125):
        y = inner.value("fma", [y, x, inner.value("splat_const", [], ROW_F32, value=number)], ROW_F32)
    inner.add("store", [y, p, i], dtype=f32, scale=4, indexed=True)
    inner.add("yield", [])
    machine = select(function, rules, target)
    body = inside_loop(machine)
    assert not any(isinstance(o, Memory) and o.label for i in body for o in i.operands)
    assert names(machine)[f"vbroadcastss.{32 * lanes}"] == 3


def test_many_constants_stay_in_memory_where_registers_are_few() -> None:
    function, b, (p, n, _, _) = start(8)
    loop = Op("loop", [b.value("s_const", [], S64, value=0), n], [], {"step": 8}, [Block([S64])])
    b.block.ops.append(loop)
    inner = Builder(loop.blocks[0])
    x = y = inner.value("load", [p, loop.blocks[0].arguments[0]], ROW_F32, dtype=f32, scale=4, indexed=True)
    for number in range(30):
        y = inner.value("fma", [y, x, inner.value("splat_const", [], ROW_F32, value=number + 0.5)], ROW_F32)
    inner.add("store", [y, p, loop.blocks[0].arguments[0]], dtype=f32, scale=4, indexed=True)
    inner.add("yield", [])
    machine = select(function, rules, V3)
    folded = [i for i in inside_loop(machine) if any(isinstance(o, Memory) and o.label for o in i.operands)]
    assert len(folded) + names(machine)["vbroadcastss.256"] == 30
    assert 15 <= len(folded) < 30


def test_negation_is_absorbed_by_fma() -> None:
    function, b, (p, _, _, _) = start()
    x, y, z = (b.value("load", [p], ROW_F32, dtype=f32, disp=64 * n) for n in range(3))
    first = b.value("fma", [b.value("neg", [x], ROW_F32), y, z], ROW_F32)
    second = b.value("fma", [x, y, b.value("neg", [first], ROW_F32)], ROW_F32)
    b.add("store", [second, p], dtype=f32)
    found = names(select(function, rules, V4))
    assert sum(n for name, n in found.items() if name.startswith("vfnmadd")) == 1
    assert sum(n for name, n in found.items() if name.startswith("vfmsub")) == 1
    assert found["vxorps.512"] == 0


@pytest.mark.parametrize("condition", ["le", "ne", "gt"])
@pytest.mark.parametrize("also_number", [False, True])
def test_a_choice_is_made_by_the_comparison_that_there_is(condition: str, also_number: bool) -> None:
    """AVX2 compares by > and =: what is chosen changes places, but where the mask itself is asked for too."""
    function, b, (p, _, _, _) = start(8)
    x, y = (b.value("load", [p], ROW_I32, dtype=i32, disp=32 * n) for n in range(2))
    low, high = (b.value("load", [p], ROW_F32, dtype=f32, disp=32 * n) for n in (2, 3))
    mask = b.value("cmp", [x, y], MASK, cond=condition)
    b.add("store", [b.value("select", [mask, low, high], ROW_F32), p], dtype=f32)
    if also_number:
        b.add("store", [b.value("mask_to_row", [mask], ROW_F32), p], dtype=f32, disp=32)
    machine = select(function, rules, V3)
    opposite = condition != "gt" and not also_number
    assert names(machine)["vpxor.256"] == (condition != "gt" and also_number)
    (choice,) = instructions(machine, "vblendvps.256")
    loads = [item.operands[0] for item in instructions(machine, "vmovups.256")
             if getattr(item.operands[1], "disp", None) in (64, 96)]
    assert choice.operands[1:3] == (loads if opposite else loads[::-1])


def test_every_lane_op_has_a_rule() -> None:
    missing = set(LANE_OPS.rows) - set(rules.RULES) - STRUCTURE - set(MATH) - OF_THREADS - ALWAYS_SPLIT - OF_FOUR_LANES
    assert not missing


def test_math_without_an_instruction_is_refused() -> None:
    function, b, (p, _, _, _) = start()
    x = b.value("load", [p], ROW_F32, dtype=f32)
    b.add("store", [b.value("exp", [x], ROW_F32), p], dtype=f32)
    with pytest.raises(SelectionError, match=r"lane op exp: found no rule .*; expected .*; mend: .*x86_64.select\.py"):
        select(function, rules, V4)
    assert "exp" not in rules.legal_ops(V4)


def test_slots_of_f16_are_refused() -> None:
    function, b, (x, *_) = start(8)
    row = b.value("load", [x], ROW_F32, dtype=f32)
    b.add("store", [b.value("pack2", [row, row], ROW_B32, dtype=f16), x], dtype=b32)
    with pytest.raises(ValueError, match="pack2 to f16: found no row for it; expected bf16; mend: "):
        select(function, rules, TARGETS["v3"])


def test_too_many_lanes_are_refused() -> None:
    function, _, _ = start(16)
    with pytest.raises(ValueError, match="lanes of function test: found 16"):
        select(function, rules, V3)
    function, b, (p, _, _, _) = start(16)
    b.add("store", [b.value("load", [p], ROW_F64, dtype=f64), p], dtype=f64)
    with pytest.raises(ValueError, match="found 16 lanes of f64; expected at most 8"):
        select(function, rules, V4)


def test_selection_depends_on_few_facts() -> None:
    """Any object with these serves as a target: no other fact of a processor is looked up behind its back."""
    function, b, (p, _, _, _) = start()
    b.add("store", [b.value("load", [p], ROW_F32, dtype=bf16), p], dtype=bf16)
    few = SimpleNamespace(features=V4.features, fma_per_cycle=V4.fma_per_cycle, folded_loads=0.0)
    first, second = (select(function, rules, t) for t in (V4, few))
    assert names(first) == names(second)


def test_broadcast_operands_where_loads_are_short() -> None:
    """One load for two multiply-adds where two go in a cycle; elsewhere both take their own from memory."""
    for cpu, loads in (("icelake-server", 1), ("zen4", 0)):
        function, b, (p, q, _, _) = start()
        x = b.value("load_splat", [p], ROW_F32, dtype=f32)
        rows = [b.value("load", [q], ROW_F32, dtype=f32, disp=64 * i) for i in range(2)]
        for y in [b.value("mul", [b.value("mul", [x, y], ROW_F32), y], ROW_F32) for y in rows]:
            b.add("store", [y, q], dtype=f32)
        assert names(select(function, rules, TARGETS[cpu]))["vbroadcastss.512"] == loads


def test_row_of_integers_from_a_scalar_needs_one_broadcast() -> None:
    function, b, (p, n, _, _) = start()
    b.add("store", [b.value("splat", [n], ROW_I32), p], dtype=f32)
    assert names(select(function, rules, V4))["vpbroadcastd.general.512"] == 1


@pytest.mark.parametrize(("count", "stores"), [
    (1, {"vmovd.from_vec"}), (2, {"vmovq"}), (3, {"vmovq", "vpextrd"}), (4, {"vmovups.128"}),
    (6, {"vmovups.128", "vmovq"}), (7, {"vmovups.128", "vmovq", "vpextrd"}), (8, {"vmaskmovps.store.256"})])
def test_so_many_first_lanes_are_stored_without_a_mask(count: int, stores: set[str]) -> None:
    """Where no opmask can say which; whole rows that a mask is given for are another's to mend."""
    function, b, (base, place, *_) = start(lanes=8)
    mask = b.value("mask_first", [b.value("s_const", [], S64, value=count)], MASK)
    row = b.value("load", [base], ROW_F32, dtype=f32, masked=False, disp=0)
    b.add("store", [row, place, mask], dtype=f32, masked=True, disp=0, streaming=False)
    found = names(select(function, rules, V3))
    assert {name for name in found if found[name] and name.startswith(("vmov", "vpextr", "vmask"))} - {
        "vmovups.256"} == stores


@pytest.mark.parametrize(("dtype", "count", "moved"), [(u8, 4, "vmovd.to_vec"), (bf16, 2, "vmovd.to_vec"),
                                                       (bf16, 4, "vmovq"), (u8, 3, "vpinsrb")])
def test_so_many_narrow_elements_are_loaded_at_once(dtype: DType, count: int, moved: str) -> None:
    """The first lanes of a row, where no opmask can say which: as one number, if they are 4 or 8 bytes, else in the
    fewest pieces, as two bytes and one."""
    function, b, (base, place, *_) = start(lanes=8)
    mask = b.value("mask_first", [b.value("s_const", [], S64, value=count)], MASK)
    row = b.value("load", [base, mask], RowType(i32 if dtype is u8 else f32), dtype=dtype, masked=True, disp=0)
    b.add("store", [row, place], dtype=f32 if dtype is bf16 else i32, masked=False, disp=0, streaming=False)
    found = names(select(function, rules, V3))
    assert found["vpinsrb"] == found["vpinsrw"] == (moved == "vpinsrb") and found[moved] == 1
