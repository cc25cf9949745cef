from __future__ import annotations

import json

from phsa_megatron.config.run_folder import RunFolder, prepare_run_folder
from phsa_megatron.parallel.groups import initialize
from phsa_megatron.training.loop import train


def _run(config):
    prepare_run_folder(config)
    groups = initialize(config)
    try:
        return train(config, groups)
    finally:
        groups.close()


def test_a_run_ends_with_summary_and_done_marker(tiny_config):
    config = tiny_config()
    outcome = _run(config)
    folder = RunFolder.of(config)
    assert outcome.done
    assert folder.done.read_text().strip() == "6"
    summary = json.loads(folder.summary_file.read_text())
    print(summary)
