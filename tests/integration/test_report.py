import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.report_run import DENOISERS, HOSTILE, SAMPLES, config, hostile_run, write_metrics, write_run

from t5x_like.reports import run_report
from t5x_like.reports.html_page import resource
from t5x_like.reports.plots import write_curves_png
from t5x_like.reports.run_data import held_out_mean, read_run
from t5x_like.reports.run_report import write_report
from t5x_like.utils.jsonl import RecordFile, encode_records, read_records


class Page(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles by element."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.text = {}
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.setdefault(self._open[-1] if self._open else "", []).append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def report(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_report_has_every_curve_score_and_sample(tmp_path):
    run_dir = write_run(tmp_path / "run")
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    titles = {attributes["aria-label"].split(":")[0] for attributes in page.named("svg") if "aria-label" in attributes}
    assert titles >= {"Loss of the mixture", "Learning rate", "Gradient norm", "Tokens per second", *DENOISERS}
    drawn = [attributes for attributes in page.named("path") if attributes.get("class") == "line"]
    assert all(attributes["d"].startswith("M") and attributes["d"].count("L") > 5 for attributes in drawn)
    text = " ".join(" ".join(parts) for parts in page.text.values())
    for words in (
        "1.59",
        "gzip",
        "lzma",
        "token unigram entropy",
        "84.8 %",
        "finished",
        "encoder-decoder",
        "adafactor",
    ):
        assert words in text
    sentinels = [attributes for attributes in page.named("b") if attributes.get("class", "").startswith("sentinel")]
    assert len(sentinels) == json.dumps(SAMPLES).count("<extra_id_")
    assert [attributes.get("class") for attributes in page.named("b")].count("mode mode-R") == 1


def test_every_part_of_the_time_has_a_colour_of_its_own():
    colours = dict(re.findall(r"^\.state-(\w+) { --curve: (.*); }$", resource("run_report.css"), flags=re.M))
    assert colours.keys() == run_report._STATE_WORDS.keys()
    assert len(set(colours.values())) == len(colours)


def test_report_is_one_file_without_external_resources(tmp_path):
    page = report(write_run(tmp_path / "run"))
    for tag, attributes in page.elements:
        assert "src" not in attributes and "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert attributes["href"].startswith("#") or attributes == {"rel": "icon", "href": "data:,"}, tag
    assert not re.search(r"url\(|@import", "".join(page.text["style"]))
    assert not re.search(r"fetch|import\(|https?:|eval", page.text["script"][-1])


def test_policy_allows_our_script_and_style_only(tmp_path):
    page = report(write_run(tmp_path / "run"))
    (policy,) = [item["content"] for item in page.named("meta") if "http-equiv" in item]
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    contents = ["".join(page.text["style"]), page.text["script"][-1]]
    assert allowed == {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents}
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_text_from_the_run_stays_text(tmp_path):
    page = report(hostile_run(tmp_path / "run"))
    assert len(page.named("script")) == 2 and not page.named("img")
    assert [attributes for _, attributes in page.elements if "onerror" in attributes] == []
    assert "\x1b" not in str(page.text) and "\u202e" not in str(page.text)
    data = json.loads(page.text["script"][0])
    assert HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") in {
        curve["label"] for chart in data for curve in chart["curves"]
    }


@pytest.mark.parametrize("steps", [range(1, 2), range(10, 60, 10)])
def test_short_runs_are_drawn(tmp_path, steps):
    write_metrics(tmp_path, steps)
    page = report(tmp_path)
    assert sum(attributes.get("class") == "line" for attributes in page.named("path")) == 16


def test_empty_run_directory_has_a_report(tmp_path):
    page = report(tmp_path)
    assert "running, or killed: there is no exit.json" in page.text["p"]
    assert not page.named("figure")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        write_report(tmp_path / "elsewhere")


def test_values_that_are_not_finite_are_reported_and_left_out(tmp_path):
    records = RecordFile(tmp_path / "metrics.jsonl", restored_step=None)
    for step in range(1, 101):
        loss = float("nan") if step == 40 else float("inf") if step > 90 else 5.0 / step
        records.append({"step": step, "loss": loss, "grad_norm": float("nan")})
    records.close()
    page = report(tmp_path)
    assert "the loss is not finite in 11 records, first at step 40" in page.text["p"]
    assert "nan" not in str([attributes.get("d") for attributes in page.named("path")]).lower()


def test_unreadable_files_are_reported(tmp_path):
    write_run(tmp_path)
    (tmp_path / "samples.json").write_text("[{")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2010, "lo')
    text = " ".join(report(tmp_path).text["p"])
    assert "samples.json cannot be read" in text and "metrics.jsonl: 1 damaged lines are skipped" in text


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path):
    losses = (6.0 if step == 71_828 else 2.0 + (step % 7) / 100 for step in range(100_000))
    lines = encode_records({"step": step, "loss": loss} for step, loss in enumerate(losses))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    page = write_report(tmp_path)
    assert page.stat().st_size < 200_000
    raw = [item["d"] for item in Page(page.read_text()).named("path") if item.get("class") == "raw"]
    heights = [float(point.split()[1]) for point in re.split("[ML]", raw[0])[1:]]
    assert min(heights) < 100 and np.median(heights) > 800


