import json
import re
from html.parser import HTMLParser

import pytest

from phsa_megatron.config.errors import ConfigError, DataError
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.monitoring.report import read_run, write_report
from phsa_megatron.monitoring.report_command import main
from phsa_megatron.monitoring.report_figures import restart_steps

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting and collects text, tags, ids and everything that could load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        if tag not in _VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in {"src", "href", "xlink:href", "data", "action", "srcset"}:
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def says(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def _page(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished_page(finished_run):
    return write_report(finished_run).read_text(encoding="utf-8")


def test_a_finished_run_shows_everything_a_person_asks_for(finished_page):
    page = Page(finished_page)
    said = page.says()
    for text in (
        "phsa_demo_cpu", "finished", "PHSA, blocks of 16, top-2, init 16 + local 32", "8 layers, width 192",
        "0.62 × unigram entropy", "0:05:27", "2 launches", "Dotted verticals: restarts",
        "Loss", "Validation by domain, nats", "Validation by domain, bits per byte", "Learning rate",
        "Gradient norm", "Speed", "Selected share by layer", "Selected share over time",
        "unigram 6.42", "bigram 5.31",
        "话说天下大势，", "分久必合", "checkpoint committed", "all steps are trained",
        "train_topk", "sources.english.weight",
        "2.13.0", "not installed", "Norm of the gradient of all weights",
    ):  # fmt: skip
        assert text in said, text
    assert page.tags.count("figure") == 8


def test_the_page_loads_nothing_and_has_no_script(finished_page):
    text = finished_page
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_ids_are_unique_so_that_drawings_do_not_clip_each_other(finished_page):
    text = finished_page
    ids = Page(text).ids
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_text_of_the_run_cannot_become_markup(finished_page):
    text = finished_page
    assert "&lt;b&gt;the clock&lt;/b&gt; struck as she rose &amp; went out." in text


def test_drawings_take_the_colours_of_the_page(finished_page):
    text = finished_page
    assert "stroke: var(--series-1)" in text and "#0102" not in text and "#0101" not in text
    for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", text)):
        assert text.count(f"{variable}:") == 2, f"{variable} needs a light and a dark value"


def test_a_live_run_without_a_summary_has_a_report_too(unfinished_run):
    said = _page(unfinished_run).says()
    assert "unfinished, last record 2025-" in said and "640 of 900" in said
    assert "unigram" not in said and "What the model writes" not in said


def test_a_dense_run_has_no_figures_of_selection(unfinished_run):
    config = unfinished_run.config_file.read_text().replace("kind: phsa", "kind: dense")
    write_atomically(unfinished_run.config_file, config)
    lines = unfinished_run.metrics_file.read_text().splitlines()
    kept = [line for line in lines if "attention/" not in line]
    assert len(kept) < len(lines)
    write_atomically(unfinished_run.metrics_file, "\n".join(kept) + "\n")
    said = _page(unfinished_run).says()
    assert "dense attention" in said and "Selected share" not in said and "Gradient norm" in said


def test_restarts_are_drawn_at_the_last_step_before_them(unfinished_run):
    assert restart_steps(read_run(unfinished_run).records) == [400]


def test_values_of_the_killed_attempt_are_not_drawn(unfinished_run):
    records = read_run(unfinished_run).records
    assert records.num_superseded_steps == 37
    steps, _ = records.series("train/loss_nats")
    assert steps == list(range(1, 641))


def test_a_run_that_has_only_started_and_one_with_only_nan(unfinished_run):
    start = json.dumps({"event": "start", "time": 1.0, "environment": {}})
    write_atomically(unfinished_run.metrics_file, start + "\n")
    assert "No metrics are recorded yet." in _page(unfinished_run).says()
    nan = json.dumps(
        {"step": 1, "time": 2.0, "values": {"train/loss_nats": "NaN", "optim/grad_norm": "Infinity"}}
    )
    write_atomically(unfinished_run.metrics_file, f"{start}\n{nan}\n")
    assert "1 of 900" in _page(unfinished_run).says()


@pytest.mark.parametrize(
    ("event", "status"),
    [
        ({"event": "error", "text": "gradient is not finite"}, "failed: gradient is not finite"),
        ({"event": "end", "reason": "SIGTERM"}, "stopped: SIGTERM"),
    ],
)
def test_how_a_run_ended_stands_at_the_top(unfinished_run, event, status):
    with unfinished_run.metrics_file.open("a") as file:
        file.write(json.dumps({**event, "time": 2e9, "step": 640}) + "\n")
    assert status in _page(unfinished_run).says()


def test_the_end_of_an_earlier_launch_is_not_the_state_of_this_one(unfinished_run):
    first_line = json.dumps({"event": "end", "time": 1.0, "reason": "SIGTERM"}) + "\n"
    write_atomically(unfinished_run.metrics_file, first_line + unfinished_run.metrics_file.read_text())
    assert "unfinished" in _page(unfinished_run).says()


def test_a_metric_of_another_version_is_shown_without_a_meaning(unfinished_run):
    with unfinished_run.metrics_file.open("a") as file:
        file.write(json.dumps({"step": 641, "time": 2e9, "values": {"old/metric": 1.5}}) + "\n")
    assert "old/metric 1.5 not in this version's metrics table" in _page(unfinished_run).says()


def test_bad_folders_are_refused_with_the_file(tmp_path, unfinished_run):
    with pytest.raises(ConfigError, match=r"nowhere is no run folder"):
        write_report(RunFolder(tmp_path / "nowhere"))
    unfinished_run.summary_file.write_text("{")
    with pytest.raises(DataError, match=r"summary\.json is not JSON"):
        write_report(unfinished_run)
    unfinished_run.metrics_file.unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        write_report(unfinished_run)


def test_command_writes_and_prints_the_path(unfinished_run, capsys):
    assert main([str(unfinished_run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(unfinished_run.report_file)
    assert unfinished_run.report_file.stat().st_size < 3_000_000
