"""`sample`: whose weights, which seeds, the best by reward, searches and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_models import tiny_config, tiny_recipe

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import EvaluationConfig
from dancegrpo_fast.models import Family, load_family
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.evaluate import initial_latents
from dancegrpo_fast.roles import Role
from dancegrpo_fast.search import Found, Sampler, SearchSettings, search

PROMPTS = ["a red dot", "a blue dot"]
ASKED = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
STILL = {"model.frames": 1}


def write_recipe(folder: Path, model: Path, changes=None) -> str:
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe(folder, model, changes)))
    return str(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_wan_folder) -> Path:
    """A finished LoRA run of images, its recipe beside; steps large enough to be seen in 8 bits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    changes = STILL | {"policy.train": "lora", "optimizer.learning_rate": 0.1}
    assert main(["train", write_recipe(folder, tiny_wan_folder, changes)]) == 0
    return folder / "run"


def sampled(out: Path, source: Path | str, *options: str) -> dict[str, np.ndarray]:
    """The command's images by file name."""
    assert main(["sample", str(source), *ASKED, *options, "--out", str(out)]) == 0
    return {file.name: np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))}


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Up to one level: the stock pipeline and the live one may round differently."""
    assert first.keys() == second.keys()
    pairs = [(first[name].astype(int), second[name].astype(int)) for name in first]
    return max(np.abs(a - b).max() for a, b in pairs) <= 1


def expected_pixels(folder: Path, model: Path, changes, seeds: int, seed: int = 0) -> torch.Tensor:
    """[prompts, seeds, F, 3, H, W] of the base model's stock pipeline, from the fixed noise."""
    config = tiny_config(folder, model, changes)
    family = load_family(config.model, torch.device("cpu"))
    settings = EvaluationConfig(seeds=seeds, seed=seed)
    jobs = [(p, s) for p in range(len(PROMPTS)) for s in range(seeds)]
    latents = initial_latents(settings, jobs, family.latent_shape, family.device)
    prompts = [Prompt(PROMPTS[p]) for p, _ in jobs]
    pixels = family.draw(family.stock_pipeline(None, "full"), prompts, latents, 4)
    return (pixels * 255).round().to(torch.uint8).unflatten(0, (len(PROMPTS), seeds))


def test_images_are_the_stock_pipelines(tmp_path, tiny_wan_folder, capsys):
    """PNG, bit for bit, and a line on each; the root of the noise moves them."""
    recipe = write_recipe(tmp_path, tiny_wan_folder, STILL)
    found = sampled(tmp_path / "out", recipe, "--seeds", "2")
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last == f"4 samples in {tmp_path}/out, together on {tmp_path}/out/sheet/sheet.png"
    names = [f"000{p}_a_{c}_dot_seed{s}.png" for p, c in ((0, "red"), (1, "blue")) for s in (0, 1)]
    assert list(found) == names
    expected = expected_pixels(tmp_path, tiny_wan_folder, STILL, 2).flatten(0, 1)[:, 0]
    for name, pixels in zip(names, expected, strict=True):
        assert np.array_equal(found[name], pixels.permute(1, 2, 0).numpy())
    lines = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert lines == [
        {"prompt": PROMPTS[p], "file": names[2 * p + s], "seed": s} for p in (0, 1) for s in (0, 1)
    ]
    other = sampled(tmp_path / "other", recipe, "--seeds", "2", "--seed", "1")
    assert not equal(found, other)


@pytest.mark.parametrize("gif", [False, True])
def test_videos(tmp_path, tiny_wan_folder, gif):
    recipe = write_recipe(tmp_path, tiny_wan_folder)
    out, options = tmp_path / "out", ["--gif"] if gif else ["--fps", "10"]
    assert main(["sample", recipe, *ASKED, *options, "--out", str(out)]) == 0
    expected = expected_pixels(tmp_path, tiny_wan_folder, {}, 1)[:, 0]
    files = sorted(out.glob("*.gif" if gif else "*.mp4"))
    assert [file.name[:5] for file in files] == ["0000_", "0001_"]
    for file, pixels in zip(files, expected, strict=True):
        if gif:
            assert Image.open(file).n_frames == 5
            continue
        with av.open(str(file)) as container:
            (stream,) = container.streams.video
            assert stream.average_rate == 10 and stream.codec_context.name == "h264"
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        found = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        assert found.shape == pixels.shape == (5, 3, 16, 16)
        # Random colours at half the colour resolution: the picture as a whole must be right.
        assert (found.float() - pixels.float()).mean(dim=(1, 2, 3)).abs().max() < 6


