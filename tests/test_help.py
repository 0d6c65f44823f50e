"""Every command's help teaches: what it does, each option with unit and default, examples."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_recipe

from dancegrpo_fast.cli import COMMANDS, main


def parser_of(command: str) -> argparse.ArgumentParser:
    subparsers = argparse.ArgumentParser().add_subparsers()
    module = importlib.import_module(f"dancegrpo_fast.cli.{command.replace('-', '_')}")
    module.add_parser(subparsers)
    return subparsers.choices[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_each_option_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = parser_of(command)
    assert parser.description and parser.description.endswith(".")
    assert parser.epilog and f"  dancegrpo-fast {command}" in parser.epilog
    for action in parser._actions:
        assert action.help, action.dest
        if isinstance(action, argparse._StoreAction) and not action.choices:
            assert action.metavar or not action.option_strings, f"{action.dest}: what is it?"
        plain = action.default in (None, False, [], argparse.SUPPRESS)
        assert plain or str(action.default) in action.help, f"{action.dest}: its default"
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    body, _, examples = capsys.readouterr().out.partition("example")
    assert all(len(line) <= 80 for line in body.split("\n")), "descriptions are filled"
    assert all(len(line) <= 100 for line in examples.split("\n"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "RECIPE", "--memory", "141"], "--memory: is about a number of GPUs; give --gpus"),
        (["plan", "RECIPE", "--json"], "--json: is about a number of GPUs; give --gpus N"),
        (["plan", "RECIPE", "--iteration", "-1"], "--iteration = -1: must be at least 0"),
        (
            ["evaluate", "RECIPE", "--prompts", "p", "--out", "o", "--no-base"],
            "is a base model itself; leave one out",
        ),
        (
            ["evaluate", "RECIPE", "--prompts", "p", "--out", "o", "--format", "hpsv2", "--column",
             "c"],
            "--column: hpsv2 is lists of texts, which have no columns; leave it out",
        ),
        (["sample", "RECIPE", "--prompt", "a", "--out", "o", "--beam", "2"],
         "--beam: needs --search greedy or beam"),
        (["sample", "RECIPE", "--prompt", "a", "--out", "o", "--lora-scale", "1"],
         "--lora-scale = 1.0: these weights are no LoRA; leave it out"),
        (["report", "gone", "--out", "no/page.html"],
         "--out = 'no/page.html': there is no folder no; make it first"),
    ],
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused(
    tmp_path: Path,
    tiny_wan_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_wan_folder)))
    assert main(["r.yaml" if word == "RECIPE" else word for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert said in line


def test_videos_have_the_recipes_rate(tmp_path: Path, tiny_wan_folder: Path) -> None:
    """`model.fps` is for video files; `--fps` is another one."""
    import av

    recipe = tiny_recipe(tmp_path, tiny_wan_folder, {"model.fps": 7.0})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    for name, options, rate in (("own", [], 7), ("given", ["--fps", "9"], 9)):
        out = tmp_path / name
        words = ["--prompt", "a", "--out", str(out), *options]
        assert main(["sample", str(tmp_path / "r.yaml"), *words]) == 0
        (file,) = out.glob("*.mp4")
        with av.open(str(file)) as container:
            assert container.streams.video[0].average_rate == rate
