"""Packed documents with random contents, for the comparisons with `phsa_oracle`."""

import torch
from phsa_oracle import Setting, attention, boundaries, punctuation_weights

from phsa_kernels import api

M = 4
SETTING = Setting(topk=2, init_tokens=M, local_tokens=2 * M, block_tokens=M)


class Case:
    """Packed documents with random queries, keys, values and punctuation, in fp64."""

    def __init__(self, lengths, heads=(2, 1), head_dim=4, punctuation="some", seed=0, m=M):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.num_tokens, self.m = list(lengths), sum(lengths), m
        shape = {"q": heads[0], "k": heads[1], "v": heads[1]}
        self.q, self.k, self.v = (
            torch.randn(self.num_tokens, h, head_dim, dtype=torch.float64, generator=generator)
            for h in shape.values()
        )
        marks = torch.rand(self.num_tokens, generator=generator) < 0.3
        self.marks = {"some": marks, "none": marks & False, "all": marks | True}[punctuation].tolist()
        self.cu_seqlens = boundaries(self.lengths)

    @property
    def weights(self):
        return punctuation_weights(self.marks, self.lengths, self.m)

    def run(self, setting=SETTING, weights="punctuation", **kwargs):
        weights = self.weights if weights == "punctuation" else weights
        return api.phsa_attention(
            self.q, self.k, self.v, weights, self.cu_seqlens, **setting.kwargs(), **kwargs
        )

    def oracle(self, setting=SETTING):
        return attention(self.q, self.k, self.v, self.marks, self.lengths, setting)

    def gradients(self, out, upstream):
        return torch.autograd.grad(out, [self.q, self.k, self.v], upstream)

    def positions(self):
        return api.token_positions(self.cu_seqlens, self.num_tokens)
