"""The report in a real browser: headless Chromium, where it is installed (Debian: `apt-get install chromium`)."""

import json

import pytest
from helpers import chromium
from helpers.report_run import DENOISERS, hostile_run, write_run

from t5x_like.checkpoints.checkpoint_ref import CheckpointRef
from t5x_like.reports.comparison_page import write_comparison
from t5x_like.reports.run_report import write_report

pytestmark = pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def page():
    browser = chromium.Page()
    yield browser
    browser.close()


@pytest.fixture
def report(tmp_path):
    return write_report(write_run(tmp_path / "run"))


def test_opens_without_an_error_and_loads_nothing_else(page, report):
    page.errors.clear()
    page.requests.clear()
    page.show(1200)
    page.open(report)
    assert page.evaluate("document.title") == "smoke"
    lengths = page.evaluate("[...document.querySelectorAll('.line')].map((line) => line.getTotalLength())")
    assert len(lengths) == 2 * (1 + len(DENOISERS)) + 1 + 8
    assert min(lengths) > 500
    assert page.errors == []
    assert {address.split(":")[0] for address in page.requests} <= {"file", "data"}
    assert sum(address.startswith("file") for address in page.requests) == 1


def test_pointer_reads_values_off_every_chart(page, report):
    page.errors.clear()
    page.show(1200)
    page.open(report)
    box = page.evaluate("(({x, y, width}) => [x, y, width])(document.querySelector('.plot').getBoundingClientRect())")
    page.point(box[0] + 0.5 * box[2], box[1] + 50)
    outputs = page.evaluate("[...document.querySelectorAll('output')].map((output) => output.textContent)")
    training, held_out = (float(part.split()[-1]) for part in outputs[0].split("held-out"))
    assert 3.2 < training < 3.4 and held_out == pytest.approx(3.43, abs=0.05)
    assert page.evaluate("[...document.querySelectorAll('.place')].map((place) => place.textContent)") == [
        "1,000"
    ] * len(outputs)
    page.point(5, 5)
    assert page.evaluate("document.body.classList.contains('reading')") is False
    page.evaluate("document.querySelector('.plot').focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
    page.point(5, 5)
    assert page.evaluate("document.querySelector('.place').textContent") == "1,980"
    assert page.errors == []


@pytest.mark.parametrize("width", [1200, 400])
def test_fits_the_window_in_both_schemes(page, report, width):
    colors = []
    for dark in (False, True):
        page.show(width, dark=dark)
        page.open(report)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colors.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colors[0] != colors[1]


def test_hostile_text_does_not_run(page, tmp_path):
    page.errors.clear()
    page.requests.clear()
    page.open(write_report(hostile_run(tmp_path / "run")))
    assert page.evaluate("document.title") != "owned"
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.errors == []
    assert sum(not address.startswith("data:") for address in page.requests) == 1


def test_policy_blocks_an_injected_script(page, report):
    """The second wall: even markup that escaped the escaping is not executed."""
    text = report.read_text().replace("<footer>", "<script>document.title = 'owned'</script><footer>")
    report.write_text(text)
    page.errors.clear()
    page.open(report)
    assert page.evaluate("document.title") == "smoke"
    assert any("Content Security Policy" in error for error in page.errors)


def test_a_comparison_opens_without_an_error_and_is_readable(page, tmp_path):
    """Nothing wider than the window, in both colour schemes; a value's dot lies within its interval."""
    runs = [write_run(tmp_path / name, name=name) for name in ("first", "second")]
    steps = {}
    for number, run in enumerate(runs):
        path = run / "evaluations.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps[run] = step = records[-1]["step"]
        folder = run / "evaluations" / str(step)
        folder.mkdir(parents=True)
        rows = [
            {"objective": name, "loss": 30.0 + number + row % 7, "tokens": 10.0, "bytes": 40, "digest": row}
            for name in (*records[-1]["objectives"], "prefix_lm")
            for row in range(24)
        ]
        (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = write_comparison([CheckpointRef(run, (steps[run],)) for run in runs], tmp_path / "comparison.html")
    page.errors.clear()
    page.requests.clear()
    for width in (1200, 1000, 900, 400):
        for dark in (False, True):
            page.show(width, dark=dark)
            page.open(target)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.show(1200)
    page.open(target)
    assert page.evaluate("document.querySelectorAll('.metrics circle').length") >= 2 * (1 + len(DENOISERS))
    assert page.errors == []
    assert {address.split(":")[0] for address in page.requests} <= {"file", "data"}
