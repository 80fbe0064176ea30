"""DeepSeek, Llama and Qwens on small random checkpoints: parity with what transformers computed (make_deepseek.py)."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from sapper.cli.generate import run_generate
from sapper.kernels import mla
from sapper.models import session as sessions
from sapper.models.batch import Fed, Pick
from sapper.models.deepseek.config import from_gguf, from_json
from sapper.models.deepseek.heads import DenseHeads
from sapper.models.deepseek.model import load_model as load_deepseek
from sapper.models.deepseek.session import Session
from sapper.models.deepseek.untrained import SMALL_V2, untrained
from sapper.models.deepseek.weights import GGUF_NAMES, NAMES
from sapper.models.errors import ModelError
from sapper.models.experts import BlockExperts, DenseExperts
from sapper.models.generate import Generation
from sapper.models.gguf_file import GgufFile
from sapper.models.linear import Blocks
from sapper.models.load import Loaded, load_model
from sapper.models.mixture import DenseWeights, MixtureWeights
from sapper.models.rope import RopeScaling
from sapper.models.safetensors_file import DTYPES
from sapper.models.sampling import Sampling
from sapper.models.scaled_matrix import ScaledExperts, ScaledMatrix
from sapper.models.workspace import Workspace
from sapper.targets import host_target

from . import small

DATA = Path(__file__).parent / "data"
CHECKPOINTS = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "deepseek_v32", "llama", "qwen2", "qwen3",
               "qwen3_moe")
CONTEXT = 160


@pytest.fixture(scope="module", params=CHECKPOINTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Loaded:
    return load_model(DATA / name, "f32")


@pytest.fixture(scope="module")
def recorded(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as file:
        return {"tokens": file["tokens"].tolist(), "logits": file["logits"], "logits_bf16": file["logits_bf16"],
                "greedy": file["greedy"].tolist()}


def assert_same(logits: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_decode_gives_the_logits_of_transformers(model: Loaded, recorded: dict[str, Any]) -> None:
    session = model.session(CONTEXT)
    for token, wanted in zip(recorded["tokens"], recorded["logits"], strict=True):
        session.feed([token])
        assert_same(session.logits, wanted)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("chunk", [512, 7])
def test_prefill_gives_the_logits_of_transformers(
    model: Loaded, recorded: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "CHUNK", chunk)
    session = model.session(CONTEXT)
    session.feed(recorded["tokens"])
    assert_same(session.logits, recorded["logits"][-1])


@pytest.mark.parametrize("shortest", [3, 8, 1000])
def test_pieces_attend_naively_and_absorbed(
    model: Loaded, recorded: dict[str, Any], shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over one cache, with buffers that grow. shortest: tokens of a piece that do not attend absorbed."""
    monkeypatch.setattr(Session, "shortest_run", shortest)
    session = model.session(CONTEXT)
    tokens = recorded["tokens"]
    for part in (tokens[:2], tokens[2:3], tokens[3:12], tokens[12:13], tokens[13:]):
        session.feed(part)
        assert_same(session.logits, recorded["logits"][session.position - 1])


def test_greedy_tokens_are_those_of_transformers(model: Loaded, recorded: dict[str, Any]) -> None:
    """128 tokens: over more than one split of the positions."""
    made = Generation(model, recorded["tokens"], len(recorded["greedy"]))
    stops, model.tokenizer.stops = model.tokenizer.stops, frozenset()
    try:
        list(made)
    finally:
        model.tokenizer.stops = stops
    assert made.tokens == recorded["greedy"]
    assert len(recorded["tokens"]) + len(made.tokens) > mla.SPLIT


@pytest.mark.sampled(3)
@pytest.mark.parametrize("cache", ["f32", "bf16"])
def test_bf16_is_within_its_rounding(name: str, recorded: dict[str, Any], cache: str) -> None:
    """The checkpoint's weights are numbers of bf16. Activations stay in f32 here, so the logits are nearer to those of
    f32 than a forward pass in bf16 throughout is, also where the cache is rounded. Then a choice of experts near a tie
    may turn: deepseek_v2 takes another one for a token that the last one attends to."""
    session = load_model(DATA / name, "bf16").session(CONTEXT, cache_dtype=cache)
    session.feed(recorded["tokens"][:-1])
    session.feed(recorded["tokens"][-1:])
    wanted, theirs = recorded["logits"][-1], recorded["logits_bf16"][-1]
    cosine = session.logits @ wanted / np.linalg.norm(session.logits) / np.linalg.norm(wanted)
    assert cosine >= (0.9998 if (name, cache) == ("deepseek_v2", "bf16") else 0.9999)
    assert np.abs(session.logits - wanted).max() < np.abs(theirs - wanted).max()


