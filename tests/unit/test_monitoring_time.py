import pytest

from t5x_like.monitoring import formats
from t5x_like.monitoring.clock import Clock, goodput
from t5x_like.monitoring.throughput import Peak, measured_peak, rates


class Time:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_every_second_belongs_to_one_state():
    time = Time()
    clock = Clock(now=time)
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
    assert totals == {"init": 1, "compile": 0, "data_wait": 0, "step": 13, "save": 2, "eval": 5}
    assert goodput(totals) == 13 / 21
    assert sum(totals.values()) == time.seconds - 100


def test_state_is_left_when_its_work_raises():
    time = Time()
    clock = Clock(now=time)
    with pytest.raises(RuntimeError), clock.state("save"):
        raise RuntimeError
    time.seconds += 5
    assert clock.totals()["init"] == 5


def test_laps_are_of_this_process_and_totals_of_the_run():
    time = Time()
    clock = Clock(now=time)
    clock.go_on({"step": 50.0})
    clock.enter("step")
    time.seconds += 5
    assert clock.lap()["step"] == 5
    time.seconds += 2
    assert clock.lap()["step"] == 2
    assert clock.totals()["step"] == 57


def test_unknown_state_is_refused():
    with pytest.raises(ValueError, match="lunch"):
        Clock().enter("lunch")


def test_rates_leave_out_evaluation_saving_and_compilation():
    seconds = {"init": 9, "compile": 20, "data_wait": 1, "step": 3, "save": 7, "eval": 30}
    found = rates(seconds, steps=8, tokens=4000, flops_per_step=1e12, peak=measured_peak(10e12))
    assert found == {"seconds_per_step": 0.5, "tokens_per_second": 1000, "data_wait_fraction": 0.25, "mfu": 0.2}


def test_no_mfu_without_a_peak_and_no_rates_without_steps():
    seconds = {"data_wait": 0.0, "step": 2.0}
    assert "mfu" not in rates(seconds, steps=1, tokens=1, flops_per_step=1, peak=None)
    assert rates(seconds, steps=0, tokens=0, flops_per_step=1, peak=Peak(1.0, "")) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.number(3.14159), "3.142"),
        (formats.number(1.2e-5), "1.20e-05"),
        (formats.number(12345.6), "12,346"),
        (formats.number(0.001), "0.001000"),
        (formats.number(float("nan")), "NaN"),
        (formats.count(950), "950"),
        (formats.count(999.9), "1.00k"),
        (formats.count(19.6e9), "19.6B"),
        (formats.size(1024), "1.00 KiB"),
        (formats.size(12), "12 B"),
        (formats.flops(166.8e9), "167 GFLOP"),
        (formats.percent(0.3124), "31.2 %"),
        (formats.duration(0.21), "0.2 s"),
        (formats.duration(59.7), "1:00"),
        (formats.duration(3725), "1:02:05"),
        (formats.duration(3 * 86400 + 2 * 3600 + 60), "3 d 02:01"),
    ],
)
def test_numbers_for_people(text, expected):
    assert text == expected
