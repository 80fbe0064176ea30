"""Calling a kernel: from Python arguments to running machine code.

Enters: a `lang.Kernel` and the arguments of a call. Leaves: the kernel has run when the call returns.
Holds: what runs was compiled for exactly the facts in its `Specialisation`, and every check of `arguments` was made
either for this call or for an earlier one with the same shapes, strides and dtypes; what may differ between such calls
(addresses, overlap, alignment, writability) is checked each time.

    call ── shapes, strides, dtypes seen twice? ── yes: check addresses, fill in words, run      (about 2 µs)
                        └ no: bind ─ specialise ─ memory cache ─ disk cache ─ compile ─ make an entry, run

The contract of specialisation:
`compile_kernel(kernel, static_dims, unit_strides, dim_classes, target, schedule, aligned)`, where
    static_dims   {dim: extent}, compiled in as constants
    unit_strides  {tensor: "contiguous" | (stride of dimension i is 1, ...) | Panels}; of a contiguous tensor (C order)
                  the strides follow from its extents, another's are in the slots "a.stride.i"; of an extent of 1 a
                  stride may be anything, and flags for it say what the caller passed; Panels: it was packed
    dim_classes   {dim: (bound, divisor)}; bound 1 | 16 | 128 | 1024 | 8192 | 2**31-1, the least not below the extent,
                  except that 1 means exactly one (an extent of 0 is in class 16); divisor 64 | 16 | 1, the largest that
                  divides the extent; dims in static_dims have none
    aligned       names of large tensors whose data and rows all start at multiples of 64 bytes
and whose result is read by `CompiledKernel.of`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from ..ir.nodes import Location
from ..ir.types import TensorType
from ..lang import context
from ..lang import digest as _digest  # noqa: F401  each first call needs it: loaded with the runtime, not in the call
from ..lang.errors import KernelError
from ..targets.x86_64.detect import host, host_target
from ..targets.x86_64.target import target as named_target
from . import arguments as _arguments
from . import settings
from .arguments import (
    FIRST_SLOT,
    WRITEABLE_FLAG,
    Binding,
    Parameter,
    Signature,
    as_array,
    fill_words,
    integer_range,
    slot_words,
)
from .cache import DiskCache, disk_cache, toolchain_key
from .compiled import CompiledKernel
from .errors import ArgumentError, LaunchError, warn_once
from .loader import CodeBlock, load
from .scratch import NO_COUNTS, areas, stride_bytes, take_area
from .tuned import tuned_schedule

if TYPE_CHECKING:
    from ..tile.schedule import StrideClass
    from .cuda.launch import DeviceCall

DIM_CLASSES = (16, 128, 1024, 8192)
LARGEST_CLASS = 2**31 - 1
CACHE_LINE_BYTES = 64
LARGE_BYTES = 8 << 20
"""A tensor from this size on is not expected in the caches when it is read next: it may be stored past them, if it is
aligned to cache lines."""
GRAIN_NS = 50_000.0
"""A worker gets at least so much of the estimated work: what it costs to wake one that sleeps."""
ASSUMED_BYTES_PER_NS = 10.0
MAX_ENTRIES = 1024
SPECIALISED_FORMS = 8
"""For so many different extents of the dims that a kernel is specialised for a launcher has code of its own."""
OPTIONS = ("emulate", "interpret", "schedule", "static", "target", "threads")

Compile = Callable[..., Any]
Block = tuple["memoryview[int]", "memoryview[float]", "memoryview[float]", int]
"""An argument block as 64-bit words, as floats, as doubles, and its address."""


class Specialisation(NamedTuple):
    """What a kernel is compiled for; see the head of the module."""

    static_dims: tuple[tuple[str, int], ...]
    unit_strides: tuple[tuple[str, StrideClass], ...]
    dim_classes: tuple[tuple[str, tuple[int, int]], ...]
    aligned: tuple[str, ...] = ()


def dim_class(extent: int) -> tuple[int, int]:
    """(least upper bound of the class, divisor) of an extent."""
    return extent_bound(extent), 64 if extent % 64 == 0 else 16 if extent % 16 == 0 else 1


def extent_bound(extent: int) -> int:
    if extent == 1:
        return 1
    for most in DIM_CLASSES:
        if extent <= most:
            return most
    return LARGEST_CLASS


def specialise(signature: Signature, binding: Binding, static: frozenset[str],
               large_bytes: int = LARGE_BYTES) -> Specialisation:
    """What a call lets the compiler assume. large_bytes: see aligned_tensors."""
    patterns: list[tuple[str, StrideClass]] = []
    for position, view in binding.tensors.items():
        name = signature.parameters[position].name
        patterns.append((name, view.panels or ("contiguous" if view.is_contiguous else
                                               tuple(s == 1 for s in view.strides))))
    fixed = tuple((dim, extent) for dim, extent in binding.dims.items() if dim in static)
    classes = tuple((dim, dim_class(extent)) for dim, extent in binding.dims.items() if dim not in static)
    return Specialisation(fixed, tuple(patterns), classes, aligned_tensors(signature, binding, large_bytes))


def aligned_tensors(signature: Signature, binding: Binding, large_bytes: int = LARGE_BYTES) -> tuple[str, ...]:
    """Tensors of large_bytes or more whose data and rows start at cache lines: those of a CPU may be stored past the
    caches, those of a GPU copied in pieces of 16 bytes. Rows shorter than that (pairs) count as part of longer ones."""
    names = []
    for position, view in binding.tensors.items():
        size_bytes = view.dtype.size_bytes
        if (not view.address % CACHE_LINE_BYTES and size_bytes * math.prod(view.shape) >= large_bytes
                and view.strides and view.strides[-1] == 1
                and not any(s * size_bytes % CACHE_LINE_BYTES for s in view.strides[:-1]
                            if s * size_bytes not in (2, 4, 8))):
            names.append(signature.parameters[position].name)
    return tuple(names)


# Held while a kernel is compiled and while launchers change. One for all: compilers would wait for the GIL anyway.
_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child: the thread that held a lock may not exist here. All that they guard is whole at any moment."""
    global _lock
    _lock = threading.RLock()
    for bound in _renewed:
        bound.renew_lock()


