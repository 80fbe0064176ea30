"""The C header of a model's library: text that C99 and C++ take, with nothing but <stdint.h>."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..codegen.c_abi import needed_features
from ..targets import module_of
from .draw import MAX_TEMPERATURE
from .opening import MOST_THREADS, STATUS
from .plan import Model, Plan, Training


def header_text(plan: Plan[Any]) -> str:
    """The header of a planned model."""
    if isinstance(plan.model, Training):
        return _framed(plan, "a language model in training", _RECIPE, _training_lines(plan))
    return _framed(plan, "a language model", _SAMPLING if plan.model.draws else (), _answering_lines(plan))


def _framed(plan: Plan[Any], what: str, types: Sequence[str], functions: Sequence[str]) -> str:
    """types: what comes before the functions of the model, for all models of a kind."""
    model = plan.model
    name = model.name
    system = module_of(plan.target.family, "system").SYSTEM
    guard = re.sub(r"\W", "_", f"sapper_{name}_h").upper()
    lines = [
        f"/* {name}: {what}. Made by sapper for {plan.target.name}; needs no Python and no C library.",
        f"   {model.description.replace('*/', '* /')}",
        "   Features that the processor must have (else SAPPER_MODEL_BAD_CPU):",
        f"   {' '.join(sorted(needed_features(plan.target.features, (code.machine for code in plan.codes))))}.",
        f"   Linux on {system.name}; a model is used by one thread at a time. */",
        f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "",
        "#ifndef SAPPER_MODEL_STATUS", "#define SAPPER_MODEL_STATUS", "enum sapper_model_status {",
        *(f"    SAPPER_MODEL_{status} = {number}, /* {meaning} */" for status, (number, meaning) in STATUS.items()),
        "};", "#endif", "",
        *types, *functions,
        "/* End the workers, free all memory. Null is allowed. */",
        f"void {name}_close({name}_model *model);", "",
        "#ifdef __cplusplus", "}", "#endif", "", f"#endif /* {guard} */",
    ]
    return "\n".join(lines) + "\n"


def _opening_lines(name: str) -> list[str]:
    return [
        "#ifdef __cplusplus", 'extern "C" {', "#endif", "",
        f"typedef struct {name}_model {name}_model;", "",
        f"/* Map and check the weights, start threads - 1 workers (threads: 1 .. {MOST_THREADS}). Returns a",
        "   sapper_model_status; *model is set where it is SAPPER_MODEL_OK. */",
        f"int {name}_open(const char *weights, int64_t threads, {name}_model **model);",
    ]


def _answering_lines(plan: Plan[Model]) -> list[str]:
    model, name, upper = plan.model, plan.model.name, plan.model.name.upper()
    return [
        f"#define {upper}_VOCABULARY {model.vocabulary}",
        f"#define {upper}_CONTEXT {model.context} /* tokens that a conversation may have */",
        f"#define {upper}_WEIGHTS_BYTES INT64_C({plan.weights_bytes})", "",
        *_opening_lines(name),
        "/* Run tokens, after those that were run before. With another status than OK, nothing has changed. */",
        f"int {name}_prefill({name}_model *model, const int32_t *tokens, int64_t count);",
        f"int {name}_step({name}_model *model, int32_t token);",
        f"/* {model.vocabulary} numbers for the token that comes next, valid until the next run; and the likeliest. */",
        f"const float *{name}_logits(const {name}_model *model);",
        f"int32_t {name}_likeliest(const {name}_model *model);",
        "/* Tokens run so far; and back to an earlier number of them, 0 for a new conversation. */",
        f"int64_t {name}_position(const {name}_model *model);",
        f"int {name}_rewind({name}_model *model, int64_t position);",
        *_drawing_lines(plan),
        *_words_lines(plan),
    ]


def _training_lines(plan: Plan[Training]) -> list[str]:
    model, name, upper = plan.model, plan.model.name, plan.model.name.upper()
    return [
        f"#define {upper}_VOCABULARY {model.vocabulary}",
        f"#define {upper}_SEQUENCES {model.sequences} /* of a step */",
        f"#define {upper}_LENGTH {model.length} /* tokens of a sequence */",
        f"#define {upper}_WEIGHTS_BYTES INT64_C({plan.weights_bytes})", "",
        *_opening_lines(name),
        f"/* A step on {upper}_SEQUENCES x {upper}_LENGTH tokens; targets: what follows each of them, below 0 where",
        "   that does not count. trained may be null. With another status than OK, nothing has changed. */",
        f"int {name}_train({name}_model *model, const int32_t *tokens, const int32_t *targets,",
        f"{' ' * len(name)}           const sapper_recipe *recipe, sapper_trained *trained);",
        "/* The loss of such tokens, without a change. */",
        f"int {name}_evaluate({name}_model *model, const int32_t *tokens, const int32_t *targets, double *loss);",
        "/* Steps so far, those before a state that was loaded among them. */",
        f"int64_t {name}_steps(const {name}_model *model);",
        f"/* Write the weights as they are now, as a file of the form that {name}_open takes. */",
        f"int {name}_save(const {name}_model *model, const char *path);",
        "/* Write what AdamW knows of each weight, and go on with it. Beside a model, as training.safetensors, it is",
        "   what `sapper train --resume` takes. */",
        f"int {name}_save_state(const {name}_model *model, const char *path);",
        f"int {name}_load_state({name}_model *model, const char *path);",
    ]


_RECIPE = (
    "#ifndef SAPPER_MODEL_RECIPE", "#define SAPPER_MODEL_RECIPE",
    "/* AdamW. All finite and not below 0, the betas below 1. Often: 1e-4, 0.1, 1, 0.9, 0.95, 1e-8, 0. */",
    "typedef struct sapper_recipe {",
    "    double rate;  /* of learning, in this step */",
    "    double decay; /* of weights in matrices */",
    "    double clip;  /* largest norm of the gradient */",
    "    double beta1, beta2, epsilon;",
    "    double balance; /* how far the choice of a DeepSeek-V3 moves to experts with few tokens; else 0 */",
    "} sapper_recipe;", "",
    "typedef struct sapper_trained {",
    "    double loss; /* a mean over the targets that count, before the weights were changed */",
    "    float norm;  /* of its gradient, before that was clipped */",
    "} sapper_trained;", "#endif", "",
)

_SAMPLING = (
    "#ifndef SAPPER_MODEL_SAMPLING", "#define SAPPER_MODEL_SAMPLING",
    "/* How a token is drawn: of the top_k likeliest the fewest whose probabilities reach top_p, of these the ones",
    "   with min_p of the likeliest's or more, by their probabilities at that temperature. */",
    "typedef struct sapper_model_sampling {",
    "    float temperature; /* 0: the likeliest */",
    "    int32_t top_k;", "    float top_p, min_p;", "    uint64_t seed;",
    "} sapper_model_sampling;", "#endif", "",
)


def _drawing_lines(plan: Plan[Model]) -> list[str]:
    """What a model that draws has besides."""
    name = plan.model.name
    return [] if not plan.model.draws else [
        f"/* How {name}_pick picks from now on (null: the likeliest): temperature 0 .. {MAX_TEMPERATURE:g}, top_k",
        f"   1 .. {plan.model.candidates}, top_p above 0 and at most 1, min_p 0 .. 1. */",
        f"int {name}_sampling({name}_model *model, const sapper_model_sampling *how);",
        "/* The token that comes next; each call draws anew. */",
        f"int32_t {name}_pick({name}_model *model);",
    ]


def _words_lines(plan: Plan[Model]) -> list[str]:
    """What a model with a tokenizer has besides."""
    if plan.words is None:
        return []
    name = plan.model.name
    return [
        f"/* The tokens of a text of at most {plan.text_bytes} bytes of UTF-8, and their number; -1: it is longer, or",
        "   there is no room for so many. Names of control tokens in it are plain text. */",
        f"int64_t {name}_encode({name}_model *model, const char *text, int64_t bytes, int32_t *tokens, int64_t room);",
        "/* The bytes of a token, not terminated, and their number; none for one that stands for no text. */",
        f"const char *{name}_text(const {name}_model *model, int32_t token, int64_t *bytes);",
    ]
