"""What `sapper bench` measures of whole models: a prompt of 512 tokens, and token by token after it.

In: `Settings`. Out: `Row`s. Holds: SmolLM2 is a trained model in a file that llama.cpp reads too. DeepSeek models have
random weights; where llama.cpp is a peer they are written to a GGUF file, which it converts to the formats that it has,
and both read the same files. PyTorch runs the transformers model of the same shape in bf16, prompts through
torch.compile.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .bench_suites import Row, Settings, attempt, rows_of, with_floor

PROMPT_TOKENS, DECODE_TOKENS, CONTEXT = 512, 64, 1024
DECODE_S = 0.5
"""A sample of decoding lasts about so long: tokens one after the other, as many as a short answer has. The first tenths
of a second after a peer's turn read weights that memory has not given for a while: on a virtual machine with 480 MiB of
last cache they came at 11 GB/s instead of 16."""
TRIAL_S = 300
"""How long llama.cpp may take to load a file and to read two tokens."""
BF16 = "bf16"
ROUNDED = " rounded"
"""Said of rows of activations, and in blocks of the weights that many rows meet, that are rounded to bf16."""
AS_IN_FILE = "4 bit"
"""What the form of SmolLM2's file is called: Q4_1, and Q8_0 for the logits."""
GGUF_TYPES = {BF16: "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K": "Q4_K_M"}
"""Formats of a DeepSeek's matrices -> llama.cpp's names of the mix that has most of them in it."""
DEEPSEEK = "deepseek-v2"
DEEPSEEKS = {DEEPSEEK: ("SMALL_V2", tuple(base + more for base in GGUF_TYPES for more in ("", ROUNDED))),
             "deepseek-v2-lite 4 layers": ("WIDE_V2", (BF16, BF16 + ROUNDED, "Q8_0", "Q4_K"))}
"""Name -> that of its config (models/deepseek/untrained.py), and the forms that are measured. PyTorch runs the first.
"""


Feed = Callable[[], Any]


def model_rows(settings: Settings) -> Iterator[list[Row]]:
    """SmolLM2-135M, beside llama.cpp on its 4-bit file."""
    if not _wants_model("smollm2", settings):
        return
    from ..models.errors import ModelError
    from ..models.llama.model import load_model

    settings.report("loading the model")
    try:
        models = {form: load_model("smollm2", loaded_as(form)) for base in (BF16, AS_IN_FILE)
                  for form in (base, base + ROUNDED) if not is_left_out("smollm2", form, settings)}
    except (ModelError, ImportError) as error:
        settings.say(f"no model to run: {error}")
        return
    for threads in settings.thread_counts:
        for form, model in models.items():
            yield from attempt("smollm2", settings, partial(_smollm2_case, form, model, threads, settings))


def deepseek_rows(settings: Settings) -> Iterator[list[Row]]:
    """Models with DeepSeek-V2's attention and experts, in the forms that files have."""
    from ..models.deepseek import untrained

    for name, (widths, forms) in DEEPSEEKS.items():
        if _wants_model(name, settings) and not (settings.quick and name != DEEPSEEK):
            yield from _of_deepseek(name, getattr(untrained, widths), forms, settings)


def _of_deepseek(name: str, values: Mapping[str, Any], forms: Sequence[str],
                 settings: Settings) -> Iterator[list[Row]]:
    """values: of its config.json. Of each form but bf16, of which they are made, the file lies there while it is
    measured."""
    from ..models.deepseek.config import from_json
    from ..models.deepseek.untrained import untrained

    config = from_json(dict(values), "the benchmark")
    with TemporaryDirectory(prefix="sapper-bench-") as folder:
        path: Path | None = None
        for form in forms:
            base = form.removesuffix(ROUNDED)
            if is_left_out(name, form, settings):
                continue
            if "llama" in settings.against:
                if path is not None and path.stem not in (GGUF_TYPES[BF16], GGUF_TYPES[base]):
                    path.unlink()
                path = _converted(base, config, Path(folder), settings)
            elif base not in (BF16, "Q4_0"):
                continue
            settings.report(f"loading a DeepSeek with random weights, {form}")
            model = untrained(config, loaded_as(form)) if path is None else _loaded(path, form)
            for threads in settings.thread_counts:
                yield from attempt(name, settings,
                                   partial(_deepseek_case, name, values, form, model, path, threads, settings))
            del model


