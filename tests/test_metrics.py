"""Metrics files, clips and trackers, read back by independent readers."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from test_config import RECIPE
from torch.utils.tensorboard import SummaryWriter

from dancegrpo_fast.config import LoggingConfig, RunConfig, UserError
from dancegrpo_fast.report import trackers
from dancegrpo_fast.report.log import RunLog
from dancegrpo_fast.report.metrics import JsonLines, gif_bytes, read_metrics, save_clip, write_gif
from dancegrpo_fast.report.trackers import check_trackers


@pytest.fixture(autouse=True)
def fresh_numbers(monkeypatch):
    """TensorBoard reads the files of one second by name, and its 10th of a process before the 9th.

    Runs are hours apart; tests before this one in the process are not.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def moving_dot(frames: int = 5, size: int = 12) -> torch.Tensor:
    """[F, 3, H, W]: a red dot that moves one pixel a frame over a gradient."""
    video = torch.linspace(0, 0.5, size).expand(frames, 3, size, size).clone()
    for frame in range(frames):
        video[frame, :, 3, frame] = torch.tensor([1.0, 0.0, 0.0])
    return video


def decode(picture: bytes) -> torch.Tensor:
    """[F, 3, H, W] bytes of a GIF or WebP, as Pillow shows them."""
    image = Image.open(io.BytesIO(picture))
    frames = [
        torch.frombuffer(bytearray(frame.convert("RGB").tobytes()), dtype=torch.uint8)
        for frame in ImageSequence.Iterator(image)
    ]
    return torch.stack(frames).reshape(-1, image.height, image.width, 3).permute(0, 3, 1, 2)


def board(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def run_config(folder: Path, **logged: Any) -> RunConfig:
    return RunConfig.model_validate({**RECIPE, "output": str(folder), "logging": logged})


# --- clips


def test_gif_keeps_frames_pixels_and_time():
    video = moving_dot()
    gif = gif_bytes(video, fps=8)
    # At most 256 colours a frame, so that every pixel survives.
    assert torch.equal(decode(gif), (video * 255).round().to(torch.uint8))
    image = Image.open(io.BytesIO(gif))
    assert image.info["loop"] == 0 and image.info["duration"] == 120  # 12.5 hundredths, to even


def test_gif_clamps_and_paints_nan_black():
    video = torch.tensor([-1.0, 2.0, math.nan, 0.5]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert decode(gif_bytes(video))[0, 0].tolist() == [[0, 255], [0, 128]]


def test_gif_takes_bfloat16_strided_input_with_gradient():
    video = moving_dot().to(torch.bfloat16).transpose(2, 3).requires_grad_()
    expected = (video.detach().float() * 255).round().to(torch.uint8)
    assert torch.equal(decode(gif_bytes(video)), expected)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 1, 4, 4), (0, 3, 4, 4), (1, 2, 3, 4, 4)])
def test_gif_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"shape {list(shape)}; expected [F, 3, H, W]")):
        gif_bytes(torch.zeros(shape))


def test_gif_names_a_wrong_rate():
    with pytest.raises(ValueError, match="fps = 0"):
        gif_bytes(moving_dot(), fps=0)


def test_a_clip_is_named_by_its_tag_and_iteration(tmp_path):
    clip = save_clip(tmp_path / "clips", "samples/a red dot, moving", moving_dot(), 3, fps=5)
    assert clip.path == tmp_path / "clips" / "samples_a_red_dot_moving_000003.gif"
    assert clip.path.read_bytes() == gif_bytes(moving_dot(), fps=5)
    assert (clip.tag, clip.frames, clip.height, clip.width) == (
        "samples/a red dot, moving", 5, 12, 12,
    )  # fmt: skip
    write_gif(tmp_path / "a.gif", moving_dot(), fps=5)
    assert (tmp_path / "a.gif").read_bytes() == clip.path.read_bytes()


def test_clips_of_one_iteration_keep_their_files(tmp_path):
    """Prompts in letters that a file's name does not keep, and equal beginnings."""
    texts = (chr(0x7EA2), chr(0x84DD), "x" * 90 + "1", "x" * 90 + "2")
    tags = [f"held out {text}" for text in texts]
    with RunLog(run_config(tmp_path), True, resumed=None) as log:
        log.write(0, {}, [(tag, torch.full((2, 3, 8, 8), n / 4)) for n, tag in enumerate(tags)])
    files = sorted((tmp_path / "clips").glob("*_000000.gif"))
    assert len({file.read_bytes() for file in files}) == len(files) == 4
    shown = [board(tmp_path).Images(tag)[0].encoded_image_string for tag in tags]
    assert len(set(shown)) == 4 and files[0].name == "held_out_000000.gif"
    clip = save_clip(tmp_path / "clips", chr(0x7EA2), moving_dot(), 3, fps=240)
    assert clip.path.name == "clip_000003.gif"


