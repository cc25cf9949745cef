"""A run folder as a real run leaves it: noisy curves, a kill, a resume, two domains, Chinese samples."""

import json
import math
import random

import pytest

from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.run_folder import RunFolder

CONFIG = """\
run: {name: phsa_demo_cpu, root_dir: runs, seed: 1234, train_steps: 900, sample_prompts: [It was, 天下]}
model: {name: demo, num_layers: 8, hidden_size: 192, num_query_heads: 6, num_kv_heads: 2, vocab_size: 8192}
attention: {kind: phsa, impl: reference, block_tokens: 16, init_tokens: 16, local_tokens: 32, train_topk: 2}
data:
  name: demo_prose
  seq_len_tokens: 512
  sources:
    english: {weight: 0.6, domain: english, train_prefix: prepared/en, valid_prefix: prepared/en_valid}
    chinese: {weight: 0.4, domain: chinese, train_prefix: prepared/zh, valid_prefix: null}
parallel: {tensor_size: 1}
optim: {global_batch_sequences: 8, lr: 0.002, clip_grad_norm: 1.0}
cluster: {name: cpu, device: cpu}
monitoring: {log_every_steps: 1}
"""


class Clock:
    def __init__(self):
        self.now = 1_764_000_000.0

    def tick(self, seconds):
        self.now += seconds
        return self.now


def _step_values(step, noise):
    loss = 3.9 + 5.1 * math.exp(-step / 130) + noise.gauss(0, 0.05)
    warm, decay = min(1, step / 60), min(1, (900 - step) / 180)
    return {
        "train/loss_nats": loss,
        "optim/lr": 2e-3 * warm * decay,
        "optim/grad_norm": 0.45
        + 6 * math.exp(-step / 30)
        + abs(noise.gauss(0, 0.08))
        + (4 if step == 512 else 0),
        "optim/num_zeros": 0,
        "perf/tokens_per_s": 11_800 + noise.gauss(0, 250),
        "perf/step_time_s": 0.35,
        "perf/dense_equiv_tflops": 0.21,
        "progress/consumed_tokens": step * 8 * 512,
        "perf/goodput_frac": 0.617,
        "memory/peak_gib": 1.4,
    }


def _evaluation(step):
    values = {"val/loss_nats": 4.0 + 5.0 * math.exp(-step / 130), "val/eval_s": 2.0}
    for domain, extra in (("english", -0.2), ("chinese", 0.35)):
        nats = values["val/loss_nats"] + extra
        values[f"val/{domain}/loss_nats"] = nats
        values[f"val/{domain}/bits_per_byte"] = nats / math.log(2) / (4.1 if domain == "english" else 3.2)
    for layer in range(1, 9):
        share = 0.05 + 0.03 * layer * (1 - math.exp(-step / 300)) * (1 + 0.4 * math.sin(layer))
        values[f"attention/layer_{layer}/selected_mass_frac"] = share
        values[f"attention/layer_{layer}/attended_key_frac"] = 0.31
        values[f"attention/layer_{layer}/max_logit"] = 3.0 + layer + step / 100
    values["attention/max_logit"] = 11.0 + step / 100
    values["attention/frac_queries_with_more_candidates_than_k"] = 0.83
    return values


def _launch(write, clock, first, last, noise):
    environment = {"host": "laptop", "python": "3.11.7", "packages": {"torch": "2.13.0", "triton": None}}
    write({"event": "start", "time": clock.tick(5), "environment": environment})
    write({"event": "start_from", "time": clock.tick(1), "text": f"going on from step {first - 1}"})
    for step in range(first, last + 1):
        write({"step": step, "time": clock.tick(0.35), "values": _step_values(step, noise)})
        if step % 100 == 0:
            write({"step": step, "time": clock.tick(2), "values": _evaluation(step)})
            write(
                {
                    "event": "checkpoint_requested",
                    "time": clock.tick(0.1),
                    "step": step,
                    "text": f"step {step}",
                }
            )
            write(
                {
                    "event": "checkpoint_committed",
                    "time": clock.tick(0.4),
                    "step": step,
                    "text": f"step {step}",
                }
            )


@pytest.fixture
def unfinished_run(tmp_path):
    """A run that was killed at step 437, resumed at 400, and is at step 640."""
    folder = RunFolder(tmp_path / "phsa_demo_cpu")
    folder.path.mkdir()
    write_atomically(folder.config_file, CONFIG)
    lines, clock, noise = [], Clock(), random.Random(7)
    _launch(lines.append, clock, 1, 437, noise)
    clock.tick(600)
    _launch(lines.append, clock, 401, 640, noise)
    _save(folder, lines)
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The same run to its end, with baselines, samples and a summary; tests only read it."""
    folder = RunFolder(tmp_path_factory.mktemp("finished") / "phsa_demo_cpu")
    folder.path.mkdir()
    write_atomically(folder.config_file, CONFIG)
    lines, clock, noise = [], Clock(), random.Random(7)
    _launch(lines.append, clock, 1, 437, noise)
    clock.tick(600)
    _launch(lines.append, clock, 401, 900, noise)
    baselines = {"unigram_entropy_nats": 6.42, "bigram_entropy_nats": 5.31}
    lines.append({"event": "baselines", "time": clock.tick(1), **baselines})
    for prompt, text in (
        ("It was a bright cold day", " in the parlour, and <b>the clock</b> struck as she rose & went out."),
        ("话说天下大势，", "分久必合，合久必分。曹操引兵至城下，众将皆大惊。"),
    ):
        lines.append({"event": "sample", "time": clock.tick(1), "prompt": prompt, "text": text})
    lines.append({"event": "end", "time": clock.tick(1), "step": 900, "reason": "all steps are trained"})
    _save(folder, lines)
    summary = {"final_val_loss_nats": 4.01, "wall_s": 327.0, "steps": 900, **baselines}
    write_atomically(folder.summary_file, json.dumps(summary))
    return folder


def _save(folder, lines):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(folder.metrics_file, text)