def _wants_model(name: str, settings: Settings) -> bool:
    return any(settings.wants(f"{name} {part}") for part in ("prefill", "decode"))


def is_left_out(name: str, form: str, settings: Settings) -> bool:
    """Whether blocks are to be rounded to bf16, which this processor can't multiply; says so."""
    from ..models.workspace import Workspace

    if form.removesuffix(ROUNDED) in (BF16, form) or Workspace(1, 1).packs_pairs():
        return False
    settings.say(f"{name}, {form}, is left out: this processor does not multiply pairs of bf16")
    return True


def loaded_as(form: str) -> str:
    """A form's name for load_model."""
    base, rounded = form.removesuffix(ROUNDED), "-rounded" if form.endswith(ROUNDED) else ""
    return ("bf16" if base == BF16 else "file") + rounded


def products_of(form: str, rounds: bool) -> str:
    """What the matrices of a prompt are multiplied with. rounds: whether those in blocks are rounded in any case."""
    if form.endswith(ROUNDED) or (rounds and form != BF16):
        return "bf16"
    return "f32" if form == BF16 else "i8"


def rounds_prompts(model: Any) -> bool:
    """Whether the matrices in blocks of a model, all of them, are rounded as they meet a prompt."""
    from ..models.experts import PanelExperts
    from ..models.mixture import MixtureWeights
    from ..models.workspace import Workspace

    work = Workspace(1, 1)
    mixtures = [one.feed_forward for one in model.weights.layers
                if isinstance(getattr(one, "feed_forward", None), MixtureWeights)]
    return work.rounds_many() and all(
        one.gate.rounds(2, PROMPT_TOKENS * one.taken, work) for one in mixtures if isinstance(one.gate, PanelExperts))


Operations = dict[str, int]
"""Of a prompt, by what makes the products: "f32", "bf16", "i8"."""


def attention_of_prompt(tokens: int, heads: int, features: int, layers: int) -> int:
    """Operations of a prompt's attention. features: of a key and of a value together, of a head. A token meets itself
    and those before it; what a kernel computes beside and masks is no use."""
    return tokens * (tokens + 1) * heads * features * layers


def together(*parts: tuple[str, int]) -> Operations:
    found: Operations = {}
    for products, count in parts:
        found[products] = found.get(products, 0) + count
    return found


def _smollm2_case(form: str, model: Any, threads: int, settings: Settings) -> list[Row]:
    config, tokens = model.config, prompt_tokens_of(settings)
    operations = together(
        (products_of(form, rounds_prompts(model)), 2 * tokens * smollm2_size(model) + 2 * model.weights.logits.size),
        (model.cache_dtype, attention_of_prompt(tokens, config.heads, 2 * config.head_features, config.layers)))
    weight_bytes = sum(m.nbytes for m in _smollm2_matrices(model)) + model.weights.logits.nbytes
    return _speeds("smollm2", form, model, operations, weight_bytes, model.path, AS_IN_FILE, threads, settings)


def _smollm2_matrices(model: Any) -> list[Any]:
    """Those of the layers."""
    return [m for one in model.weights.layers for part in (one.feed_forward,)
            for m in (one.qkv, one.output, part.gate, part.up, part.down)]


def smollm2_size(model: Any) -> int:
    """How many weights of the layers each token meets."""
    return sum(m.size for m in _smollm2_matrices(model))


def _deepseek_case(name: str, values: Mapping[str, Any], form: str, model: Any, path: Path | None, threads: int,
                   settings: Settings) -> list[Row]:
    operations = deepseek_operations(form, model, prompt_tokens_of(settings))
    more = {}
    if name == DEEPSEEK and form.startswith(BF16) and "torch" in settings.against:
        settings.report("compiling the transformers model")
        try:
            more["torch"] = _torch_feeds(values, threads, settings)
        except Exception as error:      # it needs another package, and its compiler one of C++
            settings.say(f"torch is left out of {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return _speeds(name, form, model, operations, model.weights.step_bytes, path, form.removesuffix(ROUNDED),
                   threads, settings, more)


