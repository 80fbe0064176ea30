"""`sapper quantize`: what it writes and says, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapper.cli.main import main
from tests.models import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_gguf(tmp_path_factory.mktemp("quantize") / "small.gguf", small.random_weights())


def test_a_model_and_its_figures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 150)
    out = tmp_path / "out"
    assert main(["quantize", str(model), "-o", str(out), "--dtype", "int4", "--perplexity", str(text), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["matrices"] == 7 * small.LAYERS and 0.02 < facts["relative_error"] < 0.15
    assert facts["after_bytes"] < facts["before_bytes"] and sum(facts["forms"].values()) == facts["matrices"]
    assert facts["perplexity_after"] == pytest.approx(facts["perplexity_before"], rel=0.5)
    assert main(["generate", str(out), "-p", "hello", "--raw", "--tokens", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) <= 3


def test_the_summary(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(model), "-o", str(tmp_path / "out"), "--dtype", "int8", "--group", "32",
                 "--asymmetric"]
    assert main(arguments) == 0
    assert "14 of 21 tensors quantised (14 in q8m)" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "found something that is there; expected a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["--dtype", "int2"], 2, "found 'int2'; expected one of int4, int8"),
    (["--group", "48"], 2, "found 48; expected 32, 64 or 128"),
    (["--perplexity", "nowhere.txt"], 1, "nowhere.txt: found no file"),
])
def test_refusals(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(["quantize", str(model), "-o", str(tmp_path / "out"), *arguments]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    """Of a model that takes a while; the process has a directory of its own to write in."""
    weights = small.random_weights()
    source = small.write_gguf(tmp_path / "m.gguf", weights)
    place = tmp_path / "place"
    place.mkdir()
    slow = ("import time, sapper.models.quantize as q, sapper.cli.main as m; plain = q.quantized_rows\n"
            "q.quantized_rows = lambda form, rows: (time.sleep(0.3), plain(form, rows))[1]\n"
            "import sys; sys.exit(m.main(sys.argv[1:]))")
    process = subprocess.Popen([sys.executable, "-c", slow, "quantize", str(source), "-o", str(place / "out")],
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        limit = time.monotonic() + 60
        while not any(place.iterdir()):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        os.kill(process.pid, number)
        _, told = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == status and b"Traceback" not in told, told.decode()
    assert not any(place.iterdir())
