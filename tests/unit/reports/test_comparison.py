"""The comparison page: intervals of paired and of unpaired examples, aligned samples, and text that attacks it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.errors import ConfigError
from t5x_like.evaluation import bootstrap, comparison
from t5x_like.reports.comparison_page import write_comparison
from t5x_like.utils.jsonl import encode_records

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&\x1b\u202e{{ 7*7 }}"


def write_run(folder, name, shift, *, text="text", rows=60, answers=("a", "b"), seed=0):
    """Write an evaluated run as `eval` leaves it: losses vary much from row to row, and are `shift` higher."""
    step_dir = folder / "evaluations" / "7"
    step_dir.mkdir(parents=True)
    noise = np.random.default_rng(seed).normal(3.0, 1.0, rows)
    held_out = [
        {"objective": "S", "row": i, "loss": 10 * (x + shift), "tokens": 10.0, "bytes": 40, "digest": f"{text}{i}"}
        for i, x in enumerate(noise)
    ]
    loss = float(np.mean(noise) + shift)
    metrics = {"em": 50.0 + 10 * shift, "examples": len(answers)}
    # The same documents with another tokenizer: the scores can be compared, and their rows are others.
    held_out_text = {"fingerprint": text, "tokenizer": text, "documents": 60, "bytes": 2400}
    objectives = {"S": {"loss": loss, "accuracy": 0.5, "tokens": 600}}
    result = {"step": 7, "objectives": objectives, "prefix_lm": None, "held_out": [held_out_text]}
    (folder / "config.json").write_text(json.dumps({"name": name, "training": {"global_batch_size": 8, "seed": shift}}))
    (line,) = encode_records([{**result, "tasks": {"quiz": metrics}}])
    (folder / "evaluations.jsonl").write_text(f"{line}\n")
    (step_dir / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    predictions = [{"index": i, "inputs": f"q{i}", "target": "t", "output": answer} for i, answer in enumerate(answers)]
    (step_dir / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    drawn = [50.0 + 10 * shift + x for x in np.random.default_rng(1).normal(0, 1, 100)]
    (step_dir / "quiz.metrics.json").write_text(json.dumps({"draws": {"em": drawn}}))
    sample = {"denoiser": "S", "inputs": "[S]in", "targets": "out", "prediction": f"said by {name}"}
    (folder / "samples.json").write_text(json.dumps([sample]))
    return folder


def subjects(*folders):
    return [comparison.read_checkpoint(CheckpointRef(folder)) for folder in folders]


def test_pairing_makes_a_small_difference_significant(tmp_path):
    """A tenth of the rows' standard deviation is insignificant on other rows and significant on the same ones."""
    first, same, other = (
        write_run(tmp_path / "a", "a", 0.0),
        write_run(tmp_path / "b", "b", 0.1),
        write_run(tmp_path / "c", "c", 0.1, text="other tokens", seed=5),
    )
    rows = {row.name: row for row in comparison.compare(subjects(first, same, other))}
    base, paired, unpaired = rows["loss/S"].cells
    assert base.difference is None and base.interval[0] < base.value < base.interval[1]
    assert paired.paired and paired.difference == pytest.approx(0.1)
    assert paired.difference_interval == pytest.approx((0.1, 0.1)) and paired.verdict == "worse"
    assert not unpaired.paired and unpaired.verdict == ""
    low, high = unpaired.difference_interval
    assert high - low == pytest.approx(np.hypot(*(np.diff(cell.interval)[0] for cell in (base, unpaired))), rel=0.3)
    assert rows["quiz/em"].cells[1].verdict == "better" and not rows["quiz/em"].lower_is_better
    assert "perplexity/S" not in rows and comparison.lower_is_better("bits_per_byte")


def test_draws_are_of_the_rows(tmp_path):
    (subject,) = subjects(write_run(tmp_path / "a", "a", 0.5))
    rows = [json.loads(line) for line in (tmp_path / "a/evaluations/7/held_out.jsonl").read_text().splitlines()]
    indices = next(iter(bootstrap.draws(len(rows))))
    expected = sum(rows[i]["loss"] for i in indices) / sum(rows[i]["tokens"] for i in indices)
    assert subject.draws["loss/S"][0] == pytest.approx(expected)


