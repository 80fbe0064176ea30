"""Adapters of low rank: gradients beside differences of an independent loss in float64, what stays as it is, files that
others read, adapters as PEFT writes them, runs that go on, what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sapper.models.adapted import Lora, bases
from sapper.models.adapter import CONFIG, PREFIX, WEIGHTS, lora_of, merge, read_adapter, take_up, with_adapter
from sapper.models.checkpoint import open_checkpoint
from sapper.models.errors import ModelError
from sapper.models.load import load_model
from sapper.models.training import Recipe, mean_loss, resume, start, steps, write_trained

from . import small
from .loss64 import places
from .test_deepseek import write_gguf
from .test_training import DATA, drawn, loss_of, tokens_of

Array = np.ndarray[Any, np.dtype[Any]]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rows of queries and keys in pairs."""
    return small.write_gguf(tmp_path_factory.mktemp("lora") / "small.gguf", small.random_weights())


def opened(path: Path, lora: Lora, **options: Any) -> Any:
    """With B drawn too: gradients of A are zero beside a B that is."""
    training = start(open_checkpoint(path), 2, 16, lora=lora, **options)
    random = np.random.default_rng(5)
    for name, tensor in training.tensors.items():
        if ".lora_B." in name:
            tensor.write(0.1 * random.standard_normal(tensor.shape))
    return training


