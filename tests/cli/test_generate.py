"""`run_generate`: what it prints, and that it answers mistakes with a status instead of an exception."""

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType

import pytest

from sapper.cli.generate import INTERRUPTED, REFUSED, run_generate
from sapper.models.llama.session import Session


def _small() -> ModuleType:
    """tests/models/small.py, which belongs to another test package."""
    path = Path(__file__).parents[1] / "models" / "small.py"
    spec = importlib.util.spec_from_file_location("small_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small = _small()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.write_gguf(tmp_path_factory.mktemp("cli") / "small.gguf", small.random_weights()))


def run(model: str, prompt: str = "hello", tokens: int = 4, **options) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    status = run_generate(model, prompt, tokens, interpret=True, out=out, err=err, **options)
    return status, out.getvalue(), err.getvalue()


def test_text_goes_to_stdout_and_speeds_to_stderr(model: str) -> None:
    status, out, err = run(model)
    assert status == 0
    assert out.endswith("\n")
    assert "prompt tokens at" in err and "tokens/s" in err and "(stopped: " in err


def test_a_single_token_has_no_speed(model: str) -> None:
    _, _, err = run(model, tokens=1)
    assert ", 1 token (stopped: length" in err


def test_json_is_one_object(model: str) -> None:
    status, out, err = run(model, json=True, raw=True)
    result = json.loads(out)
    assert status == 0 and err == ""
    assert list(result) == ["model", "prompt", "text", "tokens", "prompt_tokens", "stop", "load_s",
                            "prefill_tokens_per_s", "decode_tokens_per_s"]
    assert result["prompt_tokens"] == 1
    assert 1 <= len(result["tokens"]) <= 4
    assert result["stop"] in ("length", "end")
    again = json.loads(run(model, json=True, raw=True)[1])
    assert again["text"] == result["text"] and again["tokens"] == result["tokens"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": "/nowhere.gguf"}, "/nowhere.gguf: found nothing"), ({"tokens": 0}, "at least 1"),
    ({"dtype": "f64"}, "dtype of the weights"), ({"temperature": -1.0}, "temperature"),
    ({"prompt": "", "raw": True}, "the tokens: found none"), ({"prompt": "x" * 500}, "the prompt: found"),
    ({"system": "Be brief.", "raw": True}, "--system: found --raw"),
])
def test_mistakes_are_told(model: str, changes: dict, message: str) -> None:
    status, out, err = run(**{"model": model, **changes})
    assert status == REFUSED
    assert out == ""
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_there_is(model: str, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    feed = Session.feed

    def interrupted(self: Session, tokens) -> None:
        if self.position > 20:
            raise KeyboardInterrupt
        feed(self, tokens)

    monkeypatch.setattr(Session, "feed", interrupted)
    status, out, err = run(model, "x" * 10, tokens=60, json=as_json, temperature=3.0, top_k=200)
    assert status == INTERRUPTED
    assert (json.loads(out)["stop"] if as_json else err.split("stopped: ")[1].split(";")[0]) == "interrupted"