os.register_at_fork(after_in_child=_renew_lock)


# ------------------------------------------------------------------------------------------------------ configuration


class Configuration(NamedTuple):
    """What the runtime is given, since it may not import it.

    compile_kernel: see the head of the module. find_target: the target of this CPU for None, else the one wanted, by
    name or as it is, if this CPU can run it. target_key: all facts of a target that code depends on, as text.
    interpret: runs a kernel under the reference interpreter: (kernel, arguments), tensors as NumPy arrays.
    toolchain_key: changes when the compiler does.
    """

    compile_kernel: Compile
    find_target: Callable[[Any], Any]
    target_key: Callable[[Any], str]
    interpret: Callable[[Any, tuple[Any, ...]], Any]
    toolchain_key: Callable[[], str]


_configuration: Configuration | None = None


def configure(
    compile_kernel: Compile | None = None,
    find_target: Callable[[Any], Any] | None = None,
    target_key: Callable[[Any], str] | None = None,
    interpret: Callable[[Any, tuple[Any, ...]], Any] | None = None,
    toolchain_key: Callable[[], str] | None = None,
) -> None:
    """Replace parts of the configuration; what is not given becomes the default of `_default_configuration`."""
    global _configuration
    default = _default_configuration()
    _configuration = Configuration(
        compile_kernel or default.compile_kernel,
        find_target or default.find_target,
        target_key or default.target_key,
        interpret or default.interpret,
        toolchain_key or default.toolchain_key,
    )


def configuration() -> Configuration:
    global _configuration
    if _configuration is None:
        _configuration = _default_configuration()
    return _configuration


def set_configuration(new: Configuration) -> None:
    """Put back a configuration that `configuration` gave."""
    global _configuration
    _configuration = new


def _default_configuration() -> Configuration:
    return Configuration(compile_for_call, _find_target, _target_key, _interpret, toolchain_key)


def compile_for_call(kernel: Any, **options: Any) -> Any:
    """The code that a call runs (options: as pipeline.compile_kernel): by hand where that is admitted and right."""
    from ..codegen.pipeline import compile_kernel

    if kernel.by_hand and options["schedule"] is None:
        from .by_hand import choose

        facts = {name: options[name] for name in ("static_dims", "unit_strides", "dim_classes")}
        made = choose(kernel, options["target"], **facts)
        if made is not None:
            return made.compiled
    from ..assembly.errors import AssemblyError

    try:
        compiled = compile_kernel(kernel, **options)
    except AssemblyError as error:
        warn_once(f"registers {kernel.name}",
                  f"kernel {kernel.name}: its pieces by hand are not used, generated code is: {error}")
        return compile_kernel(kernel, **options, by_hand=False)
    if compiled.pieces:
        from .by_hand import trusted

        if not trusted(kernel, options["target"], options["schedule"]):
            return compile_kernel(kernel, **options, by_hand=False)
    return compiled


def _by_hand_key(kernel: Any, schedule: Any) -> list[str]:
    blocks = schedule.get("assembly") if isinstance(schedule, Mapping) else getattr(schedule, "assembly", ())
    if not getattr(kernel, "by_hand", None) and not blocks:
        return []
    from .by_hand import key_of

    return key_of(kernel, tuple(blocks or ()))


def _find_target(wanted: Any) -> Any:
    if wanted is None:
        return host_target()
    found = named_target(wanted) if isinstance(wanted, str) else wanted
    missing = sorted(found.features - host().features)
    if missing:
        raise LaunchError(
            f"target {found.name}: found no {', '.join(missing)} in this CPU; expected all features of the target; "
            "mend: leave the target out, or print the code with `sapper asm`"
        )
    return found


def _target_key(target: Any) -> str:
    """Every field of a target; sets sorted, since their order changes from process to process."""
    if is_dataclass(target):
        target = [getattr(target, field.name) for field in fields(target)]
    return json.dumps([sorted(fact) if isinstance(fact, frozenset) else fact for fact in target], default=repr)