# --- files


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    lines.write(1, {"reward": 0.1, "loss": torch.tensor(2.0, dtype=torch.float64)})
    lines.write(2, {"reward": 1 / 3, "grad_norm": math.nan})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines.close()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()] == [
        {"iteration": 1, "reward": 0.1, "loss": 2.0},
        {"iteration": 2, "reward": 1 / 3, "grad_norm": None},
    ]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"x": 1}', '{"iteration": null}', "3"])
def test_damage_in_the_middle_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 0}}\n{damage}\n{{"iteration": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no JSON object with an iter"):
        JsonLines(path, resumed=1)


# --- a run's log


def test_numbers_and_clips_reach_files_and_tensorboard(tmp_path):
    with RunLog(run_config(tmp_path), True, resumed=None) as log:
        log.write(1, {"reward": 0.1})
        log.write(2, {"reward": 1 / 3, "grad_norm": math.nan}, [("a dot", moving_dot())])
        log.spent(2, {"time/sample": 1.5})
    events = board(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [
        (1, pytest.approx(0.1)), (2, pytest.approx(1 / 3)),
    ]  # fmt: skip
    assert math.isnan(events.Scalars("grad_norm")[0].value)
    assert [(e.step, e.value) for e in events.Scalars("time/sample")] == [(2, 1.5)]
    (image,) = events.Images("a dot")
    assert (image.step, image.width, image.height) == (2, 12, 12)
    assert image.encoded_image_string == (tmp_path / "clips" / "a_dot_000002.gif").read_bytes()
    # What the machine adds stays out of the file that two runs are compared by.
    assert "time" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path / "times.jsonl") == [{"iteration": 2, "time/sample": 1.5}]


def test_resume_drops_what_will_be_written_again(tmp_path):
    with RunLog(run_config(tmp_path), True, resumed=None) as log:
        for iteration in range(6):
            log.write(iteration, {"x": iteration})
            log.spent(iteration, {"t": iteration})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "x"')  # what a crash leaves
    with RunLog(run_config(tmp_path), True, resumed=3) as log:
        for iteration in (4, 5):
            log.write(iteration, {"x": 10 * iteration})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"iteration": i, "x": x} for i, x in enumerate([0, 1, 2, 3, 40, 50])
    ]
    assert [line["iteration"] for line in read_metrics(tmp_path / "times.jsonl")] == [0, 1, 2, 3]
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("x")] == [
        (0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))


def test_resume_without_a_file_starts_one(tmp_path):
    with RunLog(run_config(tmp_path), True, resumed=3) as log:
        log.write(4, {"x": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 4, "x": 1.0}]


