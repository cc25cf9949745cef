import importlib.util
import re
import sys

import pytest

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.schema import WandbConfig
from phsa_megatron.monitoring.metrics import METRICS
from phsa_megatron.monitoring.wandb_workspace import LAYOUT, build_workspace


def test_every_plot_shows_rows_of_the_metrics_table():
    named = [name for plots in LAYOUT.values() for plot in plots for name in plot.metrics]
    assert set(named) <= set(METRICS) and len(named) == len(set(named)) > 20


@pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="wandb-workspaces is not installed here"
)
def test_the_workspace_that_would_be_saved_has_every_section_and_plot():
    workspace = build_workspace(WandbConfig(project="p", entity="team"))
    assert (workspace.project, workspace.entity) == ("p", "team")
    assert [section.name for section in workspace.sections] == list(LAYOUT)
    model = workspace._to_model().model_dump_json()  # what `save` sends
    for plots in LAYOUT.values():
        for plot in plots:
            assert f'"{plot.title}"' in model, plot.title
    (by_layer,) = [
        panel
        for section in workspace.sections
        for panel in section.panels
        if panel.title == "attention on the selected blocks"
    ]
    assert re.search(by_layer.metric_regex, "attention/layer_12/selected_mass_frac")
    assert not re.search(by_layer.metric_regex, "attention/layer_12/kept_mass_frac")


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(DeviceError, match=r"phsa-megatron\[workspace\]"):
        build_workspace(WandbConfig())
