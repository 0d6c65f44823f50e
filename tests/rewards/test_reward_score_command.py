"""`dancegrpo-fast score`: files to prompts, tables, sheets, and mistakes."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_reward_models import images_of, tiny_clip

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import UserError
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards import REWARDS, Samples
from dancegrpo_fast.rewards.clip import ClipScore
from dancegrpo_fast.rewards.files import batches, find_jobs, read


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red cat\na blue dog\n")
    Path("samples").mkdir()


def save(image: torch.Tensor, name: str) -> None:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path("samples") / name)


def score(capsys, *arguments: str) -> tuple[int, str, list[dict[str, str]]]:
    capsys.readouterr()
    code = main(["score", "samples", "--prompts", "prompts.txt", *arguments])
    captured = capsys.readouterr()
    rows = []
    if Path("samples/scores/scores.csv").exists():
        with open("samples/scores/scores.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    return code, captured.out if code == 0 else captured.err.strip(), rows


def test_scores_of_files_are_those_of_their_pixels(capsys, tmp_path):
    tiny_clip(tmp_path / "clip")
    images = images_of((40, 48), 5)
    for i, image in enumerate(images):
        save(image, f"{i % 2:04d}_seed{i}.png")
    prompts = [["a red cat", "a blue dog"][i % 2] for i in range(5)]
    expected = ClipScore(str(tmp_path / "clip"))(images[:, None], prompts)
    code, out, rows = score(capsys, "--reward", "clip_score", "path=clip", "--batch-size", "2")
    assert code == 0 and "clip_score" in out
    found = {row["file"]: float(row["clip_score"]) for row in rows}
    for i in range(5):
        # Batches of other sizes: 1e-6 of float32 features.
        assert found[f"{i % 2:04d}_seed{i}.png"] == pytest.approx(float(expected[i]), abs=2e-6)
    values = [float(row["weighted"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert {row["prompt"] for row in rows} == {"a red cat", "a blue dog"}
    with Image.open("samples/scores/sheet.png") as sheet:
        assert sheet.size == (5 * 160, 160 + 28)
        best = next(i for i in range(5) if rows[0]["file"] == f"{i % 2:04d}_seed{i}.png")
        # 40 x 48 pixels fit three times into 156.
        corner = np.asarray(sheet)[2 : 2 + 120, 2 : 2 + 144]
        expected = images[best].permute(1, 2, 0).numpy().repeat(3, axis=0).repeat(3, axis=1)
        assert (corner == expected).all()


DEVICES = """
import torch

class Moved:
    name = "moved"

    def __call__(self, videos, prompts):
        return torch.full((len(prompts),), float(videos.device.type == "meta"))


class Waits(Moved):
    name, remote = "waits", True
"""


def test_pixels_are_where_training_has_them(capsys, monkeypatch):
    """On the process's device, but for rewards that wait for a server: these stay on the CPU."""
    for i, image in enumerate(images_of((8, 8), 3)):
        save(image, f"{i % 2:04d}_{i}.png")
    Path("where.py").write_text(DEVICES)
    world = SimpleNamespace(device=torch.device("meta"))
    monkeypatch.setattr("dancegrpo_fast.parallel.world.World.from_environment", lambda: world)
    arguments = ["--reward", "where.py:Moved", "--reward", "where.py:Waits", "--batch-size", "2"]
    code, out, rows = score(capsys, *arguments)
    assert code == 0, out
    found = [(float(row["where.py:Moved"]), float(row["where.py:Waits"])) for row in rows]
    assert found == [(1.0, 0.0)] * 3


def test_win_rates_and_several_rewards(capsys):
    for i, image in enumerate(images_of((16, 16), 6)):
        save(image, f"{i % 2}_{i}.png")
    arguments = ["--reward", "colourfulness", "--reward", "jpeg_incompressibility"]
    code, out, rows = score(capsys, *arguments, "win_rate=balanced")
    assert code == 0
    for name in ("colourfulness", "jpeg_incompressibility"):
        for prompt in ("a red cat", "a blue dog"):
            rates = sorted(float(r[name]) for r in rows if r["prompt"] == prompt)
            # File sizes may tie; colourfulness does not.
            assert rates == [0, 0.5, 1] or (name != "colourfulness" and sum(rates) == 1.5)
    total = [float(r["colourfulness"]) + float(r["jpeg_incompressibility"]) for r in rows]
    assert [float(r["weighted"]) for r in rows] == total