def test_one_objective_is_drawn_once(tmp_path):
    document = config()
    document["data"]["mixture"] = [{"kind": "causal_lm", "name": "causal_lm", "rate": 1.0, "mode": None}]
    (tmp_path / "config.json").write_text(json.dumps(document))
    records = RecordFile(tmp_path / "metrics.jsonl", restored_step=None)
    for step in range(1, 4):
        records.append({"step": step, "loss": 3.0 / step, "loss/causal_lm": 3.0 / step})
    records.close()
    assert [item["data-chart"] for item in report(tmp_path).named("figure")] == ["loss"]


def test_held_out_loss_of_the_mixture_is_weighted_by_rates_and_tokens(tmp_path):
    document = config()
    document["data"]["mixture"] = [{"name": "R", "rate": 3.0}, {"name": "S", "rate": 1.0}]
    (tmp_path / "config.json").write_text(json.dumps(document))
    objectives = {"R": {"loss": 2.0, "tokens": 100}, "S": {"loss": 4.0, "tokens": 500}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": 5, "objectives": objectives}))
    curve = held_out_mean(read_run(tmp_path))
    assert curve.steps.tolist() == [5]
    assert curve.values.tolist() == [(3 * 100 * 2.0 + 500 * 4.0) / (3 * 100 + 500)]


@pytest.mark.parametrize("complete", [True, False])
def test_picture_of_the_curves(tmp_path, complete):
    run_dir = tmp_path / "run"
    if complete:
        write_run(run_dir)
    else:
        run_dir.mkdir()
        write_metrics(run_dir, [1])
    from matplotlib.image import imread

    pixels = imread(write_curves_png(run_dir, tmp_path / "curves.png"))
    assert pixels.shape[:2] == (576, 1920)
    assert (pixels[..., :3].min(axis=2) < 0.8).mean() > 0.005


def test_metrics_of_tasks_are_drawn_over_the_steps(tmp_path):
    run_dir = write_run(tmp_path / "run")
    path = run_dir / "evaluations.jsonl"
    records = read_records(path).records
    for record in records:
        record["tasks"] = {"squad_v010": {"em": record["step"] / 50, "f1": "NaN", "examples": 90}, HOSTILE: {"x": 1.0}}
    path.write_text("".join(f"{line}\n" for line in encode_records(records)))
    page = write_report(run_dir).read_text()
    assert "squad_v010" in page and "<b>em</b>" in page
    assert "<b>f1</b>" not in page, "there is nothing to draw"
    assert "<img" not in page and "&lt;img" in page