def test_weights_of_a_run_and_of_what_it_exported(tmp_path, run):
    """The snapshot through our networks, the export through the stock loader: one picture."""
    recipe = run / "recipe.yaml"
    trained = sampled(tmp_path / "run", run)
    exported = sampled(tmp_path / "final", recipe, "--weights", str(run / "final"))
    base = sampled(tmp_path / "base", recipe)
    assert equal(trained, exported) and not equal(trained, base)


def test_lora_scale(tmp_path, run):
    recipe, final = run / "recipe.yaml", ["--weights", str(run / "final")]
    base, trained = sampled(tmp_path / "base", recipe), sampled(tmp_path / "run", run)
    for name, source in {"live": [run], "stock": [recipe, *final]}.items():
        found = {
            scale: sampled(tmp_path / f"{name}{scale}", *source, "--lora-scale", scale)
            for scale in ("0", "0.5", "1")
        }
        assert equal(found["0"], base) and equal(found["1"], trained)
        assert not equal(found["0.5"], base) and not equal(found["0.5"], trained)


def test_whole_pipelines_as_weights(tmp_path, tiny_wan_folder):
    recipe = write_recipe(tmp_path, tiny_wan_folder, STILL)
    base = sampled(tmp_path / "base", recipe)
    whole = sampled(tmp_path / "whole", recipe, "--weights", str(tiny_wan_folder))
    assert equal(base, whole)


# ---- best of n -----------------------------------------------------------------------------------

REWARD = '''
import torch

class Red:
    name = "red"

    def __call__(self, videos, prompts):
        scores = videos[:, :, 0].mean(dim=(1, 2, 3))
        return torch.where(scores == scores.max(), torch.nan, scores)
'''


def test_best_of_n(tmp_path, tiny_wan_folder):
    """Of six the two reddest, best first; one whose score failed comes last."""
    (tmp_path / "red.py").write_text(REWARD)
    recipe = write_recipe(tmp_path, tiny_wan_folder, STILL)
    reward = f"{tmp_path}/red.py:Red"
    options = ["--best-of", "6", "--seeds", "2", "--reward", reward]
    sampled(tmp_path / "out", recipe, *options)
    pixels = expected_pixels(tmp_path, tiny_wan_folder, STILL, 6).float() / 255
    means = pixels[:, :, :, 0].mean(dim=(2, 3, 4))
    lines = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for p in range(2):
        order = means[p].argsort(descending=True).tolist()[1:3]  # The reddest of all failed.
        kept = lines[2 * p : 2 * p + 2]
        assert [line["seed"] for line in kept] == order
        for line in kept:
            # Accumulated in float32 over 768 values in another order.
            assert abs(line["scores"]["red"] - means[p, line["seed"]].item()) < 1e-6
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    sampled(tmp_path / "all", recipe, "--best-of", "6", "--seeds", "6", "--reward", reward)
    lines = [json.loads(x) for x in (tmp_path / "all" / "samples.jsonl").read_text().splitlines()]
    assert [lines[i]["scores"]["red"] is None for i in range(12)] == ([False] * 5 + [True]) * 2


def test_a_sample_that_is_no_number_is_never_the_best(tmp_path, tiny_wan_folder, monkeypatch):
    """In eight bits it is black, which some rewards like."""
    (tmp_path / "dark.py").write_text(
        "class Dark:\n    name = 'dark'\n    def __call__(self, videos, prompts):\n"
        "        return -videos.mean(dim=(1, 2, 3, 4))\n"
    )
    drawn = Family.draw

    def draw(*arguments):
        return drawn(*arguments).index_fill(0, torch.tensor([1]), torch.nan)

    monkeypatch.setattr(Family, "draw", draw)
    recipe, out = write_recipe(tmp_path, tiny_wan_folder, STILL), tmp_path / "out"
    dark = ["--reward", f"{tmp_path}/dark.py:Dark"]
    options = ["--prompt", "a dot", "--best-of", "3", "--seeds", "3", *dark, *dark]
    assert main(["sample", recipe, *options, "--out", str(out)]) == 0
    lines = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    assert [x["scores"]["dark"] is None for x in lines] == [False, False, True]
    assert lines[2]["seed"] == 1


