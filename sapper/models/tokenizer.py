"""Text to tokens and back, built on the `tokenizers` library from a GGUF's metadata or a checkpoint's tokenizer.json.

In: metadata or a directory. Out: `Tokenizer` (encode, token_bytes, stop tokens) and `TextStream`, which turns tokens
into text as they come. Holds: a token's bytes are known by themselves, so text may be cut between any two tokens; a
character whose bytes come in several tokens is held back until it is whole.

Two families: byte-level BPE (GPT-2, Llama 3, SmolLM: each byte is written as a printable character, so pieces are
text), and SentencePiece BPE (Llama 2: a space is written as U+2581, a byte outside the vocabulary as <0x41>).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from .errors import ModelError
from .safetensors_file import read_json

SPACE_MARK = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of token in tokenizer.ggml.token_type."""

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = CL100K_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
DIGIT_SPLIT = r"\p{N}"
CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""What the pre_tokenizer of DeepSeek-V2's tokenizer.json takes for letters: those with two cases, of some scripts."""
LAST_SPACES, LAST_SPACES_ONCE = r"\s+$", r"(?<!\s)\s+$"
"""The same, but that the second is tried at the first of a run of spaces only: the first looks through the whole run
from each of them, which for a prompt of a MiB takes hours."""
DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_SPLITS = (
    "[\r\n]", rf"\s?[{CASED_LETTERS}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    LAST_SPACES_ONCE, DEEPSEEK_HAN, DIGIT_SPLIT,
)
"""Of DeepSeek-LLM, V2 and V2-Lite, whose files of GGUF name the first."""
DEEPSEEK_CODER_SPLITS = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_HAN, DIGIT_SPLIT)
DEEPSEEK3_SPLITS = (
    r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""As in the pre_tokenizer of DeepSeek-V3's tokenizer.json, and in llama.cpp's list for that name."""
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (GPT2_SPLIT,), "gpt-2": (GPT2_SPLIT,),
    "smollm": (DIGIT_SPLIT, GPT2_SPLIT), "starcoder": (DIGIT_SPLIT, GPT2_SPLIT),
    "llama-bpe": (CL100K_SPLIT,), "llama3": (CL100K_SPLIT,), "llama-v3": (CL100K_SPLIT,),
    "qwen2": (QWEN2_SPLIT,), "deepseek-r1-qwen": (QWEN2_SPLIT,),
    "deepseek-llm": DEEPSEEK_SPLITS, "deepseek-coder": DEEPSEEK_CODER_SPLITS, "deepseek-v3": DEEPSEEK3_SPLITS,
}
"""tokenizer.ggml.pre -> the patterns that cut text into words, one applied to the pieces of the other."""
WHOLE_WORDS_FIRST = frozenset(("llama-bpe", "llama3", "llama-v3"))
"""Vocabularies in which a word that is a token is that token, whatever the merges say; these begin text with BOS."""

STOP_NAMES = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<end_of_turn>",
     "<EOT>", "<|EOT|>")
)  # fmt: skip


def byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE -> the byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = byte_characters()


class Tokenizer:
    """Encodes and decodes.

    inner: the `tokenizers.Tokenizer`. byte_level: which family. control: ids that stand for no text. begin, end: ids of
    BOS and EOS or None. add_begin: whether text begins with BOS. stops: ids after which generation ends.
    chat_template: Jinja source or "".
    """

    def __init__(
        self, inner: Any, *, byte_level: bool, control: frozenset[int], begin: int | None, end: int | None,
        add_begin: bool, stops: frozenset[int], chat_template: str,
    ) -> None:
        self.inner = inner
        self.byte_level = byte_level
        self.control = control
        self.begin = begin
        self.end = end
        self.add_begin = add_begin
        self.stops = stops
        self.chat_template = chat_template
        self.size: int = inner.get_vocab_size()
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_begin: bool | None = None) -> list[int]:
        """The tokens of a text; names of control tokens in it become these tokens.

        add_begin: put BOS in front (None: as the model wants it), unless the text begins with it already. Raises
        ModelError where the vocabulary has no token for a part of the text, nor for what is unknown.
        """
        clean = text.encode("utf-8", "replace").decode("utf-8")  # A lone surrogate has no bytes.
        try:
            tokens: list[int] = self.inner.encode(clean, add_special_tokens=False).ids
        except Exception as error:  # The library raises bare Exceptions.
            raise ModelError("the tokenizer", f"{error}"[:200], "tokens for any text") from None
        wanted = self.add_begin if add_begin is None else add_begin
        if wanted and self.begin is not None and tokens[:1] != [self.begin]:
            tokens = [self.begin, *tokens]
        return tokens

    def token_text(self, token: int) -> str:
        """The token as the vocabulary writes it; "" for one that it does not have."""
        return self.inner.id_to_token(token) or ""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of UTF-8 text that a token stands for; none for control tokens."""
        found = self._bytes.get(token)
        if found is None:  # kept, as it takes some 5 us to tell, of each token of each sequence
            found = self._bytes[token] = self._bytes_of(token)
        return found

    def _bytes_of(self, token: int) -> bytes:
        if token in self.control:
            return b""
        piece = self.token_text(token)
        if self.byte_level:
            if all(character in _BYTE_OF for character in piece):
                return bytes(_BYTE_OF[character] for character in piece)
            return piece.encode("utf-8", "replace")
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass  # Not a byte after all: an ordinary piece that looks like one.
        return piece.replace(SPACE_MARK, " ").encode("utf-8", "replace")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(token) for token in tokens).decode("utf-8", "replace")


