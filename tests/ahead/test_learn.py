"""A model in training as an executable: without Python it learns what `sapper train` does, bit for bit."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.ahead.learn import learn_functions
from sapper.ahead.plan import Plan, Training
from sapper.cli.build_model import content_of
from sapper.cli.build_training import run_build_training
from sapper.cli.train import run_train
from sapper.codegen.compile import encoded
from sapper.codegen.translate import translated
from sapper.models.checkpoint import open_checkpoint
from sapper.models.errors import ModelError
from sapper.models.safetensors_file import read_tensors
from sapper.targets import target
from tests.codegen.run_native import RUNNABLE
from tests.models.small import random_weights, write_gguf

from .built import run
from .test_families import FAMILIES

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")
DATA = Path(__file__).parents[1] / "models" / "data"
SEQUENCES, LENGTH, STEPS = 2, 8, 6
TEXT = "hello world, it's 12 o'clock\r\nand é is no e; " * 12
RECIPE = {"steps": STEPS, "rate": 0.0125, "warmup": 2, "decay": 0.05, "clip": 1.5}
OPTIONS = [part for name, value in RECIPE.items() for part in (f"--{name}", str(value))] + ["--seed", "3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a text, and what `sapper train` makes of them: after some steps and at the end."""
    directory = tmp_path_factory.mktemp("learn")
    write_gguf(directory / "small.gguf", random_weights(seed=3))
    (directory / "text").write_bytes(TEXT.encode())
    run_train(str(directory / "small.gguf"), str(directory / "text"), str(directory / "trained"), recipe=RECIPE,
              sequences=SEQUENCES, length=LENGTH, seed=3, validate=None, save_every=4, resume=False, threads=2,
              progress=False)
    return directory


def build(base: Path, output: Path, target_name: str | None = None) -> dict[str, Any]:
    return run_build_training(str(base / "small.gguf"), str(output), target_name, SEQUENCES, LENGTH, None)


@pytest.fixture(scope="module")
def planned(base: Path) -> tuple[Path, Plan[Training]]:
    """An executable, and its plan."""
    plans = []

    def with_plan(library: Any, ending: str, name: str) -> bytes:
        plans.append(library.plan)
        return content_of(library, ending, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapper.cli.build_training.content_of", with_plan)
        facts = build(base, base / "learner")
    assert facts["weights"] == str(base / "learner.model" / "model.safetensors")
    return base / "learner", plans[0]


@pytest.fixture(scope="module")
def built(planned: tuple[Path, Plan[Training]]) -> Path:
    return planned[0]


@pytest.fixture
def learner(built: Path, tmp_path: Path) -> Path:
    """An executable of a test's own, and its weights."""
    shutil.copy(built, tmp_path / "learner")
    shutil.copytree(f"{built}.model", tmp_path / "learner.model")
    return tmp_path / "learner"


def same(one: Path, other: Path, near: bool = False) -> None:
    found, expected = read_tensors(one / "model.safetensors"), read_tensors(other / "model.safetensors")
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].read(), tensor.read(), rtol=0, atol=2e-5 * near, err_msg=name)


def test_it_learns_what_train_does(base: Path, learner: Path) -> None:
    """And the weights are a model that every command takes."""
    status, said, told = run(learner, *OPTIONS, "--threads", "2", str(base / "text"))
    assert (status, told) == (0, "")
    lines = said.decode().splitlines()
    assert len(lines) == STEPS and all(
        re.fullmatch(rf"step {number} of 6: loss \d\.\d{{4}}, norm \d+\.\d\d, \d+\.\d tokens/s", line)
        for number, line in enumerate(lines, 1))
    directory = Path(f"{learner}.model")
    same(directory, base / "trained")
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json", "metadata.gguf", "model.safetensors", "training.safetensors"]
    assert open_checkpoint(directory).architecture == "llama"
    again = run(learner, *OPTIONS, text=TEXT.encode())
    assert again[:2] == (1, b"") and again[2].startswith("as many steps were done before; expected more --steps")


