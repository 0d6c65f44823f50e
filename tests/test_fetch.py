"""Hub ids, found in the local cache and fetched into it; no hub: its answers are played."""

from __future__ import annotations

import hashlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from tiny_models import CPU, tiny_config, tiny_recipe

from dancegrpo_fast.cli import main
from dancegrpo_fast.cli.fetch import reward_sources
from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.models.source import Source, components, locate, needed_files
from dancegrpo_fast.trainer import Trainer

REPO = "tiny-org/Tiny-Wan2.1"
COMMIT = hashlib.sha1(b"a commit").hexdigest()
real_download = huggingface_hub.snapshot_download


class Hub:
    """A hub of some repositories, and an empty cache on this machine.

    Downloads leave what huggingface_hub's leave: refs, blobs, a snapshot of links, and the list of
    all files of the commit, by which a partial snapshot is known as one.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repos: dict[str, Path] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cache = folder / "home" / "hub"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.cache))
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def download(
        self, name, *, revision=None, allow_patterns=None, ignore_patterns=None, **options
    ):
        if options.get("local_files_only"):
            return real_download(
                name, revision=revision, allow_patterns=allow_patterns, local_files_only=True
            )
        self.asked.append((name, revision))
        if name not in self.repos:
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no repository\n{name}")
        store = self.cache / f"models--{name.replace('/', '--')}"
        (store / "refs").mkdir(parents=True, exist_ok=True)
        (store / "refs" / (revision or "main")).write_text(COMMIT)
        snapshot, blobs = store / "snapshots" / COMMIT, store / "blobs"
        blobs.mkdir(exist_ok=True)
        files = {
            path.relative_to(self.repos[name]).as_posix(): path
            for path in self.repos[name].rglob("*")
            if path.is_file()
        }
        entries = {
            file: TreeCacheEntry(path.stat().st_size, f"{number:040x}")
            for number, (file, path) in enumerate(files.items())
        }
        write_tree_cache(str(store), COMMIT, entries)
        for file, path in files.items():
            wanted = allow_patterns is None or any(fnmatch(file, p) for p in allow_patterns)
            if wanted and not any(fnmatch(file, p) for p in ignore_patterns or ()):
                link, blob = snapshot / file, blobs / entries[file].blob_id
                link.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, blob)
                link.unlink(missing_ok=True)
                link.symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path, tiny_wan_folder, monkeypatch) -> Hub:
    """The tiny Wan as a repository, with what real ones hold beside."""
    hub = Hub(tmp_path, monkeypatch)
    repo = tmp_path / "repo"
    shutil.copytree(tiny_wan_folder, repo)
    for extra in (
        "README.md", "whole.safetensors", "transformer/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/tf_model.h5",
    ):  # fmt: skip
        (repo / extra).write_bytes(b"x" * 1000)
    hub.repos[REPO] = repo
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return hub


def recipe(folder: Path, changes=None) -> str:
    values = tiny_recipe(folder, Path(REPO), changes)
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "r.yaml")


def refused(capsys, *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return capsys.readouterr().err.strip().split("\n")


def test_fetch_then_train(hub, tmp_path, capsys):
    """Before: one line that says what to do. After: the run, from the cache and its revision."""
    file = recipe(tmp_path, {"iterations": 1})
    (line,) = refused(capsys, "train", file)
    assert f"model.path = '{REPO}'" in line and "dancegrpo-fast fetch RECIPE" in line
    assert main(["fetch", file]) == 0
    snapshot = hub.cache / "models--tiny-org--Tiny-Wan2.1" / "snapshots" / COMMIT
    fetched = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.*")}
    assert not [f for f in fetched if f.endswith((".bin", ".h5", ".md")) or "fp16" in f]
    assert "whole.safetensors" not in fetched and "tokenizer/tokenizer.json" in fetched
    size = sum(path.stat().st_size for path in snapshot.rglob("*.*"))
    first, last = capsys.readouterr().out.strip().split("\n")
    assert first.split() == f"model.path {REPO}: {size / 1e6:.1f} MB in {snapshot}".split()
    assert last == f"{size / 1e6:.1f} MB in all; the hub cache is {hub.cache}"
    asked = len(hub.asked)
    assert main(["train", file]) == 0
    assert len(hub.asked) == asked, "training went to the hub"
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()
    assert not any(p.is_symlink() for p in (tmp_path / "run" / "final").rglob("*"))


def test_revision(hub, tmp_path, capsys):
    file = recipe(tmp_path)
    assert main(["fetch", file, "model.revision=v2"]) == 0
    assert {revision for _, revision in hub.asked} == {"v2"}
    assert locate(REPO, "v2") == locate(REPO, COMMIT)
    with pytest.raises(UserError, match="hub cache holds no such model; run `dancegrpo-fast fetch"):
        locate(REPO)
    with pytest.raises(UserError, match="holds no such model at revision 'v3'"):
        locate(REPO, "v3")


def test_revision_of_a_folder(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, {"model.revision": "main"})
    with pytest.raises(UserError, match="model.revision = 'main': .* is a folder, which has no"):
        open_family(config.model)


@pytest.mark.parametrize("path", ["gone", "a/b/c", "/gone/there", "./gone/there", "a--b/../c"])
def test_folder_that_is_not_there(path, hub):
    with pytest.raises(UserError, match="give the folder of a diffusers pipeline"):
        locate(path)
    assert not hub.asked


def test_download_that_fails(hub, tmp_path, capsys):
    (line,) = refused(capsys, "fetch", recipe(tmp_path), "model.path=tiny-org/gone")
    assert "model.path = 'tiny-org/gone': cannot be downloaded" in line
    assert "LocalEntryNotFoundError: no repository tiny-org/gone" in line


def test_repository_without_safetensors(hub, tmp_path, capsys):
    (hub.repos[REPO] / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (line,) = refused(capsys, "fetch", recipe(tmp_path))
    assert "transformer: holds no diffusion_pytorch_model.safetensors" in line


def test_folder_is_only_checked(hub, tmp_path, tiny_wan_folder, capsys):
    file = recipe(tmp_path, {"model.path": str(tiny_wan_folder)})
    assert main(["fetch", file]) == 0
    assert not hub.asked
    assert capsys.readouterr().out.startswith(f"model.path         {tiny_wan_folder}: ")


def test_everything_that_is_missing_is_said_before_loading(tmp_path, tiny_wan_folder):
    """One line per component; of weights the header alone is read."""
    model = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, model)
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(model / "tokenizer")
    (model / "text_encoder" / "config.json").unlink()
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        Trainer(tiny_config(tmp_path, model), CPU)
    lines = str(caught.value).split("\n")
    where = [Path(line.split(": ")[0]).relative_to(model).parts[0] for line in sorted(lines)]
    assert where == ["text_encoder", "tokenizer", "transformer", "vae"]
    assert all("fetch" in line for line in lines)


def test_unused_components_are_neither_needed_nor_fetched():
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None], "requires_safety_checker": True,
        "unet": ["diffusers", "UNet2DConditionModel"],
    }  # fmt: skip
    assert components(index, ("safety_checker",)) == {
        "feature_extractor": "CLIPImageProcessor", "unet": "UNet2DConditionModel"
    }  # fmt: skip
    patterns = needed_files(index, ("safety_checker",))
    files = {
        "model_index.json": True, "unet/config.json": True, "safety_checker/config.json": False,
        "unet/diffusion_pytorch_model.safetensors": True,
        "unet/diffusion_pytorch_model-00001-of-00003.safetensors": True,
        "unet/diffusion_pytorch_model.safetensors.index.json": True,
        "unet/diffusion_pytorch_model.non_ema.safetensors": False,
        "unet/diffusion_pytorch_model.bin": False,
        "feature_extractor/preprocessor_config.json": True,
        "feature_extractor/model.safetensors": False, "sd-v1-4.ckpt": False,
    }  # fmt: skip
    assert {file: any(fnmatch(file, p) for p in patterns) for file in files} == files


def test_index_that_cannot_be_read(tmp_path, tiny_wan_folder):
    (tmp_path / "model_index.json").write_text("{")
    config = tiny_config(tmp_path, tmp_path)
    with pytest.raises(UserError, match="is no pipeline index; fetch or save it again"):
        Source.of(config.model, ("WanPipeline",))


def test_weights_of_rewards(hub, tmp_path, capsys):
    """What the recipe names, and the reward's own where it names none; formats we read."""

    def named(**values) -> list[str]:
        return reward_sources(RewardConfig(**values), "rewards.0")

    assert named(name="moving_shape") == []
    assert named(name="clip_score") == ["openai/clip-vit-large-patch14"]
    assert named(name="clip_score", path="tiny-org/clip") == ["tiny-org/clip"]
    (tmp_path / "tiny-org" / "here").mkdir(parents=True)
    assert named(name="clip_score", path="tiny-org/here") == []
    assert named(name="mine.py:Mine", options={"weights": "tiny-org/mine"}) == ["tiny-org/mine"]

    clip = tmp_path / "clip_repo"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({}))
    (clip / "flax_model.msgpack").write_bytes(b"x" * 5000)
    hub.repos["tiny-org/clip"] = clip
    rewards = [{"name": "clip_score", "path": "tiny-org/clip"}]
    assert main(["fetch", recipe(tmp_path, {"rewards": rewards})]) == 0
    assert "rewards.0          tiny-org/clip: 0.0 MB in" in capsys.readouterr().out
    store = hub.cache / "models--tiny-org--clip" / "snapshots" / COMMIT
    assert [path.name for path in store.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer/tokenizer.json", None, "tokenizer: holds no vocabulary; fetch it again"),
        ("tokenizer/tokenizer.json", b"", "tokenizer.json: cannot be read (Expecting value"),
        ("text_encoder/config.json", b"{", "config.json: cannot be read (Expecting property"),
        ("text_encoder/model.safetensors", b"cut", "model.safetensors: cannot be read (Error"),
        ("vae/config.json", b"[]", "vae/config.json: cannot be read (no object); complete the"),
        ("scheduler/scheduler_config.json", None, "scheduler_config.json: cannot be read (No such"),
        ("transformer/config.json", b"", "transformer/config.json: cannot be read (Expecting"),
    ],
)
def test_damage_is_said_in_one_line(tmp_path, tiny_wan_folder, capsys, name, content, told):
    """Without a vocabulary transformers makes a tokenizer that knows no word, and says nothing."""
    model = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, model)
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path, model)))
    capsys.readouterr()
    assert main(["train", str(recipe)]) == 2
    (line,) = [x for x in capsys.readouterr().err.split("\n") if str(model) in x]
    assert told in line