class TextStream:
    """Tokens in, text out, whole characters only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, "" if its bytes end within a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left: U+FFFD if the tokens ended within a character."""
        return self._decoder.decode(b"", True)


def from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer in a GGUF's metadata. Raises ModelError if it is missing, broken or of an unknown kind."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or set(map(type, tokens)) != {str}:
        raise ModelError(f"{where}, key tokenizer.ggml.tokens", "no list of strings", "the vocabulary")
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(f"{where}, key tokenizer.ggml.token_type", "another number of kinds", f"{len(tokens)} kinds")
    try:
        if model == "gpt2":
            inner, begins = _byte_level(metadata, where, tokens)
        elif model == "llama":
            inner, begins = _sentence_piece(metadata, where, tokens, kinds)
        else:
            raise ModelError(f"{where}, key tokenizer.ggml.model", repr(model)[:80], "'gpt2' or 'llama'")
        _add_tokens(inner, tokens, kinds)
    except ModelError:
        raise
    except Exception as error:  # The library raises bare Exceptions for merges and pieces that do not fit.
        raise ModelError(f"{where}, the tokenizer", f"{error}"[:200], "a vocabulary and merges that fit") from None

    def token_id(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None or (type(value) is int and value == 0xFFFFFFFF):
            return None
        if type(value) is not int or not 0 <= value < len(tokens):
            raise ModelError(f"{where}, key tokenizer.ggml.{key}_token_id", repr(value)[:80], "a token's number")
        return value

    control = frozenset(_places(kinds, CONTROL) + _places(kinds, UNKNOWN))
    stops = {token_id("eos"), token_id("eot"), token_id("eom")} | {i for i in control if tokens[i] in STOP_NAMES}
    template = metadata.get("tokenizer.chat_template", "")
    return Tokenizer(
        inner, byte_level=model == "gpt2", control=control, begin=token_id("bos"), end=token_id("eos"),
        add_begin=bool(metadata.get("tokenizer.ggml.add_bos_token", begins)),
        stops=frozenset(i for i in stops if i is not None), chat_template=template if isinstance(template, str) else "",
    )


def _places(kinds: list[int], kind: int) -> list[int]:
    """Which tokens are of a kind; found without looking at each of 100 000 in Python."""
    found = []
    at = -1
    for _ in range(kinds.count(kind)):
        at = kinds.index(kind, at + 1)
        found.append(at)
    return found


def _numbers(tokens: list[str]) -> dict[str, int]:
    """Token -> its number, the lowest where one occurs twice."""
    return dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))


