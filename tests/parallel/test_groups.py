import random
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist

from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.schema import Device, TrainConfig
from phsa_megatron.parallel import cpu_shim, groups


@pytest.fixture
def two_processes_expected(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig()
    config.cluster.processes_per_node = 2
    return config


def test_one_process_has_the_whole_model_and_all_data(single_process_groups):
    found = single_process_groups
    assert (found.rank, found.world_size, found.data_rank, found.data_size) == (0, 1, 0, 1)
    assert found.is_first_stage and found.is_last_stage


def test_collectives_of_one_process_return_their_input_unchanged(single_process_groups):
    tensor = torch.arange(3.0)
    assert single_process_groups.any_true(True) is True
    assert single_process_groups.any_true(False) is False
    for collective in ("sum_over_data", "sum_over_world", "from_last_stage"):
        result = getattr(single_process_groups, collective)(tensor)
        assert torch.equal(result, tensor) and result is not tensor
    single_process_groups.barrier()


def test_closing_lets_the_process_start_again_with_the_same_draws():
    draws = []
    for _ in range(2):
        opened = groups.initialize(TrainConfig())
        draws.append((torch.rand(3).tolist(), np.random.rand(), random.random()))
        opened.close()
        assert not dist.is_initialized()
    assert draws[0] == draws[1]


def test_another_seed_draws_other_numbers():
    draws = []
    for seed in (1, 2):
        config = TrainConfig()
        config.run.seed = seed
        opened = groups.initialize(config)
        draws.append(torch.rand(3).tolist())
        opened.close()
    assert draws[0] != draws[1]


def test_wrong_number_of_processes_is_refused_before_connecting():
    config = TrainConfig()
    config.cluster.num_nodes, config.cluster.processes_per_node = 2, 4
    with pytest.raises(ConfigError, match=r"is 8 processes, but 1 started. Start 8"):
        groups.initialize(config)
    assert not dist.is_initialized()


def test_layout_that_does_not_divide_the_processes_is_refused_before_connecting(two_processes_expected):
    two_processes_expected.parallel.tensor_size = 3
    with pytest.raises(ConfigError, match=r"parallel.tensor_size=3 .* multiple of 3"):
        groups.initialize(two_processes_expected)
    assert not dist.is_initialized()


def test_a_process_that_does_not_come_is_named(two_processes_expected):
    two_processes_expected.health.start_timeout_s = 1.0
    with pytest.raises(DeviceError, match=r"processes \[1\] of 2 did not start within 1 s"):
        groups.initialize(two_processes_expected)


def test_rank_without_address_is_refused(two_processes_expected, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(DeviceError, match="MASTER_PORT is not"):
        groups.initialize(two_processes_expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_on_a_machine_without_it_is_refused():
    config = TrainConfig()
    config.cluster.device = Device.cuda
    with pytest.raises(DeviceError, match="cluster.device=cuda, but torch sees no CUDA device"):
        groups.initialize(config)


def test_cpu_run_that_would_use_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_shim, "_installed_mode", None)
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES="):
        groups.initialize(TrainConfig())


def test_number_of_threads_is_used(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    config = TrainConfig()
    config.run.num_threads = 3
    groups.initialize(config).close()
    assert asked == [3]