def test_rewards_of_a_recipe(capsys):
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes/demo.yaml").read_text())
    recipe["rewards"] = [{"name": "colourfulness"}, {"name": "flicker", "weight": 0}]
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    for i, image in enumerate(images_of((16, 16), 2)):
        save(image, f"{i}.png")
    code, out, rows = score(capsys, "--recipe", "r.yaml", "rewards.0.weight=-3.0")
    assert code == 0, out
    for row in rows:  # Flicker has no frames to look at, and no weight.
        assert float(row["weighted"]) == -3 * float(row["colourfulness"])
        assert row["flicker"] == "" and "flicker needs 3 frames" in row["error"]
    assert "no scores" in out


def test_a_broken_file_is_named_and_the_others_are_scored(capsys):
    save(images_of((16, 16), 1)[0], "0_good.png")
    Path("samples/1_bad.png").write_bytes(b"not a picture")
    code, out, rows = score(capsys, "--reward", "colourfulness")
    assert code == 0 and "1 of 2 without a score, such as 1_bad.png: cannot be read" in out
    assert [row["file"] for row in rows] == ["0_good.png", "1_bad.png"]
    assert rows[1]["colourfulness"] == "" and rows[0]["error"] == ""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_pillow_trips_over_are_named(capsys, monkeypatch):
    images = images_of((32, 32), 3)
    for i, image in enumerate(images[:2]):
        save(image, f"{i}.png")
    save(images[2], "0_damaged.gif")
    data = bytearray(Path("samples/0_damaged.gif").read_bytes())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    Image.new("RGB", (40, 40)).save("samples/0_large.png")
    Image.new("I;16", (16, 16), 30000).save("samples/0_deep.png")
    Path("samples/0_damaged.gif").write_bytes(data[:-20] + bytes([255] * 3))
    bad_name = os.fsdecode(b"samples/1_\xff.png")
    Image.new("RGB", (16, 16)).save(bad_name)
    code, out, rows = score(capsys, "--reward", "colourfulness")
    assert code == 0
    told = {row["file"]: row["error"] for row in rows}
    assert "exceeds limit" in told["0_large.png"] and "DecompressionBomb" in told["0_large.png"]
    assert "more than 8 bits a channel" in told["0_deep.png"]
    assert told["1_?.png"] == ""


def test_a_place_that_cannot_be_had_costs_no_scoring(capsys, monkeypatch):
    save(images_of((8, 8), 1)[0], "0.png")
    monkeypatch.setattr("dancegrpo_fast.cli.score._score", None)
    code, err, _ = score(capsys, "--reward", "colourfulness", "--out", "prompts.txt")
    assert code == 2 and err == "prompts.txt: File exists; name another place"


def test_videos(capsys):
    frames = images_of((32, 48), 10)
    with av.open("samples/0.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = {"crf": "0"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    pixels, fps = read(Path("samples/0.mp4"))
    assert pixels.shape == (10, 3, 32, 48) and fps == 8
    # Chroma is stored at half size: luma survives, colours of noise do not.
    assert (pixels.float().mean(1) - frames.float().mean(1)).abs().mean() < 8
    pictures = [Image.fromarray(f.permute(1, 2, 0).numpy()).convert("L") for f in frames]
    pictures[0].save("samples/1.gif", save_all=True, append_images=pictures[1:], duration=40)
    grey, fps = read(Path("samples/1.gif"))
    assert grey.shape == (10, 3, 32, 48) and fps == 25
    assert (grey[:, 0] == torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))).all()
    code, _, rows = score(capsys, "--reward", "motion_amplitude")
    assert code == 0
    expected = REWARDS["motion_amplitude"]().score(Samples(grey[None], [""])).values
    assert float({r["file"]: r for r in rows}["1.gif"]["motion_amplitude"]) == float(expected)
    Path("samples/2.mp4").write_bytes(b"nothing")
    with pytest.raises(OSError, match="2.mp4 is no readable video"):
        read(Path("samples/2.mp4"))


