"""Text to tokens and back in machine code, against the tokenizer that a session uses."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.models.load import load_model
from sapper.models.tokenizer import Tokenizer
from tests.codegen.run_native import RUNNABLE
from tests.models.small import random_weights, write_gguf
from tests.strategies.amount import examples
from tests.weights import find_smollm2

from .built import build

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")
ALPHABET = st.characters(exclude_categories=("Cn", "Cs")) | st.sampled_from("hello world\n  '123<|>\u00e9\u4e2d")
CONTEXT = 96


class Words:
    """A built model's tokenizer, in this process."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.model = ctypes.c_void_p()
        self.library.model_text.restype = ctypes.POINTER(ctypes.c_char)
        self.library.model_encode.restype = ctypes.c_int64
        assert self.library.model_open(str(library.with_suffix(".weights")).encode(), 1, ctypes.byref(self.model)) == 0

    def encode(self, text: bytes, room: int = 4096) -> list[int] | None:
        tokens = (ctypes.c_int32 * room)()
        count = self.library.model_encode(self.model, text, ctypes.c_int64(len(text)), tokens, ctypes.c_int64(room))
        return None if count < 0 else list(tokens[:count])

    def text(self, token: int) -> bytes:
        count = ctypes.c_int64(-1)
        found = self.library.model_text(self.model, token, ctypes.byref(count))
        return found[: count.value] if count.value else b""


def made(directory: Path, strings: dict[str, str]) -> tuple[Words, Tokenizer]:
    path = write_gguf(directory / "small.gguf", random_weights(), strings=strings)
    build(path, directory / "model.so")
    return Words(directory / "model.so"), load_model(path).tokenizer


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe"])
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Words, Tokenizer]:
    return made(tmp_path_factory.mktemp(request.param), {"tokenizer.ggml.pre": request.param})


@settings(max_examples=examples(100))
@given(text=st.text(ALPHABET, max_size=60))
def test_tokens_are_those_of_the_tokenizer(words: tuple[Words, Tokenizer], text: str) -> None:
    built, tokenizer = words
    names = [t.content for t in tokenizer.inner.get_added_tokens_decoder().values()]
    if any(name in text for name in names):
        return
    tokens = built.encode(text.encode())
    assert tokens == tokenizer.encode(text, add_begin=False)
    assert b"".join(built.text(token) for token in tokens or []) == text.encode()


@settings(max_examples=examples(100))
@given(content=st.binary(max_size=40))
def test_any_bytes_come_back(words: tuple[Words, Tokenizer], content: bytes) -> None:
    """What is no UTF-8 has tokens too, those of its bytes."""
    tokens = words[0].encode(content)
    assert tokens is not None and b"".join(words[0].text(token) for token in tokens) == content


def test_limits(words: tuple[Words, Tokenizer]) -> None:
    built, tokenizer = words
    longest = b"world " * (16 * CONTEXT // 6)
    assert len(built.encode(longest) or []) > CONTEXT and built.encode(longest + b" " * 7) is None
    assert built.encode(b"hello world", 1) is None and built.encode(b"") == []
    for token in range(-1, tokenizer.size + 1):
        assert built.text(token) == (tokenizer.token_bytes(token) if 0 <= token < tokenizer.size else b"")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text", [
    "The quick brown fox jumps over the lazy dog.", "def f(x):\n    return x ** 2  # 1234567890\n",
    "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600!",
    "   spaces   and\ttabs \r\n\r\n", "it's they'LL don't '", "a" * 500,
    "\u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663",
])
def test_smollm2(text: str, smollm2: tuple[Words, Tokenizer]) -> None:
    built, tokenizer = smollm2
    assert built.encode(text.encode()) == tokenizer.encode(text)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Words, Tokenizer]:
    directory: Any = tmp_path_factory.mktemp("smollm2")
    tokenizer = load_model(find_smollm2()).tokenizer
    build("smollm2", directory / "model.so", context=64)
    return Words(directory / "model.so"), tokenizer