def deepseek_operations(form: str, model: Any, tokens: int) -> Operations:
    """Of a prompt. Routers are f32 in every form. What makes keys and values meets a cache of latent vectors: in bf16
    both, and attention too, where that is the cache's type (models/deepseek/session.py)."""
    from ..models.mixture import MixtureWeights

    config, weights = model.config, model.weights
    expand = sum(one.attention.keys.size + one.attention.values.size for one in weights.layers)
    routers = sum(one.feed_forward.router.size for one in weights.layers
                  if isinstance(one.feed_forward, MixtureWeights))
    features = config.head_features + config.value_features
    return together(
        (products_of(form, rounds_prompts(model)),
         2 * tokens * (weights.step_size - expand - routers) + 2 * weights.logits.size),
        ("f32", 2 * tokens * routers),
        (model.cache_dtype, 2 * tokens * expand + attention_of_prompt(tokens, config.heads, features, config.layers)))


def _speeds(name: str, form: str, model: Any, operations: Operations, weight_bytes: int, path: Path | None,
            peer_form: str, threads: int, settings: Settings,
            more: Mapping[str, tuple[Feed, Feed]] | None = None) -> list[Row]:
    """Rows for a model's prompt, of which the last token alone goes through the matrix of the logits, and for its
    decoding. operations: of the prompt, whose floor is each of them at the peak of its products. weight_bytes: that one
    token reads. path, peer_form: of the file that llama.cpp reads."""
    prompt_tokens = prompt_tokens_of(settings)
    feeds = {"sapper": feeds_of(model.session(CONTEXT, threads=threads), prompt_tokens), **(more or {})}
    dtypes = {"torch": BF16, "llama": peer_form}
    if path is not None and "llama" in settings.against:
        feeds["llama"] = _llama_feeds(path, prompt_tokens, threads, repacks_of(path, settings))
    label = f"{name} prefill, {form}, {threads} thread{'s' * (threads > 1)}"
    peaks, products = settings.peaks(threads), products_of(form, rounds_prompts(model))
    settings.report(label)
    total = sum(operations.values())
    timings, peaks = with_floor({who: prefill for who, (prefill, _) in feeds.items()}, peaks, settings,
                                products=tuple(operations))
    rows = rows_of(f"{name} prefill", form, str(prompt_tokens), threads, timings,
                   sum(count / peaks.arithmetic(one) for one, count in operations.items()), prompt_tokens, "tokens/s",
                   dtypes, (total, weight_bytes, products))
    of_one = 100 * total / peaks.arithmetic(products) / rows[0].median_s
    settings.say(f"{label}: {of_one:.0f} % of the peak of {products} alone, were all operations of it; "
                 f"{100 * operations.get(products, 0) / total:.0f} % of them are")
    settings.report(label.replace("prefill", "decode"))
    timings, peaks = with_floor({who: decode for who, (_, decode) in feeds.items()}, peaks, settings, reads=True,
                                sample_s=DECODE_S)
    rows += rows_of(f"{name} decode", form, f"1 after {prompt_tokens}", threads, timings,
                    peaks.floor_s(0, weight_bytes, 0, "DRAM"), 1.0, "tokens/s", dtypes)
    return [row for row in rows if settings.wants(row.case)]


# --------------------------------------------------------------------------------------------------------- contestants


def prompt_tokens_of(settings: Settings) -> int:
    return 64 if settings.quick else PROMPT_TOKENS


def tokens_of(count: int) -> list[int]:
    return [(7 * i + 11) % 4000 + 100 for i in range(count)]


def feeds_of(session: Any, prompt_tokens: int) -> tuple[Feed, Feed]:
    """What feeds a session the prompt, and what feeds it one token after the prompt."""
    tokens = tokens_of(prompt_tokens)

    def feed_prompt() -> None:
        session.position = 0
        session.feed(tokens)

    def feed_token() -> None:
        if not prompt_tokens <= session.position < prompt_tokens + DECODE_TOKENS:
            session.position = prompt_tokens
        session.feed((tokens[session.position % prompt_tokens],))

    return feed_prompt, feed_token


@cache
def _survives(path: Path) -> bool:
    """Whether llama.cpp runs a file in the layouts that it makes for this processor. It ends the process where it finds
    no kernel for a matrix in its layout (some types of experts, with tile registers), so another one tries."""
    code = "import sys; from sapper.cli.bench_models import llama; llama(sys.argv[1], 1, True).eval([1, 2])"
    try:
        return not subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True,
                                  timeout=TRIAL_S).returncode
    except subprocess.TimeoutExpired:
        return False


