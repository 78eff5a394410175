import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.reports.charts import EXTENT, Scale, Series, decimate, path, series, smooth, ticks, value_scale
from t5x_like.reports.sample_view import pieces, sample


def curve(values):
    return Series("loss", np.arange(1.0, len(values) + 1), np.asarray(values, np.float64))


def test_decimation_keeps_the_extremes_and_the_ends():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[[31_415, 92_653]] = 50.0, -60.0
    found = decimate(curve(values))
    assert len(found) <= 602
    assert found.values.max() == 50.0 and found.values.min() == -60.0
    assert (found.steps[0], found.steps[-1]) == (1, 100_000)
    assert (np.diff(found.steps) > 0).all()


def test_decimation_keeps_a_break():
    values = np.ones(10_000)
    values[5_000] = np.nan
    assert np.isnan(decimate(curve(values)).values).sum() == 1


def test_trend_keeps_level_slope_and_start():
    flat = smooth(curve(np.full(500, 3.25)))
    np.testing.assert_allclose(flat.values, 3.25)
    line = smooth(curve(np.linspace(0, 1, 500)))
    inner = slice(20, -20)
    np.testing.assert_allclose(line.values[inner], (line.steps[inner] - 1) / 499, atol=1e-12)
    steep = 8 * np.exp(-np.arange(500) / 5.0)
    assert smooth(curve(steep)).values[0] == pytest.approx(8, rel=0.02)


def test_trend_removes_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=3000)
    assert smooth(curve(noise)).values[50:].std() < 0.2
    assert smooth(curve(noise[:49])) is None


def test_trend_on_a_logarithmic_axis_does_not_foresee_a_jump():
    values = np.where(np.arange(400) < 200, 1.0, 1e8)
    trend = smooth(curve(values), log=True)
    assert trend.values[trend.steps == 196].item() < 100
    assert smooth(curve(values)).values[trend.steps == 196].item() > 1e6


def test_trend_breaks_where_the_curve_does():
    values = np.ones(300)
    values[100:120] = np.nan
    trend = smooth(curve(values))
    assert np.isnan(trend.values).sum() == 1
    assert trend.steps[np.isnan(trend.values)].item() == 121
    assert path(trend, Scale(0, 300), Scale(0, 2)).count("M") == 2


def test_values_that_are_not_finite_break_the_line():
    x, y = Scale(0, 10), Scale(0, 10)
    assert path(curve([1, 2, math.nan, 4, math.inf, 6, 7]), x, y) == (
        "M100.0 900.0L200.0 800.0M400.0 600.0h0M600.0 400.0L700.0 300.0"
    )


def test_wide_positive_ranges_are_logarithmic():
    scale = value_scale([curve([1e-3, 1.0, 1e3])])
    assert scale.log
    assert ticks(scale, 3) == [0.001, 1.0, 1000.0]
    assert scale(1e-3) > 0 and scale(1e3) < EXTENT
    assert not value_scale([curve([2.0, 8.0])]).log


def test_booleans_and_text_are_no_metrics():
    records = [{"step": 1, "a": 1.0}, {"step": 2, "a": True}, {"step": 3, "a": "x"}, {"step": 4}, {"step": 5, "a": 2}]
    assert series(records, "a").steps.tolist() == [1, 5]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=64), min_size=1, max_size=120))
def test_curve_stays_within_the_chart_for_any_values(values):
    found = curve(values)
    x, y = Scale(0.0, float(len(values))), value_scale([found])
    for drawn in (found, smooth(found, log=y.log)):
        if drawn is not None:
            text = path(drawn, x, y)
            assert "nan" not in text and "inf" not in text
            heights = [float(point.split()[1].removesuffix("h0")) for point in text.replace("M", "L").split("L")[1:]]
            assert all(-1 <= height <= EXTENT + 1 for height in heights)
    marks = ticks(y, 3)
    assert len(marks) <= 9 and all(math.isfinite(mark) for mark in marks)


def test_sample_is_cut_at_sentinels_and_its_mode():
    kinds = [(piece.kind, piece.text) for piece in pieces("[R] Thank <extra_id_0> <unk> [S] to<extra_id_12></s>\x1b")]
    assert kinds == [
        ("mode", "R"),
        ("text", " Thank "),
        ("sentinel", "<extra_id_0>"),
        ("text", " <unk> [S] to"),
        ("sentinel", "<extra_id_12>"),
        ("text", "</s>\\x1b"),
    ]


def test_restored_spans_are_marked():
    found = sample(
        {
            "denoiser": "R",
            "inputs": "a <extra_id_0> b <extra_id_1> c <extra_id_2>",
            "targets": "<extra_id_0> one two<extra_id_1> three<extra_id_2> four</s>",
            "prediction": "<extra_id_0>one two<extra_id_1> four<extra_id_1> three<extra_id_7> four</s>",
        }
    )
    assert (found.right_spans, found.spans) == (1, 3)
    assert [piece.text for piece in found.prediction if piece.marked] == ["one two"]