def test_what_was_drawn_before_an_interrupt_keeps_its_line(tmp_path, tiny_wan_folder, monkeypatch):
    drawn = Family.draw

    def draw(family, pipeline, prompts, *arguments):
        if prompts[0].text == PROMPTS[1]:
            raise KeyboardInterrupt
        return drawn(family, pipeline, prompts, *arguments)

    monkeypatch.setattr(Family, "draw", draw)
    recipe = write_recipe(tmp_path, tiny_wan_folder, {**STILL, "evaluation.batch_size": 1})
    assert main(["sample", recipe, *ASKED, "--out", str(tmp_path / "out")]) == 3
    (line,) = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == PROMPTS[0]


def test_best_by_the_recipes_rewards(tmp_path, tiny_wan_folder):
    """Its weights count: a negative one keeps the darkest."""
    (reward,) = tiny_recipe(tmp_path, tiny_wan_folder)["rewards"]
    changes = STILL | {"rewards": [reward | {"weight": -2.0}]}
    recipe = write_recipe(tmp_path, tiny_wan_folder, changes)
    sampled(tmp_path / "out", recipe, "--best-of", "4")
    means = expected_pixels(tmp_path, tiny_wan_folder, STILL, 4).float().mean(dim=(2, 3, 4, 5))
    lines = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == means.argmin(dim=1).tolist()


def test_scores_without_a_choice(tmp_path, tiny_wan_folder):
    recipe = write_recipe(tmp_path, tiny_wan_folder, STILL)
    sampled(tmp_path / "out", recipe, "--seeds", "2", "--reward", "colourfulness")
    lines = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["scores"]["colourfulness"] > 0 for line in lines)


# ---- search --------------------------------------------------------------------------------------

SEARCH = ["--search", "greedy", "--search-width", "3", "--search-steps", "0,2"]


def bright(videos: torch.Tensor) -> np.ndarray:
    """[n, 1] what `tiny_models.Bright` says of 8-bit pixels."""
    return (videos.float() / 255).mean(dim=(1, 2, 3, 4))[:, None].double().numpy()


def library(config, settings: SearchSettings, prompt: int, seeds: int, roots: int) -> list[Found]:
    """The search of a prompt, called as a function, from the first `roots` initial noises."""
    family = load_family(config.model, torch.device("cpu"))
    rollout = config.rollout
    sampler = Sampler(
        family, family.modules, family.grid.schedule(rollout), rollout.dynamics,
        rollout.noise_level, 8,
    )  # fmt: skip
    jobs = [(prompt, s) for s in range(seeds * roots)]
    noise = initial_latents(EvaluationConfig(), jobs, family.latent_shape, family.device)
    root = NoiseKey.from_seed(0).fold_in(Role.EVALUATION).fold_in(prompt)
    return search(
        sampler, family.encode([PROMPTS[prompt]]).select([0] * seeds),
        [root.fold_in(s) for s in range(seeds)],
        lambda x, trees: bright((family.decode(x) * 255).round().to(torch.uint8)),
        settings, roots=noise.unflatten(0, (seeds, roots)),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_search_is_the_librarys(tmp_path, tiny_wan_folder, family, capsys):
    """Each seed's search from its own noise, best sample first, and what that took."""
    model, changes = tiny_wan_folder, dict(STILL)
    if family == "flux":
        sys.path.insert(0, str(Path(__file__).parent / "families"))
        from case_flux import CASES

        model, changes = CASES[0].build(tmp_path / "model"), CASES[0].overrides()
    recipe, config = write_recipe(tmp_path, model, changes), tiny_config(tmp_path, model, changes)
    out = sampled(tmp_path / "out", recipe, *SEARCH, "--seeds", "2")
    steps, trees = config.rollout.steps, 4
    printed = capsys.readouterr().out
    assert (
        f"(mean of 4) for {trees * (steps + 4)} model evaluations, {trees * 6} previews and "
        f"{trees * 7} reward calls" in printed
    )
    lines = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(out) == len(lines) == 4
    for p in range(2):
        found = library(config, SearchSettings("greedy", 3, (0, 2)), p, seeds=2, roots=1)
        scores = [float(one.scores[one.ranked[0]][0]) for one in found]
        order = sorted(range(2), key=lambda s: -scores[s])
        kept = lines[2 * p : 2 * p + 2]
        assert [line["seed"] for line in kept] == order
        # The pipeline's networks, batches and conditions are the library's: the same bits.
        assert [line["scores"]["bright"] for line in kept] == [scores[s] for s in order]


def test_brute_force_is_best_of_n(tmp_path, tiny_wan_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_wan_folder, STILL)
    out = sampled(tmp_path / "out", recipe, "--best-of", "6")
    printed = capsys.readouterr().out
    assert "(mean of 2) for 48 model evaluations, 0 previews and 12 reward calls" in printed
    lines = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    config = tiny_config(tmp_path, tiny_wan_folder, STILL)
    family = load_family(config.model, torch.device("cpu"))
    for p, line in enumerate(lines):
        (one,) = library(config, SearchSettings("brute", 6, (-1,)), p, seeds=1, roots=6)
        path = one.plan.states[one.ranked[0]].path
        assert line["seed"] == (path[0][1] if path else 0)
        pixels = (family.decode(one.sample[None]) * 255).round().to(torch.uint8)[0, 0]
        written = out[line["file"]].astype(int)
        # The stock pipeline steps in its own order of operations: up to one level.
        assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - written).max() <= 1