def repacks_of(path: Path, settings: Settings) -> bool:
    settings.report(f"trying {path.name} with llama.cpp")
    if not _survives(path):
        settings.say(f"llama.cpp ends with {path.name} in layouts that it makes for this processor: it runs without")
    return _survives(path)


def llama(path: str, threads: int, repacks: bool) -> Any:
    """A model of llama.cpp. repacks: in the layouts that it makes for this processor."""
    import llama_cpp.llama_cpp as library
    from llama_cpp import Llama

    defaults = library.llama_model_default_params

    def plain() -> Any:
        made = defaults()
        made.use_extra_bufts = False
        return made

    if not repacks:
        library.llama_model_default_params = plain
    try:
        return Llama(path, n_ctx=CONTEXT, n_batch=PROMPT_TOKENS, n_threads=threads, n_threads_batch=threads,
                     verbose=False)
    finally:
        library.llama_model_default_params = defaults


def _llama_feeds(path: Path, prompt_tokens: int, threads: int, repacks: bool) -> tuple[Feed, Feed]:
    other = llama(str(path), threads, repacks)
    tokens = tokens_of(prompt_tokens)

    def feed_prompt() -> None:
        other.n_tokens = 0
        other.eval(tokens)

    def feed_token() -> None:
        if not prompt_tokens <= other.n_tokens < prompt_tokens + DECODE_TOKENS:
            other.n_tokens = prompt_tokens
        other.eval([tokens[other.n_tokens % prompt_tokens]])

    return feed_prompt, feed_token


def _torch_feeds(values: Mapping[str, Any], threads: int, settings: Settings) -> tuple[Feed, Feed]:
    """Of transformers: prompts compiled, tokens as they come, as its cache grows and would be compiled again."""
    import warnings

    import torch
    import transformers

    types: Any = transformers
    types.logging.set_verbosity_error()
    prompt_tokens = prompt_tokens_of(settings)
    torch.set_num_threads(threads)
    config = types.DeepseekV2Config(**{key: value for key, value in values.items() if key != "model_type"},
                                    topk_method="greedy", n_group=1, topk_group=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = types.DeepseekV2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    compiled: Any = torch.compile(model, dynamic=False)
    tokens = torch.tensor([tokens_of(prompt_tokens)])
    cache: list[Any] = []

    def feed_prompt() -> None:
        with torch.inference_mode():
            compiled(tokens, use_cache=False, logits_to_keep=1)

    def feed_token() -> None:
        with torch.inference_mode():
            if not cache or cache[0].get_seq_length() >= prompt_tokens + DECODE_TOKENS:
                cache[:] = [model(tokens, use_cache=True, logits_to_keep=1).past_key_values]
            model(tokens[:, :1], past_key_values=cache[0], use_cache=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of the compiler, about what it finds in transformers
        feed_prompt()
        feed_token()
    return feed_prompt, feed_token


def _loaded(path: Path, form: str) -> Any:
    from ..models.load import load_model

    return load_model(path, loaded_as(form))


@lru_cache(maxsize=1)
def quiet_llama() -> Any:
    """What llama.cpp tells its news to; kept, as it goes on telling."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _converted(base: str, config: Any, folder: Path, settings: Settings) -> Path:
    """The model's file in one of GGUF_TYPES, made by llama.cpp of the one in bf16, which is written first."""
    import llama_cpp

    from ..models.deepseek.untrained_gguf import write_gguf

    plain = folder / f"{GGUF_TYPES[BF16]}.gguf"
    if not plain.exists():
        settings.report("writing a DeepSeek with random weights")
        write_gguf(plain, config)
    path = folder / f"{GGUF_TYPES[base]}.gguf"
    if not path.exists():
        settings.report(f"llama.cpp converts it to {GGUF_TYPES[base]}")
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{GGUF_TYPES[base]}")
        llama_cpp.llama_log_set(quiet_llama(), ctypes.c_void_p())
        failed = llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), wanted)
        if failed:
            raise RuntimeError(f"llama.cpp could not convert {plain} to {GGUF_TYPES[base]}: it gave {failed}")
    return path
