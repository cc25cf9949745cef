"""The doctor's two hands: code run in a process of its own, and a tiny PHSA step to run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

PROBE_TIMEOUT_S = 180


@dataclass(frozen=True)
class Probe:
    """What a process of its own answered.

    Attributes:
        values: The object it printed; None if it failed.
        error_type: Name of the exception, `signal` or `timeout`; empty if it succeeded.
        error: The message.
    """

    values: dict[str, Any] | None
    error_type: str = ""
    error: str = ""

    def failure(self) -> str:
        """Return how it failed, in one line."""
        return f"{self.error_type}: {self.error}"


_PROBE_FRAME = """
import json, sys
def answer():
{body}
try:
    result = {{"values": answer()}}
except BaseException as error:
    result = {{"error_type": type(error).__name__, "error": str(error)[:600]}}
sys.stdout.write("\\nDOCTOR " + json.dumps(result) + "\\n")
sys.stdout.flush()
"""


def probe(body: str, *, hide_gpus: bool = False) -> Probe:
    """Run code in a process of its own and return what it answered.

    Args:
        body: The body of a function that returns a JSON object.
        hide_gpus: Let the process see no GPU.

    Returns:
        The answer, or how the process ended: an exception, a signal, or no end within `PROBE_TIMEOUT_S`.
    """
    code = _PROBE_FRAME.format(body="\n".join(f"    {line}" for line in body.strip().splitlines()))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    if hide_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Probe(None, "timeout", f"did not end within {PROBE_TIMEOUT_S} s")
    answers = [line for line in done.stdout.splitlines() if line.startswith("DOCTOR ")]
    if done.returncode < 0 or not answers:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Probe(None, "signal", f"the process died with code {done.returncode}: {last}")
    answer = json.loads(answers[-1].removeprefix("DOCTOR "))
    return Probe(answer.get("values"), answer.get("error_type", ""), answer.get("error", ""))


def tiny_step(device: str) -> dict[str, float]:
    """Build a two-layer PHSA model and run it forward and backward on two packed documents.

    Args:
        device: cpu or cuda.

    Returns:
        `loss_nats`, `grad_norm` (global L2) and `seconds` of the pass.

    Raises:
        RuntimeError: The loss or a gradient is not finite.
    """
    from phsa_megatron.parallel import cpu_shim

    cpu_shim.install(hide_gpu=device == "cpu")
    import time

    import torch

    from phsa_megatron.attention.punctuation import PunctuationTable
    from phsa_megatron.attention.side_info import SideInfo
    from phsa_megatron.config import schema
    from phsa_megatron.model.factory import build_model
    from phsa_megatron.parallel.groups import initialize

    config = schema.TrainConfig()
    config.run.dtype, config.cluster.device = schema.Dtype.fp32, schema.Device(device)
    config.model = schema.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 128)
    config.attention.block_tokens, config.attention.init_tokens, config.attention.local_tokens = 4, 4, 8
    config.data.seq_len_tokens = 64
    groups = initialize(config)
    try:
        (model,) = build_model(config, groups)
        tokens = torch.arange(64, device=groups.device)[None] % 100
        vocabulary = ["." if token % 5 == 0 else "a" for token in range(config.model.vocab_size)]
        attention = config.attention
        table = PunctuationTable.build(
            vocabulary, attention.punctuation_match, attention.punctuation_language
        )
        ends = torch.tensor([0, 40, 64], dtype=torch.int32, device=groups.device)
        side = SideInfo.build(tokens, ends, table.to(groups.device), attention, attention.train_topk)
        start_s = time.perf_counter()
        losses = model(tokens, tokens, None, labels=tokens.roll(-1), packed_seq_params=side)
        losses.mean().backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        values = {
            "loss_nats": losses.mean().item(),
            "grad_norm": torch.stack([gradient.norm() for gradient in gradients]).norm().item(),
            "seconds": time.perf_counter() - start_s,
        }
    finally:
        groups.close()
    if not all(torch.isfinite(torch.tensor(value)) for value in values.values()):
        raise RuntimeError(f"not finite: {values}")
    return values
