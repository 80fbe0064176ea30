"""Whether a piece on rows computes what it stands for, for all inputs.

Enters: a `Block`, its immediates, a meaning on the same rows. Leaves: a `Proof`. Holds: "proved" is said only of a
difference that can't be on; a counterexample was run through the interpreter of rows before it is told.

Both sides are run on rows of which nothing is known (symbolic.py), which gives a term for each lane of the result. Two
terms are the same for all inputs if they are one object; if their difference is off for every value of the bits that it
depends on, where those are few; or if z3 finds no value for which it is on. Lanes of the same form are decided once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..ir.nodes import Op, Value
from ..tile import semantics
from . import terms
from .symbolic import Lanes, NotSymbolic, as_lanes, is_nan, unknown
from .terms import Term

EXHAUSTIVE_BITS = 16
"""So many input bits are gone through one by one."""
SAMPLES = 1 << 12
Z3_LIMIT_MS = 20_000
Meaning = Callable[[list[Any]], Any]


@dataclass(frozen=True, slots=True)
class Proof:
    """proved: True, False (then `text` shows a counterexample), None: not decided. text: how, or why not.

    scope: for all of what it is proved.
    """

    proved: bool | None
    text: str
    scope: str = "inputs"

    def __str__(self) -> str:
        how = {True: f"proved for all {self.scope}", False: "wrong", None: "not proved"}[self.proved]
        return f"{how}: {self.text}"


@dataclass(frozen=True, slots=True)
class Decision:
    """Of one or many pairs of terms. ways: how each was decided. values: input values that tell a pair apart."""

    proved: bool | None
    ways: tuple[str, ...] = ()
    values: Mapping[str, int] | None = None


def prove_block(block: Any, immediates: Sequence[int], meaning: Meaning, inputs: Sequence[Any], lanes: int,
                same: Sequence[int] = ()) -> Proof:
    """block.run against meaning, both on rows of `lanes` elements. inputs: NumPy dtypes of the rows. same: of each row
    the number of the first that holds the same; empty: nothing is known of that."""
    rows = [unknown(f"x{same[at] if same else at}", (lanes,), dtype) for at, dtype in enumerate(inputs)]
    try:
        found, wanted = block.run(list(rows), list(immediates)), meaning(list(rows))
    except NotSymbolic as error:
        return Proof(None, str(error))
    wanted = np.broadcast_to(wanted, (lanes,))
    decision = decide(pairs(found, wanted), wanted.dtype)
    if not decision.proved:
        if decision.values is None:
            return Proof(None, "; ".join(decision.ways))
        return _replayed(block, immediates, meaning, rows, decision.values)
    return Proof(True, f"{lanes} lanes, {', '.join(dict.fromkeys(decision.ways))}")


def pairs(found: Any, wanted: Any) -> list[tuple[Term, Term]]:
    """The terms of two arrays, side by side. What is known on one side is a constant."""
    return list(zip(as_lanes(found).terms(), as_lanes(wanted).terms(), strict=True))


def decide(couples: Sequence[tuple[Term, Term]], dtype: Any) -> Decision:
    """Whether all pairs are equal for all inputs. dtype: of the values; NaNs are alike."""
    ways: list[str] = []
    known: dict[Any, str] = {}
    undecided: Decision | None = None
    for a, b in couples:
        form = terms.shape_of(a, b)
        if form in known:
            continue
        decision = _decide(_difference(a, b, np.dtype(dtype)), a is b, not _rounding(b))
        if decision.values is not None:
            return decision
        known[form] = decision.ways[0]
        if not decision.proved:
            undecided = decision
        ways += decision.ways
    return undecided or Decision(True, tuple(ways))


def _difference(a: Term, b: Term, dtype: np.dtype[Any]) -> Term:
    """One bit that is on where the two differ."""
    differ = terms.invert(terms.equal(a, b))
    if dtype.kind == "f" or dtype.name == "bfloat16":
        differ = terms.both(differ, terms.invert(terms.both(is_nan(a, dtype), is_nan(b, dtype))))
    return differ


def _rounding(a: Term) -> list[str]:
    """Functions in a term whose results may be rounded in more than one way."""
    return [name for name in terms.calls_of(a) if not name.startswith("cast ")]


def _decide(differ: Term, same: bool, exact: bool) -> Decision:
    """same: both are one term. exact: what is wanted is rounded in one way only."""
    if differ.operator == "const":
        return Decision(not differ.detail, ("the same bits moved" if same else "constants",),
                        {} if differ.detail else None)
    support = sorted(terms.support(differ))
    calls, rounding = terms.calls_of(differ), _rounding(differ)
    # Sums and products may be rounded otherwise than the language does: running tells by how much.
    rounded = Decision(None, (f"{', '.join(rounding)} of floats on {len(support)} bits",))
    if len(support) <= EXHAUSTIVE_BITS:
        values = _spread(support, np.arange(1 << len(support), dtype=np.uint64))
        found = _by_values(differ, values)
        if found is None:
            return Decision(True, (f"each value of the {len(support)} bits that matter",))
        return rounded if rounding and not exact else found
    if rounding and not exact:
        return rounded
    random = np.random.default_rng(0)
    samples = {t.detail: _hostile(random, t.width) for t in terms.inputs_of(differ)}
    found = _by_values(differ, samples)
    if found is not None or rounding:
        return found or rounded
    why = f"{', '.join(calls)} on {len(support)} bits" if calls else f"it depends on {len(support)} bits"
    if find_spec("z3") is None:
        return Decision(None, (f"{why}, more than the {EXHAUSTIVE_BITS} that are gone through; mend: "
                               "pip install 'sapper[prove]' for z3",))
    return _by_z3(differ, why)


def _spread(support: Sequence[terms.Bit], counter: Any) -> dict[str, Any]:
    """Values of inputs in which the bits of `support` count up, all others off."""
    found: dict[str, Any] = {}
    for at, (name, bit) in enumerate(support):
        here = (counter >> np.uint64(at) & np.uint64(1)) << np.uint64(bit)
        found[name] = found.get(name, np.uint64(0)) | here
    return found


def _hostile(random: np.random.Generator, width: int) -> Any:
    """Random values of all magnitudes, and those beside powers of two."""
    low = (1 << width) - 1
    powers = [(1 << bit) + by & low for bit in range(width) for by in (-1, 0, 1)]
    drawn = [int.from_bytes(random.bytes(8), "little") & low for _ in range(SAMPLES - len(powers))]
    values = np.array(powers + [v >> int(random.integers(0, width)) if at % 2 else v for at, v in enumerate(drawn)],
                      np.uint64)
    return random.permutation(values)


def _by_values(differ: Term, values: Mapping[str, Any]) -> Decision | None:
    """A counterexample among given values, None if there is none."""
    wrong = np.flatnonzero(terms.evaluate(differ, values))
    if not len(wrong):
        return None
    return Decision(False, (), {name: int(v[wrong[0]]) for name, v in values.items()})


def _by_z3(differ: Term, why: str) -> Decision:
    import z3

    solver = z3.SolverFor("QF_UFBV")
    solver.set("timeout", Z3_LIMIT_MS)
    (form,) = terms.to_z3([differ])
    solver.add(form == 1)
    answer = solver.check()
    if answer == z3.unsat:
        return Decision(True, ("z3",))
    if answer == z3.sat:
        model = solver.model()
        values = {t.detail: model.eval(z3.BitVec(t.detail, t.width), model_completion=True).as_long()
                  for t in terms.inputs_of(differ)}
        if terms.evaluate(differ, {name: np.array([v], np.uint64) for name, v in values.items()})[0]:
            return Decision(False, (), values)
        return Decision(None, (f"{why}: what z3 takes for any function",))
    return Decision(None, (f"{why}: z3 says {solver.reason_unknown()} after {Z3_LIMIT_MS // 1000} s",))


def _replayed(block: Any, immediates: Sequence[int], meaning: Meaning, rows: Sequence[Lanes],
              values: Mapping[str, int]) -> Proof:
    """The counterexample as arrays, run through the interpreter of rows and through the meaning."""
    given = [known_array(row, values) for row in rows]
    found, wanted = block.run([g.copy() for g in given], list(immediates)), meaning([g.copy() for g in given])
    wanted = np.broadcast_to(np.asarray(wanted), found.shape)
    bits = f"u{found.dtype.itemsize}"
    nan = np.isnan(found) & np.isnan(wanted) if found.dtype.kind == "f" else np.zeros(found.shape, bool)
    wrong = np.flatnonzero((found.view(bits) != np.ascontiguousarray(wanted).view(bits)) & ~nan)
    if not len(wrong):
        raise RuntimeError(f"{block.name}: a counterexample does not differ when it is run: {dict(values)}")
    lane = int(wrong[0])
    at = ", ".join(f"{g[lane]!r} ({int(g.view(f'u{g.dtype.itemsize}')[lane]):#x})" for g in given)
    return Proof(False, f"lane {lane}: for {at} found {found[lane]!r} "
                        f"({int(found.view(bits)[lane]):#x}), expected {wanted[lane]!r}")


def known_array(unknowns: Lanes, values: Mapping[str, int]) -> Any:
    """The array that an array of inputs is for given values; others are 0."""
    bits = [values.get(t.detail, 0) for t in unknowns.terms()]
    whole = np.array(bits, np.uint64).astype(f"u{unknowns.dtype.itemsize}")
    return whole.view(unknowns.dtype).reshape(unknowns.shape)


# --- The meaning of a piece in a kernel -------------------------------------------------------------------------------

def meaning_in_language(result: Value, inputs: Sequence[Value]) -> Meaning:
    """What the tile IR computes for `result` from the inputs, on rows. Raises NotSymbolic, when it is called, where it
    needs more than them and constants."""
    order: list[Op] = []
    pending: list[tuple[Value, bool]] = [(result, False)]
    seen: set[Value] = set(inputs)
    while pending:
        value, done = pending.pop()
        if done:
            assert value.op is not None
            order.append(value.op)
        elif value not in seen:
            seen.add(value)
            if value.op is None:
                continue
            pending.append((value, True))
            pending += [(operand, False) for operand in value.op.operands]

    def compute(rows: list[Any]) -> Any:
        values: dict[Value, Any] = dict(zip(inputs, rows, strict=True))
        for op in order:
            dtype = op.results[0].type.dtype  # type: ignore[union-attr]
            if op.name == "const":
                values[op.results[0]] = semantics.constant(op.attributes["value"], dtype)
            elif op.name == "full":
                values[op.results[0]] = values[op.operands[0]]
            elif op.name in semantics.ELEMENTWISE and all(o in values for o in op.operands):
                values[op.results[0]] = semantics.elementwise(op.name, [values[o] for o in op.operands], dtype)
            else:
                raise NotSymbolic(f"its meaning needs {op.name} beside its inputs")
        return values[result]

    return compute