def test_losses_are_those_of_train(base: Path, learner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one thread, whose sums have another order; and the text may come from standard input."""
    other = learner.with_name("other")
    facts = run_train(str(base / "small.gguf"), str(base / "text"), str(other), recipe=RECIPE, sequences=SEQUENCES,
                      length=LENGTH, seed=3, validate=None, save_every=None, resume=False, threads=1)
    lines = run(learner, *OPTIONS, "--threads", "1", text=TEXT.encode())[1].decode().splitlines()
    numbers = [re.findall(r"\d+\.\d+", line) for line in lines]
    assert numbers[0][0] == f"{facts['first_loss']:.4f}" and numbers[-1][0] == f"{facts['last_loss']:.4f}"
    norms = re.findall(r"norm (\d+\.\d\d)", capsys.readouterr().err)
    assert norms == [numbers[0][1], numbers[-1][1]]
    same(Path(f"{learner}.model"), other)


def test_it_goes_on_from_a_step_that_train_saved(base: Path, learner: Path) -> None:
    directory = Path(f"{learner}.model")
    for name in ("model.safetensors", "training.safetensors"):
        shutil.copy(base / "trained.step-4" / name, directory / name)
    status, said, _ = run(learner, *OPTIONS, "--threads", "2", str(base / "text"))
    assert (status, [line.split(":")[0] for line in said.decode().splitlines()]) == (0, ["step 5 of 6", "step 6 of 6"])
    same(directory, base / "trained")


def test_train_goes_on_from_where_it_ended(base: Path, learner: Path) -> None:
    """And so does itself. The rate rises all the time, so that the number of steps changes nothing before it."""
    rising = ["--warmup", "100", "--rate", "0.1", "--seed", "3", "--save-every", "2", "--threads", "2",
              str(base / "text")]
    further, directory = learner.with_name("further"), Path(f"{learner}.model")
    assert run(learner, "--steps", "3", *rising)[0] == 0
    run_train(str(directory), str(base / "text"), str(further), recipe={"steps": 5, "warmup": 100, "rate": 0.1},
              sequences=SEQUENCES, length=LENGTH, seed=3, validate=None, save_every=None, resume=True, threads=2,
              progress=False)
    status, said, _ = run(learner, "--steps", "5", *rising)
    assert (status, [line.split(":")[0] for line in said.decode().splitlines()]) == (0, ["step 4 of 5", "step 5 of 5"])
    same(directory, further)


def test_messages(base: Path, learner: Path, tmp_path: Path) -> None:
    text = str(base / "text")
    for arguments in (["--bogus"], ["--steps"], ["--steps", "0"], ["--steps", "1.5"], ["--rate", "-1"], ["--rate", "x"],
                      ["--rate", "0." + "1" * 15], [text, text], [text, "--steps", "5"]):
        status, said, told = run(learner, *arguments)
        assert (status, said) == (2, b"") and told.startswith("learner [--steps N]"), arguments
    assert run(learner, "--help")[:2] == (0, run(learner, "--bogus")[2].encode())
    assert run(learner, "/nowhere") == (1, b"", "the text can't be read\n")
    assert run(learner, str(tmp_path)) == (1, b"", "the text can't be read\n")
    for short in (b"", b"a", b"hello world"):
        assert run(learner, text=short) == (
            1, b"", "the text is too short; expected at least 9 tokens, a sequence and what follows it\n")
    assert run(learner, "--weights", "nowhere", text) == (
        1, b"", "nowhere: the weights file can't be opened or mapped\n")
    assert run(learner, "--weights", "x" * 4001, text)[0] == 1
    assert run(learner, "--balance", "0.001", text) == (1, b"", "a number of the recipe is out of its range\n")
    status, _, told = run(learner, "--rate", "100000000000000", "--warmup", "0", "--clip", "1000000", text)
    assert (status, told) == (1, "the loss or its gradient is not finite; expected a lower --rate, from the last saved "
                                 "step\n")
    state = Path(f"{learner}.model") / "training.safetensors"
    state.write_bytes(b"damage")
    assert run(learner, text)[2].startswith(f"{state}: ")
    state.unlink()
    assert sorted(os.listdir(state.parent)) == ["config.json", "metadata.gguf", "model.safetensors"]
    status, _, told = run(Path(shutil.which("bash") or ""), "-c",
                          f"ulimit -f 100; trap '' XFSZ; exec {learner} --steps 1 {text}")
    assert (status, told) == (1, "the file can't be written\n")
    assert sorted(os.listdir(state.parent)) == ["config.json", "metadata.gguf", "model.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_have_a_meaning_on_other_families(family: str, planned: tuple[Path, Plan[Training]]) -> None:
    """Each is machine code there, also where no emulator runs it."""
    facts = target(FAMILIES[family].target)
    for function in learn_functions(planned[1]):
        assert encoded(translated(function.machine, facts), facts).code_bytes > 0, function.machine.name


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, base: Path, tmp_path: Path) -> None:
    """Near what this processor learns: sums have another order."""
    found = FAMILIES[family]
    if shutil.which(found.emulator[0]) is None:
        pytest.skip(f"{found.emulator[0]} is not installed")
    build(base, tmp_path / "learner", found.target)
    # The emulator is what the program's own name leads to.
    status, said, told = run(Path(found.emulator[0]), *found.emulator[1:], str(tmp_path / "learner"), *OPTIONS,
                             "--weights", str(tmp_path / "learner.model" / "model.safetensors"), "--threads", "2",
                             str(base / "text"))
    assert (status, told, len(said.splitlines())) == (0, "", STEPS)
    same(tmp_path / "learner.model", base / "trained", near=True)


def test_what_cannot_be_an_executable(tmp_path: Path) -> None:
    shutil.copytree(DATA / "llama", tmp_path / "llama")
    tokenizer = tmp_path / "llama" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"normalizer": null', '"normalizer": {"type": "NFC"}'))
    with pytest.raises(ModelError, match="the normalizer NFC"):
        run_build_training(str(tmp_path / "llama"), str(tmp_path / "learner"), None, SEQUENCES, LENGTH, None)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
