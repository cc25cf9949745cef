import json
import shutil
import subprocess
from pathlib import Path

import pytest

from phsa_megatron.config.errors import ConfigError, DataError
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.monitoring.alerts import Alert, write_alert
from phsa_megatron.monitoring.comparison import differences, write_comparison
from phsa_megatron.monitoring.plots import smoothed
from phsa_megatron.monitoring.report_command import main
from tests.monitoring.test_report import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def two_runs(unfinished_run, tmp_path):
    """The unfinished run, and another with more layers' worth of k that has a torn last line and an alert."""
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    text = unfinished_run.config_file.read_text().replace("train_topk: 2", "train_topk: 4")
    write_atomically(other.config_file, text.replace("name: phsa_demo_cpu", "name: wider"))
    lines = unfinished_run.metrics_file.read_text().splitlines()[:500]
    write_atomically(other.metrics_file, "\n".join(lines) + '\n{"step": 999, "ti')
    write_alert(other.alerts_dir, Alert("loss_spike", 77, "loss is up & <b>away</b>"))
    return [unfinished_run, other]


@pytest.fixture
def page_file(two_runs, tmp_path):
    return write_comparison(two_runs, tmp_path / "comparison.html")


def test_the_page_shows_runs_curves_maps_settings_restarts_and_alerts(page_file):
    page = Page(page_file.read_text(encoding="utf-8"))
    said = page.says()
    for text in (
        "2 runs compared", "phsa_demo_cpu", "wider", "unfinished, last record", "640 of 900",
        "Training loss", "Validation loss", "Gradient norm", "Speed", "Validation, chinese",
        "phsa_demo_cpu: attention on the selected blocks", "wider: attention on the selected blocks",
        "attention.train_topk", "401 to 640", "laptop", "loss_spike", "loss is up & <b>away</b>",
        "running mean, the past weighs 0.9", "goodput", "61.7%", "Largest attention logit",
        "phsa_demo_cpu: largest attention logit",
    ):  # fmt: skip
        assert text in said, text
    assert "run.name" not in said and "seq_len_tokens" not in said, "only settings that differ"
    assert "999" not in said, "a torn last line is not read"
    assert "script" not in page.tags
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert len(page.ids) == len(set(page.ids)) > 100


def test_differences_name_what_one_run_lacks(two_runs):
    from phsa_megatron.monitoring.comparison import _open

    config = two_runs[1].config_file
    write_atomically(config, config.read_text().replace(", progress: true", "").replace("lr: 0.002, ", ""))
    assert differences(_open(two_runs)) == [
        ("attention.train_topk", [("2", False), ("4", True)]),
        ("optim.lr", [("0.002", False), ("(absent)", True)]),
    ]


def test_curves_over_tokens(two_runs, tmp_path):
    page = write_comparison(two_runs, tmp_path / "tokens.html", axis="tokens").read_text()
    assert ">tokens<" in page and "Curves over consumed tokens" in page


def test_a_running_mean_is_not_pulled_by_its_start_and_passes_over_gaps():
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0] * 3)
    gap = smoothed([float("nan"), 1.0, float("inf"), 3.0], 0.5)
    assert str(gap[0]) == "nan" and gap[1:] == pytest.approx([1.0, 1.0, (0.5 + 3) / 1.5])


def test_the_command_compares_several_runs(two_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(folder.path) for folder in two_runs]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html" and Path("comparison.html").exists()
    with pytest.raises(ConfigError, match="--smoothing=1"):
        main([str(two_runs[0].path), "--smoothing", "1"])
    with pytest.raises(DataError, match="given twice"):
        write_comparison([two_runs[0], two_runs[0]], tmp_path / "x.html")


def in_chromium(page_file, *options, timeout_s=60):
    """Open a page in a headless browser; return what it printed on (stdout, stderr)."""
    profile = page_file.parent / "browser"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        # No network: it asks for nothing by itself.
        "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
        "--virtual-time-budget=3000", *options,
        page_file.resolve().as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    return ended.stdout, ended.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: `apt-get install chromium` runs this test")
def test_a_browser_shows_every_plot_and_reports_no_error(page_file, finished_run, tmp_path):
    from phsa_megatron.monitoring.report import write_report

    pages = {"comparison": page_file, "report": tmp_path / "report.html"}
    shutil.copy(write_report(finished_run), pages["report"])
    for name, file in pages.items():
        # A probe that a browser runs after layout: which drawings have a size, and what their colours became.
        probe = tmp_path / f"{name}_probe.html"
        text = file.read_text(encoding="utf-8").replace("default-src 'none'", "script-src 'unsafe-inline'")
        script = (
            "<script>addEventListener('load', () => { document.title = JSON.stringify("
            "[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('svg')].filter("
            "s => s.getBoundingClientRect().width > 200 && s.getBoundingClientRect().height > 100 && "
            "s.querySelectorAll('path, use, image').length > 5).length)) })</script>"
        )
        probe.write_text(text.replace("</body>", script + "</body>"), encoding="utf-8")
        dom, _ = in_chromium(probe, "--dump-dom", "--window-size=1280,2000")
        shown = json.loads(dom[dom.index("<title>") + 7 : dom.index("</title>")])
        assert len(shown) >= 8 and set(shown) == {1}, f"{name}: each figure shows one drawing: {shown}"
        _, log = in_chromium(file, "--dump-dom")
        assert "CONSOLE" not in log, log
    # Negative control: the same browser reports what the page's policy forbids.
    bad = tmp_path / "bad.html"
    bad.write_text(pages["report"].read_text().replace("</body>", "<script>1</script></body>"))
    assert "CONSOLE" in in_chromium(bad, "--dump-dom")[1]
