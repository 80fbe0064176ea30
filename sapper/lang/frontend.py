"""From a kernel's Python source to tile IR.

Enters: a Kernel, and the extents that are fixed. Leaves: an ir Function of stage "tile". The source is read by
walking its ast with an environment of values (see bindings.py): what concerns Python objects alone is computed
at once, what concerns tiles and scalars becomes ops. A called function is read in place, with names of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from ..ir.extents import fixed, names_in, names_of
from ..ir.nodes import Block, Function, Location, Op, Value
from ..ir.types import DType, TensorType, TileType, bool_, f32, index
from .access import Access, Update, other_than_assigning
from .affine import Affine
from .bindings import Axis, Carried, LoopRange, LoopScope, Span, axes_of, dtype_of, is_tensor, is_tile
from .calls import Calls
from .dims import DimExpression, nested
from .expressions import Gone, LocalFunction, Returned
from .kernel import Kernel
from .liveness import assigned_names
from .operands import INDEX

STATEMENT_MENDS: dict[str, str] = {
    "While": "walk a range: for i in range(n)",
    "With": "a kernel holds nothing to close",
    "Try": "a kernel raises nothing",
    "Raise": "a kernel raises nothing; check arguments before the call",
    "Delete": "names need no deleting",
    "Global": "pass values as arguments and return them",
    "Nonlocal": "pass values as arguments and return them",
    "Import": "import outside the kernel",
    "ImportFrom": "import outside the kernel",
    "ClassDef": "define classes outside the kernel",
    "AnnAssign": "leave the annotation out, or write .to(dtype)",
    "Match": "write if and elif",
    "Break": "give the range its end: span(start, stop)",
    "Continue": "put the rest of the body under an if",
}


ASKED = (ast.Eq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
"""Comparisons of extents that a kernel may assert, for calls to check."""

JOINS = {"add": "add", "sub": "add", **{name: name for name in ("max", "min", "and", "or", "xor")}}
"""Of ops of an element and a value, by which an element may be met again: the op that joins values."""


class Retry(Exception):
    """A weak number carried through a loop turned out to have a dtype: read the loop again with it."""

    def __init__(self, name: str, dtype: DType) -> None:
        super().__init__(name)
        self.name = name
        self.dtype = dtype


def build(kernel: Kernel, static: Mapping[str, int]) -> Function:
    """The tile IR of a kernel. static: extents fixed at compile time, by dimension name."""
    return Frontend(kernel, static).run()


class Frontend(Calls):
    """Reads one kernel."""

    def __init__(self, kernel: Kernel, static: Mapping[str, int]) -> None:
        self.kernel = kernel
        names = names_of(type for _, type in kernel.parameters)
        place = Location(kernel.source_file, kernel.source_line)
        super().__init__(Function(kernel.name, "tile", place), static, names)
        self.function.attributes["dims"] = names

    def run(self) -> Function:
        kernel, function = self.kernel, self.function
        self.frame = self.frame_of(kernel.python_function, None, None)
        for name, type in kernel.parameters:
            value = function.add_argument(name, type)
            self.levels[value] = 0
            self.frame.env[name] = value
        body = self.frame.parsed.node.body  # type: ignore[attr-defined]
        self.block(body)
        self.look_through_undecided()
        if not any(op.name == "store" for op in function.walk()):
            last = ast.unparse(body[-1]).split("\n")[0]
            self.fail("stores-nothing", f"kernel {kernel.name} stores nothing", body[-1], last,
                      "at least one store to a tensor argument", "write out[...] = ...")
        if self.static:  # the proofs compared dimensions by name; from here on the fixed ones are numbers
            for value in function.arguments:
                if isinstance(value.type, TensorType):
                    value.type = TensorType(dtype_of(value), tuple(fixed(d, self.static) for d in value.type.dims))
            function.attributes["dims"] = [n for n in self.dim_names if n not in self.static]
        rows = [[*key[:2], constant, *key[2:]] for key, constant in self.requirements.items()]
        rows += self.conditions
        if rows:
            function.attributes["requires"] = rows
        if kernel.options.get("in_place"):
            function.attributes["in_place"] = [list(pair) for pair in kernel.options["in_place"]]
            function.unite()
        used = {operand for op in function.walk() for operand in op.operands}
        head: list[Op] = []
        for op in reversed(self.prelude):
            if op.results[0] in used:
                head.insert(0, op)
                used.update(op.operands)
        function.body.ops[:0] = head
        return function

    # Statements.

    def block(self, body: list[ast.stmt]) -> Returned | None:
        last = len(body) - 1
        for position, statement in enumerate(body):
            handler = STATEMENTS.get(type(statement))
            if handler is None:
                kind = type(statement).__name__
                self.fail("unsupported-statement", f"{STATEMENT_WORDS.get(kind, kind.lower())} in a kernel", statement,
                          ast.unparse(statement).partition("\n")[0], "assignments, for, if, calls, assert and return",
                          STATEMENT_MENDS.get(kind, "leave it out"))
            returned: Returned | None = handler(self, statement)
            if returned is not None:
                if isinstance(statement, ast.Return) and position != last:
                    self.fail("return-in-the-middle", "statements follow a return", statement, "a return",
                              "a return as the last statement", "delete what follows")
                return returned
        return None

    def pass_statement(self, node: ast.Pass) -> None:
        return None

    def expression_statement(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.call(node.value, True)
        elif not isinstance(node.value, ast.Constant):
            self.evaluate(node.value)

    def return_statement(self, node: ast.Return) -> Returned:
        frame = self.frame
        if frame.nesting:
            self.fail("return-in-the-middle", "a return inside a loop or a run-time if", node, "a return",
                      "a return as the last statement of the function",
                      "assign the result to a name in both branches and return that")
        if frame.caller is None and node.value is not None and not (
                isinstance(node.value, ast.Constant) and node.value.value is None):
            self.fail("kernel-returns-value", f"kernel {self.kernel.name} returns a value", node,
                      ast.unparse(node.value), "no value: results are stored to tensor arguments",
                      "add a parameter out: Tensor[...] and write out[...] = ...")
        return Returned(None if node.value is None else self.evaluate(node.value))

    def assert_statement(self, node: ast.Assert) -> None:
        parts = [node.test]
        while parts:
            test = parts.pop(0)
            if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
                parts[:0] = test.values
            elif not (isinstance(test, ast.Compare) and self.asked_of_extents(test)):
                self.assert_now(test, node)

    def assert_now(self, test: ast.expr, node: ast.Assert) -> None:
        value = self.evaluate(test)
        if isinstance(value, DimExpression):
            value = self.operand(value, test)
        if isinstance(value, (Value, Axis)):
            self.fail("assertion", "an assert about a run-time value", node, self.describe(value),
                      "a condition on Python constants, or a comparison of extents", "check it before the call")
        if not value:
            said = ""
            if node.msg is not None:
                message = self.evaluate(node.msg)
                said = message if isinstance(message, str) else self.describe(message)
            self.fail("assertion", "an assert does not hold", node, ast.unparse(test), said or "a true condition",
                      "change the constants that it is about")

    def asked_of_extents(self, test: ast.Compare) -> bool:
        """Whether a comparison is one of extents that are known at a call, which then checks it."""
        sides = [self.evaluate(side) for side in (test.left, *test.comparators)]
        names = {name for side in sides if isinstance(side, DimExpression) for name in names_in(nested(side))}
        tensor = next((v for v in self.function.arguments if names & set(names_of([v.type]))), None)
        if tensor is None or self.guards or self.static.keys() >= names or not all(
                type(side) is int or isinstance(side, DimExpression) for side in sides) or not all(
                isinstance(operator, ASKED) for operator in test.ops):
            return False
        for operator, left, right in zip(test.ops, sides, sides[1:], strict=False):
            if isinstance(operator, ast.Eq) and right == 0 and isinstance(left, DimExpression) and left.op == "mod":
                self.condition_on(tensor, "multiple", nested(left.left), nested(left.right))
                continue
            low, high = (right, left) if isinstance(operator, (ast.Gt, ast.GtE)) else (left, right)
            if isinstance(operator, (ast.Lt, ast.Gt)):      # as what is asked, not as an index that is inside
                low = DimExpression("add", low, 1) if isinstance(low, DimExpression) else low + 1
            self.condition_on(tensor, "inside", nested(low), nested(DimExpression("add", high, 1)))
            if isinstance(operator, ast.Eq):
                self.condition_on(tensor, "inside", nested(high), nested(DimExpression("add", low, 1)))
        return True

    def define_function(self, node: ast.FunctionDef) -> None:
        if node.decorator_list:
            self.fail("unsupported-statement", "a decorated function in a kernel", node,
                      ast.unparse(node.decorator_list[0]),
                      "a plain function", "define it outside the kernel")
        self.bind(node.name, LocalFunction(node, self.frame), node)

    def assign(self, node: ast.Assign) -> None:
        first, given = node.targets[0], node.value
        if isinstance(first, ast.Tuple) and isinstance(given, ast.Tuple) and len(first.elts) == len(given.elts) and (
                not any(isinstance(e, ast.Starred) for e in given.elts)):
            value: Any = tuple([self.evaluate(e, target) for e, target in zip(given.elts, first.elts, strict=True)])
        else:
            known = len(self.accesses)
            value = self.evaluate(given, first)
            if isinstance(first, ast.Subscript) and len(node.targets) == 1:
                written = ast.unparse(first)
                reads = [a for a in self.accesses[known:] if not a.store and ast.unparse(a.node) == written]
                items, nodes = self.subscript_items(first)
                self.store(self.evaluate(first.value), items, value, first, nodes, given, joins=bool(reads))
                self.note_update(reads)
                return
        for target in node.targets:
            self.assign_to(target, value, node.value)

    def assign_to(self, target: ast.expr, value: Any, value_node: ast.expr) -> None:
        if isinstance(target, ast.Name):
            if isinstance(value, LoopRange):
                self.fail("bad-argument", f"{value.kind}(...) stands only after `in` of a for loop", value_node,
                          self.describe(value), "a value", f"write for {target.id} in {ast.unparse(value_node)}:")
            self.bind(target.id, value, target)
        elif isinstance(target, (ast.Tuple, ast.List)):
            if not isinstance(value, tuple):
                self.fail("tuple", "only a tuple can be unpacked", value_node, self.describe(value), "a tuple",
                          "assign it to one name")
            starred = next((t for t in target.elts if isinstance(t, ast.Starred)), None)
            if starred is not None:
                self.fail("unsupported-statement", "a starred name takes what is left of a tuple", starred,
                          ast.unparse(starred), "one name for each value", "name each value")
            if len(value) != len(target.elts):
                self.fail("tuple", "a tuple of another length is unpacked", target, f"{len(value)} values",
                          f"{len(target.elts)} values", "write one name for each value")
            same = isinstance(value_node, ast.Tuple) and len(value_node.elts) == len(value)
            for position, (element, part) in enumerate(zip(target.elts, value, strict=True)):
                self.assign_to(element, part,
                               value_node.elts[position] if same else value_node)  # type: ignore[attr-defined]
        elif isinstance(target, ast.Subscript):
            items, nodes = self.subscript_items(target)
            self.store(self.evaluate(target.value), items, value, target, nodes, value_node)
        else:
            self.fail("unsupported-statement", "an assignment to this is not possible in a kernel", target,
                      ast.unparse(target), "a name, a tuple of names, or an element of a tensor", "assign to a name")

    def augmented_assign(self, node: ast.AugAssign) -> None:
        target = node.target
        if isinstance(target, ast.Name):
            before = self.lookup(target.id, target)
            self.bind(target.id, self.apply(node.op, before, self.evaluate(node.value), node, target, node.value), node)
            return
        if not isinstance(target, ast.Subscript):
            self.fail("unsupported-statement", "an assignment to this is not possible in a kernel", target,
                      ast.unparse(target), "a name or an element of a tensor", "assign to a name first")
        tensor = self.evaluate(target.value)
        if not is_tensor(tensor):
            self.fail("subscript", "only a tensor's elements can be assigned", target, self.describe(tensor),
                      "a tensor", other_than_assigning(tensor))
        items, nodes = self.subscript_items(target)
        before = self.load(tensor, items, target, nodes)
        read = self.accesses[-1]
        after = self.apply(node.op, before, self.evaluate(node.value), node, target, node.value)
        self.store(tensor, items, after, target, nodes, node.value, joins=True)
        self.note_update([read])

    def note_update(self, reads: list[Access]) -> None:
        """Of a store just made, whether it joins a value with the element that it writes. reads: the loads of that
        element in its statement."""
        store, block = self.accesses[-1], self.builder.block
        made = store.op.operands[1].op
        join = None if made is None else JOINS.get(made.name)
        if made is None or join is None or dtype_of(store.tensor) == bool_ or made not in block.ops:
            return
        used = [value for outer in block.ops for op in outer.walk() for value in op.operands]
        for read in reads:
            loaded = read.op.result
            places = made.operands[:1] if made.name == "sub" else made.operands
            if loaded in places and read.tensor is store.tensor and read.op in block.ops and (
                    used.count(loaded) == used.count(made.result) == 1):
                read.update = store.update = Update(join, block, read)
                return

    # Control.

    def if_statement(self, node: ast.If) -> Returned | None:
        test = self.condition(self.evaluate(node.test), node.test, "the condition of if")
        if isinstance(test, bool):
            return self.block(node.body if test else node.orelse)
        frame = self.frame
        env = frame.env
        before_at = dict(frame.assigned_at)
        branches: list[tuple[Block, dict[str, Any], dict[str, ast.AST]]] = []
        frame.nesting += 1
        self.guards += 1
        for body, taken in ((node.body, True), (node.orelse, False)):
            block = Block()
            self.branches.append((test, taken))
            outside = self.open_block(block)
            frame.env = dict(env)
            frame.assigned_at = dict(before_at)
            self.block(body)
            branches.append((block, frame.env, frame.assigned_at))
            self.close_block(outside)
            self.branches.pop()
        self.guards -= 1
        frame.nesting -= 1
        frame.env = env
        frame.assigned_at = before_at
        (then, then_env, then_at), (other, other_env, other_at) = branches
        merged: list[tuple[str, Value, Value, bool]] = []
        live = frame.live.get(node, ())
        for name in assigned_names([node]):
            written_at = then_at.get(name) or other_at.get(name) or node
            if name not in live:
                env[name] = Gone("missing-branch", "is not bound after the if", f"assign {name} before the if")
                continue
            values: list[Any] = []
            for branch_env in (then_env, other_env):
                value = branch_env.get(name)
                if name not in branch_env or (isinstance(value, Gone) and value.kind == "missing-branch"):
                    env[name] = Gone("missing-branch", "is assigned in one branch of the if only",
                                     f"assign {name} before the if, or in both branches")
                    break
                if isinstance(value, Gone):
                    env[name] = value
                    break
                values.append(value)
            if len(values) < 2:
                continue
            if values[0] is values[1] or self.same_object(values[0], values[1]):
                env[name] = values[0]
                continue
            merged.append((name, *self.merge(name, values[0], values[1], then, other, written_at)))
        self.at(node)
        place = self.builder.location
        then.ops.append(Op("yield", [entry[1] for entry in merged], (), None, None, place))
        other.ops.append(Op("yield", [entry[2] for entry in merged], (), None, None, place))
        op = self.builder.add("if", [test], [entry[1].type for entry in merged], [then, other])
        for (name, _, _, weak), result in zip(merged, op.results, strict=True):
            self.levels[result] = self.level
            if weak:
                self.weak.add(result)
            self.bind(name, result, node)
        return None

    def for_statement(self, node: ast.For) -> None:
        if node.orelse:
            self.fail("unsupported-statement", "else of a for loop", node.orelse[0], "else", "a loop without else",
                      "put the statements after the loop")
        walked = self.evaluate(node.iter)
        if isinstance(walked, tuple):
            for item in walked:
                self.assign_to(node.target, item, node.iter)
                self.block(node.body)
            return
        if not isinstance(walked, LoopRange):
            name, found, mend = self.text(node.target), self.describe(walked), "walk an extent, and index with it"
            if isinstance(walked, (DimExpression, Span, int)):
                mend = "write tiles(...) for tiles, each(...) for indices"
            elif isinstance(walked, Axis):
                found, mend = "an axis that is one piece", f"write {name} = whole(...), or for {name} in tiles(...)"
            self.fail("bad-range", "this cannot be walked", node.iter, found,
                      "tiles(...), each(...), range(...) or a tuple", mend)
        targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if len(names) != len(targets) or len(set(names)) < len(names):
            self.fail("unsupported-statement", "loop variables are names", node.target, ast.unparse(node.target),
                      "different names", "name each loop variable")
        if len(names) != len(walked.spans):
            self.fail("bad-range", f"{walked.kind} of {len(walked.spans)} extents, {len(names)} loop variables",
                      node.target, f"{len(names)} names", f"{len(walked.spans)}",
                      "name one variable for each extent" + (
                          "; the schedule picks how large a tile is"
                          if any(isinstance(span.stop, int) for span in walked.spans[len(names):]) else ""))
        # The range is computed before the loop.
        bounds: list[Value] = []
        forms: list[tuple[Affine, Affine]] = []
        for span in walked.spans:
            bounds.append(self.value(span.start, index, node.iter))
            bounds.append(self.value(span.stop, index, node.iter))
            forms.append((self.dim_form(span.start, node.iter), self.dim_form(span.stop, node.iter)))
        carried = [n for n in self.frame.live.get(node, ()) if self.is_carried(n, node)]
        dtypes: dict[str, DType] = {}
        for _ in range(2 * len(carried) + 2):
            state = (len(self.accesses), dict(self.frame.env), dict(self.frame.assigned_at), dict(self.axes),
                     self.level, self.guards, self.ragged, self.scopes, self.frame.nesting, self.builder.block,
                     len(self.known), len(self.branches), len(self.undecided))
            try:
                self.loop(node, walked, names, bounds, forms, carried, dtypes)
                return
            except Retry as retry:
                if dtypes.get(retry.name) == retry.dtype:
                    raise AssertionError("a loop was read twice with the same dtype") from None
                dtypes[retry.name] = retry.dtype
                count, self.frame.env, self.frame.assigned_at, self.axes, self.level, self.guards = state[:6]
                self.ragged, self.scopes, self.frame.nesting, self.builder.block, depth, *open_now = state[6:]
                del self.accesses[count:]
                del self.known[depth:]
                del self.branches[open_now[0]:]
                del self.undecided[open_now[1]:]
        self.fail("carried-type", f"{' and '.join(carried)} find no dtype that stays the same in the loop", node,
                  "numbers without a dtype", "a dtype", "start from full(value=0, dtype=f32)")

    def is_carried(self, name: str, node: ast.For) -> bool:
        if name not in self.frame.env or isinstance(self.frame.env[name], Gone):
            return False
        value = self.frame.env[name]
        if isinstance(value, (bool, int, float, DimExpression)) or is_tile(value):
            return True
        self.fail("carried-kind", f"{name} is assigned in the loop and used again, but is no tile or scalar",
                  node.target,
                  self.describe(value), "a tile or a scalar", "give the name in the loop another name")

    def loop(self, node: ast.For, walked: LoopRange, names: list[str], bounds: list[Value],
             forms: list[tuple[Affine, Affine]], carried: list[str], dtypes: dict[str, DType]) -> None:
        frame = self.frame
        self.at(node)
        location = self.builder.location
        initial, weak = self.enter_carried(carried, dtypes, node)
        self.level += 1
        empty = any(self.empty_range(*pair) for pair in forms)
        ragged = empty or not all(self.reach.is_never_empty(*pair) for pair in forms)
        self.ragged += ragged
        scope = LoopScope(walked.kind, self.level, self.guards + self.ragged, node, names, bool(carried))
        scope.disjoint, scope.empty, scope.ends = walked.disjoint, empty, bounds if ragged else []
        if scope.disjoint and carried:
            self.fail("disjoint", "a loop that carries a value runs in order", node.iter,
                      f"carried: {', '.join(carried)}", "a loop without carried values, or without disjoint=True",
                      f"store {carried[0]} to a tensor, or leave disjoint=True out")
        self.scopes = (*self.scopes, scope)
        outer_env = frame.env
        body = Block([INDEX] * len(names) if walked.kind != "tiles" else ())
        outside = self.open_block(body)
        frame.env = dict(outer_env)
        frame.nesting += 1
        first_access = len(self.accesses)
        self.bind_counters(walked, names, bounds, forms, scope, body)
        arguments: list[Value] = []
        for name, value, unsettled in zip(carried, initial, weak, strict=True):
            argument = Value(value.type, body)
            body.arguments.append(argument)
            arguments.append(argument)
            self.bind_carried(frame.env, name, argument, unsettled)
        self.block(node.body)
        yields = [self.carried_result(name, argument, node) for name, argument in zip(carried, arguments, strict=True)]
        if walked.kind != "tiles" and len(names) == 1:
            for before, argument, after in zip(initial, arguments, yields, strict=True):
                self.note_carried(before, argument, after, body.arguments[0])
        self.builder.location = location
        self.builder.add("yield", yields)
        inner_env = frame.env
        frame.nesting -= 1
        frame.env = outer_env
        self.close_block(outside)
        attributes: dict[str, Any] = self.finish_loop(scope, first_access)
        self.level -= 1
        self.ragged -= ragged
        self.scopes = self.scopes[:-1]
        if walked.kind == "tiles":
            kind, attributes = "tiles", {"axes": [axis.name for axis in scope.variables], **attributes}
        else:
            kind, attributes = "each", {"count": len(names), **attributes}
            if walked.step != 1:
                attributes["step"] = walked.step
        self.builder.location = location
        op = Op(kind, [*bounds, *initial], [v.type for v in initial], attributes, [body], location)
        self.builder.block.ops.append(op)
        self.forget_inner(inner_env, outer_env, names, carried, node.lineno + frame.parsed.line_offset)
        for name, result, unsettled in zip(carried, op.results, weak, strict=True):
            self.bind_carried(outer_env, name, result, unsettled)

    def note_carried(self, before: Value, argument: Value, after: Value, counter: Value) -> None:
        """Of a scalar integer to which each step of the loop at hand adds what no step changes."""
        if axes_of(argument) or dtype_of(argument).kind not in "xiu":
            return
        step = self.form_of(after).plus(Affine(0, {argument: 1}), -1)
        if all(isinstance(symbol, str) or (isinstance(symbol, Value) and self.level_of(symbol) < self.level)
               for symbol in step.terms):
            self.carries[argument] = Carried(before, step, counter)

    def enter_carried(self, carried: list[str], dtypes: dict[str, DType], node: ast.For
                      ) -> tuple[list[Value], list[bool]]:
        """What the names that a loop carries hold before it, and whether the dtype of each may still change."""
        initial: list[Value] = []
        weak: list[bool] = []
        for name in carried:
            value = self.operand(self.frame.env[name], node)
            unsettled = not isinstance(value, Value) or value in self.weak
            weak.append(unsettled and name not in dtypes)
            initial.append(self.value(value, dtypes.get(name), node))
        return initial, weak

    def bind_counters(self, walked: LoopRange, names: list[str], bounds: list[Value],
                      forms: list[tuple[Affine, Affine]], scope: LoopScope, body: Block) -> None:
        """The names between `for` and `in`: axes of tiles, or numbers with the range that they are in."""
        env, node = self.frame.env, scope.node
        for position, (name, (start, stop)) in enumerate(zip(names, forms, strict=True)):
            if walked.kind == "tiles":
                env[name] = axis = self.new_axis(name, start, stop, scope, body, None, node)
                scope.variables.append(axis)
                self.walks[axis.name] = bounds[2 * position], bounds[2 * position + 1], 1
            else:
                env[name] = value = body.arguments[position]
                value.name = name
                self.levels[value] = self.level
                scope.variables.append(self.counted(value, walked, start, stop))
                self.walks[value] = bounds[2 * position], bounds[2 * position + 1], walked.step
                if walked.down is not None:
                    below = self.apply(ast.Mult(), value, walked.down.step, node, node, node)
                    env[name] = self.apply(ast.Sub(), walked.down.start, below, node, node, node)
            self.frame.assigned_at[name] = node.target

    def counted(self, value: Value, walked: LoopRange, start: Affine, stop: Affine) -> Value:
        """What takes each number from 0, or its start, on in a loop: its index, or how many steps that has taken."""
        if walked.step == 1:
            self.ranges[value] = (start, stop)
            return value
        steps = Value(INDEX, None, value.name)
        self.counters[steps] = value
        self.levels[steps] = self.level
        self.forms[value] = start.plus(Affine(0, {steps: walked.step}))
        (span,) = walked.spans
        extent, ends = stop.plus(start, -1), (span.start, span.stop)
        if not extent.terms:
            self.ranges[steps] = (Affine(0), Affine(max(0, -(-extent.constant // walked.step))))
        elif all(isinstance(end, (int, DimExpression)) for end in ends):
            first, behind = ends
            last = DimExpression("floordiv", DimExpression("sub", behind, first + 1), walked.step)
            most = Value(INDEX, None)
            self.levels[most], self.dim_expressions[most] = 0, last
            self.ranges[steps] = (Affine(0), Affine(1, {most: 1}))
        return steps

    def bind_carried(self, env: dict[str, Any], name: str, value: Value, unsettled: bool) -> None:
        value.name = name
        self.levels[value] = self.level
        if unsettled:
            self.weak.add(value)
        env[name] = value

    @staticmethod
    def forget_inner(inner_env: dict[str, Any], outer_env: dict[str, Any], names: list[str], carried: list[str],
                     line: int) -> None:
        """What a loop's body made cannot be used behind it; a use says why."""
        for name in inner_env:
            if inner_env[name] is not outer_env.get(name, outer_env) and name not in carried:
                counts = name in names
                outer_env[name] = Gone(
                    "use-outside-loop",
                    f"{'is a variable of' if counts else 'is assigned in'} the loop of line {line} and used after it",
                    "move the use into the loop" if counts else
                    f"give {name} a value before the loop so that the loop carries it")

    def carried_result(self, name: str, argument: Value, node: ast.For) -> Value:
        """What the body leaves in a carried name, as a value of the type that entered."""
        frame = self.frame
        value = frame.env[name]
        place = frame.assigned_at.get(name, node)
        if isinstance(value, Gone):
            self.fail(value.kind, f"{name} {value.because}", place, name, "a value at the end of the loop", value.mend)
        if not isinstance(value, (bool, int, float, DimExpression, Axis)) and not is_tile(value):
            self.fail("carried-kind", f"{name} is carried through the loop, but becomes no tile or scalar", place,
                      self.describe(value), f"{argument.type}", "use another name in the loop")
        value = self.operand(value, place)
        type = argument.type
        assert isinstance(type, TileType)
        if isinstance(value, Value):
            have = value.type
            assert isinstance(have, TileType)
            if argument in self.weak:
                if value not in self.weak and not have.axes:
                    raise Retry(name, have.dtype)
                if value in self.weak and have.dtype != type.dtype:
                    raise Retry(name, have.dtype)
            elif value in self.weak and not have.axes:
                value = self.value(value, type.dtype, place)
        elif argument in self.weak and isinstance(value, float) and type.dtype != f32:
            raise Retry(name, f32)
        else:
            value = self.constant(value, type.dtype, place)
        if value.type == type:
            return value
        if self.permuted(value, argument):
            return self.spread(value, type.axes)
        have = value.type
        assert isinstance(have, TileType)
        mend = f"start from zeros({', '.join([*have.axes, f'dtype={have.dtype.name}'])}) or full(...)"
        loops = [self.axes[axis].loop for axis in have.axes]
        if not type.axes and any(loop is not None and loop.level >= self.level for loop in loops):
            names = ", ".join(have.axes)
            over = names if len(loops) == 1 else f"({names})"
            mend = f"to add up over {names}, reduce what is added: sum(..., over={over})"
        if set(have.axes) == set(type.axes):
            mend = f"write .to({type.dtype.name})"
        elif set(type.axes) < set(have.axes) and type.axes:
            more = ", ".join(axis for axis in have.axes if axis not in type.axes)
            mend = f"to add up over {more}, contract: a[..., {more}] @ b[{more}, ...]; else {mend}"
        elif set(have.axes) < set(type.axes):
            mend = f"start from a value that spans [{', '.join(have.axes)}], or assign another name"
        self.fail("carried-type", f"carried value {name} changes type", place, f"{have} at the end of the loop",
                  f"{type}, as before the loop", mend)


STATEMENTS: dict[type[ast.stmt], Callable[..., Any]] = {
    ast.Pass: Frontend.pass_statement, ast.Expr: Frontend.expression_statement, ast.Return: Frontend.return_statement,
    ast.Assert: Frontend.assert_statement, ast.FunctionDef: Frontend.define_function, ast.Assign: Frontend.assign,
    ast.AugAssign: Frontend.augmented_assign, ast.If: Frontend.if_statement, ast.For: Frontend.for_statement,
}
STATEMENT_WORDS = {"AnnAssign": "an annotated assignment", "ClassDef": "a class", "AsyncFunctionDef": "a coroutine",
                   "ImportFrom": "an import", "Import": "an import", "Delete": "del"}
