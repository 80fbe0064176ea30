"""Programs and their arrays -> compiled kernels, launches, and a place for every byte that they touch.

Enters: a `Whole`: the launches of its programs, bound to arrays, and what the arrays are. Leaves: a `Plan`. Holds: an
array is a constant (its bytes go into the weights file) if no launch writes it; inputs, outputs and state keep their
memory; what is trained begins as the weights file has it, at places that its format says; every other one is a
temporary, which each program writes before it reads it (checked, byte by byte), and temporaries that are never alive in
the same phase of a program share memory. A phase is what lies between two barriers, so sharing adds no barrier. Every
region begins on a cache line; what lies where does not depend on this process's addresses.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Generic, TypeVar

from ..codegen.encode import EncodedCode
from ..codegen.machine import MachineFunction
from ..ir.nodes import Location
from ..runtime.buffers import LINE_BYTES
from ..runtime.compiled import CompiledKernel
from ..runtime.launch import Launcher, compile_for_call
from ..runtime.program import Launch, Layout, plan_barriers
from ..runtime.specialise import Specialisation, large_in_program
from ..runtime.system import HUGE_PAGE_BYTES, PAGE_BYTES, round_up
from .errors import AheadError
from .words import BYTES_OF_A_TOKEN, Tables, Vocabulary, make_tables

CONSTANT, STATE, TEMPORARY, TRAINED = "constant", "state", "temporary", "trained"

Sections = Sequence[tuple[str, Sequence[tuple[Any, Sequence[Any]]]]]
"""A program: (heading, [(kernel, arguments), ...]) in order. Scalars may be `Variable`s, tensors `Rows`."""


VARIABLES = {"prefill": {"position": (1, 0), "count": (0, 1)}, "step": {"position": (1, 0)}, "draw": {}}
DRAWING = ("top_k", "temperature", "top_p", "min_p", "u", "drawn")
"""Names of the arrays of one element from which "draw" draws: i32, then f32; and of the token that it gives, i32."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What becomes a file. name: of the C functions. programs: by name. arrays: name -> array, of all that is to be
    called by name. state: names of what lasts from run to run."""

    name: str
    programs: Mapping[str, Sections]
    arrays: Mapping[str, Any]
    state: Sequence[str]

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the arrays that keep their memory."""
        return tuple(self.state)

    @property
    def trained(self) -> Mapping[str, int]:
        """Names of the arrays that begin as the weights file has them: where they are in it."""
        return {}