def test_a_run_is_not_written_over(tmp_path):
    with RunLog(run_config(tmp_path), True, resumed=None) as log:
        log.write(0, {"x": 1})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        RunLog(run_config(tmp_path), True, resumed=None)
    assert str(caught.value) == (
        f"output = {str(tmp_path)!r}: already holds a run; "
        "continue it with --resume latest, or name another folder"
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_processes_write_nothing(tmp_path):
    with RunLog(run_config(tmp_path / "run"), False, resumed=None) as log:
        log.write(1, {"x": 1}, [("a dot", moving_dot())])
        log.spent(1, {"t": 1})
        assert log.page(1) is None
    assert not (tmp_path / "run").exists()


class Failing:
    """A tracker on a disk that is full at first."""

    def __init__(self, config: RunConfig, resumed: int | None) -> None:
        self.seen: list[int] = []

    def write(self, iteration, values, clips):
        if iteration == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.seen.append(iteration)

    def close(self):
        pass


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_one_failing_tracker_costs_the_others_nothing(tmp_path, monkeypatch, caplog, on_failure):
    monkeypatch.setitem(trackers._TRACKERS, "wandb", Failing)
    config = run_config(tmp_path, trackers=["wandb", "tensorboard"])
    checkpoint = config.checkpoint.model_copy(update={"on_failure": on_failure})
    config = config.model_copy(update={"checkpoint": checkpoint})
    with RunLog(config, True, resumed=None) as log:
        if on_failure == "stop":
            with pytest.raises(OSError, match="No space"):
                log.write(1, {"x": 1})
            return
        log.write(1, {"x": 1})
        log.write(2, {"x": 2})
        assert log._trackers[0].seen == [2]
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [e.step for e in board(tmp_path).Scalars("x")] == [1, 2]
    assert "iteration 1 could not be logged" in caplog.text


def test_tensorboard_writes_again_after_a_full_disk(tmp_path, monkeypatch):
    """A SummaryWriter that failed keeps failing: the next line needs a new one."""
    broken = []

    class Writer(SummaryWriter):
        def add_scalar(self, name, value, step):
            if step == 2:
                broken.append(self)
            if self in broken:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().add_scalar(name, value, step)

    monkeypatch.setattr(trackers, "SummaryWriter", Writer)
    with RunLog(run_config(tmp_path), True, resumed=None) as log:
        for iteration in (1, 2, 3):
            log.write(iteration, {"x": iteration})
    assert [e.step for e in board(tmp_path).Scalars("x")] == [1, 3]


# --- Weights & Biases


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.metrics: list[tuple] = []
        self.finished = False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, with the calls of its public interface that we make."""
    module: Any = ModuleType("wandb")
    module.__spec__ = SimpleNamespace(name="wandb")
    module.inits, module.run = [], FakeRun()

    def init(**arguments):
        module.inits.append(arguments)
        return module.run

    module.init = init
    module.Image = lambda path: ("image", path)
    module.Video = lambda path, format: ("video", path, format)
    module.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_recipe_numbers_and_clips_over_iterations(tmp_path, wandb):
    config = run_config(tmp_path / "shapes", trackers=["wandb"], project="p", offline=True)
    check_trackers(config.logging)
    with RunLog(config, True, resumed=None) as log:
        log.write(3, {"reward": 0.5}, [("a dot", moving_dot()), ("a still", moving_dot(1))])
    (init,) = wandb.inits
    assert (init["project"], init["name"], init["mode"]) == ("p", "shapes", "offline")
    assert init["config"]["rollout"]["group_size"] == 12 and init["dir"] == str(tmp_path / "shapes")
    assert ("*", "iteration") in wandb.run.metrics and wandb.run.finished
    clips = tmp_path / "shapes" / "clips"
    assert wandb.run.rows == [{
        "iteration": 3, "reward": 0.5,
        "a dot": ("video", str(clips / "a_dot_000003.gif"), "gif"),
        "a still": ("image", str(clips / "a_still_000003.gif")),
    }]  # fmt: skip
    assert not (tmp_path / "shapes" / "tensorboard").exists()


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, wandb):
    config = run_config(tmp_path / "run", trackers=["wandb"])
    for resumed in (None, 0, 7):
        with RunLog(config, True, resumed=resumed):
            pass
    ids = [init["id"] for init in wandb.inits]
    assert len(set(ids)) == 1 and {init["resume"] for init in wandb.inits} == {"allow"}
    with RunLog(config, True, resumed=None):  # Begun anew: it has no line yet.
        assert wandb.inits[-1]["id"] != ids[0]


def test_wandb_that_does_not_start_says_what_to_do(tmp_path, wandb, monkeypatch):
    def refuse(**arguments):
        raise wandb.errors.Error("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"does not start \(api_key not configured\); run `wandb l"):
        RunLog(run_config(tmp_path, trackers=["wandb"]), True, resumed=None)


def test_a_missing_package_is_named_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_trackers(LoggingConfig())
    with pytest.raises(UserError, match="the package wandb is not installed; pip install wandb"):
        check_trackers(LoggingConfig(trackers=["tensorboard", "wandb"]))


def test_the_real_wandb_works_offline(tmp_path, monkeypatch):
    real = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run_config(tmp_path / "run", trackers=["wandb"], offline=True)
    for resumed in (None, 2):
        with RunLog(config, True, resumed=resumed) as log:
            log.write(3, {"reward": 0.5}, [("a still", moving_dot(1))])
    stored = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(stored) == 2, real.__version__
    for _ in range(100):  # W&B's own process writes them, and `finish` does not wait for it.
        if all(b"reward" in path.read_bytes() for path in stored):
            return
        time.sleep(0.1)
    raise AssertionError("the numbers are not in W&B's files")