def _device_target(wanted: Any) -> Any:
    """The target where it is one of a CUDA device, else None."""
    if isinstance(wanted, str):
        from ..targets.ptx.target import TARGETS

        return TARGETS.get(wanted)
    return wanted if getattr(wanted, "lanes_are_threads", False) else None


def _may_lie_on_device(value: Any) -> bool:
    """Whether a tensor of another package, or ours, lies in a CUDA device's memory."""
    if type(value) is numpy.ndarray or not hasattr(value, "__dlpack_device__"):
        return False
    from .cuda.launch import ordinal_of

    return ordinal_of(value) is not None


def emulate(launcher: Launcher, arguments: tuple[Any, ...]) -> None:
    """Run a call for a GPU on the emulator, with arrays of NumPy. Raises ArgumentError where the target is no GPU."""
    if launcher.device_target is None:
        raise ArgumentError("option", launcher.name, "emulate", f"target {launcher.target!r}",
                            "a target that is emulated", 'pass target="sm_90a" too')
    if context.emulate is None:
        raise LaunchError("emulate: found no emulator; expected the package sapper to set it; mend: import sapper")
    context.emulate(launcher.kernel, *arguments, target=launcher.device_target.name, schedule=launcher.schedule,
                    static=launcher.static)


def _interpret(kernel: Any, arguments: tuple[Any, ...]) -> Any:
    from ..tile.eager import run

    run(kernel, arguments)


# ----------------------------------------------------------------------------------------------------------- entries


class Entry:
    """A kernel compiled, loaded, and laid out for calls with one set of shapes and strides.

    run(words, address) launches it with a filled block. words: the block's words from FIRST_SLOT on; data_words and
    scalar_words are (word, position of the parameter) of those that every call writes anew. direct: it needs no scratch
    and no sync block. blocks: argument blocks that no call is using.
    """

    __slots__ = ("aligned", "blocks", "code", "compiled", "data_words", "direct", "run", "scalar_words",
                 "scratch_bytes", "threads", "words")

    def __init__(
        self, signature: Signature, compiled: CompiledKernel, code: CodeBlock, binding: Binding, threads: int,
        aligned: tuple[str, ...] = (),
    ) -> None:
        self.compiled = compiled
        self.aligned = frozenset(aligned)
        self.scratch_bytes = compiled.scratch_for(binding.dims)
        self.code = code
        self.words = fill_words(signature, compiled.slots, binding)
        slots = slot_words(compiled.slots)
        parameters = [(i, p.name) for i, p in enumerate(signature.parameters)]
        self.data_words = [(slots[f"{n}.data"], i) for i, n in parameters if f"{n}.data" in slots]
        self.scalar_words = [(slots[f"scalar.{n}"], i) for i, n in parameters if f"scalar.{n}" in slots]
        self.threads = threads
        self.blocks: list[Block] = []
        self.direct = threads == 1 and not self.scratch_bytes and compiled.counters == 0
        self.run: Callable[[memoryview, int], None] = self._runner()

    def block(self) -> Block:
        """A new argument block: words 0 to 2, the slots, and one word that takes what the kernel doesn't ask for."""
        words = (ctypes.c_int64 * (FIRST_SLOT + len(self.words) + 1))(0, 0, 0, *self.words)
        view = memoryview(words).cast("B")
        return view.cast("q"), view.cast("f"), view.cast("d"), ctypes.addressof(words)

    def _runner(self) -> Callable[[memoryview, int], None]:
        function, address = self.code.function, self.code.address
        scratch_bytes, threads = self.scratch_bytes, self.threads
        step = stride_bytes(scratch_bytes)
        if threads > 1:
            from . import workers  # a process whose launches take one worker never loads them

            def run_together(view: memoryview, block: int) -> None:
                workers.launch(address, view, block, threads, step)

            return run_together
        if self.direct:

            def run_direct(view: memoryview, block: int) -> None:
                function(block, 0, 1)

            return run_direct

        def run_alone(view: memoryview, block: int) -> None:
            area = take_area(scratch_bytes)
            view[0] = area.scratch
            view[1] = step
            view[2] = area.sync
            area.counters[:] = NO_COUNTS
            function(block, 0, 1)
            areas.append(area)

        return run_alone


class BoundCall:
    """A call with its arguments bound: calling it runs the kernel on the same memory again, in under 2 µs.

    One thread runs it at a time; others wait. The arguments are kept alive and must stay where they are.
    """

    __slots__ = ("__weakref__", "_block", "_keep", "_lock", "_scalars", "_view", "entry", "name")

    def __init__(self, name: str, entry: Entry, block: Block, keep: Any, scalars: dict[str, tuple[int, Parameter]]):
        self.name = name
        self.entry = entry
        self._view, _, _, self._block = block
        self._lock = threading.Lock()
        self._keep = (keep, block)
        self._scalars = scalars
        register_renewal(self)

    def renew_lock(self) -> None:
        """Forget who runs it: for a forked child, in which nobody does."""
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.entry.run(self._view, self._block)

    def set_scalar(self, name: str, value: Any) -> None:
        """Another value for a scalar parameter from the next call on. Raises ArgumentError."""
        if name not in self._scalars:
            known = ", ".join(self._scalars) or "none"
            raise ArgumentError("scalar", self.name, name, "no such scalar", f"one of {known}", "prepare anew")
        word, parameter = self._scalars[name]
        with self._lock:
            self._view[word] = _arguments.scalar_word(value, self.name, parameter)


