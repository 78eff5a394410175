import pytest

from t5x_like.monitoring.throughput import Peak, achieved, measured_peak, rates
from t5x_like.monitoring.time_tracker import TimeTracker, goodput, lost_time
from t5x_like.utils import formatting


class Time:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_every_second_belongs_to_one_state():
    time = Time()
    clock = TimeTracker(now=time)
    time.seconds += 1
    clock.enter("step")
    time.seconds += 10
    with clock.state("eval"):
        time.seconds += 4
        with clock.state("save"):
            time.seconds += 2
        time.seconds += 1
    time.seconds += 3
    totals = clock.totals()
    assert totals == {"init": 1, "restore": 0, "compile": 0, "data_wait": 0, "step": 13, "save": 2, "eval": 5}
    assert goodput(totals) == 13 / 21
    assert sum(totals.values()) == time.seconds - 100


def test_state_is_left_when_its_work_raises():
    time = Time()
    clock = TimeTracker(now=time)
    with pytest.raises(RuntimeError), clock.state("save"):
        raise RuntimeError
    time.seconds += 5
    assert clock.totals()["init"] == 5


def test_laps_cover_this_process_and_totals_the_whole_run():
    time = Time()
    clock = TimeTracker(now=time)
    clock.go_on({"step": 50.0})
    clock.enter("step")
    time.seconds += 5
    assert clock.lap()["step"] == 5
    time.seconds += 2
    assert clock.lap()["step"] == 2
    assert clock.totals()["step"] == 57


def test_unknown_state_is_refused():
    with pytest.raises(ValueError, match="lunch"):
        TimeTracker().enter("lunch")


def test_rates_leave_out_evaluation_saving_and_compilation():
    seconds = {"init": 9, "compile": 20, "data_wait": 1, "step": 3, "save": 7, "eval": 30}
    found = rates(seconds, steps=8, tokens=4000, flops_per_step=1e12, peak=measured_peak(10e12))
    assert found == {"step_time_s": 0.5, "tokens_per_second": 1000, "data_wait_fraction": 0.25, "mfu": 0.2}


def test_no_mfu_without_a_peak_and_no_rates_without_steps():
    seconds = {"data_wait": 0.0, "step": 2.0}
    assert "mfu" not in rates(seconds, steps=1, tokens=1, flops_per_step=1, peak=None)
    assert rates(seconds, steps=0, tokens=0, flops_per_step=1, peak=Peak(1.0, "")) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.number(3.14159), "3.142"),
        (formatting.number(1.2e-5), "1.20e-05"),
        (formatting.number(12345.6), "12,346"),
        (formatting.number(0.001), "0.001000"),
        (formatting.number(float("nan")), "NaN"),
        (formatting.count(950), "950"),
        (formatting.count(999.9), "1.00k"),
        (formatting.count(19.6e9), "19.6B"),
        (formatting.size(1024), "1.00 KiB"),
        (formatting.size(12), "12 B"),
        (formatting.flops(166.8e9), "167 GFLOP"),
        (formatting.percent(0.3124), "31.2 %"),
        (formatting.duration(0.21), "0.2 s"),
        (formatting.duration(59.7), "1:00"),
        (formatting.duration(3725), "1:02:05"),
        (formatting.duration(3 * 86400 + 2 * 3600 + 60), "3 d 02:01"),
    ],
)
def test_number_formatting(text, expected):
    assert text == expected


def test_lost_time_explains_the_goodput():
    seconds = {"init": 2.0, "step": 6.0, "eval": 1.0, "save": 1.0}
    lost = lost_time(seconds)
    assert lost["lost_time/init"] == 0.2 and lost["lost_time/compile"] == 0
    assert sum(lost.values()) + goodput(seconds) == 1
    assert lost_time({}) == {}


def test_mfu_is_never_above_what_the_machine_has_done():
    """A peak that was measured on a busy machine rises with what training reaches; one by data sheet stays."""
    seconds = {"step": 2.0, "data_wait": 0.0}
    reached = achieved(seconds, steps=4, flops_per_step=50.0)
    assert reached == 100.0
    low = measured_peak(60.0)
    risen = low.at_least(reached)
    assert risen.at_least(80.0) is risen and "fastest steps" in risen.source
    assert rates(seconds, steps=4, tokens=1, flops_per_step=50.0, peak=risen)["mfu"] == 1.0
    by_data_sheet = Peak(60.0, "data sheet")
    assert by_data_sheet.at_least(reached) is by_data_sheet
    assert measured_peak(200.0).at_least(reached).flops_per_second == 200.0
