"""Makes the small random checkpoints in tests/models/data, and what transformers computes.

    python -m tests.models.make_deepseek [NAME]...    needs torch and transformers (made with 5.24); the tests do not

Out: for each architecture a directory with a checkpoint in bf16, and NAME.npz beside it: `tokens`, `logits`
[tokens, vocabulary] of the checkpoint's weights in f32, `logits_bf16` of a forward pass in bf16 throughout, `greedy`:
128 tokens that follow, each the likeliest by its f32 logits. Holds: the likeliest token leads by MARGIN at every step,
so that another order of summation gives the same tokens; so does the last position that an indexer keeps, by
INDEX_MARGIN of the largest score.

deepseek_v3 has an MTP head as well, which transformers has not: `Predictor`, as the report on DeepSeek-V3 has it (2024,
section 2.2), with the order of its inputs and the output of the final norm as its hidden state as in vLLM's
deepseek_mtp.py. It is trained for a moment to foresee what the random model says. Of it the .npz has `draft_logits` for
the prompt, `drafts`, the likeliest token behind each token but one, and `draft_margins`, by how much it leads.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from . import small

DATA = Path(__file__).parent / "data"
VOCABULARY = small.VOCABULARY + 5
GREEDY, PROMPT, MARGIN, INDEX_MARGIN = 128, 24, 2e-3, 2e-5
SHOWN, STEPS = 48, 400
"""Tokens behind each prompt that a predictor is shown, and steps of its training."""
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
        num_nextn_predict_layers=1, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "deepseek_v32": lambda: DeepseekV32Config(
        **SHAPE, q_lora_rank=40, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        index_n_heads=16, index_head_dim=20, index_topk=12,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "qwen2": lambda: Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3": lambda: Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=256, tie_word_embeddings=True,
        rope_parameters={**YARN, "rope_theta": 1e6, "factor": 4.0, "attention_factor": 1.25},
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False, num_experts=8,
        num_experts_per_tok=3, norm_topk_prob=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
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


class Predictor(torch.nn.Module):
    """The MTP head of a DeepseekV3ForCausalLM: logits for the token after the next one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.main = [model]  # in a list, so that its parameters are not this module's
        self.block = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.enorm, self.hnorm, self.norm = (DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
                                             for _ in range(3))
        self.eh_proj = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [sequences, count] -> [sequences, count - 1, vocabulary]: from a token and the one behind it."""
        model = self.main[0]
        with torch.no_grad():
            hidden = model.model(tokens).last_hidden_state[:, :-1]
            embedded = model.model.embed_tokens(tokens[:, 1:])
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        places = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)[None, None].to(x.dtype)
        x = self.block(x, attention_mask=mask, position_ids=places,
                       position_embeddings=model.model.rotary_emb(x, position_ids=places))
        return model.lm_head(self.norm(x))

    def names(self) -> dict[str, torch.Tensor]:
        """Its tensors as checkpoints name them; embedding and head are the model's."""
        layer = f"model.layers.{self.main[0].config.num_hidden_layers}."
        tensors = {}
        for name, value in self.state_dict().items():
            if name.endswith("experts.gate_up_proj"):  # transformers joins what files have apart
                for expert, both in enumerate(value):
                    for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                        tensors[f"{layer}mlp.experts.{expert}.{part}_proj.weight"] = half.contiguous()
            elif name.endswith("experts.down_proj"):
                for expert, one in enumerate(value):
                    tensors[f"{layer}mlp.experts.{expert}.down_proj.weight"] = one.contiguous()
            else:
                name = name.removeprefix("block.")
                tensors[layer + ("shared_head.norm.weight" if name == "norm.weight" else name)] = value
        return tensors


def train_predictor(model: Any, tokens: list[int]) -> Predictor:
    """A predictor that was shown what follows a hundred random prompts."""
    predictor = Predictor(model)
    fill(predictor, 1)
    random = torch.Generator().manual_seed(1)
    seen = torch.cat([torch.tensor([tokens] * 4), torch.randint(0, small.VOCABULARY, (96, len(tokens)),
                                                                 generator=random)])
    for _ in range(SHOWN):
        seen = torch.cat([seen, model(seen).logits[:, -1:].argmax(-1)], dim=1)
    optimiser = torch.optim.Adam(predictor.parameters(), 3e-3)
    with torch.enable_grad():
        for step in range(STEPS):
            batch = seen[torch.randint(0, len(seen), (16,), generator=random)]
            logits = predictor(batch)[:, len(tokens) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, len(tokens) + 1 :].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % 50 == 0:
                print(f"step {step}: {float(loss.detach()):.3f}")
    with torch.no_grad():
        for value in predictor.parameters():
            value.copy_(value.to(torch.bfloat16))
    return predictor


def add_predictor(path: Path, model: Any, tokens: list[int], greedy: list[int]) -> dict[str, Any]:
    """Train a predictor for a model in f32 and write it beside the model; what it says."""
    predictor = train_predictor(model, tokens)
    file = "model-mtp.safetensors"
    tensors = {name: value.to(torch.bfloat16) for name, value in predictor.names().items()}
    save_file(tensors, path / file)
    index_path = path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, file)
    index_path.write_text(json.dumps(index, indent=2))
    logits = predictor(torch.tensor([tokens + greedy]))[0].detach()
    best = logits.topk(2)
    drafts = best.indices[:, 0].tolist()
    right = [a == b for a, b in zip(drafts[len(tokens) - 1 :], greedy[1:], strict=False)]
    print(f"{sum(right)} of {len(right)} drafts are right")
    return {"draft_logits": logits[: len(tokens) - 1].numpy(), "drafts": np.array(drafts, np.int32),
            "draft_margins": (best.values[:, 0] - best.values[:, 1]).numpy()}


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
    path = DATA / name
    shutil.rmtree(path, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path, max_shard_size="150KB")
    drafts = add_predictor(path, model, tokens, greedy) if name == "deepseek_v3" else {}
    narrow = model.to(torch.bfloat16)
    logits_bf16 = narrow(torch.tensor([tokens])).logits[0].float()
    small.write_tokenizer(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    for file in path.iterdir():
        file.chmod(0o644)
    np.savez_compressed(
        DATA / f"{name}.npz", tokens=np.array(tokens, np.int32), logits=logits.numpy(),
        logits_bf16=logits_bf16.numpy(), greedy=np.array(greedy, np.int32), **drafts,
    )
    size = sum(file.stat().st_size for file in [*path.iterdir(), DATA / f"{name}.npz"])
    cosine = torch.nn.functional.cosine_similarity(logits.flatten(), logits_bf16.flatten(), dim=0)
    print(f"{name}: seed {seed}, margin {margin:.4f}, {size / 1024:.0f} KiB, bf16 cosine {cosine:.6f}")
    print(json.dumps(json.loads((path / "config.json").read_text())))


if __name__ == "__main__":
    with torch.no_grad():
        for one in sys.argv[1:] or CONFIGS:
            make(one)
