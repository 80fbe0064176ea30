"""Tokenizers, the text stream and chat templates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.models.chat import render
from sapper.models.errors import ModelError
from sapper.models.gguf_file import GgufFile
from sapper.models.tokenizer import TextStream, Tokenizer, byte_characters, from_directory, from_gguf
from tests.weights import find_smollm2

from . import small

DATA = Path(__file__).parent / "data" / "smollm2.json"


def byte_level(**changes: Any) -> Tokenizer:
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": small.TOKENS,
        "tokenizer.ggml.token_type": small.KINDS, "tokenizer.ggml.merges": small.PAIRS,
        "tokenizer.ggml.eos_token_id": small.VOCABULARY - 1, "tokenizer.chat_template": small.TEMPLATE,
    }
    metadata.update(changes)
    return from_gguf({key: value for key, value in metadata.items() if value is not None}, "test")


PIECES = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)],
          "\u2581", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "\u2581hell", "\u2581hello", "\u2581w", "or",
          "ld"]
PIECE_KINDS = [2, 3, 3, *[6] * 256, *[1] * 16]
SCORES = [0.0] * 259 + [float(-i) for i in range(16)]


def sentence_piece(**changes: Any) -> Tokenizer:
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES, "tokenizer.ggml.token_type": PIECE_KINDS,
        "tokenizer.ggml.scores": SCORES, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return from_gguf({**metadata, **changes}, "test")


def test_the_byte_table_is_a_bijection_over_printable_characters() -> None:
    table = byte_characters()
    assert sorted(table.values()) == list(range(256))
    assert all(character.isprintable() and not character.isspace() for character in table)
    assert table["A"] == 65 and table["\u0120"] == 32 and table["\u010a"] == 10


def test_byte_level_merges() -> None:
    tokenizer = byte_level()
    assert [tokenizer.token_text(t) for t in tokenizer.encode("hello world")] == ["hello", "\u0120world"]
    assert [tokenizer.token_text(t) for t in tokenizer.encode("hell<|im_end|>o")] == ["hell", "<|im_end|>", "o"]
    assert tokenizer.decode(tokenizer.encode("hell<|im_end|>o")) == "hello"
    assert tokenizer.stops == {small.VOCABULARY - 1}


@pytest.mark.parametrize("text", ["", " ", "hello  world\n", "naïve 日本語 🙂", "a\x00b", "'ll 12345", "\t \r\n"])
def test_text_comes_back(text: str) -> None:
    assert byte_level().decode(byte_level().encode(text)) == text
    assert sentence_piece().decode(sentence_piece().encode(text)) == (" " + text if text else "")


def test_a_lone_surrogate_is_no_error() -> None:
    assert byte_level().decode(byte_level().encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize(("pre", "text", "words"), [
    ("gpt-2", "it's 1234  x", ["it", "'s", " 1234", " ", " x"]),
    ("smollm", "it's 1234  x", ["it", "'s", " ", "1", "2", "3", "4", " ", " x"]),
    ("llama-bpe", "IT'S 12345\n\n x", ["IT", "'S", " ", "123", "45", "\n\n", " x"]),
    ("qwen2", "IT'S 123\n x", ["IT", "'S", " ", "1", "2", "3", "\n", " x"]),
    ("deepseek-llm", "it's 12 \u0645\u0631  日本.x \u00e9!  \n", [
        "it", "'", "s", " ", "1", "2", " \u0645\u0631  ", "日本", ".", "x", " \u00e9", "!", "  ", "\n"]),
    ("deepseek-coder", "it's 12 \u0645\u0631  日本+x!\n", [
        "it", "'", "s", " ", "1", "2", " \u0645\u0631", " ", " ", "日本", "+", "x", "!", "\n"]),
    ("deepseek-v3", "is 1234 日本.x  \\y!\n", ["is", " ", "123", "4", " ", "日本", ".x", " ", " \\", "y", "!\n"]),
])
def test_words_are_cut_as_the_vocabulary_wants(pre: str, text: str, words: list[str]) -> None:
    cut = byte_level(**{"tokenizer.ggml.pre": pre}).inner.pre_tokenizer.pre_tokenize_str(text)
    table = byte_characters()
    assert [bytes(table[c] for c in piece).decode() for piece, _ in cut] == words


def test_many_spaces_take_no_longer_than_their_number(tmp_path: Path) -> None:
    """A pattern that looks through all of them from each one would take minutes."""
    text = " " * 50_000 + "1"
    assert len(byte_level(**{"tokenizer.ggml.pre": "deepseek-llm"}).encode(text)) == len(text)
    small.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    source = json.loads(path.read_text())
    source["pre_tokenizer"]["pretokenizers"].insert(0, {
        "type": "Split", "pattern": {"Regex": r"\s+$"}, "behavior": "Isolated", "invert": False})
    path.write_text(json.dumps(source))
    assert len(from_directory(tmp_path).encode(text)) == len(text)


def test_begin_is_put_in_front_once() -> None:
    tokenizer = sentence_piece()
    assert tokenizer.encode("he")[:1] == [1]
    assert tokenizer.encode("<s>he").count(1) == 1
    assert 1 not in tokenizer.encode("he", add_begin=False)
    assert byte_level().add_begin is False
    assert byte_level(**{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 7}).encode("he")[0] == 7


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = sentence_piece()
    assert [tokenizer.token_text(t) for t in tokenizer.encode("hello", add_begin=False)] == ["\u2581hello"]
    tokens = tokenizer.encode("é", add_begin=False)
    assert [tokenizer.token_text(t) for t in tokens] == ["\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokens) == " é"
    bare = sentence_piece(**{"tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare.encode("hello")) == "hello"


def test_the_stream_holds_back_parts_of_a_character() -> None:
    tokenizer = byte_level()
    stream = TextStream(tokenizer)
    tokens = tokenizer.encode("é🙂!")
    assert [stream.push(token) for token in tokens] == ["", "é", "", "", "", "🙂", "!"]
    assert stream.finish() == ""
    for token in tokens[2:5]:
        assert stream.push(token) == ""
    assert stream.finish() == "\ufffd"


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer.ggml.tokens": None}, "no list of strings"),
    ({"tokenizer.ggml.tokens": []}, "no list of strings"),
    ({"tokenizer.ggml.tokens": [1, 2]}, "no list of strings"),
    ({"tokenizer.ggml.token_type": [1]}, "number of kinds"),
    ({"tokenizer.ggml.merges": None}, "no list of pairs"),
    ({"tokenizer.ggml.merges": ["ab"]}, "no list of pairs"),
    ({"tokenizer.ggml.merges": ["h zz"]}, "the tokenizer"),
    ({"tokenizer.ggml.pre": 5}, "ggml.pre"),
    ({"tokenizer.ggml.model": "unigram"}, "'gpt2' or 'llama'"),
    ({"tokenizer.ggml.eos_token_id": -1}, "a token's number"),
    ({"tokenizer.ggml.bos_token_id": "x"}, "a token's number"),
    ({"tokenizer.ggml.tokens": ["\udcff", *small.TOKENS[1:]]}, "the tokenizer"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_broken_vocabularies_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        byte_level(**changes)


def test_sentence_piece_needs_scores() -> None:
    with pytest.raises(ModelError, match="no list of scores"):
        sentence_piece(**{"tokenizer.ggml.scores": [1.0]})


def test_of_several_chat_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    path = small.write_directory(tmp_path / "c", small.random_weights())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "T{{ messages[0].content }}"}]
    for templates, text in ((named, "Thi"), (named[:1], None), ([5, {}], None)):
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
        tokenizer = from_directory(path)
        assert bool(tokenizer.chat_template) == (text is not None)
        assert text is None or render(tokenizer, [{"role": "user", "content": "hi"}]) == text


def test_a_directory_says_how_text_begins_and_ends(tmp_path: Path) -> None:
    path = small.write_directory(tmp_path / "c", small.random_weights())
    (path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": {"content": "<|start|>"}, "eos_token": "<|im_end|>", "add_bos_token": True}
    ))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, small.VOCABULARY - 1]}))
    (path / "chat_template.jinja").write_text("T{{ messages[0].content }}")
    tokenizer = from_directory(path)
    assert tokenizer.encode("he")[0] == tokenizer.begin == small.VOCABULARY - 2
    assert tokenizer.stops == {3, small.VOCABULARY - 1}
    assert render(tokenizer, [{"role": "user", "content": "x"}]) == "Tx"


def test_a_text_that_the_vocabulary_has_no_token_for_is_told(tmp_path: Path) -> None:
    path = small.write_directory(tmp_path / "c", small.random_weights())
    source = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**source, "model": {"type": "Unigram", "vocab": [["a", 0.0]]}}))
    with pytest.raises(ModelError, match=r"the tokenizer: found Encountered an unknown token.*expected tokens for any"):
        from_directory(path).encode("hello")


# ---- chat templates


def test_messages_are_rendered() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "{{ 1 + 1 }}"}]
    assert render(byte_level(), messages) == "<|start|>system: s<|im_end|><|start|>user: {{ 1 + 1 }}<|im_end|><|start|>"


THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages[::-1] %}
    {%- set tool = m.content.startswith('<tool>') and m.content.endswith('</tool>') %}
    {%- if ns.last < 0 and m.role == "user" and not tool %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.content is string %}{%- set content = m.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if m.role == "assistant" %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
"""Does what templates of models that think do (Qwen3): of answers before the last question only the answer is said."""


def test_thoughts_of_earlier_answers_are_left_out() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
                {"role": "user", "content": "c"}]
    tokenizer = byte_level(**{"tokenizer.chat_template": THINKING})
    said = "<|start|>user\na<|im_end|>\n<|start|>assistant\n{}b<|im_end|>\n"
    assert render(tokenizer, messages) == (
        said.format("") + "<|start|>user\nc<|im_end|>\n<|start|>assistant\n")
    assert render(tokenizer, messages[:2], False) == said.format("<think>\nhm\n</think>\n\n")


@pytest.mark.parametrize(("template", "message"), [
    ("", "no chat template"),
    ("{{ raise_exception('only user') }}", "only user"),
    ("{% for", "TemplateSyntaxError"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{% for i in range(10000000) %}x{% endfor %}", "OverflowError"),
])
def test_bad_templates_are_refused(template: str, message: str) -> None:
    tokenizer = byte_level(**{"tokenizer.chat_template": template})
    with pytest.raises(ModelError, match=message):
        render(tokenizer, [{"role": "user", "content": "x"}])


# ---- the real vocabulary


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    path = find_smollm2()
    return from_gguf(GgufFile(path).metadata, "smollm2")


def test_smollm2_gives_the_tokens_that_llama_cpp_gives(smollm2: Tokenizer) -> None:
    recorded = json.loads(DATA.read_text())
    for text, tokens in recorded["tokenized"]:
        assert smollm2.encode(text) == tokens, text
    for run in recorded["runs"]:
        text = render(smollm2, [{"role": "user", "content": run["prompt"]}])
        assert text == recorded["before"] + run["prompt"] + recorded["after"]
        assert smollm2.encode(text) == run["tokens"]


def test_smollm2_any_text_comes_back(smollm2: Tokenizer) -> None:
    random = np.random.default_rng(5)
    for _ in range(200):
        points = random.choice([9, 10, 32, 39, 65, 97, 0xE9, 0x3B1, 0x65E5, 0x1F642, 0x200D, 0x1F469], 20)
        text = "".join(map(chr, points))
        tokens = smollm2.encode(text)
        assert smollm2.decode(tokens) == text
        stream = TextStream(smollm2)
        assert "".join([stream.push(token) for token in tokens]) + stream.finish() == text