def test_samples_and_answers_are_aligned(tmp_path):
    both = subjects(
        write_run(tmp_path / "a", "a", 0.0, answers=("x", "y", "z")),
        write_run(tmp_path / "b", "b", 0.0, answers=("x", "other")),
    )
    (sample,) = comparison.aligned_samples(both)
    assert sample["predictions"] == ["said by a", "said by b"]
    answers = comparison.aligned_answers(both, 5)["quiz"]
    assert [(row["index"], row["predictions"]) for row in answers] == [(1, ["y", "other"]), (0, ["x", "x"])]
    assert comparison.configuration_differences(both) == []
    changed = write_run(tmp_path / "c", "c", 1.0)
    assert comparison.configuration_differences([both[0], *subjects(changed)]) == [("training.seed", ["0.0", "1.0"])]


def add_records(folder, offset, objectives=()):
    """Write a falling training loss, and the mixture of the run."""
    losses = (3.0 + offset - 0.02 * step for step in range(60))
    records = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in encode_records(records)))
    config = json.loads((folder / "config.json").read_text())
    config["data"] = {"mixture": [{"name": name} for name in objectives]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drawn(page, key):
    """Return (label class, height at the first step) of each line of a chart; lower on the page is a larger number."""
    figure = re.search(rf'data-chart="{key}".*?</figure>', page, flags=re.S)
    found = re.findall(r'<g class="(s\d)">.*?class="line" d="M[\d.]+ ([\d.]+)', figure[0], flags=re.S) if figure else []
    return [(css, float(y)) for css, y in found]


def test_curves_of_the_runs_are_drawn_on_one_scale(tmp_path):
    low, high = (add_records(write_run(tmp_path / name, name, 0.0), offset) for name, offset in (("a", 0), ("b", 1)))
    page = write_comparison([CheckpointRef(low), CheckpointRef(high)], tmp_path / "page.html").read_text()
    (first, below), (second, above) = drawn(page, "loss")
    assert (first, second) == ("s0", "s1") and above < below
    assert [css for css, _ in drawn(page, "held-out")] == ["s0", "s1"]
    assert "mixtures of the runs differ" not in page
    other = add_records(write_run(tmp_path / "c", "c", 0.0), 0, objectives=("R",))
    assert (
        "mixtures of the runs differ"
        in write_comparison([CheckpointRef(low), CheckpointRef(other)], tmp_path / "other.html").read_text()
    )


def test_a_model_without_records_has_no_curve(tmp_path):
    run, model = add_records(write_run(tmp_path / "a", "a", 0.0), 0), write_run(tmp_path / "b", "b", 0.0)
    page = write_comparison([CheckpointRef(run), CheckpointRef(model)], tmp_path / "page.html").read_text()
    assert "data-chart" not in page and "<h2>Curves</h2>" not in page


def test_page_executes_no_text_of_a_run(tmp_path):
    first = write_run(tmp_path / "a", HOSTILE, 0.0, answers=(HOSTILE, "b"))
    second = write_run(tmp_path / "b", "b", 0.3)
    page = write_comparison(
        [CheckpointRef(first), CheckpointRef(second, (7,))], tmp_path / "out" / "page.html"
    ).read_text()
    assert "<script" not in page and "<img" not in page and "http:" not in page and "https:" not in page
    assert "&lt;/script&gt;" in page and "\x1b" not in page and "{{ 7*7 }}" in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert "is better than the first in 1, worse in 1" in page
    assert "+0.3* worse <small>+0.3 to +0.3</small>" in re.sub(r"<span[^>]*>(.)</span>", r"\1", page)


def test_checkpoints_without_evaluation_are_refused(tmp_path):
    run = write_run(tmp_path / "a", "a", 0.0)
    with pytest.raises(ConfigError, match="found steps 7, expected an evaluated step"):
        comparison.read_checkpoint(CheckpointRef(run, (8,)))
    with pytest.raises(ConfigError, match="found 1 checkpoint, expected 2 to 6"):
        write_comparison([CheckpointRef(run)], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="found no evaluation"):
        comparison.read_checkpoint(CheckpointRef(tmp_path))
    with pytest.raises(ConfigError, match="found no such directory, expected the directory of an evaluated run"):
        comparison.read_checkpoint(CheckpointRef(tmp_path / "b"))
    with pytest.raises(ConfigError, match="MODEL: found .*a:7 more than once"):
        write_comparison([CheckpointRef(run), CheckpointRef(run, (7,))], tmp_path / "page.html")
