"""A tokenizer as what sapper/ahead makes tables of.

In: a `Tokenizer`. Out: an `ahead.Vocabulary`. Holds: for any text without the name of a control token in it, the tables
give the tokens that the tokenizer gives; what they can't express is refused.
"""

from __future__ import annotations

import json
from typing import Any

from ..ahead.words import Frame, Vocabulary
from .chat import render
from .errors import ModelError
from .tokenizer import GPT2_SPLIT, Tokenizer, byte_characters

_MESSAGE = "sapper"


def vocabulary_of(tokenizer: Tokenizer, size: int, chats: bool = True) -> Vocabulary:
    """size: tokens of the model, of which the tokenizer may have fewer. chats: with what is around a user's message.
    Raises ModelError for a tokenizer that is no byte-level BPE, or does more to a text than to cut and to merge."""
    facts = json.loads(tokenizer.inner.to_str())
    model = facts["model"]
    if not tokenizer.byte_level or model["type"] != "BPE":
        raise _refusal("no byte-level BPE")
    if facts["normalizer"] is not None:
        raise _refusal(f"the normalizer {facts['normalizer'].get('type')}")
    ids: dict[str, int] = model["vocab"]
    bytes_of = byte_characters()
    merges = []
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        merges.append((ids[left], ids[right], ids[left + right]))
    return Vocabulary(
        texts=[tokenizer.token_bytes(token) for token in range(size)],
        byte_tokens=[ids.get(c) for c, _ in sorted(bytes_of.items(), key=lambda item: item[1])],
        merges=merges,
        patterns=_patterns(facts["pre_tokenizer"]),
        whole_words=sorted(ids.values()) if model.get("ignore_merges") else (),
        begin=[tokenizer.begin] if tokenizer.add_begin and tokenizer.begin is not None else [],
        stops=sorted(tokenizer.stops),
        frame=_frame(tokenizer) if chats else Frame(),
    )


def _refusal(found: str) -> ModelError:
    return ModelError("the tokenizer", found, "byte-level BPE without a normalizer, which can be built in",
                      "build a library (-o model.so), and give it tokens")


def _patterns(step: Any) -> list[str]:
    """The patterns of a pre-tokenizer of tokenizer.json, in order."""
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [pattern for part in step["pretokenizers"] for pattern in _patterns(part)]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2_SPLIT] if step["use_regex"] else []
    if kind == "Digits" and step["individual_digits"]:
        return [r"\p{N}"]
    if kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated" and not step["invert"]:
        return [step["pattern"]["Regex"]]
    raise _refusal(f"the pre-tokenizer {json.dumps(step)[:120]}")


def _frame(tokenizer: Tokenizer) -> Frame:
    """What the chat template puts around a message; nothing but BOS where there is no template."""
    if not tokenizer.chat_template:
        return Frame(prefix=tokenizer.encode(""))
    spaced = f" \n{_MESSAGE} \n"
    text = render(tokenizer, [{"role": "user", "content": spaced}])
    message = spaced if spaced in text else _MESSAGE
    before, found, after = text.partition(message)
    if not found or message in after:
        raise ModelError("the chat template", "a message changed, or twice", "each message once, as it is",
                         "build a library (-o model.so), and give it tokens")
    names = [token.content for token in tokenizer.inner.get_added_tokens_decoder().values()]
    head = max((before.rfind(name) + len(name) for name in names if name in before), default=0)
    tail = min((after.find(name) for name in names if name in after), default=len(after))
    return Frame(tokenizer.encode(before[:head]), before[head:].encode(), after[:tail].encode(),
                 tokenizer.encode(after[tail:], add_begin=False) if after[tail:] else (), message is _MESSAGE)
