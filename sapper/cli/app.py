"""The commands, their options and their help. What a command does stands in a module of its own.

Enters: the arguments. Leaves: the exit status. Holds: sapper's own errors are printed as messages, without a traceback.
"""

from __future__ import annotations

import copy
import json as json_text
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..runtime.settings import MAX_THREADS
from .errors import CommandError, UsageError, is_told
from .signals import as_ended


class Commands(TyperGroup):
    """Raises signals.Ended, of which typer makes no status of its own."""

    def invoke(self, ctx: Any) -> Any:
        with as_ended():
            return super().invoke(ctx)


app = typer.Typer(
    name="sapper", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich", help="AI kernels from one readable Python source to machine code.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(invoke_without_command=True)
app.add_typer(cache_app, name="cache")

KernelName = Annotated[str, typer.Argument(metavar="FILE.py:KERNEL|NAME", help="A kernel of a file or of the library.")]
TargetName = Annotated[str | None, typer.Option("--target", help="Compile for this target instead of this CPU.")]
Static = Annotated[str | None, typer.Option("--static", help="Extents compiled in: N=576,K=64.")]
Dims = Annotated[str | None, typer.Option("--dims", "--shape", help="Extents of the call whose code is wanted: M=512.")]
Scalars = Annotated[
    str | None, typer.Option("--set", help="Scalars: position=511. Default: the largest positions that fit.")]
ScheduleText = Annotated[str | None, typer.Option("--schedule", help="A schedule as JSON, or a file with one.")]
ModelName = Annotated[str, typer.Argument(help="A GGUF file, a safetensors directory, or a name such as smollm2.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="Of the draws; 0: the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Draw among so many likeliest tokens.")]
TopP = Annotated[float, typer.Option("--top-p", help="Of these, the fewest that have this probability together.")]
MinP = Annotated[float, typer.Option("--min-p", help="Of these, those with this part of the likeliest's.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
Speculate = Annotated[bool, typer.Option(
    "--speculate", help="Draft tokens with the model's MTP head; they are the same ones.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be given again.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, max=MAX_THREADS, help="Workers; default: all cores.")]
WeightsDtype = Annotated[str, typer.Option(
    "--dtype", help="How weights are held: file (activations in 8 bits), file-f32 (activations in f32), file-rounded, "
                    "bf16, bf16-rounded or f32: docs/models.md.")]
AdapterName = Annotated[str | None, typer.Option(
    "--adapter", metavar="DIRECTORY", help="Add an adapter (LoRA) to the weights: sapper train --lora's, or PEFT's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: an object, or a list of them.")]


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    try:
        _with_command(arguments[:1])(args=arguments, prog_name="sapper", standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    except Exception as error:
        if not is_told(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.status if isinstance(error, CommandError) else 1
    return 0


def _with_command(names: list[str]) -> typer.Typer:
    """The program with the command of that name alone, if there is one: options of twenty commands take longer to be
    made than the one that is run. Otherwise the whole."""
    chosen = [one for one in app.registered_commands if one.callback is not None and [one.callback.__name__] == names]
    if not chosen:
        return app
    program = copy.copy(app)
    program.registered_commands, program.registered_groups = chosen, []
    return program


def _print_json(value: Any) -> None:
    print(json_text.dumps(value, indent=1))


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"sapper {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """AI kernels from one readable Python source to machine code: no C compiler, no LLVM.

    Start with [bold]sapper demo[/bold] and [bold]sapper doctor[/bold].
    """


@app.command()
def demo(
    model: Annotated[bool, typer.Option("--model/--no-model", help="Let SmolLM2 answer a prompt at the end.")] = True,
    json: Json = False,
) -> None:
    """Compile a matmul for this CPU, show it, check it, time it beside NumPy and the peak; then let a model answer.

    \b
    Examples:
      sapper demo
      sapper demo --no-model
      sapper demo --json
    """
    from .demo import run_demo

    raise typer.Exit(run_demo(model, json))


@app.command()
def doctor(json: Json = False) -> None:
    """Show what this machine has, what sapper makes of it, and what is missing. Status 1 if something needed is broken.

    \b
    Examples:
      sapper doctor
      sapper doctor --json
    """
    from .doctor import examine, report

    facts = examine()
    if json:
        _print_json(facts)
    else:
        print("\n".join(report(facts)))
    raise typer.Exit(0 if facts["ok"] else 1)


@app.command()
def kernels(json: Json = False) -> None:
    """List the kernels of the library.

    \b
    Examples:
      sapper kernels
      sapper kernels --json
    """
    from ..kernels import library

    rows = [{"name": entry.name, "dtype": entry.dtype, "module": entry.kernel.__module__.rpartition(".")[2],
             "parameters": {name: str(type) for name, type in entry.kernel.parameters}} for entry in library()]
    if json:
        _print_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        types = [f"{name}: {type.replace('tensor<', '').replace('>', '')}" if "<" not in type else
                 f"{name}[{type[len('tensor<'):-1]}]" for name, type in row["parameters"].items()]
        print(f"{row['name']:<{width}}  {'  '.join(types)}")


@app.command()
def ir(
    kernel: KernelName,
    stage: Annotated[
        str, typer.Option("--stage", help="tile, canonical, lane, expanded, simplified, or machine.")
    ] = "tile",
    target: TargetName = None, static: Static = None, dims: Dims = None, schedule: ScheduleText = None,
    locations: Annotated[bool, typer.Option("--locations", help="With the source line of each op.")] = False,
) -> None:
    """Print a kernel at one station of the compiler.

    \b
    Examples:
      sapper ir softmax
      sapper ir my.py:f --stage lane --target zen4 --static N=576
      sapper ir matmul_nn_f32 --stage machine --schedule '{"registers": {"m": 6}}'
    """
    from .show import STAGES, show_ir

    if stage not in STAGES:
        known = "\n".join(f"  {name:<11} {text}" for name, text in STAGES.items())
        raise UsageError(f"found no stage {stage!r}; expected one of\n{known}")
    sys.stdout.write(show_ir(kernel, stage, target, static, dims, schedule, locations).rstrip("\n") + "\n")


@app.command()
def asm(
    kernel: KernelName, target: TargetName = None, static: Static = None, dims: Dims = None,
    schedule: ScheduleText = None,
    bytes: Annotated[bool, typer.Option("--bytes", help="The machine code in hexadecimal instead.")] = False,
) -> None:
    """Print the assembly that a call takes, as GNU as accepts it, with the source line of each stretch; what is by hand
    in it is said first. `--schedule '{}'` prints the generated code instead of a kernel by hand.

    \b
    Examples:
      sapper asm softmax
      sapper asm my.py:f --target zen4 --static N=576,K=64
      sapper asm matmul_nn_f32 --bytes
    """
    from .show import code_named, hex_dump, listing

    code = code_named(kernel, target, static, dims, schedule)
    sys.stdout.write(hex_dump(code.compiled.code) if bytes else listing(code))


@app.command()
def build(
    kernels: Annotated[
        list[str], typer.Argument(metavar="FILE.py[:KERNEL]|NAME...|MODEL",
                                  help="Kernels, or all of a file; or one whole model.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE",
                          help="Ends in .so, .o or .s; a model's with no ending is an executable.")
    ],
    header: Annotated[
        str | None, typer.Option("--header", metavar="FILE", help="The C header; default: beside the output.")
    ] = None,
    target: TargetName = None, static: Static = None, dims: Dims = None, schedule: ScheduleText = None,
    fallback: Annotated[
        bool, typer.Option("--fallback/--no-fallback", help="With the general forms, for all other calls.")
    ] = True,
    scratch_mib: Annotated[
        int | None, typer.Option("--scratch-mib", min=0, max=2047, help="The library's scratch memory; default: 64.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Of a model: most tokens of a conversation.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of a model: how weights are held: file (the default), file-f32, "
                                                 "file-rounded, bf16, bf16-rounded, f32.")
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="Of a model: what trains it, in f32.")] = False,
    sequences: Annotated[
        int | None, typer.Option("--sequences", min=1, help="With --training: of a step; default: 1.")] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="With --training: tokens of a sequence; default: 512.")
    ] = None,
    json: Json = False,
) -> None:
    """Build a library that C programs use without Python, and its header. docs/c-abi.md says how to call it.

    A model (a GGUF file, a safetensors directory, a name such as smollm2) is built whole: its code as one file, its
    weights beside it. With --training it is what `sapper train` does: a library for a program that says what is learned
    from, or, without an ending, a program that learns from a text.

    \b
    Examples:
      sapper build my.py -o libmy.so
      sapper build matmul_nn_f32 softmax -o libk.so --target v3
      sapper build my.py:f -o f.o --static N=576,K=64 --dims M=512 --no-fallback
      sapper build my.py:f -o f.s --header include/f.h
      sapper build smollm2 -o model.s
      sapper build smollm2 -o model --dtype bf16
      sapper build smollm2 -o learner.so --training --sequences 2 --length 256
      sapper build smollm2 -o learner --training
    """
    from ..models.locate import is_model
    from .build import report, run_build

    models = [name for name in kernels if is_model(name)]
    if models and len(kernels) > 1:
        raise UsageError(f"{models[0]}: found a model among others; expected it alone")
    of_kernels: dict[str, Any] = {
        "--static": static, "--dims": dims, "--schedule": schedule, "--scratch-mib": scratch_mib,
        "--no-fallback": None if fallback else False}
    of_answers: dict[str, Any] = {"--context": context, "--dtype": dtype}
    of_training: dict[str, Any] = {"--sequences": sequences, "--length": length}
    wrong = [(of_kernels, "a model", "kernels")] if models else [
        (of_answers | of_training | {"--training": training or None}, "kernels", "a model")]
    if models:
        wrong.append((of_answers, "a model in training", "one that answers") if training else
                     (of_training, "a model that answers", "--training"))
    for options, found, expected in wrong:
        for option, value in options.items():
            if value is not None:
                raise UsageError(f"{option}: found {found}; expected {expected} with it")
    if models and training:
        from .build_training import report_training, run_build_training

        learner = run_build_training(models[0], output, target, sequences or 1, length, header)
        if json:
            _print_json(learner)
        else:
            print(report_training(learner))
        return
    if models:
        from .build_model import report_model, run_build_model

        whole = run_build_model(models[0], output, target, context, dtype or "file", header)
        if json:
            _print_json(whole)
        else:
            print(report_model(whole))
        return
    made = run_build(kernels, output, target, static, dims, schedule, fallback,
                     64 if scratch_mib is None else scratch_mib, header)
    if json:
        _print_json(made)
    else:
        print(report(made))


@app.command()
def explain(
    kernel: KernelName, target: TargetName = None, static: Static = None, dims: Dims = None,
    schedule: ScheduleText = None, scalars: Scalars = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Run the call, where this CPU can.")] = True,
    loop: Annotated[str | None, typer.Option("--loop", help="Show this loop instead of the hottest.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show all instructions.")] = False,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write one page for a browser.")] = None,
    json: Json = False,
) -> None:
    """Show source lines beside instructions, registers over time, and what bounds each loop; measured, where it runs.

    \b
    Examples:
      sapper explain matmul_nn_f32 --shape M=512,N=512,K=512
      sapper explain my.py:f --target v3 --static N=64 --all
      sapper explain softmax --shape M=256,N=1024 --html softmax.html
    """
    from .explain import gather, print_report
    from .explain_outline import print_outline

    facts = gather(kernel, target, static, dims, schedule, run, scalars)
    labels = [entry["label"] for entry in facts["loops"]]
    if loop is not None and loop not in labels:
        known = ", ".join(labels) or "none, as the kernel has no loop"
        raise UsageError(f"--loop: found no loop {loop!r}; expected one of: {known}")
    if html is not None:
        from pathlib import Path

        from .explain_page import page
        from .files import write_files

        write_files({Path(html): page(facts).encode()})
    if json:
        _print_json(facts)
    elif html is None:
        (print_outline if "assembled" in facts else print_report)(facts, loop, everything)
    else:
        print(f"{html}: {len(facts['rows'])} instructions of {facts['name']} for {facts['target']}")


@app.command()
def port(
    kernel: Annotated[str | None, typer.Argument(
        metavar="[FILE.py[:KERNEL]|NAME]", help="A kernel, or all of a file; the library if left out.")] = None,
    target: Annotated[list[str] | None, typer.Option("--target", help="Only this one; may be given again.")] = None,
    static: Static = None, dims: Dims = None, schedule: ScheduleText = None, json: Json = False,
) -> None:
    """Show what becomes of kernels on every known target: hand-written, generated or impossible, and what it costs.

    \b
    Examples:
      sapper port my.py
      sapper port --target sm_80 --target sm_90a
      sapper port matmul_nn_f32 --shape M=512,N=512,K=512 --json
      sapper port my.py:f --target v3 --target zen4 --static N=64
    """
    from .port import print_report, run_port

    rows = list(run_port(kernel, static, dims, schedule, target or []))
    if json:
        _print_json(rows)
    else:
        print_report(rows)


@app.command()
def check(
    kernel: Annotated[
        str | None, typer.Argument(metavar="FILE.py[:KERNEL]|NAME", help="A kernel, or all of a file.")
    ] = None,
    library: Annotated[bool, typer.Option("--library", help="All kernels of the library.")] = False,
    target: TargetName = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed, the same cases.")] = 0,
    runs: Annotated[int, typer.Option("--runs", min=1, help="How many cases for each kernel.")] = 12,
    schedule: ScheduleText = None,
    arguments: Annotated[str | None, typer.Option(
        "--arguments", metavar="FUNCTION", help="Of the file: (random, shape) -> a dict of all arguments.")] = None,
    shape: Annotated[list[str] | None, typer.Option(
        "--shape", metavar="M=7,N=33", help="Extents to take; several in turns.")] = None,
    json: Json = False,
) -> None:
    """Check kernels on random and hostile inputs, and name the first station that is wrong. Status 1 if one is.

    Ragged and empty shapes, odd strides, NaN, infinities, denormal numbers; against the interpreter, at every station;
    native code between guard pages in a process of its own. Where few values make sense, as in a page table, a function
    of the file makes them (--arguments), of a NumPy generator and a dict of extents.

    \b
    Examples:
      sapper check my.py
      sapper check my.py:f --runs 40 --seed 7
      sapper check my.py:f --arguments made --shape M=7,N=33 --shape M=1,N=1
      sapper check softmax --target v3 --json
      sapper check --library --runs 4
    """
    from .check import run_check

    if (kernel is None) != library:
        raise UsageError("check: expected a kernel, a file or --library, and one of them only")
    if library and (arguments or shape):
        raise UsageError("check: found --library with --arguments or --shape; expected a kernel of your own with them")
    status, results = run_check(kernel, target, seed, runs, schedule, json, arguments, shape or ())
    if json:
        _print_json(results)
    raise typer.Exit(status)


@app.command()
def emulate(
    file: Annotated[str, typer.Argument(metavar="FILE.ptx", help="PTX text, of any compiler.")],
    kernel: Annotated[str | None, typer.Argument(help="The entry to run; default: the only one.")] = None,
    grid: Annotated[str, typer.Option("--grid", help="Blocks: 8 or 4,2,1.")] = "1",
    block: Annotated[str | None, typer.Option("--block", help="Threads; default: what .reqntid says.")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="Blocks of a cluster.")] = None,
    arg: Annotated[list[str] | None, typer.Option("--arg", "-a", help="In order: x=f32[100], n=100.")] = None,
    shared: Annotated[int, typer.Option("--shared", min=0, help="Bytes of dynamic shared memory.")] = 0,
    lazy: Annotated[bool, typer.Option("--lazy", help="Asynchronous effects land only when something waits.")] = False,
    short_sums: Annotated[bool, typer.Option(
        "--short-sums", help="Sum products of fp8 with the few bits that tensor cores keep.")] = False,
    tensor_fences: Annotated[bool, typer.Option(
        help="Barriers order tensor memory only with tcgen05.fence; Triton takes them without.")] = True,
    expect: Annotated[list[str] | None, typer.Option("--expect", help="A NumPy expression: z = x + y.")] = None,
    cooperative: Annotated[bool, typer.Option("--cooperative", help="All blocks are resident at once.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of random arguments.")] = 0,
    json: Json = False,
) -> None:
    """Run a kernel of PTX text without a GPU, and check it: races, bounds, bytes nobody wrote, deadlocks.

    \b
    Examples:
      sapper emulate add.ptx --grid 8 --block 128 -a x=f32[1000] -a y=f32[1000] -a z=f32[1000]:empty -a n=1000 \\
        --expect "z = x + y"
      sapper emulate add.ptx add -a x=f32[8] -a y=f32[8] -a z=f32[8] -a n=8 --block 8 --lazy --json
    """
    from ..emulate import Options
    from .emulate import report, run_emulate

    options = Options(lazy=lazy, short_sums=short_sums, tensor_fences=tensor_fences)
    facts = run_emulate(file, kernel, grid, block, cluster, arg or [], shared, options, expect or [], cooperative, seed)
    if json:
        _print_json(facts)
    else:
        print("\n".join(report(facts)))


@cache_app.callback(invoke_without_command=True)
def cache(context: typer.Context) -> None:
    """The compiled kernels on disk.

    \b
    Examples:
      sapper cache
      sapper cache show --json
      sapper cache clear
    """
    if context.invoked_subcommand is None:
        cache_show()


@cache_app.command("show")
def cache_show(json: Json = False) -> None:
    """List the compiled kernels, the most recently used first.

    \b
    Examples:
      sapper cache show
      sapper cache show --json
    """
    from .cache import show

    facts = show()
    if json:
        _print_json(facts)
        return
    from .doctor import size_text

    if facts["directory"] is None:
        print("there is no cache: SAPPER_CACHE_DIR switches it off")
        return
    for entry in facts["entries"]:
        print(f"{entry['used_at']}  {size_text(entry['size_bytes']):>10}  {entry['name']}")
    print(f"{facts['directory']}: {len(facts['entries'])} kernels, {size_text(facts['size_bytes'])} of "
          f"{size_text(facts['limit_bytes'])}")


@cache_app.command("clear")
def cache_clear(json: Json = False) -> None:
    """Drop all compiled kernels; they are compiled again when they are called.

    \b
    Examples:
      sapper cache clear
    """
    from .cache import clear

    dropped = clear()
    if json:
        _print_json({"dropped": dropped})
    else:
        print(f"dropped {dropped} kernels")


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="A user's message.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Most tokens of the answer.")] = 128,
    temperature: Temperature = 0.0, top_k: TopK = 40, top_p: TopP = 1.0, min_p: MinP = 0.0, seed: Seed = 0,
    stop: Stop = None, threads: Threads = None, dtype: WeightsDtype = "file", adapter: AdapterName = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt is the beginning of a text, not a message.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    speculate: Speculate = False,
    profile: Annotated[bool, typer.Option(
        "--profile", help="Show where the time of a step goes, kernel by kernel.")] = False,
    json: Json = False,
) -> None:
    """Let a model answer a prompt. Text goes to stdout as it comes, speeds to stderr.

    \b
    Examples:
      sapper generate smollm2 --prompt "What is a sapper?"
      sapper generate model.gguf --prompt "Once upon a time" --raw --tokens 64 --temperature 0.8 --seed 1
      sapper generate smollm2 --prompt "Hello" --json
      sapper generate smollm2 --prompt "Hello" --adapter smollm2-lora
      sapper generate smollm2 --prompt "Hello" --profile --threads 2
    """
    from .generate import run_generate

    raise typer.Exit(run_generate(model, prompt, tokens, json=json, threads=threads, raw=raw, system=system,
                                  dtype=dtype, adapter=adapter, temperature=temperature, top_k=top_k,
                                  top_p=top_p, min_p=min_p, seed=seed, stop=stop or [], speculate=speculate,
                                  profile=profile))


@app.command()
def chat(
    model: ModelName,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", "-n", min=1, help="Most tokens of an answer.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=2, help="Tokens of the conversation.")] = None,
    temperature: Temperature = 0.0, top_k: TopK = 40, top_p: TopP = 1.0, min_p: MinP = 0.0, seed: Seed = 0,
    stop: Stop = None, threads: Threads = None, dtype: WeightsDtype = "file", adapter: AdapterName = None,
    speculate: Speculate = False,
) -> None:
    """Talk with a model in the terminal. Ctrl-C ends an answer, Ctrl-D the program; /help says what else there is.

    \b
    Examples:
      sapper chat smollm2
      sapper chat model.gguf --system "Answer in one sentence." --temperature 0.7
      echo "What is a sapper?" | sapper chat smollm2
    """
    from .chat import run_chat

    raise typer.Exit(run_chat(model, system=system, tokens=tokens, context=context, threads=threads, dtype=dtype,
                              adapter=adapter, speculate=speculate, temperature=temperature, top_k=top_k, top_p=top_p,
                              min_p=min_p, seed=seed, stop=stop or []))


@app.command()
def serve(
    model: ModelName,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0: any free one.")] = 8080,
    key: Annotated[str | None, typer.Option("--key", help="What clients must give. Also: SAPPER_SERVE_KEY.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name for clients; default: MODEL.")] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Sequences in a step.")] = 8,
    context: Annotated[int | None, typer.Option("--context", min=2, help="Tokens of a sequence.")] = None,
    pages: Annotated[int | None, typer.Option("--pages", min=1, help="Pages of 64 tokens, for all sequences.")] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait.")] = 32,
    body_bytes: Annotated[int, typer.Option("--body-bytes", min=1, help="Most bytes of a request.")] = 1 << 20,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most tokens of an answer.")] = 4096,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Longest time of a request.")] = 600.0,
    stall_seconds: Annotated[float, typer.Option("--stall-seconds", min=0.1, help="Longest stall of a client.")] = 30.0,
    threads: Threads = None, dtype: WeightsDtype = "file", adapter: AdapterName = None, speculate: Speculate = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API has it: /v1/models, /v1/completions, /v1/chat/completions, and /health
    and /metrics. Ctrl-C or SIGTERM stops it.

    \b
    Examples:
      sapper serve smollm2
      sapper serve model.gguf --port 9000 --slots 16 --context 2048
      SAPPER_SERVE_KEY=secret sapper serve smollm2 --host 0.0.0.0
    """
    from .serve import run_serve

    raise typer.Exit(run_serve(
        model, host=host, port=port, key=key, name=name, slots=slots, context=context, pages=pages, queue=queue,
        body_bytes=body_bytes, tokens=tokens, seconds=seconds, stall_seconds=stall_seconds, threads=threads,
        dtype=dtype, speculate=speculate, adapter=adapter))


@app.command()
def perplexity(
    model: ModelName,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text in UTF-8.")],
    context: Annotated[int | None, typer.Option("--context", "-c", min=4, help="Of a window; default: 512.")] = None,
    stride: Annotated[int, typer.Option("--stride", min=0, help="Windows every so many tokens; 0: side by side.")] = 0,
    threads: Threads = None, dtype: WeightsDtype = "file", adapter: AdapterName = None, json: Json = False,
) -> None:
    """Measure how well a model foretells a text, over the windows of llama.cpp's llama-perplexity.

    \b
    Examples:
      sapper perplexity smollm2 book.txt
      sapper perplexity model.gguf book.txt --context 2048 --json
      sapper perplexity model.gguf book.txt --context 512 --stride 128
      sapper perplexity smollm2 book.txt --adapter smollm2-lora
    """
    from .perplexity import run_perplexity

    facts = run_perplexity(model, file, context=context, stride=stride, threads=threads, dtype=dtype, adapter=adapter,
                           progress=not json)
    if json:
        _print_json(facts)
    else:
        print(f"perplexity {facts['perplexity']:.4f} +/- {facts['error']:.4f} over {facts['tokens']} tokens in "
              f"{facts['windows']} windows")


@app.command()
def quantize(
    model: ModelName,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIRECTORY", help="A new directory.")],
    dtype: Annotated[str, typer.Option("--dtype", help="int4 or int8.")] = "int4",
    group: Annotated[int, typer.Option("--group", help="Weights that share a scale: 32, 64 or 128.")] = 64,
    zero_points: Annotated[
        bool | None, typer.Option("--asymmetric/--symmetric", help="Whether groups have zero points; default: of int4.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--perplexity", metavar="FILE", help="Measure it over a text, before and after.")
    ] = None,
    shard_mib: Annotated[int, typer.Option("--shard-mib", min=1, help="Largest size of a file, about.")] = 4096,
    threads: Threads = None, json: Json = False,
) -> None:
    """Quantise a model's matrices in groups, to 4 or 8 bits, and write it as a directory that every command takes.
    Embeddings and outputs take 8 bits in any case; vectors, and routers of experts, stay as they are.

    \b
    Examples:
      sapper quantize ./Llama-3.2-1B -o llama-int4 --dtype int4 --group 64
      sapper quantize smollm2 -o smollm2-int8 --dtype int8 --perplexity book.txt
    """
    from .quantize import run_quantize

    facts = run_quantize(model, out, dtype=dtype, group=group, zero_points=zero_points, text=text, shard_mib=shard_mib,
                         threads=threads, progress=not json)
    if json:
        _print_json(facts)
        return
    forms = ", ".join(f"{count} in {form}" for form, count in facts["forms"].items()) or "none"
    print(f"{facts['out']}: {facts['matrices']} of {facts['tensors']} tensors quantised ({forms}), "
          f"{facts['before_bytes'] / 2**20:.1f} to {facts['after_bytes'] / 2**20:.1f} MiB, "
          f"error {100 * facts['relative_error']:.2f} % of the weights, {facts['seconds']:.1f} s")
    if text is not None:
        print(f"perplexity {facts['perplexity_before']:.4f} before, {facts['perplexity_after']:.4f} after")


@app.command()
def train(
    model: ModelName,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to learn from, in UTF-8.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIRECTORY", help="A new directory.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many, all in all.")] = 100,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Of a step.")] = 1,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens of a sequence; default: 512.")] = None,
    rate: Annotated[float, typer.Option("--rate", min=0.0, help="Of learning, at its highest.")] = 1e-4,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps over which it rises.")] = 10,
    decay: Annotated[float, typer.Option("--decay", min=0.0, help="Of weights in matrices.")] = 0.1,
    clip: Annotated[float, typer.Option("--clip", min=0.0, help="Largest norm of a gradient.")] = 1.0,
    lora: Annotated[int | None, typer.Option(
        "--lora", min=1, metavar="RANK", help="Train adapters of this rank; the model stays as it is.")] = None,
    alpha: Annotated[float | None, typer.Option(
        "--alpha", min=0.0, help="With --lora: adapters count alpha / rank times; default: twice the rank.")] = None,
    adapt: Annotated[str, typer.Option(
        "--adapt", help="With --lora: which matrices, as q_proj,v_proj; default: all of attention and dense parts.")
    ] = "all",
    base: Annotated[str | None, typer.Option(
        "--base", help="With adapters: what the model is held in, f32 or bf16; default: bf16 where its file is.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(
        "--adapter", metavar="DIRECTORY", help="Go on with this adapter, of its rank and matrices.")] = None,
    balance: Annotated[float, typer.Option(
        "--balance", min=0.0, help="How far a step moves a DeepSeek-V3's choice to experts with few tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(
        "--seed", min=0, help="Of the order in which sequences come, and of new adapters.")] = 0,
    validate: Annotated[
        str | None, typer.Option("--validate", metavar="FILE",
                                 help="Measure the loss over a text's first 64 sequences, before and after.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(
        "--save-every", min=1, help="Save the model and the optimiser's state as DIRECTORY.step-N.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from such a directory.")] = False,
    threads: Threads = None, json: Json = False,
) -> None:
    """Train a model on a text, with AdamW in f32, and write it as a directory that every command takes: a Llama, a
    Mistral, a Qwen or a DeepSeek-V2 or V3, from any file that loads. The rate falls to a tenth along half a cosine. To
    go on from a saved step, give the same options again, with --resume.

    With --lora the model stays as it is and adapters of low rank learn, in a fraction of the memory. What is written
    is an adapter, as PEFT has it, for `--adapter` of other commands and for `sapper merge`; a saved step of it goes on
    by --adapter and --resume.

    \b
    Examples:
      sapper train smollm2 book.txt -o smollm2-book
      sapper train ./model notes.txt -o tuned --steps 500 --length 1024 --rate 5e-5 --validate held-back.txt
      sapper train tuned.step-200 notes.txt -o tuned --steps 500 --length 1024 --rate 5e-5 --resume
      sapper train smollm2 book.txt -o smollm2-lora --lora 16 --rate 5e-4
      sapper train ./model notes.txt -o notes-lora --lora 8 --alpha 16 --adapt q_proj,v_proj --base bf16
      sapper train ./model notes.txt -o notes-lora --adapter notes-lora.step-200 --resume
    """
    from .train import run_train

    if lora is not None and adapter is not None:
        raise UsageError("--lora: found --adapter, which has a rank; expected one of them")
    without = {"--alpha": alpha, "--adapt": None if adapt == "all" else adapt, **({} if adapter else {"--base": base})}
    for option, value in without.items():
        if value is not None and lora is None:
            raise UsageError(f"{option}: found no --lora; expected a rank with it")
    if base not in (None, "f32", "bf16"):
        raise UsageError(f"--base: found {base!r}; expected f32 or bf16")
    if lora is not None and resume:
        raise UsageError("--resume: found a new adapter; expected --adapter and a directory that --save-every made")
    adapting: dict[str, Any] = {"rank": lora, "alpha": alpha, "modules": adapt, "base": base, "adapter": adapter}
    recipe = {"steps": steps, "rate": rate, "warmup": warmup, "decay": decay, "clip": clip, "balance": balance}
    facts = run_train(model, text, out, recipe=recipe, sequences=sequences, length=length, seed=seed, validate=validate,
                      save_every=save_every, resume=resume, threads=threads, progress=not json, **adapting)
    if json:
        _print_json(facts)
        return
    print(f"{facts['out']}: {facts['steps']} steps of {sequences} x {facts['length']} tokens, loss "
          f"{facts['first_loss']:.4f} to {facts['last_loss']:.4f}, {facts['tokens_per_second']:.0f} tokens/s, "
          f"{facts['seconds']:.1f} s")
    if validate is not None:
        print(f"loss over {validate} {facts['validation_before']:.4f} before, {facts['validation_after']:.4f} after")


@app.command()
def merge(
    model: ModelName,
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A directory, as sapper train --lora writes it, or PEFT.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIRECTORY", help="A new directory.")],
    dtype: Annotated[str, typer.Option("--dtype", help="Of the matrices that are written: f32 or bf16.")] = "f32",
    json: Json = False,
) -> None:
    """Add an adapter to a model's matrices, and write the model as a directory that every command takes.

    
    Examples:
      sapper merge smollm2 smollm2-lora -o smollm2-book
      sapper merge ./Llama-3.2-1B ./adapter -o llama-tuned --dtype bf16
    """
    from .merge import run_merge

    facts = run_merge(model, adapter, out, dtype=dtype, progress=not json)
    if json:
        _print_json(facts)
        return
    print(f"{facts['out']}: {facts['matrices']} of {facts['tensors']} tensors with an adapter, "
          f"{facts['bytes'] / 2**20:.1f} MiB, {facts['seconds']:.1f} s")


@app.command()
def tune(
    kernel: Annotated[
        str | None, typer.Argument(metavar="[FILE.py:KERNEL|NAME]", help="A kernel of a file or of the library.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", "--dims", help="Extents: M=512,N=512. Default: the kernel's own cases.")
    ] = None,
    scalars: Scalars = None,
    budget: Annotated[str, typer.Option("--budget", help="Time for each shape: 60s, 5m.")] = "60s",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Workers; default: all cores.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Large operands come from memory, as weights do.")] = False,
    database: Annotated[
        str | None, typer.Option("--database", metavar="FILE", help="Of trials; default: in the cache directory.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Show what was found so far.")] = False,
    export: Annotated[str | None, typer.Option("--export", metavar="FILE", help="Write all results to a file.")] = None,
    import_from: Annotated[str | None, typer.Option("--import", metavar="FILE", help="Read such a file.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="A level of a GPU that is here, as sm_90a; default: this CPU.")
    ] = None,
    on_paper: Annotated[
        bool, typer.Option("--on-paper", help="Compare estimates, for any target; nothing is timed, nothing kept.")
    ] = False,
    json: Json = False,
) -> None:
    """Search for a faster schedule than the model's; calls use it from then on. Ctrl-C loses nothing.

    \b
    Examples:
      sapper tune matmul_nn_f32 --shape M=512,N=512,K=512 --threads 1
      sapper tune my.py:f --shape M=1000,N=64 --budget 5m
      sapper tune attention_rounded_bf16 --shape T=512,H=9,G=1,D=64,position=512
      sapper tune my.py:decode --shape H=8,P=4096,D=128 --set position=2047
      sapper tune matmul_nt_bf16_bf16 --shape M=128,N=4096,K=16384 --target sm_90a --on-paper
      sapper tune --report
      sapper tune --export found.json
    """
    from .tune import run_tune

    raise typer.Exit(run_tune(kernel, shape, budget, threads, cold, database, report, export, import_from, json, target,
                              on_paper, scalars))


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="Which suite; all of them by default; gpu by itself.")] = "all",
    threads: Annotated[int | None, typer.Option("--threads", help="Workers; default: one, and then all cores.")] = None,
    against: Annotated[str | None, typer.Option("--against", help="Peers, with commas; default: all found.")] = None,
    json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the figures to a file too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest case of each kernel.")] = False,
    case: Annotated[str | None, typer.Option("--case", help="Only cases whose name and shape contain this.")] = None,
) -> None:
    """Measure kernels, the compiler and the model beside the machine's peaks and their peers.

    \b
    Examples:
      sapper bench --quick
      sapper bench matmul --threads 1 --against numpy,torch --json figures.json
      sapper bench batch --case "step 16 x"
      sapper bench quantized --case "product Q4_K 16x" --against llama
    """
    from .bench import run_bench

    raise typer.Exit(run_bench(suite, threads, against, json, quick, case))
