"""A planned model as a library: its functions, kernels and programs in one file, and its weights in another.

Enters: a `Model` and a target. Leaves: a `ModelLibrary`, whose `so`, `o`, `s` and `h` are files, and the weights.
Holds: each kernel's code is in the file once for each form that the programs need; nothing of Python, of a C library or
of a linker is needed to use it. Same model, same target: same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..codegen.c_abi import needed_features
from ..codegen.compile import encoded, style_of
from ..codegen.machine import Instruction, LabelReference, MachineFunction
from ..codegen.object import Part, write_executable, write_object, write_shared_object
from ..codegen.print import print_file
from ..codegen.table import Table
from ..codegen.translate import cpu_check, translated
from ..codegen.unwind import frame_rows
from ..runtime.program_code import program_function
from ..runtime.workers_code import launch_function, work_function
from ..targets import module_of
from ..targets.system import System
from .digest import digest_function
from .draw import draw_functions
from .entry import entry_functions
from .header import header_text
from .learn import learn_functions
from .listing import listing_of
from .opening import HEAD_BYTES
from .plan import CONSTANT, TEMPORARY, AnyModel, Code, Plan, Training, make_plan, memory_of
from .start import start_functions
from .tables import program_tables
from .training import training_functions
from .words_code import words_functions

Item = tuple[MachineFunction | Table, bool]


@dataclass(slots=True)
class ModelLibrary:
    """plan: where everything is. items: functions and tables in order, each with whether others may call it.

    codes: kernels by symbol. notes: what is to be said of functions, by name. areas: zeroed memory of the file's own.
    """

    plan: Plan[Any]
    items: list[Item]
    codes: dict[str, Code]
    notes: dict[str, list[str]]
    areas: dict[str, int]

    @property
    def system(self) -> System:
        found: System = module_of(self.plan.target.family, "system").SYSTEM
        return found

    def parts(self) -> list[Part]:
        parts = []
        unwinds = style_of(self.plan.target).unwinds
        for item, exported in self.items:
            if isinstance(item, Table):
                parts.append(Part(item.name, item.encoded(), False))
                continue
            code = self.codes.get(item.name)
            made = encoded(item, self.plan.target, checked=code is not None)
            frame = tuple(frame_rows(item, made.offsets)) if unwinds and not _calls_itself(item) else ()
            if code is None:
                parts.append(Part(item.name, made, exported, None, frame))
            else:
                parts.append(Part(item.name, code.encoded, False, code.source, frame))
        return parts

    def so(self, soname: str) -> bytes:
        return write_shared_object(self.parts(), soname, self.areas, debug=True, system=self.system)

    def o(self) -> bytes:
        return write_object(self.parts(), self.areas, debug=True, system=self.system)

    def executable(self) -> bytes:
        """A static executable; the plan has a tokenizer."""
        return write_executable(self.parts(), f"{self.plan.model.name}_start", self.areas, debug=True,
                                system=self.system)

    def s(self) -> str:
        listing = listing_of(self.plan, self.notes)
        return print_file(self.items, self.areas, line_table=True, notes=listing.notes, remarks=listing.remarks,
                          style=style_of(self.plan.target))

    def h(self) -> str:
        return header_text(self.plan)


ORDERED = frozenset({"sapper_program", "sapper_work", "sapper_launch"})
"""Functions through which several threads work together."""


def _calls_itself(function: MachineFunction) -> bool:
    """Whether it has parts that it calls, for which one set of frame rows can't stand."""
    calls = [item for item in function.body if isinstance(item, Instruction) and item.row.control == "call"]
    return any(isinstance(call.operands[0], LabelReference) for call in calls)


def plan_model(model: AnyModel, target: Any) -> Plan[AnyModel]:
    """Compile a model's programs and place all that they touch. Raises what calling the kernels would, AheadError."""
    return make_plan(model, target, HEAD_BYTES)


def make_model_library(plan: Plan[Any], weights_digest: int) -> ModelLibrary:
    """weights_digest: of the bytes of the weights file that are checked (digest.py)."""
    codes = {code.symbol: code for code in plan.codes}
    if isinstance(plan.model, Training):
        entry = [*training_functions(plan, weights_digest), *words_functions(plan)]
        entry += [(made, not number) for number, made in enumerate(learn_functions(plan))]  # the first one is called
    else:
        entry = [*entry_functions(plan, weights_digest), *draw_functions(plan), *words_functions(plan)]
        entry += [(made, not number) for number, made in enumerate(start_functions(plan))]  # the first one is called
    items: list[Item] = [(function.machine, exported) for function, exported in entry]
    items += [(table, False) for table in program_tables(plan)]
    items += [(code.machine, False) for code in plan.codes]
    made = digest_function()
    needed = needed_features(plan.target.features, [code.machine for code in plan.codes])
    checks, areas = cpu_check(plan.target, needed, often=False)
    own = (program_function(), work_function(), launch_function(), made.machine)
    items += [(function, False) for function in own]
    items = [(item if isinstance(item, Table) or item.name in codes else
              translated(item, plan.target, item.name in ORDERED), exported) for item, exported in items]
    items += [(check, False) for check in checks]
    notes = {function.machine.name: function.notes for function in [*(f for f, _ in entry), made]}
    return ModelLibrary(plan, items, codes, notes, areas)


def weights_pieces(plan: Plan[Any]) -> Iterator[bytes | bytearray | memoryview]:
    """The weights file, piece by piece: every constant at its offset."""
    here = 0
    for region in sorted(plan.of_kind(CONSTANT), key=lambda region: region.offset):
        if region.offset > here:
            yield bytes(region.offset - here)
        yield memory_of(region)
        here = region.offset + region.size_bytes
    yield bytes(plan.words_offset - here)
    if plan.words is not None:
        yield plan.words.content


def report(plan: Plan[Any]) -> dict[str, int]:
    """Bytes and counts of a plan, for people and programs."""
    return {
        "weights_bytes": plan.weights_bytes, "state_bytes": plan.state_bytes,
        "temporary_bytes": plan.temporary_bytes, "temporary_bytes_without_sharing": plan.separate_bytes,
        "temporaries": len(plan.of_kind(TEMPORARY)), "scratch_bytes_of_a_worker": plan.scratch_bytes,
        "kernels": len(plan.codes), "code_bytes": sum(code.encoded.code_bytes for code in plan.codes),
        **{f"{name}_launches": len(program.launches) for name, program in plan.programs.items()},
        **{f"{name}_barriers": sum(launch.barrier for launch in program.launches)
           for name, program in plan.programs.items()},
    }