def test_search_with_the_weights_of_a_run(tmp_path, run):
    options = ["--search", "beam", "--beam", "2", *SEARCH[2:]]
    trained = sampled(tmp_path / "run", run, *options)
    exported = sampled(
        tmp_path / "final", run / "recipe.yaml", "--weights", str(run / "final"), *options
    )
    base = sampled(tmp_path / "base", run / "recipe.yaml", *options)
    assert equal(trained, exported) and not equal(trained, base)


NEVER = '''
import torch

class Never:
    name = "never"

    def __call__(self, videos, prompts):
        return torch.full((len(videos),), torch.nan)

class Pair:
    name = "pair"
    groupwise = True

    def __call__(self, videos, prompts):
        return videos.mean(dim=(1, 2, 3, 4))
'''


def test_searches_that_are_refused(tmp_path, tiny_wan_folder, capsys):
    (tmp_path / "never.py").write_text(NEVER)
    recipe, out = write_recipe(tmp_path, tiny_wan_folder, STILL), tmp_path / "out"
    steps = ["--search-steps", "1"]
    cases = {
        ("--search-width", "3"): "--search-width: needs --search greedy or beam",
        ("--beam", "3"): "--beam: needs --search greedy or beam",
        ("--search", "greedy", *steps): "--search = greedy: needs --search-width",
        ("--search", "greedy", "--search-width", "3"): "needs --search-steps",
        (*SEARCH, "--best-of", "4"): "--best-of: is brute force; leave it out beside --search",
        (*SEARCH[:3], "0", *steps): "--search: width = 0: must be at least 1",
        (*SEARCH, "--beam", "2"): "--search: beam = 2 with method = 'greedy'",
        (*SEARCH[:5], "0,x"): "'0,x': give steps such as 2,4,6",
        (*SEARCH[:4], "--search-steps=-1,2"): "the initial noise is that of --seed",
        (*SEARCH[:5], "1,3"): "must lie from -1 (the initial noise) to 2",
        (*SEARCH, "--reward", f"{tmp_path}/never.py:Pair"): "pair compares the samples of a prompt",
    }
    for options, message in cases.items():
        capsys.readouterr()
        assert main(["sample", recipe, *ASKED, "--out", str(out), *options]) == 2, options
        lines = [x for x in capsys.readouterr().err.split("\n") if message in x]
        assert len(lines) == 1, (options, message)
    assert not out.exists()
    never = ["--reward", f"{tmp_path}/never.py:Never"]
    assert main(["sample", recipe, *ASKED, "--out", str(out), *SEARCH, *never]) == 2
    assert "all 3 previews of tree 0 at step 1 have no score (NaN)" in capsys.readouterr().err