_renewed: weakref.WeakSet[Any] = weakref.WeakSet()


def register_renewal(bound: Any) -> None:
    """Have `bound.renew_lock()` called in a forked child."""
    _renewed.add(bound)


def choose_threads(compiled: CompiledKernel, dims: Mapping[str, int], size_bytes: int, wanted: int | None) -> int:
    """How many workers a launch takes: as many as there are tasks, and as the work is worth waking.

    wanted: the caller's limit, or None for that of the settings. size_bytes: of all tensors, the measure of work when
    the compiler gave no estimate.
    """
    limit = settings.threads() if wanted is None else wanted
    if not compiled.counters or limit == 1:
        return 1
    tasks = compiled.task_count(dims)
    if tasks is not None:
        limit = min(limit, tasks)
    work_ns = compiled.work_ns(dims)
    if work_ns is None:
        work_ns = size_bytes / ASSUMED_BYTES_PER_NS
    return max(1, min(limit, int(work_ns / GRAIN_NS)))


# ---------------------------------------------------------------------------------------------------------- launchers


class Launcher:
    """One kernel with one set of options: its compiled forms and the entries made so far.

    call: takes the arguments of a call and runs the kernel.
    """

    def __init__(self, kernel: Any, options: Mapping[str, Any]) -> None:
        self.kernel = kernel
        self.name: str = kernel.name
        self.options = dict(options)
        threads = self.options.get("threads")
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= settings.MAX_THREADS):
            raise self._bad_option("threads", threads, f"a whole number from 1 to {settings.MAX_THREADS}")
        self.threads: int | None = threads
        self.signature = Signature(
            self.name,
            [Parameter.of(name, type) for name, type in kernel.parameters],
            getattr(kernel, "options", {}).get("in_place", ()),
        )
        self.static = self._static_dims(self.options.get("static", ()))
        self.schedule = self.options.get("schedule")
        self.target = self.options.get("target")
        self.specialised: frozenset[str] = kernel.specialise
        self.forms: set[tuple[tuple[str, int], ...]] = set()
        self.device_target = _device_target(self.target)
        self.device_launcher: Any = None
        self.stored: tuple[str, ...] = ()
        self.packed: list[tuple[int, ...]] = []
        self.compiled: dict[tuple[Specialisation, str], tuple[CompiledKernel, CodeBlock]] = {}
        self.layouts: dict[Any, Entry] = {}
        self.entries: dict[Any, Any] = {}
        self.call: Callable[..., None] = self.slow_call

    def _bad_option(self, option: str, found: Any, expected: str) -> ArgumentError:
        return ArgumentError("option", self.name, option, repr(found), expected, f"leave {option} out")

    def _static_dims(self, static: Any) -> frozenset[str]:
        known = [d for p in self.signature.parameters for d in p.dims or () if isinstance(d, str)]
        if static is True:
            return frozenset(known)
        names = static.split() if isinstance(static, str) else [getattr(d, "name", d) for d in static or ()]
        for name in names:
            if name not in known:
                raise self._bad_option("static", name, f"dims of the kernel ({', '.join(dict.fromkeys(known))})")
        return frozenset(names)

    def static_for(self, dims: Mapping[str, int], rows: Iterable[str] = ()) -> frozenset[str]:
        """The dims whose extents are compiled in for a call: those that the options say, and those that the kernel is
        specialised for while there are few extents of these. rows: dims that vary from run to run."""
        static = self.static.difference(rows)
        apart = self.specialised.difference(rows, static)
        if not apart:
            return static
        form = tuple((dim, dims[dim]) for dim in sorted(apart))
        if form not in self.forms:
            with _lock:
                if len(self.forms) >= SPECIALISED_FORMS:
                    return static
                self.forms.add(form)
        return static | apart

    # ---- compiling

    def get_compiled(self, specialisation: Specialisation,
                     dims: Mapping[str, int]) -> tuple[CompiledKernel, CodeBlock]:
        """Memory cache, disk cache, compiler, in this order. dims: the extents of the call."""
        schedule = self.schedule_for(dims)
        key = specialisation, repr(schedule)
        found = self.compiled.get(key)
        if found is None:
            with _lock:
                found = self.compiled.get(key)
                if found is None:
                    target = configuration().find_target(self.target)
                    compiled = self.from_disk_or_compile(specialisation, schedule, target)
                    found = self.compiled[key] = compiled, load(compiled.code)
                    if settings.debugging():
                        from . import debuggers

                        debuggers.announce(self.name, found[1], compiled.lines,
                                           Location(self.kernel.source_file, self.kernel.source_line), compiled.frame)
        return found

    def schedule_for(self, dims: Mapping[str, int], target: Any = None) -> Any:
        """The schedule of the options; or else, for code that is generated, what a search found for such extents.

        target: the one that code is made for (None: that of the options).
        """
        if self.schedule is not None or getattr(self.kernel, "by_hand", None) or settings.debugging():
            return self.schedule
        threads = settings.threads() if self.threads is None else self.threads
        found = configuration().find_target(self.target) if target is None else target
        return tuned_schedule(self.name, self.kernel.source_digest(), getattr(found, "name", ""), dims, threads)

    def from_disk_or_compile(self, specialisation: Specialisation, schedule: Any, target: Any) -> CompiledKernel:
        now = configuration()
        cache = None if settings.debugging() else disk_cache()  # what lies on disk has no lines
        key = ""
        if cache is not None:
            key = json.dumps(
                [
                    now.toolchain_key(),
                    self.name,
                    self.kernel.source_digest(),
                    specialisation,
                    now.target_key(target),
                    _schedule_key(schedule),
                    *_by_hand_key(self.kernel, schedule),
                ]
            )
            compiled = _read_cached(cache, key)
            if compiled is not None:
                return compiled
        result = now.compile_kernel(
            self.kernel,
            static_dims=dict(specialisation.static_dims),
            unit_strides=dict(specialisation.unit_strides),
            dim_classes=dict(specialisation.dim_classes),
            target=target,
            schedule=schedule,
            aligned=frozenset(specialisation.aligned),
        )
        stored: tuple[str, ...] = ()
        if not isinstance(result, CompiledKernel) and getattr(result, "stored", None) is None:
            stored = stored_tensors(self.kernel.tile_ir(dict(specialisation.static_dims)))
        compiled = CompiledKernel.of(self.name, result, stored)
        if cache is not None and not getattr(self.kernel, "refused_by_hand", False):
            cache.put(key, compiled.pack())
        return compiled

    # ---- calling

    def slow_call(self, *arguments: Any, **options: Any) -> None:
        """A call with nothing known about it yet."""
        if options or len(arguments) < len(self.signature.parameters):
            arguments, options = self.by_position(arguments, options)
            if options.pop("interpret", False):
                interpret(self.kernel, *arguments)
                return
            if options:
                launcher_with(self.kernel, options).call(*arguments)
                return
        if self.options.get("emulate"):
            emulate(self, arguments)
            return
        if self.on_device(arguments):
            self.device_launcher.call(arguments)
            return
        entry, words, _ = self.bind(arguments)
        view, _, _, address = entry.block()
        for word, value in words.items():
            view[word] = value
        entry.run(view, address)

    def on_device(self, arguments: tuple[Any, ...]) -> bool:
        """Whether a call goes to a CUDA device: its target is one, or a tensor lies there. device_launcher is then
        set."""
        if self.device_target is None and not any(
                _may_lie_on_device(arguments[i]) for i in self.signature.tensor_positions if i < len(arguments)):
            return False
        if self.device_launcher is None:
            from .cuda.launch import DeviceLauncher

            if self.threads is not None:
                raise ArgumentError("option", self.name, "threads", f"{self.threads} on a CUDA device",
                                    "none: the device has as many workers as it holds", "leave threads out")
            self.device_launcher = DeviceLauncher(self)
        return True

    def prepare(self, *arguments: Any) -> BoundCall | DeviceCall:
        """Bind the arguments for repeated calls."""
        arguments, _ = self.by_position(arguments, {})
        if self.on_device(arguments):
            bound: DeviceCall = self.device_launcher.prepare(arguments)
            return bound
        entry, words, binding = self.bind(arguments)
        block = entry.block()
        for word, value in words.items():
            block[0][word] = value
        slots = slot_words(entry.compiled.slots)
        scalars = {
            p.name: (slots.get(f"scalar.{p.name}", len(block[0]) - 1), p)
            for p in self.signature.parameters
            if p.dims is None
        }
        return BoundCall(self.name, entry, block, (arguments, binding), scalars)

    def bind(self, arguments: tuple[Any, ...]) -> tuple[Entry, dict[int, int], Binding]:
        """Check a call and find or make its entry; also the words that this call writes into the block."""
        signature = self.signature
        binding = signature.bind(arguments)
        tensors = binding.tensors
        places = [(view.shape, view.strides, view.panels) for view in tensors.values()]
        layout = (*places, aligned_tensors(signature, binding))
        entry = self.layouts.get(layout)
        if entry is None:
            specialisation = specialise(signature, binding, self.static_for(binding.dims))
            compiled, code = self.get_compiled(specialisation, binding.dims)
            signature.check_stores(binding, compiled.stored)
            signature.check_requires(binding, compiled.requires)
            size_bytes = sum(v.dtype.size_bytes * math.prod(v.shape) for v in tensors.values())
            threads = choose_threads(compiled, binding.dims, size_bytes, self.threads)
            entry = Entry(signature, compiled, code, binding, threads, specialisation.aligned)
            with _lock:
                if len(self.layouts) >= MAX_ENTRIES:
                    self.layouts.clear()
                self.layouts[layout] = entry
        else:
            signature.check_stores(binding, entry.compiled.stored)
            self._remember(arguments, binding, entry)  # not at the first: it writes and compiles a function
        own = {word: tensors[position].address for word, position in entry.data_words}
        for word, position in entry.scalar_words:
            own[word] = binding.scalars[position]
        return entry, own, binding

    def by_position(
        self, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments by position, those given by keyword and the scalars' defaults included, and what is left."""
        parameters = self.signature.parameters
        if len(arguments) < len(parameters):
            defaults = getattr(self.kernel, "defaults", {})
            options = dict(options)
            filled = list(arguments)
            for parameter in parameters[len(arguments) :]:
                if parameter.name in options:
                    filled.append(options.pop(parameter.name))
                elif parameter.name in defaults:
                    filled.append(defaults[parameter.name])
                else:
                    break
            arguments = tuple(filled)
        for option in options:
            if option not in OPTIONS:
                names = ", ".join(p.name for p in parameters)
                if option in self.signature.positions:
                    raise ArgumentError("option", self.name, option, "it by position and by name", "it once",
                                        "leave out the one or the other")
                raise ArgumentError(
                    "option", self.name, option, "an unknown keyword",
                    f"a parameter not given yet ({names}) or one of {', '.join(OPTIONS)}", "leave it out",
                )  # fmt: skip
        return arguments, options

    # ---- the fast path

    def _remember(self, arguments: tuple[Any, ...], binding: Binding, entry: Entry) -> None:
        """Let the next call with arguments like these take the fast path, if they are plain NumPy arrays or packed."""
        signature = self.signature
        key: list[Any] = []
        packed = []
        for position in signature.tensor_positions:
            argument = arguments[position]
            if binding.tensors[position].panels is not None:
                packed.append(position)
                key.append(argument.layout)
            elif type(argument) is numpy.ndarray:
                key += (argument.shape, argument.strides, argument.dtype)
            else:
                return
        if tuple(key) in self.entries:
            return
        spare = FIRST_SLOT + len(entry.words)
        slots = slot_words(entry.compiled.slots)
        facts: list[Any] = [entry.blocks, entry.block, entry.code.function, None if entry.direct else entry.run]
        for position, parameter in enumerate(signature.parameters):
            if parameter.dims is None:
                facts.append(slots.get(f"scalar.{parameter.name}", spare))
            else:
                mask = CACHE_LINE_BYTES - 1 if parameter.name in entry.aligned else parameter.dtype.size_bytes - 1
                extent = (0, arguments[position].nbytes) if position in packed else binding.tensors[position].extent
                facts += (slots.get(f"{parameter.name}.data", spare), *extent, mask)
        with _lock:
            if not set(entry.compiled.stored) <= set(self.stored) or tuple(packed) not in self.packed:
                self.stored = tuple(
                    p.name for p in signature.parameters if p.name in {*self.stored, *entry.compiled.stored}
                )
                if tuple(packed) not in self.packed:
                    self.packed.append(tuple(packed))
                self.call = self.slow_call
                for positions in self.packed:
                    self.call = make_fast_call(signature, self.stored, self.entries, self.call, packed=positions)
                _install(self)
            if len(self.entries) >= MAX_ENTRIES:
                self.entries.clear()
            self.entries[tuple(key)] = tuple(facts)


def make_fast_call(
    signature: Signature,
    stored: Iterable[str],
    entries: dict[Any, Any],
    slow_call: Callable[..., None],
    words: memoryview | None = _arguments.MEMORY_WORDS,
    packed: tuple[int, ...] = (),
) -> Callable[..., None]:
    """The function that runs a call like one seen before, and hands any other to slow_call. packed: the positions of
    tensors that are `Packed`, not arrays.

    It is written out for the kernel's parameters, as a loop over them would take twice as long. For `f(a, x, out)` with
    an f32 scalar x and a stored f32 tensor out it reads

        def call(*arguments, **options):
            if not options and len(arguments) == 3:
                a0, a1, a2 = arguments
                if type(a0) is ndarray and type(a2) is ndarray and type(a1) is float:
                    entry = entries.get((a0.shape, a0.strides, a0.dtype, a2.shape, a2.strides, a2.dtype))
                    if entry is not None:
                        blocks, new_block, function, run, w0, low0, high0, mask0, w1, w2, low2, high2, mask2 = entry
                        p0 = memory[(id(a0) >> 3) + 2]
                        p2 = memory[(id(a2) >> 3) + 2]
                        if (not (p0 & mask0 | p2 & mask2) and memory[(id(a2) >> 3) + 8] & 1024
                                and (p2 + high2 <= p0 + low0 or p0 + high0 <= p2 + low2)):
                            ...
    """
    tensors = signature.tensor_positions
    scalars = signature.scalar_positions
    parameters = signature.parameters
    address = "memory[(id(a{0}) >> 3) + 2]" if words is not None else "address_of(a{0})"
    flags = "memory[(id(a{0}) >> 3) + 8]" if words is not None else "flags_of(a{0})"
    unpack = ["blocks", "new_block", "function", "run"]
    kinds = [f"type(a{i}) is {'Packed' if i in packed else 'ndarray'}" for i in tensors]
    key: list[str] = []
    aligned: list[str] = []
    checks: list[str] = []
    writes: list[str] = []
    for i, parameter in enumerate(parameters):
        dtype = parameter.dtype
        if parameter.dims is not None:
            unpack += (f"w{i}", f"low{i}", f"high{i}", f"mask{i}")
            key += (f"a{i}.layout",) if i in packed else (f"a{i}.shape", f"a{i}.strides", f"a{i}.dtype")
            aligned.append(f"p{i} & mask{i}")
            writes.append(f"block[w{i}] = p{i}")
            continue
        unpack.append(f"w{i}")
        if dtype.kind == "f" and dtype.bits >= 32:
            kinds.append(f"type(a{i}) is float")
            writes.append(f"floats[2 * w{i}] = a{i}" if dtype.bits == 32 else f"doubles[w{i}] = a{i}")
            if dtype.bits == 32:  # larger ones are refused; NaN and infinities pass
                checks.append(f"not {2.0**128 - 2.0**103!r} <= abs(a{i}) < inf")
        elif dtype.kind == "f":
            kinds.append("False")
        elif dtype.kind == "b":
            kinds.append(f"type(a{i}) is bool")
            writes.append(f"block[w{i}] = a{i}")
        else:
            low, high = integer_range(dtype)
            kinds.append(f"type(a{i}) is int and {low} <= a{i} <= {high}")
            writes.append(f"block[w{i}] = a{i}")
    if aligned:
        checks.append(f"not ({' | '.join(aligned)})")
    # A packed tensor is never stored to: a kernel that does so refuses it.
    stored_positions = [i for name in stored if (i := signature.positions[name]) not in packed]
    for i in stored_positions:
        checks.append(f"{flags.format(i)} & {WRITEABLE_FLAG}")
        for j in tensors:
            if j != i and not (j in stored_positions and j < i):
                same = frozenset((parameters[i].name, parameters[j].name)) in signature.in_place
                exact = f" or (p{i} == p{j} and low{i} == low{j} and high{i} == high{j}" if same else ""
                exact += f" and a{i}.shape == a{j}.shape and a{i}.strides == a{j}.strides)" if same else ""
                checks.append(f"(p{i} + high{i} <= p{j} + low{j} or p{j} + high{j} <= p{i} + low{i}{exact})")
    names = "".join(f"a{i}, " for i in range(len(parameters)))
    lines = [
        "def call(*arguments, **options):",
        f" if not options and len(arguments) == {len(parameters)}:",
        f"  ({names}) = arguments" if names else "  pass",
        f"  if {' and '.join(kinds) or 'True'}:",
        f"   entry = entries.get(({', '.join(key)}{',' if key else ''}))",
        "   if entry is not None:",
        f"    {', '.join(unpack)} = entry",
        *(f"    p{i} = a{i}.address" if i in packed else f"    p{i} = {address.format(i)}" for i in tensors),
        f"    if {' and '.join(checks) or 'True'}:",
        "     try: views = blocks.pop()",
        "     except IndexError: views = new_block()",
        "     block, floats, doubles, at = views",
        *(f"     {write}" for write in writes),
        "     if run is None: function(at, 0, 1)",
        "     else: run(block, at)",
        "     blocks.append(views)",
        "     return",
        " slow_call(*arguments, **options)",
    ]
    assert len(unpack) == 4 + 4 * len(tensors) + len(scalars)
    names_seen: dict[str, Any] = {
        "entries": entries,
        "memory": words,
        "address_of": _arguments.address_through_interface,
        "flags_of": _arguments.flags_through_interface,
        "ndarray": numpy.ndarray,
        "slow_call": slow_call,
        "inf": float("inf"),
    }
    if packed:
        from .packed import Packed

        names_seen["Packed"] = Packed
    exec(compile("\n".join(lines), f"<call of kernel {signature.kernel}>", "exec"), names_seen)
    made: Callable[..., None] = names_seen["call"]
    return made


def _schedule_key(schedule: Any) -> Any:
    """A schedule as JSON; one that is no plain data by its text."""
    if schedule is None or isinstance(schedule, (str, int, float)):
        return schedule
    if isinstance(schedule, Mapping):
        return sorted((str(name), _schedule_key(value)) for name, value in schedule.items())
    if isinstance(schedule, (list, tuple)):
        return [_schedule_key(item) for item in schedule]
    return repr(schedule)


def _read_cached(cache: DiskCache, key: str) -> CompiledKernel | None:
    packed = cache.get(key)
    if packed is None:
        return None
    try:
        return CompiledKernel.unpack(packed)
    except ValueError as error:
        warn_once("cache-damaged", f"an entry of {cache.directory} does not unpack ({error}); it is compiled again")
        return None


def stored_tensors(function: Any) -> tuple[str, ...]:
    """Names of the arguments that a tile IR function stores to, in the order of the arguments."""
    from ..tile.ops import memory_of

    stored = {memory_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    return tuple(v.name for v in function.arguments if isinstance(v.type, TensorType) and v in stored)


# --------------------------------------------------------------------------------------------------------- the hook

class _Registry:
    """The launchers of one kernel, by options; kept on the function that the kernel calls.

    checks: for the interpreter, once they are known: the tensors that the kernel stores, what its extents must fulfil.
    """

    __slots__ = ("checks", "kernel", "launchers", "quick")

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launchers: dict[str, Launcher] = {}
        self.quick: dict[Any, Launcher] = {}
        self.checks: tuple[tuple[str, ...], Any] | None = None


def _registry_of(kernel: Any) -> _Registry:
    registry: _Registry | None = kernel.__dict__.get("_runtime_registry")
    if registry is None:
        with _lock:
            registry = kernel.__dict__.setdefault("_runtime_registry", _Registry(kernel))
    return registry


def launcher_with(kernel: Any, options: Mapping[str, Any] | None = None) -> Launcher:
    """The launcher of a kernel with the options of its decorator and, over these, the ones given.

    Raises ArgumentError for an unknown option or value.
    """
    registry = _registry_of(kernel)
    quick = None
    try:
        quick = tuple(options.items()) if options else ()
        found = registry.quick.get(quick)
        if found is not None:
            return found
    except TypeError:  # an option that can't be hashed, such as a schedule
        quick = None
    chosen = _decorator_options(kernel)
    chosen.update(options or {})
    chosen.pop("interpret", None)
    key = _options_key(chosen)
    launcher = registry.launchers.get(key)
    if launcher is None:
        made = Launcher(kernel, chosen)
        launcher = registry.launchers.setdefault(key, made)
    if quick is not None:
        if len(registry.quick) >= MAX_ENTRIES:
            registry.quick.clear()
        registry.quick[quick] = launcher
    return launcher


def _decorator_options(kernel: Any) -> dict[str, Any]:
    return {name: value for name, value in kernel.options.items() if name in OPTIONS and name != "interpret"}


def _options_key(options: Mapping[str, Any]) -> str:
    return json.dumps([[name, _option_key(name, value)] for name, value in sorted(options.items())])


def _option_key(name: str, value: Any) -> Any:
    if name == "schedule":
        return _schedule_key(value)
    if name == "target" and value is not None and not isinstance(value, str):
        return configuration().target_key(value)
    if name == "static" and not isinstance(value, (bool, str)):
        return sorted(str(getattr(d, "name", d)) for d in value or ())
    return repr(value)


def _install(launcher: Launcher) -> None:
    """Make a kernel's plain call go straight to the fast path of its launcher without call options."""
    kernel = launcher.kernel
    plain = _registry_of(kernel).launchers.get(_options_key(_decorator_options(kernel)))
    if plain is launcher and not settings.interpret():
        kernel.launcher = launcher.call


def make_launcher(kernel: Any) -> Callable[..., Any]:
    """What a kernel runs when it is called: the hook of sapper.lang.context."""
    if settings.interpret():
        return lambda *arguments, **options: interpret(kernel, *arguments, **options)

    def first_call(*arguments: Any, **options: Any) -> Any:
        return launch(kernel, arguments, options)

    return first_call


def launch(kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any] | None = None) -> Any:
    """Run a kernel. options: threads (at most so many workers; 1 never wakes another), static (names of dims to compile
    in, or True), schedule, target, interpret (True: under the reference interpreter), emulate (True: code for a GPU on
    the emulator)."""
    given = dict(options or {})
    if given.get("interpret"):
        return interpret(kernel, *arguments, **given)
    given.pop("interpret", None)
    return launcher_with(kernel).call(*arguments, **given)


def interpret(kernel: Any, *arguments: Any, **options: Any) -> Any:
    """Run a kernel under the reference interpreter, with the same checks of the kernel and of the arguments.

    Raises KernelError as compiling would, so that no kernel passes here that fails there; only calls that the compiler
    does not know, such as print() and breakpoint(), may stand in it while it is being debugged.
    """
    launcher = launcher_with(kernel)
    filled, _ = launcher.by_position(arguments, options)
    binding = launcher.signature.bind(filled)
    registry = _registry_of(kernel)
    if registry.checks is None:
        try:
            function = kernel.tile_ir()
            registry.checks = stored_tensors(function), function.attributes.get("requires", ())
        except KernelError as error:
            if error.kind != "unsupported-function":
                raise
            registry.checks = (), ()
    stored, requires = registry.checks
    launcher.signature.check_stores(binding, stored)
    launcher.signature.check_requires(binding, requires)
    arrays = [as_array(binding.tensors[i]) if i in binding.tensors else value for i, value in enumerate(filled)]
    return configuration().interpret(kernel, tuple(arrays))


def prepare(kernel: Any, *arguments: Any, **options: Any) -> BoundCall | DeviceCall:
    """Compile a kernel for these arguments and bind them: `call = prepare(kernel, a, b, c); call(); call()`."""
    if options.get("interpret") or options.get("emulate") or settings.interpret():
        raise LaunchError(
            f"{kernel.name}: prepare under the interpreter: found SAPPER_INTERPRET, interpret=True or emulate=True; "
            "expected compiled code; mend: call the kernel instead"
        )
    launcher = launcher_with(kernel)
    arguments, options = launcher.by_position(arguments, dict(options))
    return (launcher_with(kernel, options) if options else launcher).prepare(*arguments)