@pytest.mark.parametrize("which", ["deepseek_v2_lite", "deepseek_v3", "deepseek_v32"])
def test_where_rounded_tokens_attend_in_products_of_bf16(which: str) -> None:
    """From a cache in bf16, but where an indexer chooses positions, or the processor has no such products. A choice of
    experts near a tie may turn."""
    with np.load(DATA / f"{which}.npz") as file:
        tokens, wanted = file["tokens"].tolist(), file["logits"][-1]
    loaded, found = load_model(DATA / which, "bf16-rounded"), []
    for cache in (None, "f32"):
        session = loaded.session(CONTEXT, cache_dtype=cache)
        names, of_one = ({getattr(kernel, "name", "") for _, steps in sections for kernel, _ in steps}
                         for sections in (session.prefill_sections(), session.step_sections()))
        rounded = cache is None and loaded.config.indexer is None and Workspace(1, 1).packs_pairs()
        assert ({"expand_rounded", "latent_attention_rounded"} <= names) == rounded
        assert ({"latent_attention_decode_rounded", "merge_long_splits"} <= of_one) == rounded
        session.feed(tokens[:-1])
        session.feed(tokens[-1:])
        assert session.logits @ wanted / np.linalg.norm(session.logits) / np.linalg.norm(wanted) > 0.9995
        found.append(session.logits.copy())
    assert (found[0] != found[1]).any()


