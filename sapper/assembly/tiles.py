"""Tile registers in assembly by hand: configured before they are used, of shapes that fit, released at the end.

Enters: instructions one by one, and the state before each. Leaves: the configurations that may hold after it, and for
each instruction the shape of its tile, for footprint.py; or AssemblyError once the states are final.
Holds: configurations that lie in constants beside the code are known, others are not, and shapes under them are left to
running. A function gives up its tiles before it returns and before it calls: no caller expects any of them kept, and
the system saves them with the thread as long as they are in use.
Source: System V ABI AMD64 supplement, 3.2.1 (figure 3.4: tmm0 to tmm7 are not preserved across calls).
"""

from __future__ import annotations

from typing import Any

from ..codegen.machine import Instruction, Memory, Register, VirtualRegister
from .build import Assembly
from .state import Checked, State, at

Shape = tuple[int, int]
"""Rows, and bytes of a row."""


class TileChecks(Checked):
    """shapes: of the tile that an instruction loads or stores; None where it is not known."""

    def __init__(self, assembly: Assembly, target: Any, waived: frozenset[str] = frozenset()) -> None:
        super().__init__(assembly, target, waived)
        self.shapes: dict[Instruction, Shape | None] = {}

    def track_tiles(self, item: Instruction, state: State) -> None:
        """What a configuration, or its release, leaves of the tiles."""
        if self.table.CONFIGURATION not in item.row.implicit_writes:
            return
        released = item.row.name == self.table.TILE_RELEASE
        shapes = () if released else self.configured(item)
        state.tiles = frozenset({(shapes, item)}) if shapes != () else frozenset({None})
        if shapes == ():
            for pair in item.row.implicit_writes:
                state.values[Register(*pair)] = frozenset({("gone", "the tiles were released", item)})
        for register in state.values:
            if isinstance(register, VirtualRegister) and register.kind == "tile":
                state.values[register] = frozenset({("gone", "a configuration makes all tiles zero", item)})

    def configured(self, item: Instruction) -> tuple[Shape, ...] | None:
        """The shapes that an instruction gives the tiles; None where they are not known before the code runs."""
        memory = item.operands[0]
        if not isinstance(memory, Memory) or memory.label is None or memory.index is not None or memory.disp:
            return None
        try:
            return self.table.tile_shapes(self.assembly.constants[memory.label][1])  # type: ignore[no-any-return]
        except OverflowError as error:
            raise self.fail("operands", f"{item.row.mnemonic} takes no such configuration", item, str(error),
                            "what table.tile_configuration makes") from None

    def check_tiles(self, item: Instruction, state: State) -> None:
        """Whether the tiles of an instruction have shapes that it takes."""
        registers = [operand for spec, operand in zip(item.row.operands, item.operands, strict=True)
                     if spec.kind == "tile"]
        if not self.final or not registers:
            return
        found: set[Shape | None] = set()
        for configuration in sorted(state.tiles, key=lambda c: -1 if c is None else self.body.index(c[1])):
            if configuration is None:
                continue  # check_read has told
            shapes, setter = configuration
            if shapes is None:
                found.add(None)
                continue
            mine = [self.table.tile_shape(r.number if isinstance(r, Register) else None, shapes) for r in registers]
            if None in mine:
                raise self.fail("operands", "a tile without a name where not all have the same shape", item,
                                f"{_text(shapes)}, of {at(setter)}", "one shape for all eight, or tiles by name",
                                "it is not known which of them it becomes: name it, x86.tmm0")
            fault = self.table.shape_fault(mine)
            if fault:
                raise self.fail("operands", f"{item.row.mnemonic} traps on tiles of these shapes", item,
                                f"{fault}, of the configuration at {at(setter)}", self.table.PRODUCT_SHAPES)
            found.add(mine[0])
        self.shapes[item] = found.pop() if len(found) == 1 else None

    def leave_tiles(self, item: Instruction, state: State, what: str) -> None:
        """The tiles are given up before a return, or a call."""
        setters = sorted((c[1] for c in state.tiles if c is not None), key=self.body.index)
        if setters and self.final:
            raise self.fail("state", f"the function {what} with tiles in use", item,
                            f"{setters[0].row.mnemonic} at {at(setters[0])}", f"{self.table.TILE_RELEASE} before it")


def _text(shapes: tuple[Shape, ...]) -> str:
    return ", ".join(f"{rows} x {bytes_}" for rows, bytes_ in shapes)