def test_which_prompt_is_a_files(tmp_path):
    def files(*names: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        return folder

    def found(folder: Path, *prompts: Prompt) -> list[tuple[str, int]]:
        return [(job.file.name, job.prompt) for job in find_jobs(folder, prompts)]

    one, two = Prompt("a"), Prompt("b")
    assert found(files("b.png", "a.JPG", "c.txt"), one, two) == [("a.JPG", 0), ("b.png", 1)]
    assert found(files("1_a.gif", "0_z.png"), one, two) == [("0_z.png", 0), ("1_a.gif", 1)]
    assert found(files("x.png", "y.mp4"), one) == [("x.png", 0), ("y.mp4", 0)]
    many = [Prompt(str(i)) for i in range(11)]
    assert found(files("10.png", "9.png"), *many) == [("9.png", 9), ("10.png", 10)]
    told = Prompt("b", metadata={"file": "0.png"})
    assert found(files("0.png"), one, told) == [("0.png", 1)]
    for names, prompts, reason in (
        (["c.txt"], (one,), "holds no file of"),
        (["2.png"], (one, two), "2.png counts beyond the 2 prompts"),
        (["x.png"], (one, two), "1 files for 2 prompts, and names without numbers"),
        (["1.png"], (one, told), "no prompt has file 1.png"),
    ):
        with pytest.raises(UserError, match=reason):
            find_jobs(files(*names), prompts)


def test_batches_are_alike():
    for name, size in (("0_a", 8), ("0_b", 8), ("0_c", 10), ("1_d", 10), ("1_e", 10)):
        save(images_of((size, 8), 1)[0], f"{name}.png")
    prompts = [Prompt("a", metadata={"n": 0}), Prompt("b", metadata={"n": 1})]
    jobs, unread = find_jobs(Path("samples"), prompts), {}
    made = list(batches(jobs, prompts, size=2, whole_prompts=False, unreadable=unread))
    assert [rows for rows, _ in made] == [[0, 1], [2, 3], [4]]
    assert [list(s.groups) for _, s in made] == [[0, 0], [0, 1], [1]]
    assert [m["n"] for m in made[1][1].metadata] == [0, 1]
    with pytest.raises(UserError, match="0_c.png: differs in size, frames or rate from 0_a.png"):
        list(batches(jobs, prompts, size=2, whole_prompts=True, unreadable=unread))
    Path("samples/0_c.png").unlink()
    jobs = find_jobs(Path("samples"), prompts)
    made = list(batches(jobs, prompts, size=1, whole_prompts=True, unreadable=unread))
    assert [rows for rows, _ in made] == [[0, 1], [2, 3]] and unread == {}


def test_lines_of_one_text_are_one_group(capsys):
    """As `sample` writes them: a line for each file."""
    lines = []
    for i, image in enumerate(images_of((16, 16), 6)):
        save(image, f"{i}.png")
        lines.append(json.dumps({"prompt": ["a", "b"][i % 2], "file": f"{i}.png", "seed": i}))
    Path("prompts.txt").rename("p.jsonl")
    Path("p.jsonl").write_text("\n".join(lines))
    arguments = ["--prompts", "p.jsonl", "--reward", "colourfulness", "win_rate=both"]
    code, _, rows = score(capsys, *arguments)
    assert code == 0
    for text in "ab":
        rates = sorted(float(row["colourfulness"]) for row in rows if row["prompt"] == text)
        assert rates == [0, 0.5, 1]


def test_list_says_everything(capsys):
    assert main(["score", "--list"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for name, entry in REWARDS.items():
        assert f"{name}: {entry.measures}" in out
        for fact in (entry.range, entry.cheats, entry.weights):
            assert fact in words
    assert max(map(len, out.split("\n"))) <= 100


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["score"], "score needs FOLDER, --prompts, --reward or --recipe; see dancegrpo-fast"),
        (["score", "gone", "--prompts", "prompts.txt", "--reward", "flicker"], "is no folder"),
        (["score", "samples", "--prompts", "prompts.txt", "--reward", "flicker"], "holds no file"),
        (["score", "samples", "--prompts", "no.txt", "--reward", "a"], "--prompts = 'no.txt': no"),
        (["score", "samples", "--prompts", "prompts.txt", "--reward", "a", "--batch-size", "0"],
         "--batch-size = 0: must be at least 1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys, arguments, line):
    assert main(arguments) == 2
    (found,) = capsys.readouterr().err.strip().split("\n")
    assert line in found


def test_settings_that_no_reward_has(capsys):
    save(images_of((8, 8), 1)[0], "0.png")
    for word, line in (
        ("frames=3", "frames = 3: Input should be a valid list"),
        ("optoins.a=3", "'optoins.a=3': write path=..., frames=[0] or options.NAME=..."),
        ("name=flicker", "'name=flicker': write path=..., frames=[0] or options.NAME=..."),
        ("wait=3", "wait = 3: Extra inputs"),
        ("options.cap=0", "rewards.0.options.cap = 0: must be greater than 0"),
    ):
        code, err, _ = score(capsys, "--reward", "motion_amplitude", word)
        assert code == 2 and line in err.split("\n")[-1]
    Path("p.jsonl").write_text(json.dumps({"prompt": "x", "count": 1}) + "\n")
    assert main(["score", "samples", "--prompts", "p.jsonl", "--reward", "counting"]) == 0
