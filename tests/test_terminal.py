"""The terminal view: a bar, or a line an iteration; what it shows of a GPU."""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_config

from dancegrpo_fast.report.terminal import Terminal, trend
from dancegrpo_fast.run import _Run


def test_the_trend_rises_from_the_lowest_to_the_highest_mark():
    assert trend([0, 1, 2, 3, 4, 5, 6, 7], "01234567") == "01234567"
    assert trend([5, math.nan, 5], "01234567") == "3 3"  # No change: the middle.
    assert trend([math.nan, -1, 1], "ab") == " ab" and trend([]) == ""


class Stream(io.StringIO):
    encoding = "utf-8"
    tty = False

    def isatty(self):
        return self.tty


def show_three(stream: Stream, **changes) -> None:
    with Terminal(5, 1, shown=changes.get("shown", True), stream=stream) as view:
        for reward in (0.25, 0.5, 0.375):
            spent = {"time/sample": 10.0, "time/update": 50.0, "speed/samples_per_second": 3.0}
            view.show({"reward/mean": reward, "gate/max_gap": 1.2e-7}, spent)


def test_a_log_file_gets_one_plain_line_an_iteration(caplog):
    caplog.set_level(logging.INFO)
    stream = Stream()
    show_three(stream)
    assert stream.getvalue() == ""  # No bar, no carriage returns.
    marks = "\u2581\u2588\u2585"
    assert caplog.messages[-1] == (
        f"iteration 4/5  reward 0.375  trend {marks}  gap 1.2e-07  took 60.0 s  left 01:00"
    )
    assert len(caplog.messages) == 3


def test_a_stream_without_unicode_gets_plain_marks(caplog):
    caplog.set_level(logging.INFO)
    stream = Stream()
    stream.encoding = "ascii"
    show_three(stream)
    assert "trend _#+" in caplog.messages[-1] and caplog.messages[-1].isascii()


def test_a_terminal_gets_a_bar_and_no_lines(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("TERM", "xterm")
    stream = Stream()
    stream.tty = True
    show_three(stream)
    last = stream.getvalue().split("\r")[-1]
    assert "4/5" in last and "reward=0.375" in last and "trend=\u2581\u2588\u2585" in last
    assert caplog.messages == []


def test_a_dumb_terminal_gets_lines(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("TERM", "dumb")
    stream = Stream()
    stream.tty = True
    show_three(stream)
    assert stream.getvalue() == "" and "reward 0.375" in caplog.messages[-1]


def test_other_processes_show_nothing(caplog):
    caplog.set_level(logging.INFO)
    stream = Stream()
    stream.tty = True
    show_three(stream, shown=False)
    assert stream.getvalue() == "" and caplog.messages == []


def test_gpu_memory_is_shown_where_there_is_one(caplog):
    caplog.set_level(logging.INFO)
    with Terminal(2, 0, shown=True, stream=Stream()) as view:
        view.show({"reward/mean": 1.0}, {"time/sample": 1.0, "memory/peak_gib": 12.34})
    assert "GPU 12.3 GiB" in caplog.text and "gap" not in caplog.text


def test_gpu_memory_is_the_devices_peak_and_nothing_elsewhere(tmp_path, monkeypatch):
    """The line that asks CUDA, with a stand-in for it: 3.5 GiB of the process's own device."""
    asked = []

    def peak(device: torch.device) -> int:
        asked.append(device)
        return 7 * 2**29

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    config = tiny_config(tmp_path, Path("model"))
    trainer = SimpleNamespace(seconds={"sample": 3.0, "update": 1.5, "snapshot": 9.0})

    def spent(device: str) -> dict[str, float]:
        world = SimpleNamespace(device=torch.device(device))
        run = SimpleNamespace(config=config, world=world, trainer=trainer)
        return _Run._spent(run, {"sample": 1.0})

    found = spent("cuda:1")
    assert found["memory/peak_gib"] == 3.5 and asked == [torch.device("cuda:1")]
    samples = config.data.prompts_per_iteration * config.rollout.group_size
    # Snapshots are no work: 2 s of sampling and 1.5 s of updates.
    assert found["speed/samples_per_second"] == pytest.approx(samples / 3.5)
    assert found["time/sample"] == 2.0
    assert "memory/peak_gib" not in spent("cpu") and len(asked) == 1