def test_best_of_needs_a_reward_that_counts(tmp_path, tiny_wan_folder, capsys):
    """With weights of 0 every sample is worth 0: the first would be chosen, whatever it is."""
    rewards = [{"name": "colourfulness", "weight": 0}, {"name": "jpeg_compressibility"}]
    recipe = write_recipe(tmp_path, tiny_wan_folder, {**STILL, "rewards": rewards})
    out, logged = tmp_path / "out", ["--reward", "colourfulness"]
    for way in (["--best-of", "2"], SEARCH):
        assert main(["sample", recipe, *ASKED, "--out", str(out), *way, *logged]) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        told = f"{way[0]}: every reward has weight 0, so none is best; give --reward"
        assert error.endswith(told) and not out.exists()
    # Beside one that counts it is only written down.
    options = ["--best-of", "2", *logged, "--reward", "jpeg_compressibility"]
    assert main(["sample", recipe, *ASKED, "--out", str(out), *options]) == 0
    lines = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    assert all(set(x["scores"]) == {"colourfulness", "jpeg_compressibility"} for x in lines)


# ---- images to start from ------------------------------------------------------------------------


def test_prompt_file_with_images(tmp_path, capsys):
    sys.path.insert(0, str(Path(__file__).parent / "families"))
    from case_wan_i2v import CASES

    case = CASES[0]
    model = case.build(tmp_path / "model")
    prompts = case.made_prompts(tmp_path / "images")
    rows = [{"prompt": prompt.text, "image": prompt.image.name} for prompt in prompts]
    file = tmp_path / "images" / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    recipe = write_recipe(tmp_path, model, case.overrides())
    out = tmp_path / "out"
    assert main(["sample", recipe, "--prompts", str(file), "--out", str(out)]) == 0
    assert len(list(out.glob("*.mp4"))) == 2
    capsys.readouterr()
    assert main(["sample", recipe, "--prompt", "a dot", "--out", str(tmp_path / "none")]) == 2
    assert "--prompts: prompt 1 of 1 has no image" in capsys.readouterr().err


# ---- refusals ------------------------------------------------------------------------------------


def test_refusals_are_one_line(tmp_path, tiny_wan_folder, run, capsys):
    recipe = write_recipe(tmp_path, tiny_wan_folder, STILL)
    full, out = tmp_path / "full", str(tmp_path / "out")
    full.mkdir()
    (full / "file").write_text("")
    cases = {
        (recipe, "--best-of", "2", "--seeds", "3"): "--best-of = 2: must be at least --seeds = 3",
        (recipe, "--seeds", "0"): "--seeds = 0: must be at least 1",
        (recipe, "--best-of", "0"): "--best-of = 0: must be at least 1",
        (recipe, "--lora-scale", "0.5"): "these weights are no LoRA; leave it out",
        (recipe, "--weights", str(full)): "holds neither model_index.json nor pytorch_lora_weights",
        (recipe, "--weights", str(tiny_wan_folder), "--lora-scale", "1"): "are no LoRA",
        (str(run), "--weights", str(run / "final")): "goes with a recipe",
        (recipe, "--reward", "nicest"): "no such reward",
        (recipe, "--seed", "-1"): "--seed = -1: must be from 0 to 2**63 - 1",
        (recipe, "--gif", "--fps", "101"): "--fps = 101: a GIF has at most 100",
        (recipe, "--prompt", " "): "--prompt = ' ': the prompt is empty",
        (recipe, "--prompt", "\udcff"): "--prompt = '\\udcff': is not UTF-8 text",
        (recipe, "--out", str(full)): "is a file or not empty; name a new folder",
        (recipe, "--out", str(full / "file")): "is a file or not empty; name a new folder",
    }
    for arguments, message in cases.items():
        capsys.readouterr()
        assert main(["sample", *ASKED, "--out", out, *arguments]) == 2
        lines = [x for x in capsys.readouterr().err.split("\n") if message in x]
        assert len(lines) == 1, (arguments, message)
    assert not Path(out).exists()