def test_a_rounded_token_after_more_than_a_split() -> None:
    """It gives what it gives as the last one of a prompt, but for the rounding."""
    config = from_json({**SMALL_V2, "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1}, "the test")
    made = untrained(config, "bf16-rounded")
    tokens = np.random.default_rng(0).integers(0, 96, mla.LONG_SPLIT + 40).tolist()
    found = []
    for last in (1, 2):
        session = made.session(len(tokens))
        session.feed(tokens[:-last])
        session.feed(tokens[-last:])
        found.append(session.logits)
    assert found[0] @ found[1] / np.linalg.norm(found[0]) / np.linalg.norm(found[1]) > 0.9999


def test_nothing_is_normed_twice(model: Loaded) -> None:
    """Router and experts, and what else reads the same rows, share one norm, of one token and of several."""
    session = model.session(CONTEXT)
    for section, steps in [*session.step_sections(), *session.prefill_sections()]:
        norms = [tuple(getattr(one, "array", one).ctypes.data for one in arguments[:2])
                 for kernel, arguments in steps if kernel.name.startswith("rms_norm")]
        assert len(set(norms)) == len(norms), section


def test_the_interpreter_agrees(model: Loaded, recorded: dict[str, Any]) -> None:
    session = model.session(CONTEXT, interpret=True)
    session.feed(recorded["tokens"][:5])
    assert_same(session.logits, recorded["logits"][4])
    session.feed(recorded["tokens"][5:6])
    assert_same(session.logits, recorded["logits"][5])


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int) -> None:
    with np.load(DATA / "deepseek_v3.npz") as file:
        tokens, logits = file["tokens"].tolist(), file["logits"]
    session = load_model(DATA / "deepseek_v3", "f32").session(CONTEXT, threads=threads)
    session.feed(tokens[:20])
    session.feed(tokens[20:21])
    assert_same(session.logits, logits[20])


def test_a_token_reads_the_experts_that_it_takes_and_no_others() -> None:
    """All others hold NaN after the gate has chosen, and no logit does."""
    model = load_deepseek(DATA / "deepseek_v3", "f32")
    session = model.session(CONTEXT)
    session.feed([5])
    wanted = session.logits.copy()
    taken = session._experts[0]
    last = model.weights.layers[-1].feed_forward
    others = np.setdiff1d(np.arange(len(last.gate.weights)), taken)
    assert len(others) == model.config.mixture.experts - model.config.mixture.chosen
    for matrices in (last.gate, last.up, last.down):
        matrices.weights[others] = np.nan
    session.position = 0
    session.feed([5])
    np.testing.assert_array_equal(session.logits, wanted)


def test_a_token_sees_the_positions_that_the_indexer_keeps_and_no_others() -> None:
    """All others hold NaN, and no logit does; there are many more of them than are kept."""
    model = load_deepseek(DATA / "deepseek_v32", "f32")
    with np.load(DATA / "deepseek_v32.npz") as file:
        tokens = file["tokens"].tolist() + file["greedy"].tolist()
    session = model.session(CONTEXT)
    session.feed(tokens[:-1])
    session.feed(tokens[-1:])
    wanted, kept = session.logits.copy(), session._kept_places.copy()
    assert len(kept) == model.config.indexer.kept == 12
    assert (np.diff(kept) > 0).all() and kept[-1] < len(tokens)
    others = np.setdiff1d(np.arange(len(tokens) - 1), kept)
    for part in (session._latents[-1], session._keys[-1]):
        part[others] = np.nan
    session.rewind(len(tokens) - 1)
    session.feed(tokens[-1:])
    np.testing.assert_array_equal(session.logits, wanted)


def test_score_scales_are_those_of_the_published_models() -> None:
    """0.13523 for V3, 0.11472 for V2-Lite: (0.1 * mscale_all_dim * ln 40 + 1)**2 / sqrt(192)."""
    v3 = RopeScaling("yarn", 40.0, original_positions=4096, table_mscale=1.0, score_mscale=1.0)
    lite = RopeScaling("yarn", 40.0, original_positions=4096, table_mscale=0.707, score_mscale=0.707)
    assert v3.score_factor / 192**0.5 == pytest.approx(0.13523, abs=5e-6)
    assert lite.score_factor / 192**0.5 == pytest.approx(0.11472, abs=5e-6)
    assert v3.table_factor == lite.table_factor == 1.0


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """V3's: of 32 pairs those up to 10 turn 32 times or more in 4096 positions, those from 24 on once or less."""
    scaling = RopeScaling("yarn", 40.0, original_positions=4096)
    plain, found = RopeScaling().frequencies(10000.0, 32), scaling.frequencies(10000.0, 32)
    np.testing.assert_array_equal(found[:11], plain[:11])
    np.testing.assert_allclose(found[23:], plain[23:] / 40, rtol=1e-12)
    between = found[11:23] / plain[11:23]
    assert (np.diff(between) < 0).all() and between[0] < 1 and between[-1] > 1 / 40
    assert scaling.table_factor == pytest.approx(1.0 + 0.1 * np.log(40))


# ---- configs and damaged files


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    values = {**json.loads((DATA / name / "config.json").read_text()), **changes}
    return {key: value for key, value in values.items() if value != "absent"}


def test_the_published_forms_of_the_configs_are_read() -> None:
    """Base and scaling as the published checkpoints have them, in keys of their own."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 0.707, "mscale_all_dim": 0.707}
    lite = from_json(config_of(
        "deepseek_v2_lite", rope_parameters="absent", rope_theta=10000, rope_scaling=yarn, qk_nope_head_dim=128,
        qk_rope_head_dim=64, scoring_func="softmax", n_group=1, topk_group=1, moe_layer_freq=1,
    ), "here")
    assert lite.score_scale == pytest.approx(0.11472, abs=5e-6)
    assert lite.query_rank == 0 and lite.mixture is not None and not lite.mixture.sigmoid
    v3 = from_json(config_of("deepseek_v3", topk_method="noaux_tc", scoring_func="sigmoid"), "here")
    assert v3.mixture is not None and v3.mixture.sigmoid and v3.mixture.normalise and v3.mixture.scale == 2.5


ABSURD: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"model_type": "deepseek_v9"}, "model_type: found 'deepseek_v9'"),
    ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank: found 0"),
    ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank: found nothing"),
    ("deepseek_v3", {"kv_lora_rank": 33}, r"kv_a_proj_with_mqa.weight: found shape \(40, 64\)"),
    ("deepseek_v3", {"q_lora_rank": "40"}, "q_lora_rank: found '40'"),
    ("deepseek_v3", {"q_lora_rank": None}, "q_proj.weight: found nothing"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim: found 7; expected an even number"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads: found 2; expected 4"),
    ("deepseek_v3", {"n_group": 3}, "8 experts in 3 groups"),
    ("deepseek_v3", {"n_group": 8}, "two experts or more"),
    ("deepseek_v3", {"topk_group": 5}, "3 experts of a token, from 5 of 4 groups"),
    ("deepseek_v3", {"num_experts_per_tok": 5}, "5 experts of a token, from 2 of 4 groups of 2"),
    ("deepseek_v3", {"n_routed_experts": 16000}, "shape"),
    ("deepseek_v3", {"n_shared_experts": 2}, "shared_experts"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: found 'softmax'; expected 'sigmoid'"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: found 'noaux_tc'"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: found true, and routed_scaling_factor 4"),
    ("deepseek_v2", {"norm_topk_prob": 1}, "norm_topk_prob: found 1; expected true or false"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq: found 2"),
    ("deepseek_v2", {"attention_bias": True}, "attention_bias"),
    ("deepseek_v2", {"rope_parameters": {"rope_type": "llama3"}}, "found 'llama3'; expected 'default' or 'yarn'"),
    ("deepseek_v2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "key factor: found nothing"),
    ("deepseek_v2", {"rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64,
                                         "beta_fast": 1, "beta_slow": 2}}, "the fast one larger"),
    ("deepseek_v2", {"first_k_dense_replace": -1}, "first_k_dense_replace: found -1"),
    ("deepseek_v2", {"num_hidden_layers": 1000}, "model.layers.3.*found nothing"),
    ("deepseek_v2", {"vocab_size": 100}, "tokens in the tokenizer"),
    ("deepseek_v32", {"index_topk": 0}, "index_topk: found 0"),
    ("deepseek_v32", {"index_topk": "absent"}, "index_topk: found nothing"),
    ("deepseek_v32", {"index_head_dim": 8}, "index_head_dim: found 8; expected more than the 8 features that turn"),
    ("deepseek_v32", {"index_n_heads": 4}, r"indexer.wq_b.weight: found shape \(320, 40\)"),
    ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank: found nothing; expected a number, as index queries"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2", {"num_key_value_heads": 3}, "a whole ratio"),
    ("qwen3", {"head_dim": 25}, "heads of 25 features; expected an even number"),
    ("qwen3", {"head_dim": 16}, r"q_proj.weight: found shape \(96, 64\)"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: found 2; expected 1"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: found \[0\]"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "9 experts of a token, from 1 of 1 groups of 8"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob: found 1; expected true or false"),
    ("qwen3_moe", {"num_experts": 9}, r"mlp.gate.weight: found shape \(8, 64\)"),
    ("qwen3", {"model_type": "llama", "head_dim": 26}, "q_proj.weight: found shape"),
]


@pytest.mark.parametrize(("name", "changes", "message"), ABSURD)
def test_absurd_configs_are_refused(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    shutil.copytree(DATA / name, tmp_path / name)
    (tmp_path / name / "config.json").write_text(json.dumps(config_of(name, **changes)))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / name, "f32")


def test_the_index_says_which_files_there_are(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(DATA / "deepseek_v3", path)
    index = path / "model.safetensors.index.json"
    (path / "consolidated.safetensors").write_bytes(b"of another form")  # Not named, so not read.
    load_model(path, "f32")
    places = json.loads(index.read_text())["weight_map"]
    for wrong, message in (([], "weight_map"), ({"w": "../x.safetensors"}, r"'\.\./x.safetensors'"), ({"w": 5}, "'5'")):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ModelError, match=message):
            load_model(path, "f32")
    index.write_text(json.dumps({"weight_map": places}))
    next(path.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match=r"model-00002.*found nothing; expected a file that the index names"):
        load_model(path, "f32")


def test_a_thousand_mutated_directories_load_or_are_refused(tmp_path: Path) -> None:
    """Bytes of config.json, of the index and of the headers of safetensors, changed, cut out or cut off; numbers in
    config.json replaced by extreme ones."""
    path = tmp_path / "model"
    shutil.copytree(DATA / "deepseek_v3", path)
    random = np.random.default_rng(0)
    originals = {file: file.read_bytes() for file in path.iterdir() if file.name != "tokenizer.json"}
    heads = {file: len(raw) if file.suffix == ".json" else 8 + int.from_bytes(raw[:8], "little")
             for file, raw in originals.items()}
    config = json.loads(originals[path / "config.json"])
    refused = 0
    for _ in range(1000):
        file = list(originals)[random.integers(0, len(originals))]
        raw = bytearray(originals[file])
        if file.name == "config.json" and random.random() < 0.7:
            key = list(config)[random.integers(0, len(config))]
            values = [0, -1, 1, 3, 2**31, 1e300, None, "x", [], {}, True, float("nan"), 1 << 20]
            raw = bytearray(json.dumps({**config, key: values[random.integers(0, len(values))]}).encode())
        else:
            at = int(random.integers(0, heads[file]))
            change = random.integers(0, 4)
            if change == 0:
                raw[at] = int(random.integers(0, 256))
            elif change == 1:
                raw[at : at + 4] = random.bytes(4)
            elif change == 2:
                del raw[at : at + int(random.integers(1, 9))]
            else:
                del raw[at:]
        small.replace(file, raw)
        try:
            load_model(path, "bf16")
        except ModelError as error:
            refused += 1
            assert "found" in str(error) and "expected" in str(error)
        finally:
            small.replace(file, originals[file])
    assert 400 < refused < 1000


def test_generate_answers_from_a_directory() -> None:
    out, err = io.StringIO(), io.StringIO()
    assert run_generate(str(DATA / "deepseek_v3"), "hello world", 6, dtype="f32", json=True, out=out, err=err) == 0
    result = json.loads(out.getvalue())
    assert 1 <= len(result["tokens"]) <= 6 and result["prompt_tokens"] > 0
    assert run_generate(str(DATA), "hello", 1, out=out, err=err) == 1
    assert "config.json" in err.getvalue()


def test_a_profile_has_every_kernel_of_a_step_and_feeds_nothing() -> None:
    out, err = io.StringIO(), io.StringIO()
    settings = {"dtype": "f32", "threads": 1, "profile": True}
    assert run_generate(str(DATA / "deepseek_v3"), "hello world", 3, json=True, out=out, err=err, **settings) == 0
    kernels = json.loads(out.getvalue())["profile"]
    assert any(one["kernel"].startswith("latent_attention_decode") for one in kernels)
    assert all(len(one["seconds"]) == 1 and one["seconds"][0] >= 0.0 for one in kernels)
    assert run_generate(str(DATA / "deepseek_v3"), "hello world", 3, out=out, err=err, **settings) == 0
    assert "latent_attention_decode" in err.getvalue() and "read GB/s" in err.getvalue()
    session = load_model(DATA / "deepseek_v3", "f32").session()
    session.feed([1, 2, 3])
    logits, position = session.logits.copy(), session.position
    session.feed([4])
    expected = session.logits.copy()
    session.rewind(position)
    session.profile(2)
    assert session.position == position and not np.array_equal(logits, expected)
    session.feed([4])
    assert np.array_equal(session.logits, expected)


# ---- fp8 and GGUF


def as_fp8(path: Path, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Replace the matrices of the attention and the feed-forward parts by fp8 ones with scales, as V3's checkpoints
    have them. Returns what the matrices are then.
    """
    wide = {}
    for file in path.glob("*.safetensors"):
        tensors = {}
        for name, value in load_file(file).items():
            if value.ndim == 2 and ("_proj" in name or "experts" in name):
                scale = random.uniform(0.5, 2.0, [-(-extent // 128) for extent in value.shape]).astype(np.float32)
                each = np.kron(scale, np.ones((128, 128), np.float32))[: value.shape[0], : value.shape[1]]
                narrow = (value.astype(np.float32) / each).astype(ml_dtypes.float8_e4m3fn)
                tensors[name], tensors[f"{name}_scale_inv"] = narrow, scale
                wide[name] = narrow.astype(np.float32) * each
            else:
                tensors[name] = value
        save_safetensors(file, tensors)
    return wide


def load_file(file: Path) -> dict[str, np.ndarray]:
    kinds = {**DTYPES, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    return {
        name: np.frombuffer(raw[8 + size :][slice(*entry["data_offsets"])], kinds[entry["dtype"]])
        .reshape(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    }


def save_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    kinds = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    header, body = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        header[name] = {"dtype": kinds[value.dtype.name], "shape": list(value.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


QUANTISED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_fp8_weights_are_those_of_the_wide_matrices(tmp_path: Path) -> None:
    path, plain = tmp_path / "fp8", tmp_path / "plain"
    for one in (path, plain):
        shutil.copytree(DATA / "deepseek_v3", one)
    wide = as_fp8(path, np.random.default_rng(0))
    for file in plain.glob("*.safetensors"):
        save_safetensors(file, {name: wide.get(name, value) for name, value in load_file(file).items()})
    (path / "config.json").write_text(json.dumps(config_of("deepseek_v3", quantization_config=QUANTISED)))
    sessions_of = [load_model(one, "f32").session(CONTEXT) for one in (path, plain)]
    for session in sessions_of:
        session.feed([5, 17, 200])
    np.testing.assert_array_equal(sessions_of[0].logits, sessions_of[1].logits)


@pytest.mark.parametrize("by_blocks", [False, True])
def test_fp8_stays_fp8(tmp_path: Path, by_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "file-f32" the matrices are used as they are: the same logits but for the order of sums. `kv_b_proj` and
    those whose rows make no panels of 16 are widened to bf16, so they are in the other model too. Chunks and single
    tokens agree. With "file" the activations of a chunk are rounded to bf16, so that a choice of experts may turn, but
    where weights are widened a block at a time."""
    monkeypatch.setattr(Workspace, "widens_blocks", lambda work: by_blocks)
    path, plain = tmp_path / "fp8", tmp_path / "plain"
    for one in (path, plain):
        shutil.copytree(DATA / "deepseek_v3", one)
    wide = as_fp8(path, np.random.default_rng(0))
    rounded = {
        name: value.astype(ml_dtypes.bfloat16).astype(np.float32) if "kv_b" in name or len(value) % 16 else value
        for name, value in wide.items()}
    for file in plain.glob("*.safetensors"):
        save_safetensors(file, {name: rounded.get(name, value) for name, value in load_file(file).items()})
    (path / "config.json").write_text(json.dumps(config_of("deepseek_v3", quantization_config=QUANTISED)))
    models = [load_model(path, "file-f32"), load_model(plain, "f32"), load_model(path, "file")]
    weights = models[0].weights
    assert isinstance(weights.layers[0].attention.output, ScaledMatrix)
    assert isinstance(weights.layers[-1].feed_forward.down, ScaledExperts)
    tokens = [5, 17, 200, 3, 90] * 4    # more than 16, whose activations are rounded
    found = []
    for model in models:
        session = model.session(CONTEXT)
        session.feed(tokens)
        one_by_one = model.session(CONTEXT)
        for token in tokens:
            one_by_one.feed([token])
        found.append((session.logits.copy(), one_by_one.logits.copy()))
    (chunk, step), (wanted, _), (rounded_chunk, rounded_step) = found
    for logits in (chunk, step):  # sums of 80 products at most, in three layers
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(rounded_step, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert np.corrcoef(rounded_chunk, wanted)[0, 1] > 0.9998
    assert bool((rounded_chunk != chunk).any()) is not by_blocks


def test_other_quantisations_and_wrong_scales_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(DATA / "deepseek_v3", path)
    for change, message in (({"quant_method": "awq"}, "quant_method: found 'awq'; expected 'fp8'"),
                            ({"fmt": "e5m2"}, "fmt: found 'e5m2'"),
                            ({"weight_block_size": [64, 64]}, r"weight_block_size: found \[64, 64\]")):
        (path / "config.json").write_text(json.dumps(
            config_of("deepseek_v3", quantization_config={**QUANTISED, **change})))
        with pytest.raises(ModelError, match=message):
            load_model(path)
    as_fp8(path, np.random.default_rng(0))
    with pytest.raises(ModelError, match="dtype F8_E4M3"):  # Without the config's word for them scales are not read.
        (path / "config.json").write_text(json.dumps(config_of("deepseek_v3")))
        load_model(path)
    (path / "config.json").write_text(json.dumps(config_of("deepseek_v3", quantization_config=QUANTISED)))
    file = next(path.glob("model-00001*"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    save_safetensors(file, {**tensors, name: np.ones((2, 1), np.float32)})
    with pytest.raises(ModelError, match=rf"{name}: found shape \(2, 1\); expected shape \(1, 1\)"):
        load_model(path)


def write_gguf(
    path: Path, name: str, split: bool, form: str | None = None, hidden: int | None = None,
    other: dict[str, str] | None = None,
) -> Path:
    """A checkpoint as llama.cpp's converter writes it. split: the rows that make keys and values in two tensors. form:
    of the matrices whose rows are whole blocks of it, but for those of the roles in `other`. hidden: experts of that
    many features, random ones."""
    config = config_of(name)
    config["moe_intermediate_size"] = hidden or config["moe_intermediate_size"]
    third = config["model_type"] == "deepseek_v3"
    writer = gguf.GGUFWriter(path, "deepseek2")
    heads, keys, values, rank = 4, config["qk_nope_head_dim"], config["v_head_dim"], config["kv_lora_rank"]
    for key, value in {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads, "attention.kv_lora_rank": rank, "vocab_size": config["vocab_size"],
        "attention.key_length": rank + 8 if split else keys + 8, "attention.value_length": rank if split else values,
        **({"attention.key_length_mla": keys + 8, "attention.value_length_mla": values} if split else {}),
        **({"attention.q_lora_rank": config["q_lora_rank"]} if config["q_lora_rank"] else {}),
        "rope.dimension_count": 8, "rope.scaling.original_context_length": 64, "expert_count": 8,
        "expert_used_count": 3, "expert_shared_count": config["n_shared_experts"], "leading_dense_block_count": 1,
        "expert_feed_forward_length": config["moe_intermediate_size"], "expert_gating_func": 2 if third else 1,
        **({"expert_group_count": 4, "expert_group_used_count": 2} if config["n_group"] else {}),
    }.items():
        writer.add_uint32(f"deepseek2.{key}", value)
    rope = config["rope_parameters"]
    for key, value in {
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0, "rope.scaling.factor": 40.0,
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        "expert_weights_scale": config["routed_scaling_factor"],
    }.items():
        writer.add_float32(f"deepseek2.{key}", value)
    writer.add_string("deepseek2.rope.scaling.type", "yarn")
    writer.add_bool("deepseek2.expert_weights_norm", third)
    writer.add_array("tokenizer.ggml.tokens", small.TOKENS)
    writer.add_array("tokenizer.ggml.token_type", small.KINDS)
    writer.add_array("tokenizer.ggml.merges", small.PAIRS)
    for key, text in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "gpt-2")):
        writer.add_string(key, text)
    tensors: dict[str, np.ndarray] = {}
    for file in (DATA / name).glob("*.safetensors"):
        tensors |= {key: value.astype(np.float32) for key, value in load_file(file).items()}
    random = np.random.default_rng(3)
    for key in [key for key in tensors if hidden and "experts" in key]:
        many = hidden * (config["n_shared_experts"] if "shared" in key else 1)
        extents = (config["hidden_size"], many) if "down" in key else (many, config["hidden_size"])
        tensors[key] = (random.standard_normal(extents) / extents[1] ** 0.5).astype(np.float32)
    for role, pattern in GGUF_NAMES.items():
        for layer in range(config["num_hidden_layers"] if "{}" in pattern else 1):
            source = NAMES.get(role, NAMES["expand"] if split and role.startswith("expand_") else "")
            if role.startswith("expert_"):
                found = [tensors.get(source.format(layer, e)) for e in range(8)]
                value = None if found[0] is None else np.stack(found)
            else:
                value = tensors.get(source.format(layer)) if source and not (split and role == "expand") else None
            if value is None:
                continue
            if role.startswith("expand_"):
                rows = value.reshape(heads, keys + values, rank)
                value = rows[:, :keys].swapaxes(1, 2) if role == "expand_keys" else rows[:, keys:]
            value = np.ascontiguousarray(value)
            if form is not None and value.ndim > 1 and value.shape[-1] % 32 == 0 and role != "router":
                kind = gguf.GGMLQuantizationType[(other or {}).get(role, form)]
                writer.add_tensor(pattern.format(layer), gguf.quants.quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(pattern.format(layer), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("name", "split"), [("deepseek_v2_lite", False), ("deepseek_v3", True)])
def test_a_gguf_file_is_the_same_model(tmp_path: Path, name: str, split: bool) -> None:
    with np.load(DATA / f"{name}.npz") as file:
        tokens, logits = file["tokens"].tolist(), file["logits"]
    session = load_model(write_gguf(tmp_path / "x.gguf", name, split), "f32").session(CONTEXT)
    session.feed(tokens[:-1])
    assert_same(session.logits, logits[-2])
    session.feed(tokens[-1:])
    assert_same(session.logits, logits[-1])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("form", "hidden", "other"), [
    ("Q8_0", 32, {}), ("Q4_0", 32, {}), ("Q4_1", 32, {}), ("Q8_0", None, {}), ("Q8_0", 32, {"expert_up": "Q4_0"}),
])
def test_blocks_of_a_gguf_file_stay_blocks(
    tmp_path: Path, form: str, hidden: int | None, other: dict[str, str]
) -> None:
    """Beside the same file with its blocks widened to f32; what is not in blocks is rounded to bf16, and what blocks
    are multiplied by to 8 bits."""
    path = write_gguf(tmp_path / "x.gguf", "deepseek_v2_lite", True, form, hidden, other)
    blocks, exact, wide = (load_deepseek(path, kept) for kept in ("file", "file-f32", "f32"))
    first = blocks.weights.layers[0].feed_forward
    assert isinstance(first, DenseWeights) and isinstance(first.gate, Blocks)
    last = blocks.weights.layers[-1].feed_forward
    assert isinstance(last, MixtureWeights)
    for one in (last.gate, last.up):  # Experts of 24 features are no whole panels; two forms do not go together.
        assert isinstance(one, BlockExperts if hidden and not other else DenseExperts)
    assert isinstance(last.down, BlockExperts if hidden else DenseExperts)
    found = []
    for model in (wide, exact, blocks):
        session = model.session(CONTEXT)
        session.feed([5, 17, 200, 8])
        session.feed([9])
        found.append(session.logits)
    for logits in found[1:]:
        assert logits @ found[0] / np.linalg.norm(logits) / np.linalg.norm(found[0]) >= 0.9995


@pytest.mark.sampled(3)
@pytest.mark.parametrize("other", [
    {"shared_down": "Q4_0"}, {"shared_gate": "Q4_0", "shared_up": "Q4_0"}, {"expert_down": "Q5_0"},
    {"expert_down": "Q5_1"},
])
def test_shared_experts_in_another_form_stand_apart(tmp_path: Path, other: dict[str, str]) -> None:
    """Files in Q4_K_M have them so: rows of one expert are no multiple of 256, those of all shared ones are. Together
    or apart, a prompt, single tokens and several conversations at once give what the widened weights give."""
    path = write_gguf(tmp_path / "x.gguf", "deepseek_v2_lite", True, "Q8_0", 32, other)
    exact, wide, blocks = (load_deepseek(path, kept) for kept in ("file-f32", "f32", "file"))
    mixture, apart = exact.config.mixture, "expert_down" not in other
    one = exact.weights.layers[-1].feed_forward
    assert mixture is not None and mixture.shared == 2 and isinstance(one, MixtureWeights)
    assert all(isinstance(part, BlockExperts) for part in (one.gate, one.up, one.down))
    assert (one.shared is not None) == apart
    assert (one.experts, one.taken) == ((8, mixture.chosen) if apart else (10, mixture.chosen + 2))
    assert one.step_size == wide.weights.layers[-1].feed_forward.step_size
    sessions = [model.session(CONTEXT, threads=2) for model in (wide, exact, blocks)]
    for tokens in ([5, 17, 200, 8], [9], [31]):
        for session in sessions:
            session.feed(tokens)
        for session in sessions[1:]:
            found, wanted = session.logits, sessions[0].logits
            assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) >= 0.999
    batch = exact.batch(2, CONTEXT, threads=2)
    batch.table[1] = np.arange(batch.table.shape[1]) + batch.table.shape[1]
    fed = [Fed(token, slot, i) for slot in (0, 1) for i, token in enumerate([5, 17, 200, 8, 9, 31])]
    batch.step(fed, [Pick(5, Sampling(), 0.0), Pick(11, Sampling(), 0.0)])
    for found in batch.step_logits[:2]:
        np.testing.assert_allclose(found, sessions[1].logits, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not host_target().has("avx512_bf16"), reason="this processor multiplies no pairs of bf16")
@pytest.mark.parametrize("on_tiles", [False, True])
def test_experts_are_rounded_where_the_form_or_the_processor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_tiles: bool
) -> None:
    """In a prompt with room for many rows of each expert. A choice of experts near a tie may turn."""
    monkeypatch.setattr(Workspace, "rounds_many", lambda self: on_tiles)
    path = write_gguf(tmp_path / "x.gguf", "deepseek_v2_lite", True, "Q8_0", 32)
    found = []
    for form in ("file-f32", "file", "file-rounded"):
        session = load_deepseek(path, form).session(CONTEXT)
        kernels = {kernel.name for _, steps in session.prefill_sections() for kernel, _ in steps}
        assert ({"grouped_rounded_q8", "grouped_swiglu_rounded_q8"} <= kernels) == (
            form == "file-rounded" or (form == "file" and on_tiles))
        session.feed([(3 * i + 17) % 250 for i in range(50)])
        found.append(session.logits)
        assert found[-1] @ found[0] / np.linalg.norm(found[-1]) / np.linalg.norm(found[0]) > 0.9995


def test_absurd_numbers_of_a_gguf_file_are_refused(tmp_path: Path) -> None:
    metadata = {**GgufFile(write_gguf(tmp_path / "x.gguf", "deepseek_v3", True)).metadata}
    for key, value, message in (
        ("attention.key_length_mla", 8, "8 turned features of 8"), ("rope.dimension_count", 7, "7 turned features"),
        ("expert_used_count", 7, "7 experts of a token"), ("expert_group_count", 3, "8 experts in 3 groups"),
        ("expert_gating_func", 3, "expert_gating_func: found 3"), ("rope.scaling.type", "longrope", "'longrope'"),
        ("expert_weights_norm", 1, "expert_weights_norm: found 1"), ("block_count", 0, "block_count: found 0"),
    ):
        with pytest.raises(ModelError, match=message):
            from_gguf({**metadata, f"deepseek2.{key}": value}, "here")


def test_keys_and_values_of_all_heads_are_each_one_stream() -> None:
    """Where a checkpoint has a head's keys and then its values."""
    loaded = load_model(DATA / "deepseek_v2_lite", "f32")
    config, attention = loaded.config, loaded.weights.layers[0].attention
    name = NAMES["expand"].format(0)
    (rows,) = [part[name] for part in map(load_file, (DATA / "deepseek_v2_lite").glob("*.safetensors")) if name in part]
    rows = rows.astype(np.float32).reshape(config.heads, -1, config.key_rank)
    wanted = rows[:, : config.key_features], rows[:, config.key_features :]
    for found, one in zip((attention.keys, attention.values), wanted, strict=True):
        assert isinstance(found, DenseHeads) and found.weights.flags.c_contiguous
        np.testing.assert_array_equal(found.weights, one)
