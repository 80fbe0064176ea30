"""One probe for each form of a PTX row that differs from the plainest one in a single modifier."""

from __future__ import annotations

from collections.abc import Iterator

from sapper.targets.ptx.instructions import TABLE
from sapper.targets.ptx.rows import Form, Operand, Row, write_line

REGISTERS = {1: ("pred", "%p"), 8: ("b16", "%h"), 16: ("b16", "%h"), 32: ("b32", "%r"), 64: ("b64", "%d")}
IMMEDIATES = {"setmaxnreg": "64", "cp.async.ca": "16", "cp.async.cg": "16", "lop3": "0xE8", "applypriority": "128",
              "discard": "128", "fence.proxy.tensormap": "128"}
"""Rows whose immediate must be a certain number."""
WHOLE = {
    "call": "(passed), probed, (passed)",
    "bar.red": "%r1, 0, %p1", "bar.red.pred": "%p2, 0, %p1", "elect": "%r1|%p1, %r3", "brx": "%r1, places",
}
"""Rows whose operands the notation does not determine."""


def variants(row: Row) -> Iterator[str]:
    """Mnemonics: the plainest one, and each that differs from it by one modifier."""
    base = [[] if optional else [row.words(part)[0] for part in together] for together, optional in row.parts]
    texts = {".".join([row.opcode, *(word for words in base for word in words)]): None}
    for place, (together, _) in enumerate(row.parts):
        for number, part in enumerate(together):
            for word in row.words(part):
                chosen = [row.words(other)[0] for other in together]
                chosen[number] = word
                words = [*base[:place], chosen, *base[place + 1:]]
                texts[".".join([row.opcode, *(word for some in words for word in some)])] = None
    yield from texts


def operand_text(row: Row, form: Form, operand: Operand, number: int) -> str | None:
    if operand.role == "i":
        return IMMEDIATES.get(row.name, "1" if row.name.startswith("wgmma.") and number < 6 else "0")
    if operand.role == "l":
        return "done"
    if operand.role == "m":
        if "tensor" in row.syntax and number == (1
                                                 if ".target." in row.syntax else 0) and "tensormap" not in row.syntax:
            return "[%d9, {" + ", ".join(f"%r{axis + 1}" for axis in range(int(form.get("dim")[0]))) + "}]"
        space = form.get("space")
        if space.startswith("param") and row.opcode == "ld":
            return "[argument]"
        if space.startswith("param"):
            return None
        return "[%r9]" if operand.type else "[%d9]"
    if operand.optional:
        hinted = "L2::cache_hint" in form and operand.type == "b64"
        masked = "multicast::cluster" in form and operand.type == "u16"
        return f"%{'d' if hinted else 'h'}8" if hinted or masked else None
    _, prefix = REGISTERS[operand.bits]
    if operand.count:
        return "{" + ", ".join(f"{prefix}{20 + 16 * number + part}" for part in range(operand.count)) + "}"
    if row.name.startswith("mbarrier.arrive") and number == 0 and form.get("space") == "shared::cluster":
        return "_"
    return f"{prefix}{number + 1}"


def probe(row: Row, form: Form) -> str | None:
    """A line of PTX, or None where no operand fits."""
    if row.name in WHOLE:
        return f"{form.mnemonic} {WHOLE[row.name]};"
    texts = [operand_text(row, form, operand, number) for number, operand in enumerate(form.operands)]
    if any(text is None and not operand.optional for text, operand in zip(texts, form.operands, strict=True)):
        return None
    return write_line(form, texts)


def module(level: str, version: tuple[int, int], forms: list[Form]) -> tuple[str, dict[int, str]]:
    """A PTX text with a probe of each form, in kernels of 64, and the mnemonic of each line."""
    lines = [f".version {version[0]}.{version[1]}", f".target {level}", ".address_size 64",
             ".func (.param .b32 result) probed(.param .b32 given) {", " ret;", "}"]
    told = {}
    for start in range(0, len(forms), 64):
        lines += [f".visible .entry probe_{start}(.param .align 16 .b8 argument[128])", "{", " .reg .pred %p<512>;",
                  " .reg .b16 %h<512>;", " .reg .b32 %r<512>;", " .reg .b64 %d<512>;",
                  " .param .b32 passed;", "places: .branchtargets done;"]
        for form in forms[start:start + 64]:
            line = probe(form.row, form)
            if line is not None:
                lines.append(" " + line)
                told[len(lines)] = form.mnemonic
        lines += ["done:", " ret;", "}"]
    return "\n".join(lines) + "\n", told


def forms() -> list[Form]:
    """All probed forms."""
    return [TABLE.form(text) for row in TABLE.rows.values() for text in variants(row)]