@dataclass(frozen=True, slots=True)
class Model(Whole):
    """A model that answers.

    programs: "prefill", "step", and "draw" where tokens are to be drawn, which needs the arrays of DRAWING, among at
    most `candidates`. variables: of each program its integer variables, as (times the position, times the number of
    tokens). tokens [chunk], last [1], token [1]: names of the inputs, i32: the chunk, the index of its last token, the
    token of a step. logits [vocabulary] f32, picked [1] i32: names of the outputs, of the last token; picked is the
    likeliest.
    context: tokens that state has room for. words: the tokenizer, where the file is to have one.
    """

    context: int
    vocabulary: int
    chunk: int
    description: str = ""
    words: Vocabulary | None = None
    tokens: str = "tokens"
    last: str = "last"
    token: str = "token"
    logits: str = "logits"
    picked: str = "picked"
    candidates: int = 0
    variables: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=lambda: VARIABLES)

    @property
    def draws(self) -> bool:
        return "draw" in self.programs

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the arrays that keep their memory."""
        drawing = DRAWING if self.draws else ()
        return (self.tokens, self.last, self.token, self.logits, self.picked, *drawing, *self.state)


TRAINING = ("tokens", "targets", "wanted", "recipe", "numbers", "loss", "norm", "steps")
"""Names of the arrays that the C functions of a model in training fill and read: i32 tokens, their targets, and these
where they count, else 0; f64 what the caller wants of a step; f32 the variables of a step; f64 the loss; f32 the norm
of its gradient; f64 how many steps there were."""
LEARNING = ("settings", "told")
"""Of a model that is trained by a program of its own: i64 pairs, each the quotient of what was asked for; i32 what is
told of a step."""
TEXT_BYTES = 64 << 20
"""Of the longest text that such a program learns from: its working memory lies as far apart as code reaches."""


@dataclass(frozen=True, slots=True)
class Training(Whole):
    """A model in training.

    programs: "numbers" makes the step's variables of the recipe, "train" is a step, "evaluate" the loss alone; with
    words, the tokenizer of a program of its own, "plan" makes the recipe of "settings", and "tell" what is told of a
    step. arrays: those of TRAINING among them, and then of LEARNING. The weights file begins with `head`; then come
    the arrays of `weights`, each on a cache line, and what no program reads, content_bytes in all. Other constants
    are in the code. A file of the optimiser's state begins with state_head; then come "steps" and the arrays of
    `saved`, some of `state`. variables: of each program its f32 variables, each with its place in "numbers". recipe:
    names of what is in "recipe", each with what it is below. settings: what a program is asked for where nobody asks,
    in the order of "settings". sequences, length: of a step's tokens.
    """

    vocabulary: int
    weights: Sequence[str]
    head: bytes
    content_bytes: int
    saved: Sequence[str]
    state_head: bytes
    variables: Mapping[str, Mapping[str, int]]
    recipe: Mapping[str, float]
    sequences: int
    length: int
    description: str = ""
    words: Vocabulary | None = None
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[str, ...]:
        return (*TRAINING, *(LEARNING if self.words is not None else ()), *self.state)

    @property
    def trained(self) -> Mapping[str, int]:
        sizes = [round_up(self.arrays[name].nbytes, LINE_BYTES) for name in self.weights]
        return dict(zip(self.weights, accumulate(sizes, initial=len(self.head)), strict=False))


AnyModel = TypeVar("AnyModel", bound=Whole)


@dataclass(slots=True)
class Code:
    """A compiled kernel. symbol: its name in the file. users: how many launches it has."""

    symbol: str
    compiled: CompiledKernel
    machine: MachineFunction
    encoded: EncodedCode
    source: Location | None
    documentation: str
    users: int = 0


@dataclass(slots=True)
class Region:
    """Memory [low, high) of this process that launches touch, and where it lies in the file or in a model's memory.

    lives: program -> (first, last) phase in which it is touched.
    """

    low: int
    high: int
    name: str = ""
    kind: str = CONSTANT
    offset: int = 0
    lives: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return self.high - self.low

    def meets(self, other: Region) -> bool:
        """Whether both are alive at the same time."""
        return any(first <= other.lives[p][1] and other.lives[p][0] <= last
                   for p, (first, last) in self.lives.items() if p in other.lives)


@dataclass(slots=True)
class PlannedProgram:
    """A program. headings: launch -> heading, where a section begins. layout: of its control memory, which lies at
    `control` in the model's memory."""

    name: str
    launches: list[Launch]
    headings: dict[int, str]
    layout: Layout
    control: int = 0


