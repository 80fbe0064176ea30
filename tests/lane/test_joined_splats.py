"""Elements side by side become one load; what else lies between, or beside, stays."""

from __future__ import annotations

import pytest

from sapper.ir.text import parse_function, print_function
from sapper.lane.joined_splats import join_splats
from sapper.lane.ops import LANE_OPS


def lane_of(*loads: str, dtype: str = "f32", lanes: int = 4) -> str:
    """A function that adds up spread elements: of each its value's name, base and displacement; or any other op."""
    lines = ["%x: s64 = arg {slot = 3}", "%y: s64 = arg {slot = 4}"]
    names = []
    for load in loads:
        if "=" in load or load.startswith("store"):
            lines.append(load)
            continue
        name, base, disp = load.split()
        lines.append(f"%{name}: row<{dtype}> = load_splat %{base} {{dtype = :{dtype}, disp = {disp}}}")
        names.append(name)
    total = names[0]
    for number, name in enumerate(names[1:]):
        lines.append(f"%t{number}: row<{dtype}> = add %{total}, %{name}")
        total = f"t{number}"
    lines.append(f"store %{total}, %y {{dtype = :{dtype}}}")
    body = "\n".join(f"  {line}" for line in lines)
    return f'lane func @f() {{lanes = {lanes}, slots = ["x.data", "y.data"]}} {{\n{body}\n}}\n'


def joined(*loads: str, **more: object) -> tuple[int, list[str]]:
    """How many rows were joined, and the loads then: "load disp", "lane number" of what was spread, "splat disp"."""
    function = parse_function(lane_of(*loads, **more), {"lane": LANE_OPS})  # type: ignore[arg-type]
    count = join_splats(function)
    assert parse_function(print_function(function), {"lane": LANE_OPS})
    found = []
    for op in function.walk():
        if op.name == "load":
            found.append(f"load {op.attributes.get('disp', 0)}")
        elif op.name == "load_splat":
            found.append(f"splat {op.attributes['disp']}")
        elif op.name == "broadcast_lane":
            found.append(f"lane {op.attributes['lane']}")
    return count, found


def test_a_row_in_any_order() -> None:
    assert joined("a x 8", "b x 0", "c x 12", "d x 4") == (1, ["load 0", "lane 2", "lane 0", "lane 3", "lane 1"])


def test_rows_of_several_places() -> None:
    loads = [f"{base}{n} {base} {4 * n}" for n in range(4) for base in "xy"]
    count, found = joined(*loads)
    assert count == 2 and found[:4] == ["load 0", "lane 0", "load 0", "lane 0"] and "splat 0" not in found


def test_slots_of_bytes() -> None:
    loads = ["%x: s64 = arg {slot = 3}", *(f"%b{n}: row<b32> = load_splat %x {{dtype = :b32, disp = {4 * n}}}"
                                          for n in range(4)), "store %b3, %x {dtype = :b32}"]
    body = "\n".join(loads)
    function = parse_function(f'lane func @f() {{lanes = 4, slots = ["x.data"]}} {{\n{body}\n}}\n', {"lane": LANE_OPS})
    assert join_splats(function) == 1


def test_two_lanes_of_doubles() -> None:
    assert joined("a x 16", "b x 24", "c x 40", dtype="f64", lanes=2) == (
        1, ["load 16", "lane 0", "lane 1", "splat 40"])


@pytest.mark.parametrize("loads", [
    ("a x 0", "b x 4", "c x 8"),                                # three
    ("a x 0", "b x 4", "c x 8", "d x 16"),                      # with a gap
    ("a x 0", "b x 4", "c y 8", "d x 12"),                      # from elsewhere
    ("a x 0", "b x 0", "c x 4", "d x 8"),                       # one of them twice
    ("a x 0", "b x 4", "store %a, %y {dtype = :f32}", "c x 8", "d x 12")])    # which may have changed meanwhile
def test_what_is_no_row_stays(loads: tuple[str, ...]) -> None:
    count, found = joined(*loads)
    assert not count and all(line.startswith("splat") for line in found)
