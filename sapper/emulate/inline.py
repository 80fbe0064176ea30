"""Calls of functions, put into the body of the caller.

Enters: a function whose body may have `call`. Leaves: one without. Holds: each call has registers, variables and labels
of its own; `ret` of the callee branches behind the call; parameters are the caller's variables of the same place. A
call through a register, and recursion, are errors. Source: PTX ISA, "call", "Function Declarations and Definitions".
"""

from __future__ import annotations

from dataclasses import replace

from ..targets.ptx.instructions import form
from . import parse
from .errors import EmulationError


def inline_calls(module: parse.Module, function: parse.Function, callers: tuple[str, ...] = ()) -> parse.Function:
    """The function with the bodies of those it calls; itself where it calls none."""
    if not any(instruction.form.row.opcode == "call" for instruction in function.body):
        return function
    result = replace(function, body=[], labels={}, registers=list(function.registers),
                     variables=list(function.variables))
    places = []
    for instruction in function.body:
        places.append(len(result.body))
        if instruction.form.row.opcode == "call":
            _put(module, result, instruction, (*callers, function.name))
        else:
            result.body.append(instruction)
    places.append(len(result.body))
    result.labels.update({label: places[place] for label, place in function.labels.items()})
    return result


def _put(module: parse.Module, into: parse.Function, call: parse.Instruction, callers: tuple[str, ...]) -> None:
    given = [operand for operand in call.operands if operand is not None]
    names = [operand.name for operand in given if isinstance(operand, parse.Label)]
    callee = module.functions.get(names[0]) if len(names) == 1 else None
    if callee is None:
        outside = f"; {names[0]} has no body in it, and is not linked" if len(names) == 1 else ""
        raise EmulationError(f"{call.text}: expected the name of a function of the text{outside}", call.line)
    if callee.name in callers:
        raise EmulationError(f"{call.text}: the emulator runs no recursion", call.line)
    callee = inline_calls(module, callee, callers)
    passed = [item for operand in given if isinstance(operand, parse.Vector) for item in operand.items]
    if len(passed) != len(callee.parameters):
        raise EmulationError(f"{call.text}: {callee.name} has {len(callee.parameters)} parameters, found {len(passed)}",
                             call.line)
    symbols: dict[str, str] = {}
    for parameter, argument in zip(callee.parameters, passed, strict=True):
        if not isinstance(argument, parse.Symbol) or argument.offset:
            raise EmulationError(f"{call.text}: expected variables as arguments", call.line)
        symbols[parameter.name] = argument.name
    for variable in callee.variables:
        symbols[variable.name] = f"call${len(into.body)}${variable.name}"
        into.variables.append(replace(variable, name=symbols[variable.name]))
    copy = _Copy(len(into.registers), 1_000_000 * (len(into.body) + 1), symbols)
    into.registers.extend(callee.registers)
    end = parse.Label("end", (copy.scope - 1,))
    start = len(into.body)
    if call.guard is not None:  # those that do not call go on behind
        skip = replace(call.guard, negated=not call.guard.negated)
        into.body.append(replace(call, form=form("bra"), operands=[end], guard=skip))
        start += 1
    for instruction in callee.body:
        copied = replace(instruction, operands=[copy.operand(operand) for operand in instruction.operands],
                         guard=copy.register(instruction.guard) if instruction.guard is not None else None)
        if instruction.form.row.opcode == "ret":
            copied = replace(copied, form=form("bra"), operands=[end])
        into.body.append(copied)
    into.labels.update({(copy.scope + scope, name): start + place for (scope, name), place in callee.labels.items()})
    into.labels[copy.scope - 1, "end"] = len(into.body)


class _Copy:
    """Operands of a callee as those of the caller. slots: added to registers; scope: to the scopes of labels."""

    def __init__(self, slots: int, scope: int, symbols: dict[str, str]) -> None:
        self.slots, self.scope, self.symbols = slots, scope, symbols

    def register(self, register: parse.Register) -> parse.Register:
        return replace(register, slot=register.slot + self.slots)

    def operand(self, operand: parse.Operand | None) -> parse.Operand | None:
        if isinstance(operand, parse.Register):
            return self.register(operand)
        if isinstance(operand, parse.Symbol):
            return replace(operand, name=self.symbols.get(operand.name, operand.name))
        if isinstance(operand, parse.Vector):
            return parse.Vector(tuple(self.operand(item) for item in operand.items))
        if isinstance(operand, parse.Label):
            return replace(operand, scopes=tuple(self.scope + scope for scope in operand.scopes))
        if isinstance(operand, parse.Address):
            base, more = self.operand(operand.base), [self.operand(item) for item in operand.coordinates]
            assert isinstance(base, (parse.Register, parse.Symbol, parse.Immediate))
            return parse.Address(base, operand.offset, tuple(item for item in more if item is not None))
        return operand