def _add_tokens(inner: Any, tokens: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken

    control = [AddedToken(tokens[i], special=True, normalized=False) for i in _places(kinds, CONTROL)]
    user = [AddedToken(tokens[i], normalized=False) for i in _places(kinds, USER_DEFINED)]
    inner.add_special_tokens(control)
    inner.add_tokens(user)


def _byte_level(metadata: Mapping[str, Any], where: str, tokens: list[str]) -> tuple[Any, bool]:
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    merges = metadata.get("tokenizer.ggml.merges")
    strings = isinstance(merges, list) and set(map(type, merges)) <= {str}
    if not isinstance(merges, list) or not strings or not set(map(str.count, merges, repeat(" "))) <= {1}:
        raise ModelError(f"{where}, key tokenizer.ggml.merges", "no list of pairs", "merges such as 'a b'")
    kind = metadata.get("tokenizer.ggml.pre", "default")
    if kind not in SPLITS:
        raise ModelError(f"{where}, key tokenizer.ggml.pre", repr(kind)[:80], f"one of {', '.join(SPLITS)}")
    halves = " ".join(merges).split(" ") if merges else []
    pairs = list(zip(halves[::2], halves[1::2], strict=True))
    inner = Inner(models.BPE(vocab=_numbers(tokens), merges=pairs, ignore_merges=kind in WHOLE_WORDS_FIRST))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[kind]]
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return inner, kind in WHOLE_WORDS_FIRST


def _sentence_piece(
    metadata: Mapping[str, Any], where: str, tokens: list[str], kinds: list[int]
) -> tuple[Any, bool]:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(type(s) is float for s in scores):
        raise ModelError(f"{where}, key tokenizer.ggml.scores", "no list of scores", f"{len(tokens)} numbers")
    vocabulary = _numbers(tokens)
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind not in (NORMAL, UNUSED):
            continue
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-score, left, right, (token[:cut], token[cut:])))
    merges.sort()
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary, merges=[pair for *_, pair in merges], unk_token=unknown, fuse_unk=True,
        byte_fallback="<0x0A>" in vocabulary,
    )
    inner = Inner(model)
    replace = normalizers.Replace(" ", SPACE_MARK)
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), replace])
    else:
        inner.normalizer = replace
    return inner, True


def _try_spaces_once(step: Any) -> None:
    """In the pre_tokenizer of a tokenizer.json."""
    if isinstance(step, dict):
        if step.get("pattern") == {"Regex": LAST_SPACES}:
            step["pattern"] = {"Regex": LAST_SPACES_ONCE}
        parts = step.get("pretokenizers")
        for part in parts if isinstance(parts, list) else ():
            _try_spaces_once(part)


def from_directory(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint: tokenizer.json, and if they are there tokenizer_config.json,
    generation_config.json and chat_template.jinja. Raises ModelError.
    """
    from tokenizers import Tokenizer as Inner

    source = read_json(path / "tokenizer.json")
    _try_spaces_once(source.get("pre_tokenizer"))
    try:
        inner = Inner.from_str(json.dumps(source))
    except Exception as error:  # The library raises bare Exceptions.
        raise ModelError(path / "tokenizer.json", f"{error}"[:200], "a tokenizer") from None
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").exists() else {}
    template = settings.get("chat_template", "")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default", "")
    if (path / "chat_template.jinja").exists():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")

    def token_id(key: str) -> int | None:
        value = settings.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        found: int | None = inner.token_to_id(name) if isinstance(name, str) else None
        return found

    added = inner.get_added_tokens_decoder()
    control = frozenset(i for i, token in added.items() if token.special)
    begin, end = token_id("bos_token"), token_id("eos_token")
    more = generation.get("eos_token_id", [])
    listed = more if isinstance(more, list) else [more]
    stops = {i for i in control if added[i].content in STOP_NAMES} | {i for i in listed if type(i) is int}
    begins = settings.get("add_bos_token")
    if not isinstance(begins, bool):  # Newer files leave it to the post-processor.
        begins = begin is not None and inner.encode("a").ids[:1] == [begin]
    return Tokenizer(
        inner, byte_level='"ByteLevel"' in json.dumps(source.get("decoder")), control=control, begin=begin, end=end,
        add_begin=begins, stops=frozenset(stops | ({end} if end is not None else set())),
        chat_template=template if isinstance(template, str) else "",
    )