@dataclass(slots=True)
class Plan(Generic[AnyModel]):
    """Where everything is. Offsets are in bytes: of constants and what is trained in the weights file (constants of a
    model in training: in a table of the code), of all else in a model's memory.

    temporary_bytes: as placed; separate_bytes: what temporaries would take without sharing. huge_bytes: from the
    start of the memory on, what is to lie on huge pages. memory_bytes: up to the workers' scratch, of which each has
    scratch_bytes. checked_bytes: of the weights file, from its start, those whose digest the code has. words: tables
    that lie in the weights file at words_offset; text_bytes: of the longest text; work: places in the memory for
    turning it into tokens. Words of a model in training are a table of the code, and that memory is not the model's.
    """

    model: AnyModel
    target: Any
    codes: list[Code]
    programs: dict[str, PlannedProgram]
    regions: list[Region]
    weights_bytes: int = 0
    temporary_bytes: int = 0
    separate_bytes: int = 0
    state_bytes: int = 0
    huge_bytes: int = 0
    memory_bytes: int = 0
    scratch_bytes: int = 0
    checked_bytes: int = 0
    words: Tables | None = None
    words_offset: int = 0
    text_bytes: int = 0
    work: dict[str, int] = field(default_factory=dict)

    def region_at(self, address: int) -> Region:
        """The region with the byte at that address of this process."""
        found = self.regions[bisect_right(self.regions, address, key=lambda region: region.low) - 1]
        assert found.low <= address < found.high, "every address of a launch lies in a region"
        return found

    def place(self, name: str) -> int:
        """Offset of a named array in the model's memory."""
        address = address_of(self.model.arrays[name])
        region = self.region_at(address)
        return region.offset + address - region.low

    @property
    def constants(self) -> list[Region]:
        """Those that are in the code."""
        return self.of_kind(CONSTANT) if self.model.trained else []

    def of_kind(self, kind: str) -> list[Region]:
        return [region for region in self.regions if region.kind == kind]