def in_pairs(rows: Array, size: int) -> Array:
    """Rows of heads whose halves turn together, in the order in which neighbours do."""
    return rows.reshape(-1, 2, size // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def rows_of(config: Any, module: str) -> tuple[str, slice]:
    """Where a module of a layer stands among the places of loss64."""
    if hasattr(config, "key_rank"):
        first = config.query_rank or config.heads * config.head_features
        return {"q_proj": ("attention joined", slice(first)), "q_a_proj": ("attention joined", slice(first)),
                "kv_a_proj_with_mqa": ("attention joined", slice(first, None)),
                "q_b_proj": ("attention query", slice(None)), "kv_b_proj": ("attention expand", slice(None)),
                "o_proj": ("output", slice(None))}[module]
    queries, both = config.heads * config.head_features, (config.heads + config.kv_heads) * config.head_features
    return {"q_proj": ("attention qkv", slice(queries)), "k_proj": ("attention qkv", slice(queries, both)),
            "v_proj": ("attention qkv", slice(both, None)), "o_proj": ("output", slice(None)),
            "gate_proj": ("feed_forward gate_up", slice(config.hidden)),
            "up_proj": ("feed_forward gate_up", slice(config.hidden, None)),
            "down_proj": ("feed_forward down", slice(None))}[module]


def added(training: Any, numbers: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """scale * B A in the places of loss64, from tensors by the names of PEFT."""
    config = training.config
    found = {name: np.zeros(array.shape) for name, array in places(bases(training._weights)).items()}
    for name in numbers:
        if name.endswith(".lora_A.weight"):
            _, _, layer, _, module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight").split(".")
            up = numbers[name.replace("lora_A", "lora_B")]
            if module in ("q_proj", "k_proj") and training.checkpoint.gguf:
                up = in_pairs(up, config.head_features)
            place, rows = rows_of(config, module)
            found[f"layers {layer} {place}"][rows] += scale * (up @ numbers[name])
    return found


@pytest.mark.parametrize(("kind", "base"), [
    ("qwen2", "f32"), ("qwen3", "bf16"), ("gguf", "f32"), ("gguf", "bf16"), ("qwen3_moe", "bf16"),
    ("deepseek_v2_lite", "f32"), ("deepseek_v3", "bf16")])
def test_gradients_and_loss(kind: str, base: str, gguf: Path) -> None:
    """As those of test_training.py, of A and B: along the gradient of each, and along a random direction. In bf16 the
    weights are those that bf16 holds, which products meet as they are. Sums that give a gradient are longer by those
    that give low, so that it is off by 2e-5 of its length."""
    training = opened(gguf if kind == "gguf" else DATA / kind, Lora(3, 5.0), base=base)
    tokens, targets = drawn(training)
    loss64, scale = loss_of(training, tokens, targets), 5.0 / 3
    weights = {name: array.astype(np.float64) for name, array in places(bases(training._weights)).items()}
    numbers = {name: tensor.read().astype(np.float64) for name, tensor in training.tensors.items()}

    def loss_at(changed: Mapping[str, Array]) -> float:
        more = added(training, {**numbers, **changed}, scale)
        return loss64({name: array + more[name] for name, array in weights.items()})

    loss, norm = training.step(tokens, targets, Recipe(steps=1), 1)
    assert loss == pytest.approx(loss_at({}), rel=2e-6)
    gradients = {name: tensor.read().astype(np.float64) for name, tensor in training.gradients.items()}
    assert norm == pytest.approx(np.sqrt(sum(np.square(array).sum() for array in gradients.values())), rel=2e-5)
    random = np.random.default_rng(1)
    for name, gradient in gradients.items():
        length = np.sqrt(np.square(gradient).sum())
        assert length > 0, name
        for direction in (gradient / length, random.standard_normal(gradient.shape)):
            direction = direction / np.sqrt(np.square(direction).sum())
            ahead, behind = (loss_at({name: numbers[name] + step * direction}) for step in (1e-5, -1e-5))
            expected = (gradient * direction).sum()
            assert (ahead - behind) / 2e-5 == pytest.approx(expected, abs=2e-5 * length + 1e-8), name


def test_how_they_are_drawn() -> None:
    """A as Kaiming's uniform with a = sqrt(5), between roots of one over the number of columns; B zero; the model
    answers as it did."""
    trained = start(open_checkpoint(DATA / "llama"), 2, 16)
    training = start(open_checkpoint(DATA / "llama"), 2, 16, lora=Lora(8, 16.0), base="f32")
    tokens, targets = drawn(training)
    assert training.loss_of(tokens, targets) == trained.loss_of(tokens, targets)
    drawn_ones, zeros = ([tensor.read() for name, tensor in training.tensors.items() if f".lora_{one}." in name]
                         for one in "AB")
    assert not any(one.any() for one in zeros)
    for one in drawn_ones:
        bound = one.shape[1] ** -0.5
        assert np.abs(one).max() <= bound and one.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    others = start(open_checkpoint(DATA / "llama"), 2, 16, lora=Lora(8, 16.0, seed=1))
    assert any((one.read() != other.read()).any()
               for one, other in zip(training.tensors.values(), others.tensors.values(), strict=True))


@pytest.mark.parametrize("kind", ["qwen3", "deepseek_v3"])
def test_the_base_stays_and_nothing_is_spent_on_it(kind: str) -> None:
    """No bit of it changes; there are neither gradients nor means of it, no product makes one, and nothing goes on
    below the lowest adapters."""
    training = opened(DATA / kind, Lora(2, 2.0))
    before = {name: array.copy() for name, array in places(bases(training._weights)).items()}
    for number in (1, 2):
        training.step(*drawn(training, number), Recipe(steps=2, rate=0.1), number)
    for name, array in places(bases(training._weights)).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    size = sum(tensor.read().size for tensor in training.tensors.values())
    assert [kind.size for kind in training.vectors] == [0] * 4
    assert all(size <= kind.size <= size + 16 * len(training.tensors) for kind in training.matrices)
    made = [(step[0].name, step[1]) for _, some in training.sections()["train"] for step in some]
    ranks = [min(arguments[2].shape) for name, arguments in made if name.startswith("matmul_tn")]
    assert ranks and max(ranks) <= 6
    count = {name: sum(one == name for one, _ in made) for name, _ in made}
    matrices = [name for name, array in before.items() if array.ndim == 2 and "router" not in name]
    products = sum(count[f"{name}_bf16"] for name in ("matmul_nt", "matmul_nt_residual"))
    assert products == len(matrices) - ("embedding" in matrices and "logits" in matrices)
    assert count["matmul_nn_bf16"] == products - 1


def test_only_what_is_asked_for_is_adapted() -> None:
    """Of the lowest layer nothing is computed backwards but what its adapters need."""
    training = opened(DATA / "llama", Lora(2, 4.0, ("down_proj", "v_proj")))
    assert training.lora.modules == ("v_proj", "down_proj")
    assert {name.split(".")[-3] for name in training.tensors} == {"v_proj", "down_proj"}
    whole = opened(DATA / "llama", Lora(2, 4.0))
    fewer = opened(DATA / "llama", Lora(2, 4.0, ("down_proj",)))
    counts = [sum(step[0].name.startswith("attention_gradient") for _, some in one.sections()["train"] for step in some)
              for one in (whole, training, fewer)]
    assert counts == [4, 4, 2]


@pytest.mark.parametrize("kind", ["gguf", "deepseek_v3"])
def test_it_learns_and_answers_as_it_was_trained(kind: str, gguf: Path, tmp_path: Path) -> None:
    """Unmerged in training; merged at load, and in the directory that `merge` writes, whose matrices without adapters
    are those of the model. Others read the files. That of a DeepSeek has what makes keys and values in two tensors."""
    path = gguf if kind == "gguf" else write_gguf(tmp_path / "deepseek.gguf", kind, split=True)
    training = start(open_checkpoint(path), 2, 16, lora=Lora(8, 16.0), base="f32")
    tokens = tokens_of(gguf) % training.vocabulary
    before = mean_loss(training, tokens)
    losses = [step.loss for step in steps(training, Recipe(steps=25, rate=2e-2), tokens)]
    after = mean_loss(training, tokens)
    assert losses[0] > 3.0 and after < 0.5 < before
    out = tmp_path / "out"
    write_trained(training, out)
    assert sorted(one.name for one in out.iterdir()) == [CONFIG, WEIGHTS]
    read = load_file(out / WEIGHTS)
    assert read.keys() == training.tensors.keys()
    for name, tensor in training.tensors.items():
        np.testing.assert_array_equal(read[name], tensor.read(), err_msg=name)
    config = json.loads((out / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 8, 16, "none")
    assert config["base_model_name_or_path"] == str(path)
    if kind == "gguf":
        assert config["target_modules"] == sorted(ALL)
    merge(open_checkpoint(path), out, tmp_path / "merged")
    expected = training.loss_of(*(np.stack([tokens[first : first + 16]] * 2) for first in (0, 1)))
    for model in (load_model(path, "f32", adapter=out), load_model(tmp_path / "merged", "f32")):
        found = model.session(17).losses([int(token) for token in tokens[:17]])
        assert np.mean(found) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    merged, base = open_checkpoint(tmp_path / "merged"), open_checkpoint(path)
    assert merged.tensors.keys() == base.tensors.keys()
    changed = {name for name, entry in base.tensors.items() if (merged.tensors[name].read() != entry.read()).any()}
    assert len(changed) == len(read) // 2 + (training.config.layers if kind == "deepseek_v3" else 0)


@pytest.mark.parametrize(("kind", "base"), [("qwen2", "bf16"), ("gguf", "f32")])
def test_a_run_that_goes_on(kind: str, base: str, gguf: Path, tmp_path: Path) -> None:
    """To the last bit what one without a break does."""
    path = gguf if kind == "gguf" else DATA / kind
    recipe, lora = Recipe(steps=5, rate=1e-2, warmup=2), Lora(4, 6.0, stable=True)
    tokens = np.arange(200, dtype=np.int32) * 7 % 250
    whole = start(open_checkpoint(path), 2, 16, lora=lora, base=base)
    expected = [step.loss for step in steps(whole, recipe, tokens, seed=3)]
    first = start(open_checkpoint(path), 2, 16, lora=lora, base=base)
    found = []
    for step in steps(first, recipe, tokens, seed=3):
        found.append(step.loss)
        if step.number == 2:
            break
    half = tmp_path / "half"
    write_trained(first, half, steps=2)
    taken = read_adapter(half)
    again = start(open_checkpoint(path), 2, 16, lora=lora_of(taken), base=base)
    take_up(again, taken)
    done = resume(again, half)
    assert done == 2
    found += [step.loss for step in steps(again, recipe, tokens, seed=3, done=done)]
    assert found == expected
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].read(), tensor.read(), err_msg=name)


def test_threads_agree() -> None:
    """Up to the order of sums, as in test_training.py; and of the same threads to the last bit."""
    found = []
    for threads in (1, 1, 2):
        training = opened(DATA / "qwen3", Lora(3, 3.0), threads=threads)
        training.step(*drawn(training), Recipe(steps=1), 1)
        found.append({name: tensor.read().copy() for name, tensor in training.gradients.items()})
    for name, array in found[0].items():
        np.testing.assert_array_equal(found[1][name], array, err_msg=name)
        np.testing.assert_allclose(found[2][name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)


# ---- adapters of others


def made(
    path: Path, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], **config: Any,
) -> dict[str, Array]:
    """An adapter as PEFT writes it, its tensors drawn. ranks: by module; shapes: of each matrix, by its last name."""
    path.mkdir()
    random = np.random.default_rng(2)
    tensors = {}
    for module, rank in ranks.items():
        rows, columns = shapes[module.rpartition(".")[2]]
        for name, extents in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            tensors[f"{PREFIX}{module}.{name}.weight"] = random.standard_normal(extents, np.float32)
    save_file(tensors, path / WEIGHTS)
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none",
             "peft_version": "0.21.2", "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {},
             "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
             "base_model_name_or_path": "some/base"}
    (path / CONFIG).write_text(json.dumps(known | config))
    return tensors


SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64), "gate_proj": (96, 64),
          "up_proj": (96, 64), "down_proj": (64, 96)}
"""Of small.py."""
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def test_patterns_and_the_stable_factor(tmp_path: Path) -> None:
    """Ranks and alphas of some modules; alpha over the root of the rank."""
    path = small.write_directory(tmp_path / "model", small.random_weights())
    ranks = {Q0: 2, Q0.replace("0", "1"): 4, DOWN1: 4}
    tensors = made(tmp_path / "adapter", ranks, SHAPES, use_rslora=True,
                   rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}, alpha_pattern={"down_proj": 12})
    factors = {Q0: 6 / 2**0.5, Q0.replace("0", "1"): 6 / 2, DOWN1: 12 / 2}
    base, whole = open_checkpoint(path), with_adapter(open_checkpoint(path), tmp_path / "adapter")
    for name, entry in base.tensors.items():
        expected, module = entry.read().astype(np.float64), name.removesuffix(".weight")
        if module in ranks:
            down, up = (tensors[f"{PREFIX}{module}.lora_{one}.weight"].astype(np.float64) for one in "AB")
            expected = expected + factors[module] * (up @ down)
        np.testing.assert_allclose(whole.tensors[name].read(), expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_an_adapter_of_the_published_model_fits_its_gguf(tmp_path: Path) -> None:
    """Whose rows of queries and keys are in pairs; and merged matrices of one in blocks are no blocks any more."""
    weights = small.random_weights()
    directory = small.write_directory(tmp_path / "model", weights)
    path = small.write_gguf(tmp_path / "model.gguf", weights)
    modules = [f"model.layers.1.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in SHAPES]
    made(tmp_path / "adapter", dict.fromkeys(modules, 4), SHAPES, lora_alpha=1)
    tokens = list(range(40, 60))
    logits = []
    for one in (directory, path):
        session = load_model(one, "f32", adapter=tmp_path / "adapter").session(32)
        session.feed(tokens)
        logits.append(session.logits.copy())
        session = load_model(one, "f32").session(32)
        session.feed(tokens)
        assert np.abs(session.logits - logits[-1]).max() > 0.5
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-4)
    merge(open_checkpoint(path), tmp_path / "adapter", tmp_path / "merged", dtype="bf16")
    session = load_model(tmp_path / "merged").session(32)
    session.feed(tokens)
    np.testing.assert_allclose(session.logits, logits[0], atol=0.3)


class TestFaults:
    @pytest.mark.parametrize(("changed", "match"), [
        ({"use_dora": True}, r"adapter_config.json, key use_dora: found True; expected an adapter without, of LoRA on"),
        ({"modules_to_save": ["lm_head"]}, r"key modules_to_save: found \['lm_head'\]; expected an adapter without"),
        ({"bias": "lora_only"}, "key bias: found 'lora_only'; expected an adapter without"),
        ({"fan_in_fan_out": True}, "key fan_in_fan_out: found True; expected an adapter without"),
        ({"init_lora_weights": "pissa_niter_4"}, "key init_lora_weights: found 'pissa_niter_4'; expected an adapter"),
        ({"newest_idea": {"a": 1}}, r"key newest_idea: found \{'a': 1\}; expected an adapter without"),
        ({"peft_type": "IA3"}, "key peft_type: found 'IA3'; expected 'LORA'"),
        ({"r": 0}, "key r: found 0; expected a whole number from 1 to 4096"),
        ({"r": 3}, r"matrix model.layers.0.self_attn.q_proj: found A of shape \(4, 64\), B of shape \(64, 4\); "
                   "expected a rank of 3 of both, as adapter_config.json says"),
        ({"lora_alpha": "6"}, "key lora_alpha: found '6'; expected a number from 0"),
        ({"rank_pattern": {"(": 3}}, r"key rank_pattern: found '\(': "),
        ({"rank_pattern": {"q_proj": 0}}, "key rank_pattern: found 0; expected whole numbers from 1 to 4096"),
    ])
    def test_what_is_not_read(self, tmp_path: Path, changed: dict[str, Any], match: str) -> None:
        made(tmp_path / "adapter", {Q0: 4}, SHAPES, **changed)
        with pytest.raises(ModelError, match=match):
            read_adapter(tmp_path / "adapter")

    def test_files_that_are_broken(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"nowhere: found no adapter_config.json; expected a directory with an ad"):
            read_adapter(tmp_path / "nowhere")
        tensors = made(tmp_path / "adapter", {Q0: 4}, SHAPES)
        file = tmp_path / "adapter" / WEIGHTS
        whole = file.read_bytes()
        file.write_bytes(whole[:-4])
        with pytest.raises(ModelError, match="expected the tensor's size, within"):
            read_adapter(tmp_path / "adapter")
        names = list(tensors)
        for some, match in (
                ({names[0]: tensors[names[0]]}, r"B of shape None; expected a rank of 4"),
                ({names[1]: tensors[names[1]]}, r"lora_B.weight: found B without an A"),
                ({**tensors, f"{PREFIX}{Q0}.lora_magnitude_vector": tensors[names[0]]},
                 "lora_magnitude_vector: found a tensor that is no A or B of a matrix"),
                ({}, "found no tensors; expected A and B of each matrix")):
            save_file(some, file)
            with pytest.raises(ModelError, match=match):
                read_adapter(tmp_path / "adapter")
        file.unlink()
        with pytest.raises(ModelError, match=r"adapter_model.safetensors: "):
            read_adapter(tmp_path / "adapter")

    def test_an_adapter_of_another_model(self, tmp_path: Path) -> None:
        path = small.write_directory(tmp_path / "model", small.random_weights())
        made(tmp_path / "deep", {Q0.replace("0", "9"): 4}, SHAPES)
        with pytest.raises(ModelError, match=r"layers.9.self_attn.q_proj.weight: found no such matrix in model; "
                                             "expected an adapter of this model; mend: take the model that "
                                             "adapter_config.json names: 'some/base'"):
            load_model(path, adapter=tmp_path / "deep")
        made(tmp_path / "wide", {Q0: 4}, {"q_proj": (64, 48)})
        with pytest.raises(ModelError, match=r"found B A of shape \(64, 48\); expected shape \(64, 64\), as model "):
            merge(open_checkpoint(path), tmp_path / "wide", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        file = small.write_gguf(tmp_path / "model.gguf", small.random_weights())
        made(tmp_path / "long", {Q0: 4}, {"q_proj": (96, 64)})
        with pytest.raises(ModelError, match=r"found B A of shape \(96, 64\); expected shape \(64, 64\), as model.gg"):
            with_adapter(open_checkpoint(file), tmp_path / "long")

    def test_modules_that_there_are_not(self) -> None:
        with pytest.raises(ModelError, match="the matrices to be adapted: found 'qproj'; expected all, or some of "
                                             "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"):
            start(open_checkpoint(DATA / "llama"), 2, 16, lora=Lora(4, 8.0, ("q_proj", "qproj")))
        with pytest.raises(ModelError, match="found 'gate_proj'; expected all, or some of q_proj, k_proj, v_proj, o"):
            start(open_checkpoint(DATA / "qwen3_moe"), 2, 16, lora=Lora(4, 8.0, ("gate_proj",)))

    def test_what_training_does_not_go_on_from(self, tmp_path: Path) -> None:
        modules = {Q0: 4, Q0.replace("0", "1"): 4}
        made(tmp_path / "differs", modules, SHAPES, alpha_pattern={"layers.0.self_attn.q_proj": 5})
        with pytest.raises(ModelError, match=r"found a rank of 4 and a factor of 1.25; expected 4 and 1.5, those of"):
            lora_of(read_adapter(tmp_path / "differs"))
        path = small.write_directory(tmp_path / "model", small.random_weights())
        made(tmp_path / "half", {Q0: 4}, SHAPES)
        half = read_adapter(tmp_path / "half")
        with pytest.raises(ModelError, match=r"layers.1.self_attn.q_proj.lora_A.weight: found nothing; expected shap"):
            take_up(start(open_checkpoint(path), 2, 16, lora=lora_of(half)), half)
        training = start(open_checkpoint(path), 2, 16, lora=lora_of(half))
        with pytest.raises(ModelError, match=r"training.safetensors: found nothing"):
            resume(training, tmp_path / "half")

    def test_a_balance_of_experts(self) -> None:
        training = start(open_checkpoint(DATA / "deepseek_v3"), 2, 16, lora=Lora(4, 8.0))
        with pytest.raises(ModelError, match=r"--balance: found adapters, beside which the choice of experts stays"):
            training.step(*drawn(training), Recipe(steps=1, balance=0.001), 1)

    def test_a_step_for_which_memory_is_short(self) -> None:
        with pytest.raises(ModelError, match=r"GiB: the weights, 16 bytes a number of an adapter, and what layer"):
            start(open_checkpoint(DATA / "llama"), 1 << 20, 256, lora=Lora(4, 8.0))
