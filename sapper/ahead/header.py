"""The C header of a model's library: text that C99 and C++ take, with nothing but <stdint.h>."""

from __future__ import annotations

import re

from ..codegen.c_abi import needed_features
from ..targets import module_of
from .draw import MAX_TEMPERATURE
from .entry import MOST_THREADS, STATUS
from .plan import Plan


def header_text(plan: Plan) -> str:
    """The header of a planned model."""
    model = plan.model
    name, upper = model.name, model.name.upper()
    system = module_of(plan.target.family, "system").SYSTEM
    guard = re.sub(r"\W", "_", f"sapper_{name}_h").upper()
    lines = [
        f"/* {name}: a language model. Made by sapper for {plan.target.name}; needs no Python and no C library.",
        f"   {model.description.replace('*/', '* /')}",
        "   Features that the processor must have (else SAPPER_MODEL_BAD_CPU):",
        f"   {' '.join(sorted(needed_features(plan.target.features, (code.machine for code in plan.codes))))}.",
        f"   Linux on {system.name}; a model is used by one thread at a time. */",
        f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "",
        "#ifndef SAPPER_MODEL_STATUS", "#define SAPPER_MODEL_STATUS", "enum sapper_model_status {",
        *(f"    SAPPER_MODEL_{status} = {number}, /* {meaning} */" for status, (number, meaning) in STATUS.items()),
        "};", "#endif", "",
        *(_SAMPLING if model.draws else ()),
        f"#define {upper}_VOCABULARY {model.vocabulary}",
        f"#define {upper}_CONTEXT {model.context} /* tokens that a conversation may have */",
        f"#define {upper}_WEIGHTS_BYTES INT64_C({plan.weights_bytes})", "",
        "#ifdef __cplusplus", 'extern "C" {', "#endif", "",
        f"typedef struct {name}_model {name}_model;", "",
        f"/* Map and check the weights, start threads - 1 workers (threads: 1 .. {MOST_THREADS}). Returns a",
        "   sapper_model_status; *model is set where it is SAPPER_MODEL_OK. */",
        f"int {name}_open(const char *weights, int64_t threads, {name}_model **model);",
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
        "/* End the workers, free all memory. Null is allowed. */",
        f"void {name}_close({name}_model *model);", "",
        "#ifdef __cplusplus", "}", "#endif", "", f"#endif /* {guard} */",
    ]
    return "\n".join(lines) + "\n"


_SAMPLING = (
    "#ifndef SAPPER_MODEL_SAMPLING", "#define SAPPER_MODEL_SAMPLING",
    "/* How a token is drawn: of the top_k likeliest the fewest whose probabilities reach top_p, of these the ones",
    "   with min_p of the likeliest's or more, by their probabilities at that temperature. */",
    "typedef struct sapper_model_sampling {",
    "    float temperature; /* 0: the likeliest */",
    "    int32_t top_k;", "    float top_p, min_p;", "    uint64_t seed;",
    "} sapper_model_sampling;", "#endif", "",
)


def _drawing_lines(plan: Plan) -> list[str]:
    """What a model that draws has besides."""
    name = plan.model.name
    return [] if not plan.model.draws else [
        f"/* How {name}_pick picks from now on (null: the likeliest): temperature 0 .. {MAX_TEMPERATURE:g}, top_k",
        f"   1 .. {plan.model.candidates}, top_p above 0 and at most 1, min_p 0 .. 1. */",
        f"int {name}_sampling({name}_model *model, const sapper_model_sampling *how);",
        "/* The token that comes next; each call draws anew. */",
        f"int32_t {name}_pick({name}_model *model);",
    ]


def _words_lines(plan: Plan) -> list[str]:
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
