import subprocess
import sys

import pytest
import torch

from phsa_megatron.parallel import cpu_shim

needs_shim = pytest.mark.skipif(not cpu_shim.is_installed(), reason="this machine has CUDA: the shim is off")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@needs_shim
def test_install_after_megatron_is_refused():
    late = _run("import megatron.core\nfrom phsa_megatron.parallel import cpu_shim\ncpu_shim.install()")
    assert late.returncode != 0
    assert "came after `import megatron.core`" in late.stderr


@needs_shim
def test_install_before_megatron_works_twice_and_without_it_megatron_needs_cuda():
    seed = "from megatron.core import tensor_parallel as t\nt.random.initialize_rng_tracker()\n"
    seed += "t.get_cuda_rng_tracker().add('x', 1)\n"
    good = _run(
        "from phsa_megatron.parallel import cpu_shim\nassert cpu_shim.install() and cpu_shim.install()\n"
        + seed
    )
    assert good.returncode == 0, good.stderr
    without = _run(seed)
    assert without.returncode != 0, "megatron works without the shim: it is not needed any more"


@needs_shim
def test_cuda_devices_mean_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    assert torch.zeros(2).cuda().device.type == "cpu"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2, pin_memory=True).is_pinned() is False
    assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"


@needs_shim
def test_other_devices_and_type_conversions_are_left_alone():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).type(torch.float64).dtype == torch.float64


@needs_shim
def test_cuda_random_state_is_the_cpu_generator():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


@needs_shim
def test_hiding_gpus_after_installation_keeps_the_shim():
    assert cpu_shim.install(hide_gpu=True)


def test_with_cuda_it_may_be_asked_for_at_any_time():
    asked = (
        "import sys, torch\ntorch.cuda.is_available = lambda: True\n"
        "from phsa_megatron.parallel import cpu_shim\nassert not cpu_shim.install()\n"
        "import megatron.core\nassert not cpu_shim.install() and not cpu_shim.is_installed()\n"
    )
    late = _run(asked)
    assert late.returncode == 0, late.stderr
    hidden_too_late = _run(asked + "cpu_shim.install(hide_gpu=True)\n")
    assert "came after `import megatron.core`" in hidden_too_late.stderr


def test_a_gpu_that_cannot_be_hidden_any_more_is_said():
    late = _run(
        "import torch\ntorch.cuda.is_available = lambda: True\n"
        "from phsa_megatron.parallel import cpu_shim\ncpu_shim.install(hide_gpu=True)\n"
    )
    assert "came after CUDA was looked for" in late.stderr
