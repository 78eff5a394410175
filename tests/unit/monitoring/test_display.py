import io
import logging
import warnings

from rich.console import Console

from t5x_like.monitoring.logging_setup import logging_to
from t5x_like.monitoring.progress_bar import Progress
from t5x_like.trainer.startup_summary import Part, StartSummary, print_summary
from t5x_like.utils.sanitize import visible

HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold]x[/bold][/nothing]\r\u202e"
"""Sets the title, clears the screen, holds markup that does not close, goes back to the line's start."""


def plain_console():
    return Console(file=io.StringIO(), width=100)


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=120, color_system="truecolor")


def test_visible_spells_out_controls_and_keeps_text():
    text = visible(HOSTILE + "naïve\tΩ\n" + "\ud800")
    assert text == "\\x1b]0;owned\\x07\\x1b[2J[bold]x[/bold][/nothing]\\x0d\\u202enaïve\tΩ\n\\ud800"


def test_one_plain_line_per_interval_without_a_terminal():
    console = plain_console()
    progress = Progress(2000, console=console)
    for step in range(1, 10):
        progress.advance(step)
    progress.write(10, {"loss": 8.3412, "tokens_per_second": 12345.0, "mfu": 0.3124, "step_time_s": 0.21})
    progress.status(HOSTILE)
    progress.status(HOSTILE)
    progress.close()
    metrics, status = console.file.getvalue().splitlines()
    assert metrics == "step 10/2000  loss 8.341  12.3k tokens/s  MFU 31.2 %  6:58 left"
    assert status == "step 10/2000  " + visible(HOSTILE)


def test_live_line_on_a_terminal_survives_hostile_text():
    console = terminal()
    progress = Progress(2000, console=console)
    progress.advance(11)
    progress.write(10, {"loss": float("nan")})
    progress.status(HOSTILE)
    progress.close()
    shown = console.file.getvalue()
    assert "step 11/2000" in shown and "loss NaN" in shown and "[bold]x[/bold][/nothing]" in shown
    assert "\x1b]0;owned" not in shown and "\x1b[2J" not in shown


def test_log_goes_to_the_file_and_warnings_to_the_console(tmp_path):
    console = plain_console()
    with logging_to(tmp_path / "log.txt", console):
        logging.getLogger("t5x_like.trainer.train").info("resumes from step 4")
        logging.getLogger("t5x_like.trainer.train").warning("%s", HOSTILE)
        logging.getLogger("elsewhere").info("chatter")
        warnings.warn("a deprecation", stacklevel=1)
    logging.getLogger("t5x_like.trainer.train").warning("afterwards")
    log, shown = (tmp_path / "log.txt").read_text(), console.file.getvalue()
    assert "INFO t5x_like.trainer.train: resumes from step 4" in log and "a deprecation" in log
    assert "chatter" not in log and "afterwards" not in log
    assert visible(HOSTILE) in shown and "resumes" not in shown and "afterwards" not in shown


def test_summary_shows_the_run():
    console = plain_console()
    summary = StartSummary(
        name="smoke " + HOSTILE,
        model="encoder-decoder, 4+4 layers",
        attention="flash for encoder self-attention",
        run_dir="runs/smoke",
        resume="resumes from step 400 of 2000",
        parts={"encoder": Part(5_242_880, 20_971_520), "decoder": Part(7_342_080, 29_368_320)},
        total_steps=2000,
        tokens_per_step=12_288,
        total_tokens=24_576_000,
        flops_per_step=5.3e11,
        memory={"parameters": 50 * 2**20, "gradients": 50 * 2**20},
        devices="8 x cpu",
        mesh={"data": 1, "fsdp": 4, "tensor": 2},
        versions={"python": "3.11.7", "jax": "0.10.2"},
    )
    print_summary(summary, console)
    shown = console.file.getvalue()
    for text in (
        "runs/smoke (resumes from step 400 of 2000)",
        "flash for encoder self-attention",
        "12.3k per step, 24.6M in 2,000 steps",
        "530 GFLOP per step",
        "in all 100 MiB per device",
        "mesh 4 fsdp x 2 tensor",
        "12,584,960",
        "jax 0.10.2",
        "[bold]x[/bold][/nothing]",
    ):
        assert text in shown
    assert "\x1b" not in shown
