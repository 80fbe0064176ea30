"""Makes the small random DeepSeek and Qwen2 checkpoints in tests/models/data, and what transformers computes on them.

    python -m tests.models.make_deepseek [NAME]...    needs torch and transformers (made with 5.24); the tests do not

Out: for each architecture a directory with a checkpoint in bf16, and NAME.npz beside it: `tokens`, `logits`
[tokens, vocabulary] of the checkpoint's weights in f32, `logits_bf16` of a forward pass in bf16 throughout, `greedy`:
128 tokens that follow, each the likeliest by its f32 logits. Holds: the likeliest token leads by MARGIN at every step,
so that another order of summation gives the same tokens; so does the last position that an indexer keeps, by
INDEX_MARGIN of the largest score.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, DeepseekV32Config, Qwen2Config

from . import small

DATA = Path(__file__).parent / "data"
VOCABULARY = small.VOCABULARY + 5
GREEDY, PROMPT, MARGIN, INDEX_MARGIN = 128, 24, 2e-3, 2e-5
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 64,
        "beta_fast": 32, "beta_slow": 1}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 80, "moe_intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "max_position_embeddings": 256,
}
CONFIGS: dict[str, Any] = {
    "deepseek_v2_lite": lambda: DeepseekV2Config(
        **SHAPE, q_lora_rank=None, n_shared_experts=2, topk_method="greedy",
        rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **SHAPE, q_lora_rank=40, n_shared_experts=1, topk_method="group_limited_greedy", n_group=4, topk_group=2,
        routed_scaling_factor=4.0, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SHAPE, q_lora_rank=40, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        num_nextn_predict_layers=0, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "deepseek_v32": lambda: DeepseekV32Config(
        **SHAPE, q_lora_rank=40, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        index_n_heads=16, index_head_dim=20, index_topk=12,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "qwen2": lambda: Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}


def fill(model: Any, seed: int) -> None:
    """Weights of a size that keeps activations near 1, each a number that bf16 has."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.1 * noise
        elif tensor.ndim == 1:
            value = 1.0 + 0.1 * noise
        elif "embed_tokens" in name:
            value = noise
        else:
            value = noise * (2.0 / tensor.shape[-1] ** 0.5)
        with torch.no_grad():
            tensor.copy_(value.to(torch.bfloat16))


def follow(model: Any, tokens: list[int]) -> tuple[list[int], float]:
    """The greedy continuation, and by how much the likeliest token led where it led least."""
    made: list[int] = []
    margin = float("inf")
    for _ in range(GREEDY):
        row = model(torch.tensor([[*tokens, *made]])).logits[0, -1]
        best = row.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        made.append(int(best.indices[0]))
    return made, margin


def index_margin(model: Any, tokens: list[int]) -> float:
    """By how much of its largest score each token's last kept position leads the next, where it leads least."""
    margin = float("inf")
    topk = torch.Tensor.topk

    def watched(scores: torch.Tensor, k: int, dim: int = -1, **rest: Any) -> Any:
        nonlocal margin
        if k < scores.shape[-1] == len(tokens):
            values = torch.sort(scores[0], descending=True).values[k:]
            margin = min(margin, float((values[:, k - 1] - values[:, k]).min() / scores[0].tril().abs().max()))
        return topk(scores, k, dim=dim, **rest)

    torch.Tensor.topk = watched
    try:
        model(torch.tensor([tokens]))
    finally:
        torch.Tensor.topk = topk
    return margin


def make(name: str) -> None:
    for seed in range(100):
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").float().eval()
        fill(model, seed)
        tokens = np.random.default_rng(seed).integers(0, small.VOCABULARY, PROMPT).tolist()
        greedy, margin = follow(model, tokens)
        if margin >= MARGIN and len(set(greedy)) > GREEDY // 4 and (
                "index_topk" not in vars(model.config) or index_margin(model, tokens + greedy) >= INDEX_MARGIN):
            break
    else:
        raise SystemExit(f"{name}: no seed keeps a margin of {MARGIN}")
    logits = model(torch.tensor([tokens])).logits[0]
    narrow = model.to(torch.bfloat16)
    path = DATA / name
    shutil.rmtree(path, ignore_errors=True)
    narrow.save_pretrained(path, max_shard_size="150KB")
    logits_bf16 = narrow(torch.tensor([tokens])).logits[0].float()
    small.write_tokenizer(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    for file in path.iterdir():
        file.chmod(0o644)
    np.savez_compressed(
        DATA / f"{name}.npz", tokens=np.array(tokens, np.int32), logits=logits.numpy(),
        logits_bf16=logits_bf16.numpy(), greedy=np.array(greedy, np.int32),
    )
    size = sum(file.stat().st_size for file in [*path.iterdir(), DATA / f"{name}.npz"])
    cosine = torch.nn.functional.cosine_similarity(logits.flatten(), logits_bf16.flatten(), dim=0)
    print(f"{name}: seed {seed}, margin {margin:.4f}, {size / 1024:.0f} KiB, bf16 cosine {cosine:.6f}")
    print(json.dumps(json.loads((path / "config.json").read_text())))


if __name__ == "__main__":
    with torch.no_grad():
        for one in sys.argv[1:] or CONFIGS:
            make(one)
