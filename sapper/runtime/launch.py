"""Calling a kernel: from Python arguments to running machine code.

Enters: a `lang.Kernel` and the arguments of a call. Leaves: the kernel has run when the call returns.
Holds: what runs was compiled for exactly the facts in its `Specialisation`, and every check of `arguments` was made
either for this call or for an earlier one with the same shapes, strides and dtypes; what may differ between such calls
(addresses, overlap, alignment, writability) is checked each time.

    call ── shapes, strides, dtypes seen twice? ── yes: check addresses, fill in words, run    vectorcall, fast_call
                        └ no: bind ─ specialise ─ memory cache ─ disk cache ─ compile ─ make an entry, run
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy

from ..ir.nodes import Location
from ..ir.types import TensorType
from ..lang import context
from ..lang import digest as _digest  # noqa: F401  each first call needs it: loaded with the runtime, not in the call
from ..lang.errors import CallError, KernelError
from ..lang.kernel import CALL_OPTIONS as OPTIONS
from ..targets import known_targets
from ..targets import target as named_target
from ..targets.x86_64.detect import host, host_target
from . import settings
from .arguments import (
    FIRST_SLOT,
    Binding,
    Free,
    Parameter,
    Signature,
    as_array,
    slot_words,
)
from .cache import DiskCache, disk_cache, toolchain_key
from .compiled import CompiledKernel
from .entries import BoundCall, Entry, choose_threads
from .errors import ArgumentError, LaunchError, warn_once
from .fast_call import ARRAY, PACKED, kind_of, make_fast_call
from .loader import CodeBlock, load
from .specialise import CACHE_LINE_BYTES, Specialisation, aligned_tensors, specialise
from .system import trim_heap
from .tuned import tuned_schedule
from .vectorcall import MAX_SCRATCH_BYTES, MAX_WORDS, Vectorcall, make_vectorcall

if TYPE_CHECKING:
    from .cuda.launch import DeviceCall

MAX_ENTRIES = 1024
SPECIALISED_FORMS = 8
"""For so many different extents of the dims that a kernel is specialised for a launcher has code of its own."""

Compile = Callable[..., Any]
Made = TypeVar("Made")



# Held while a kernel is compiled and while launchers change. One for all: compilers would wait for the GIL anyway.
_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child: the thread that held a lock may not exist here. All that they guard is whole at any moment."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


# ------------------------------------------------------------------------------------------------------ configuration


class Configuration(NamedTuple):
    """What the runtime is given, since it may not import it.

    compile_kernel: see specialise.py. find_target: the target of this CPU for None, else the one wanted, by
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
    if isinstance(wanted, str) and wanted not in known_targets():
        from ..lang.bindings import near

        raise CallError("option", f"target {wanted!r} is not known", "target", repr(wanted),
                        f"one of {', '.join(known_targets())}", near(wanted, known_targets(), "leave it out"))
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
    if not hasattr(target, "features"):
        raise CallError("option", "that is no target", "target", repr(target),
                        "a name, or what sapper.targets.target() gives", 'leave it out, or write target="zen4"')
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

    try:
        return ordinal_of(value) is not None
    except Exception:  # each package has its own error for it; view_dlpack tells it
        return False


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
        if isinstance(self.schedule, (str, int, float)):
            raise self._bad_option("schedule", self.schedule, "a Schedule, or a dict with its entries")
        self.target = self.options.get("target")
        self.specialised: frozenset[str] = kernel.specialise
        self.forms: set[tuple[tuple[str, int], ...]] = set()
        self.device_target = _device_target(self.target)
        self.device_launcher: Any = None
        self.stored: tuple[str, ...] = ()
        self.kinds: list[tuple[str, ...]] = []
        self.compiled: dict[tuple[Specialisation, str], tuple[CompiledKernel, CodeBlock]] = {}
        self.layouts: dict[Any, Entry] = {}
        self.entries: dict[Any, Any] = {}
        self.call: Callable[..., None] = self.slow_call
        self.vectorcall: Vectorcall | None = None

    def _bad_option(self, option: str, found: Any, expected: str) -> ArgumentError:
        return ArgumentError("option", self.name, option, repr(found), expected, f"leave {option} out")

    def _static_dims(self, static: Any) -> frozenset[str]:
        known = [d for p in self.signature.parameters for d in p.dims or () if isinstance(d, str)]
        if static is True:
            return frozenset(known)
        if static and not isinstance(static, Iterable):
            raise self._bad_option("static", static, "names of dims, or True for all")
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
        schedule = self.schedule_for(dims, packed=specialisation.has_packed)
        key = specialisation, repr(schedule)
        found = self.compiled.get(key)
        if found is None:
            with _lock:
                found = self.compiled.get(key)
                if found is None:
                    target = configuration().find_target(self.target)
                    compiled = self.follow(
                        schedule, lambda followed: self.from_disk_or_compile(specialisation, followed, target))
                    found = self.compiled[key] = compiled, load(compiled.code)
                    if settings.debugging():
                        from . import debuggers

                        debuggers.announce(self.name, found[1], compiled.lines,
                                           Location(self.kernel.source_file, self.kernel.source_line), compiled.frame)
        return found

    def schedule_for(self, dims: Mapping[str, int], target: Any = None, packed: bool = False,
                     workers: int | None = None) -> Any:
        """The schedule of the options; or else, for code that is generated, what a search found for such extents.

        target: the one that code is made for (None: that of the options). packed: a tensor lies in panels already,
        where searches have them plain. workers: the most that there may be (None: as the options say).
        """
        if self.schedule is not None or packed or getattr(self.kernel, "by_hand", None) or settings.debugging():
            return self.schedule
        threads = workers or (settings.threads() if self.threads is None else self.threads)
        found = configuration().find_target(self.target) if target is None else target
        return tuned_schedule(self.name, self.kernel.source_digest(), getattr(found, "name", ""), dims, threads)

    def follow(self, schedule: Any, make: Callable[[Any], Made]) -> Made:
        """What `make` gives for a schedule of `schedule_for`, or for the model's where one that a search found can't be
        followed: rows lay otherwise there, or the compiler was another."""
        try:
            return make(schedule)
        except ValueError as error:
            from ..tile.schedule import LoweringError, ScheduleError

            if schedule is None or self.schedule is not None or not isinstance(error, ScheduleError | LoweringError):
                raise
            return make(None)

    def from_disk_or_compile(self, specialisation: Specialisation, schedule: Any, target: Any) -> CompiledKernel:
        now = configuration()
        # What lies on disk has no lines, and has been through all passes.
        cache = None if settings.debugging() or settings.trace() else disk_cache()
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
        compiled = self._compile(specialisation, schedule, target)
        trim_heap()  # of the IRs, a few MiB
        if cache is not None and not getattr(self.kernel, "refused_by_hand", False):
            cache.put(key, compiled.pack())
        return compiled

    def _compile(self, specialisation: Specialisation, schedule: Any, target: Any) -> CompiledKernel:
        self.kernel.check_constants()
        result = configuration().compile_kernel(
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
        return CompiledKernel.of(self.name, result, stored)

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
        from .bounds import Bounds

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
        return BoundCall(self.name, entry, block, (arguments, binding), scalars,
                         Bounds(self.signature, binding, entry.compiled.requires))

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
            signature.check_scalars(binding, entry.compiled.requires)
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
        """Let the next call with arguments like these take the fast path, if it knows their kinds."""
        signature = self.signature
        key: list[Any] = []
        kinds: list[str] = []
        for position in signature.tensor_positions:
            argument = arguments[position]
            kind = PACKED if binding.tensors[position].panels is not None else kind_of(argument)
            if kind is None:
                return
            kinds.append(kind)
            if kind == PACKED:
                key.append(argument.layout)
            else:
                key += (argument.shape, argument.strides if kind == ARRAY else argument.stride(), argument.dtype)
        if tuple(key) in self.entries:
            return
        spare = FIRST_SLOT + len(entry.words)
        slots = slot_words(entry.compiled.slots)
        places = [slots.get(f"scalar.{p.name}" if p.dims is None else f"{p.name}.data", spare)
                  for p in signature.parameters]
        spans: dict[int, tuple[int, int, int]] = {}
        for position, view in binding.tensors.items():
            parameter = signature.parameters[position]
            mask = CACHE_LINE_BYTES - 1 if parameter.name in entry.aligned else parameter.dtype.size_bytes - 1
            low, high = (0, arguments[position].nbytes) if view.panels is not None else view.extent
            spans[position] = low, high, mask
        free, _ = signature.freedom(binding, entry.compiled.requires)
        facts: list[Any] = [entry.blocks, entry.block, entry.code.function, None if entry.direct else entry.run]
        for position, (parameter, place) in enumerate(zip(signature.parameters, places, strict=True)):
            facts += (place, *spans.get(position, ()), *free.get(("scalar", parameter.name), ()))
        with _lock:
            if not set(entry.compiled.stored) <= set(self.stored) or tuple(kinds) not in self.kinds:
                self.stored = tuple(
                    p.name for p in signature.parameters if p.name in {*self.stored, *entry.compiled.stored}
                )
                if tuple(kinds) not in self.kinds:
                    self.kinds.append(tuple(kinds))
                self.call = self.slow_call
                for known in self.kinds:
                    self.call = make_fast_call(signature, self.stored, self.entries, self.call, kinds=known)
                if self.vectorcall is not None:
                    self.call = self.vectorcall.fall_back(self.call)
                _install(self)
            if len(self.entries) >= MAX_ENTRIES:
                self.entries.clear()
            self.entries[tuple(key)] = tuple(facts)
            if PACKED not in kinds:
                self._add_form(arguments, entry, places, spans, free)

    def _add_form(self, arguments: tuple[Any, ...], entry: Entry, places: list[int],
                  spans: Mapping[int, tuple[int, int, int]], free: Free) -> None:
        """Make calls of this form a C function's, if one worker runs them in little memory."""
        if entry.threads > 1 or len(entry.words) > MAX_WORDS or entry.scratch_bytes > MAX_SCRATCH_BYTES:
            return
        if self.vectorcall is None:
            self.vectorcall = make_vectorcall(self.kernel, self.signature)
            if self.vectorcall is None:
                return
            self.call = self.vectorcall.fall_back(self.call)
            _install(self)
        self.vectorcall.add(arguments, entry, places, spans, free)


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
    if name == "static" and isinstance(value, Iterable) and not isinstance(value, str):
        return sorted(str(getattr(d, "name", d)) for d in value)
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
    if not hasattr(kernel, "parameters"):
        raise CallError("type", "prepare takes a kernel", "", repr(kernel), "a function decorated with @sapper.kernel",
                        "write prepare(kernel, a, b, c)")
    if options.get("interpret") or options.get("emulate") or settings.interpret():
        raise LaunchError(
            f"{kernel.name}: prepare under the interpreter: found SAPPER_INTERPRET, interpret=True or emulate=True; "
            "expected compiled code; mend: call the kernel instead"
        )
    launcher = launcher_with(kernel)
    arguments, options = launcher.by_position(arguments, dict(options))
    return (launcher_with(kernel, options) if options else launcher).prepare(*arguments)
