"""`sapper train`: what it writes and says, and what it refuses."""

import json
from pathlib import Path

import pytest

from sapper.cli.main import main
from tests.models import small

QUICK = ["--steps", "4", "--length", "16", "--sequences", "2", "--rate", "0.003", "--warmup", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_gguf(tmp_path_factory.mktemp("train") / "small.gguf", small.random_weights())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("hello world " * 60)
    return path


def test_a_model_and_its_figures(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And one that goes on from a saved step is the same."""
    out = tmp_path / "out"
    arguments = ["train", str(model), str(text), *QUICK, "--validate", str(text), "--json"]
    assert main([*arguments, "-o", str(out), "--save-every", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["validation_after"] < facts["validation_before"] and facts["done_before"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.step-2"]
    arguments[1] = str(tmp_path / "out.step-2")
    assert main([*arguments, "-o", str(tmp_path / "again"), "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["last_loss"], again["validation_after"]) == (facts["last_loss"], facts["validation_after"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert again["done_before"] == 2 and weights[0] == weights[1]
    assert main(["generate", str(out), "-p", "hello", "--raw", "--tokens", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) <= 3


def test_the_summary(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(model), str(text), "-o", str(tmp_path / "out"), *QUICK]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "out: 4 steps of 2 x 16 tokens, loss " in printed.out
    assert "step 4 of 4: loss " in printed.err
    assert main(arguments) == 1
    assert "found something that is there; expected a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["--validate", "nowhere.txt"], 1, "nowhere.txt: found No such file"),
    (["--length", "97"], 1, "found 97; expected 1 to 96"),
    (["--length", "96", "--validate", "SHORT"], 1, "the text: found "),
    (["--resume"], 1, "training.safetensors: found nothing"),
    (["--steps", "0"], 2, "greater than or equal to 1"),
])
def test_refusals(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int,
    message: str,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("hello")
    given = [str(short) if argument == "SHORT" else argument for argument in arguments]
    assert main(["train", str(model), str(text), "-o", str(tmp_path / "out"), *QUICK, *given]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