def address_of(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def memory_of(region: Region) -> memoryview:
    """The bytes of a region in this process; the plan's launches keep them alive."""
    return memoryview((ctypes.c_char * region.size_bytes).from_address(region.low)).cast("B")


def make_plan(model: AnyModel, target: Any, head_bytes: int) -> Plan[AnyModel]:
    """Compile and place everything. head_bytes: of a model's memory, kept free at its start.

    Raises what calling the kernels would, and AheadError for what a file can't hold.
    """
    compiler = _Compiler(target)
    programs = {name: _bind(name, sections, compiler, bool(model.trained)) for name, sections in model.programs.items()}
    plan = Plan(model, target, list(compiler.codes.values()), programs, _regions(programs))
    _classify(plan)
    for region in plan.regions:
        if region.kind == TEMPORARY:
            region.lives = {name: live for name, program in programs.items() if (live := _life(region, program))}
    _check_written_first(plan)
    _place(plan, head_bytes)
    _check_alignment(plan)
    return plan


class _Compiler:
    """Each kernel once for each specialisation that launches ask for."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.codes: dict[tuple[int, Specialisation, str], Code] = {}
        self._kernels: list[Any] = []  # alive, so that an id stands for one kernel
        self._names: dict[str, int] = {}

    def __call__(
        self, launcher: Launcher, specialisation: Specialisation, dims: Mapping[str, int]
    ) -> tuple[CompiledKernel, Code]:
        kernel = launcher.kernel
        schedule = launcher.schedule_for(dims, self.target, specialisation.has_packed)
        key = id(kernel), specialisation, repr(schedule)
        code = self.codes.get(key)
        if code is None:
            made = launcher.follow(schedule, lambda followed: compile_for_call(
                kernel, static_dims=dict(specialisation.static_dims), unit_strides=dict(specialisation.unit_strides),
                dim_classes=dict(specialisation.dim_classes), target=self.target, schedule=followed,
                aligned=frozenset(specialisation.aligned),
            ))
            self._kernels.append(kernel)
            number = self._names[kernel.name] = self._names.get(kernel.name, 0) + 1
            symbol = f"kernel.{kernel.name}" + (f".{number}" if number > 1 else "")
            machine = MachineFunction(symbol, made.made.machine.body, made.made.machine.constants,
                                      made.made.machine.frame_bytes)
            encoded = EncodedCode(made.made.bytes, made.made.code_bytes, {}, made.made.line_table,
                                  made.made.align_bytes)
            code = self.codes[key] = Code(
                symbol, CompiledKernel.of(kernel.name, made), machine, encoded,
                Location(kernel.source_file, kernel.source_line), kernel.__doc__ or "")
        code.users += 1
        return code.compiled, code


def _bind(name: str, sections: Sections, compiler: _Compiler, floats: bool) -> PlannedProgram:
    """floats: variables are f32; else they are integers."""
    launches: list[Launch] = []
    headings: dict[int, str] = {}
    for heading, steps in sections:
        headings[len(launches)] = heading
        for kernel, arguments in steps:
            launches.append(Launch(kernel, arguments, {"static": True}, compiler, large_in_program(compiler.target)))
    for launch in launches:
        for place in launch.places:
            dtype = place.parameter.dtype
            if (dtype.name != "f32") if floats else dtype.kind == "f":
                raise AheadError(f"program {name}, variable {place.variable.name}", dtype.name,
                                 "f32" if floats else "an integer", "compute it in a kernel, or pass a constant")
    plan_barriers(launches)
    return PlannedProgram(name, launches, headings, Layout.of(launches))


def _regions(programs: Mapping[str, PlannedProgram]) -> list[Region]:
    """The ranges that launches touch, those that overlap joined, in order of address."""
    ranges = sorted({r for program in programs.values() for launch in program.launches
                     for r in (*launch.reads, *launch.writes) if r[0] < r[1]})
    regions: list[Region] = []
    for low, high in ranges:
        if regions and low < regions[-1].high:
            regions[-1].high = max(regions[-1].high, high)
        else:
            regions.append(Region(low, high))
    return regions


def _classify(plan: Plan[Any]) -> None:
    model = plan.model
    for program in plan.programs.values():
        for launch in program.launches:
            for low, high in launch.writes:
                if low < high:
                    plan.region_at(low).kind = TEMPORARY
    for name, array in model.arrays.items():
        low = address_of(array)
        found = [r for r in plan.regions if r.low < low + array.nbytes and low < r.high]
        for region in found:
            region.name = f"{region.name}, {name}" if region.name else name
            if name in model.kept:
                region.kind = STATE
            elif name in model.trained:
                region.kind = TRAINED
                region.offset = model.trained[name] + region.low - low
        if name in (*model.kept, *model.trained) and not found:
            raise AheadError(f"model {model.name}, array {name}", "no launch that touches it", "at least one",
                             "leave it out, or pass it to a kernel")
    for kind in (CONSTANT, STATE, TEMPORARY, TRAINED):
        for number, region in enumerate(_by_first_use(plan, kind)):
            region.name = region.name or f"{kind} {number}"


def _life(region: Region, program: PlannedProgram) -> tuple[int, int] | None:
    phases = []
    phase = 0
    for launch in program.launches:
        if any(low < region.high and region.low < high for low, high in (*launch.reads, *launch.writes)):
            phases.append(phase)
        phase += launch.barrier
    return (phases[0], phases[-1]) if phases else None


def _check_written_first(plan: Plan[Any]) -> None:
    """Temporaries hold nothing at the start of a program. Raises AheadError for a read of what was not written."""
    for program in plan.programs.values():
        written: dict[int, list[tuple[int, int]]] = {}
        for number, launch in enumerate(program.launches):
            for low, high in launch.reads:
                region = plan.region_at(low) if low < high else None
                if region is None or region.kind != TEMPORARY:
                    continue
                reach = low
                for first, last in sorted(written.get(region.low, ())):
                    if first <= reach:
                        reach = max(reach, last)
                if reach < high:
                    raise AheadError(
                        f"program {program.name}, launch {number} ({launch.signature.kernel})",
                        f"a read of {region.name} before all that it reads is written",
                        "memory that the program writes first, or state", "name it in `state`")
            for low, high in launch.writes:
                if low < high:
                    written.setdefault(plan.region_at(low).low, []).append((low, high))


def _place(plan: Plan[Any], head_bytes: int) -> None:
    here = 0
    for region in _by_first_use(plan, CONSTANT):
        region.offset = round_up(here, LINE_BYTES)
        here = region.offset + region.size_bytes
    plan.weights_bytes = plan.words_offset = round_up(max(here, 1), PAGE_BYTES)
    model = plan.model
    if isinstance(model, Model) and model.words is not None:
        plan.words = make_tables(model.words)
        plan.weights_bytes += len(plan.words.content)
    plan.checked_bytes = plan.weights_bytes
    if isinstance(model, Training):
        plan.weights_bytes, plan.checked_bytes = len(model.head) + model.content_bytes, len(model.head)
        if model.words is not None:
            plan.words, plan.words_offset, plan.text_bytes = make_tables(model.words), 0, TEXT_BYTES
            _place_work(plan, LINE_BYTES)

    here = head_bytes
    for program in plan.programs.values():
        program.control = round_up(here, LINE_BYTES)
        here = program.control + program.layout.scratch
    start = round_up(here, LINE_BYTES)
    end = _share(_by_first_use(plan, TEMPORARY), start)
    plan.temporary_bytes = end - start
    plan.separate_bytes = sum(region.size_bytes for region in plan.of_kind(TEMPORARY))
    plan.huge_bytes = round_up(end, HUGE_PAGE_BYTES)
    here = plan.huge_bytes
    if isinstance(model, Model) and plan.words is not None:
        plan.text_bytes = model.context * BYTES_OF_A_TOKEN
        here = _place_work(plan, here)
    state = here
    kept = [plan.region_at(address_of(plan.model.arrays[name])) for name in plan.model.kept]
    for region in {region.low: region for region in kept}.values():  # small ones first: code reaches 2^31 far
        region.offset = round_up(here, LINE_BYTES)
        here = region.offset + region.size_bytes
    plan.state_bytes = here - state
    plan.memory_bytes = round_up(here, PAGE_BYTES)
    if isinstance(model, Training):     # whose state a step touches all of
        plan.huge_bytes = plan.memory_bytes
    plan.scratch_bytes = max((program.layout.step_bytes for program in plan.programs.values()), default=0)


def _place_work(plan: Plan[Any], start: int) -> int:
    """Memory from `start` on in which a text becomes tokens. Returns its end."""
    here = start
    for name, size_bytes in (("list0", 4), ("list1", 4), ("tokens_here", 4), ("pairs", 8)):
        plan.work[name] = here
        here = round_up(here + size_bytes * (plan.text_bytes + 1), LINE_BYTES)
    return here


def _check_alignment(plan: Plan[Any]) -> None:
    """Code that counts on whole cache lines finds them. Raises AheadError."""
    for program in plan.programs.values():
        for launch in program.launches:
            for name in launch.specialisation.aligned:
                address = launch.binding.tensors[launch.signature.positions[name]].address
                region = plan.region_at(address)
                if (region.offset + address - region.low) % LINE_BYTES:
                    raise AheadError(f"program {program.name}, kernel {launch.signature.kernel}, tensor {name}",
                                     f"a place inside {region.name} that is not the start of a cache line",
                                     "arrays that begin on a cache line", "make it with sapper.empty")


def _by_first_use(plan: Plan[Any], kind: str) -> list[Region]:
    """Regions in the order in which a token meets them, so that what reads ahead of itself reads what comes next."""
    found: dict[int, Region] = {}
    for name in sorted(plan.programs, key=lambda name: name != "step"):
        for launch in plan.programs[name].launches:
            for view in launch.binding.tensors.values():
                low, high = view.extent
                if low < high:
                    region = plan.region_at(view.address + low)
                    if region.kind == kind:
                        found.setdefault(region.low, region)
    return list(found.values())


def _share(regions: Sequence[Region], start: int) -> int:
    """Places from `start` on, the largest region first, then in their order, each as low as those alive with it allow.
    Returns the end."""
    placed: list[Region] = []
    end = start
    for region in sorted(regions, key=lambda region: -region.size_bytes):
        here = round_up(start, LINE_BYTES)
        for other in sorted((o for o in placed if o.meets(region)), key=lambda other: other.offset):
            if here + region.size_bytes > other.offset:
                here = max(here, round_up(other.offset + other.size_bytes, LINE_BYTES))
        region.offset = here
        placed.append(region)
        end = max(end, here + region.size_bytes)
    return end
