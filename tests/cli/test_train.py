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


def test_adapters(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is learned, on the way and in the end; one that goes on is the same; commands answer with it, or with the
    model that has it in its matrices."""
    arguments = ["train", str(model), str(text), *QUICK, "--rate", "0.03", "--validate", str(text), "--json"]
    new = ["--lora", "4", "--adapt", "q_proj,down_proj"]
    assert main([*arguments, *new, "-o", str(tmp_path / "out"), "--save-every", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["validation_after"] < facts["validation_before"]
    assert (facts["rank"], facts["alpha"], facts["modules"]) == (4, 8.0, ["q_proj", "down_proj"])
    assert facts["trained"] == 2 * 4 * (64 + 64 + 64 + 96)
    going_on = ["--adapter", str(tmp_path / "out.step-2"), "--resume"]
    assert main([*arguments, *going_on, "-o", str(tmp_path / "again")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["done_before"], again["validation_after"]) == (2, facts["validation_after"])
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert main(["merge", str(model), str(tmp_path / "out"), "-o", str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matrices"] == 4
    perplexities = []
    for given in ([str(model)], [str(model), "--adapter", str(tmp_path / "out")], [str(tmp_path / "merged")]):
        assert main(["perplexity", given[0], str(text), *given[1:], "--context", "16", "--dtype", "f32", "--json"]) == 0
        perplexities.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert perplexities[1] < 0.9 * perplexities[0]
    assert perplexities[2] == pytest.approx(perplexities[1], rel=1e-6)
    given = ["--raw", "--tokens", "3", "--adapter", str(tmp_path / "out")]
    assert main(["generate", str(model), "-p", "hello", *given]) == 0
    assert main(["merge", str(model), str(tmp_path / "out"), "-o", str(tmp_path / "merged")]) == 1
    assert "found something that is there" in capsys.readouterr().err
    assert main(["generate", str(model), "-p", "hello", "--adapter", str(tmp_path)]) == 1
    assert "found no adapter_config.json; expected a directory with an adapter" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["--lora", "0"], 2, "greater than or equal to 1"),
    (["--lora", "5000"], 1, "the rank of adapters: found 5000; expected 1 to 4096"),
    (["--lora", "4", "--alpha", "0"], 1, "the alpha of adapters: found 0; expected a number above 0"),
    (["--lora", "4", "--adapt", "q_proj,qproj"], 1, "found 'qproj'; expected all, or some of q_proj, k_proj"),
    (["--alpha", "4"], 2, "--alpha: found no --lora; expected a rank with it"),
    (["--base", "bf16"], 2, "--base: found no --lora; expected a rank with it"),
    (["--lora", "4", "--base", "f16"], 2, "--base: found 'f16'; expected f32 or bf16"),
    (["--lora", "4", "--adapter", "x"], 2, "--lora: found --adapter, which has a rank; expected one of them"),
    (["--lora", "4", "--resume"], 2, "--resume: found a new adapter; expected --adapter and a directory that"),
    (["--lora", "4", "--balance", "0.1"], 1, "--balance: found adapters, beside which the choice of experts stays"),
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
