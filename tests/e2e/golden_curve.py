"""A short run on the CPU whose numbers must not move by one bit: how it is run, where its record lies.

`python tests/e2e/golden_curve.py` records it again and prints what moved. Arithmetic libraries are held to
code paths that every x86 machine has, yet the last bit of an exponential was seen to differ between two
processors. A record is therefore keyed by the torch version, the capability that torch reports under that
rule and the processor's vendor, family and model.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "tests" / "golden"
KEYS = ("train/loss_nats", "optim/grad_norm", "optim/num_zeros")
NUM_STEPS = 50
# One thread fixes the order of sums; the rest fixes which vector instructions compute them.
PINNED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "CUDA_VISIBLE_DEVICES": "",
}
OVERRIDES = (
    "recipe=phsa_demo_cpu",
    "run.name=golden",
    f"run.train_steps={NUM_STEPS}",
    "run.num_threads=1",
    "run.sample_prompts=[]",
    "model.num_layers=2",
    "model.hidden_size=96",
    "model.ffn_hidden_size=256",
    "model.num_query_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=24",
    "data.seq_len_tokens=256",
    "optim.global_batch_sequences=4",
    "optim.micro_batch_sequences=2",
    "optim.lr=3e-3",
    "optim.warmup_steps=5",
    "optim.decay_steps=10",
    "evaluate.every_steps=0",
    "evaluate.num_sequences_per_domain=2",
    "checkpoint.save_every_steps=0",
    "monitoring.log_every_steps=1",
    "monitoring.report=false",
    "monitoring.wandb.mode=disabled",
)


def environment() -> dict[str, str]:
    """Return the environment of the pinned run."""
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "launch"))
    return {**os.environ, **PINNED, "PYTHONPATH": path}


@functools.cache
def key() -> str:
    """Return what a record is valid for: torch version and CPU capability under the pinned rule."""
    program = (
        "import torch;print(torch.__version__.split('+')[0], torch.backends.cpu.get_cpu_capability().lower())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment(), check=True, capture_output=True, text=True
    )
    version, capability = out.stdout.split()
    return f"torch{version}_{capability}"


def processor() -> str:
    """Return vendor, family and model of this machine's processor, or 'unknown'."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {name.strip(): value.strip() for name, value in facts.items()}
    names = ("vendor_id", "cpu family", "model")
    return "-".join(found[name].lower() for name in names) if all(n in found for n in names) else "unknown"


def record_file() -> Path:
    """Return the path of the record for this machine's processor."""
    return RECORDS / f"demo_{key()}_{processor()}.json"


def records() -> dict[str, list[dict[str, str]]]:
    """Return the records of every processor for this torch version and capability, by file name."""
    files = sorted(RECORDS.glob(f"demo_{key()}*.json"))
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in files}


def phsa_train(*arguments: str, cwd: Path = ROOT) -> None:
    """Run `phsa-train` under the pinned rule; its output is shown if it fails."""
    result = subprocess.run(
        [sys.executable, "-m", "phsa_megatron.cli", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"phsa-train {' '.join(arguments)} failed:\n{result.stdout}\n{result.stderr}")


def run(*extra: str) -> list[dict[str, str]]:
    """Return one row a step: the three numbers as hexadecimal floats, exact to the last bit; `extra` wins."""
    phsa_train("prepare-demo")
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        chosen = {text.split("=", 1)[0]: text for text in (*OVERRIDES, f"run.root_dir={folder}", *extra)}
        phsa_train(*chosen.values())
        lines = (Path(folder) / "golden" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line).get("values", {}) for line in lines]
    return [{k: float(v[k]).hex() for k in KEYS} for v in values if KEYS[0] in v]


def main() -> None:
    """Record the curve and print what moved."""
    path, rows = record_file(), run()
    if len(rows) != NUM_STEPS:
        raise RuntimeError(f"the run logged {len(rows)} of {NUM_STEPS} steps; nothing is recorded")
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for step, (before, after) in enumerate(zip(old, rows, strict=False), 1):
        for name in KEYS:
            if before[name] != after[name]:
                moved = (float.fromhex(row[name]) for row in (before, after))
                print(f"step {step} {name}: {' -> '.join(map(repr, moved))}")
    path.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    print(f"recorded {len(rows)} steps in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
