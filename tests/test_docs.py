"""The documentation is true: its links, fields, messages, options and figures are the code's."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import matplotlib
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

import dancegrpo_fast
from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.config.run import field_at

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OTHERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEXTS = [*PAGES, *OTHERS, *sorted((ROOT / "examples").rglob("README.md"))]


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def name(path: Path) -> str:
    """For the report: the path in the project."""
    return path.relative_to(ROOT).as_posix()


# ---- links --------------------------------------------------------------------------------------


@cache
def anchors(path: Path) -> frozenset[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text).strip())
        number = 1
        while slug in found:
            slug, number = f"{slug.rsplit('-', 1)[0] if number > 1 else slug}-{number}", number + 1
        found.add(slug)
    return frozenset(found)


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        link, _, anchor = target.partition("#")
        path = (page.parent / link).resolve() if link else page
        if not path.exists() or not path.is_relative_to(ROOT):
            broken.append(f"{target}: no such file")
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            broken.append(f"{target}: no such heading")
    assert not broken


# ---- fields, messages, options ------------------------------------------------------------------

_SECTIONS = "|".join(RunConfig.model_fields)
_FIELD = re.compile(rf"`((?:{_SECTIONS})(?:\.\w+)+)(?:(?:: |=)([^`]+))?`")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_fields_exist_and_take_the_values(page: Path) -> None:
    wrong = []
    for path, value in _FIELD.findall(prose(page)):
        if path.endswith((".py", ".md", ".html", ".json", ".jsonl")):
            continue
        try:
            field = field_at(re.sub(r"\.N\b", ".0", path))
        except (KeyError, AttributeError):
            wrong.append(f"{path}: no such field")
            continue
        if value and not re.fullmatch("[A-Z]+", value):  # N stands for any number.
            try:
                TypeAdapter(field.annotation).validate_python(yaml.safe_load(value))
            except ValidationError as error:
                wrong.append(f"{path} = {value}: {error}")
    assert not wrong


@cache
def texts_of_the_code() -> tuple[str, ...]:
    """Every string of the package; what an f-string fills in is one NUL."""
    found: list[str] = []
    for path in sorted((ROOT / "dancegrpo_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[a-z.0-9]*[a-z]", "\0", node.value))
    return tuple(found)


def is_printed(message: str) -> bool:
    """Whether one string of the code has the fragments of a message between its dots, in order."""
    fragments = [re.escape(part) for part in message.strip().split("...") if part.strip()]
    pattern = re.compile(".*".join(fragments), re.S)
    return any(pattern.search(text) for text in texts_of_the_code())


def messages() -> Iterator[tuple[str, str]]:
    """What pages say that the program prints."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r'^ *```text title="message"\n(.*?)^ *```$', text, re.S | re.M):
            yield from ((page.stem, line) for line in block.splitlines() if line.strip())
        if page.stem == "troubleshooting":
            table = text[text.index("| line | do |") : text.index("Exit code 1")]
            yield from ((page.stem, line) for line in re.findall(r"^\| `([^`]+)` \|", table, re.M))


@pytest.mark.parametrize(("page", "message"), list(messages()))
def test_quoted_messages_are_the_codes(page: str, message: str) -> None:
    assert is_printed(message)


def test_a_message_of_nobody_is_noticed() -> None:
    assert not is_printed("ratio gate: all is well with ...")
    assert sum(1 for _ in messages()) > 12


# Options of the public scripts at 15cc71d, and keys of flow_grpo's config/ at 54809b5.
DANCEGRPO = """
adv_clip_max allow_tf32 bestofn cache_dir cfg cfg_infer checkpointing_steps checkpoints_total_limit
clip_range data_json_path dataloader_num_workers dit_model_name_or_path ema_decay ema_start_step eta
fps fsdp_sharding_startegy gradient_accumulation_steps gradient_checkpointing group_frame
group_resolution h ignore_last init_same_noise learning_rate log_validation logging_dir logit_mean
logit_std lora_alpha lora_rank loss_coef lr_num_cycles lr_power lr_scheduler lr_warmup_steps
master_weight_type max_grad_norm max_train_steps mixed_precision mode_scale model_type mq_coef
num_frames num_generations num_latent_t num_train_epochs output_dir precondition_outputs
pretrained_model_name_or_path reference_model_path resume_from_checkpoint
resume_from_lora_checkpoint sampler_seed sampling_steps scale_lr seed selective_checkpointing shift
sp_size t timestep_fraction tracker_project_name train_batch_size train_sp_batch_size
uncond_prompt_dir use_cpu_offload use_ema use_group use_hpsv2 use_hpsv3 use_lora use_pickscore
use_same_noise use_videoalign vae_model_path validation_guidance_scale validation_prompt_dir
validation_sampling_steps validation_steps vq_coef w weight_decay weight_path weighting_scheme
"""
FLOW_GRPO = """
run_name debug num_epochs resume_from seed logdir save_freq eval_freq num_checkpoint_limit
mixed_precision allow_tf32 use_lora dataset resolution activation_checkpointing
fsdp_optimizer_offload pretrained.model pretrained.revision sample.num_steps sample.eval_num_steps
sample.guidance_scale sample.eval_guidance_scale sample.train_batch_size
sample.num_image_per_prompt sample.test_batch_size sample.num_batches_per_epoch sample.global_std
sample.noise_level sample.same_latent sample.sde_window_size sample.sde_window_range sample.sde_type
train.batch_size train.use_8bit_adam train.learning_rate train.adam_beta1 train.adam_beta2
train.adam_weight_decay train.adam_epsilon train.gradient_accumulation_steps train.max_grad_norm
train.num_inner_epochs train.cfg train.adv_clip_max train.clip_range train.clip_range_lt
train.clip_range_gt train.timestep_shift train.timestep_fraction train.beta train.lora_path
train.ema prompt_fn prompt_fn_kwargs reward_fn save_dir per_prompt_stat_tracking
"""


def test_migration_leaves_no_option_out() -> None:
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    flags = [f"`--{option}`" for option in DANCEGRPO.split()]
    keys = [f"`{key}`" for key in FLOW_GRPO.split()]
    assert [option for option in [*flags, *keys] if option not in text] == []


# ---- API page, figures --------------------------------------------------------------------------


def test_every_public_name_is_on_the_api_page() -> None:
    written = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(path.rpartition(".")[2] for path in written) == sorted(dancegrpo_fast.__all__)
    for path in written:
        module, _, attribute = path.rpartition(".")
        ours = getattr(dancegrpo_fast, attribute)
        assert getattr(importlib.import_module(module), attribute) is ours, path


def pinned(package: str) -> str:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.search(rf"^{package}==(.+)$", constraints, re.M)[1]


def test_figures_are_those_of_the_code(tmp_path: Path) -> None:
    if matplotlib.__version__ != pinned("matplotlib"):
        pytest.skip("figures are compared byte by byte, with the pinned matplotlib only")
    # A process of its own: matplotlib's settings and cached fonts are global.
    subprocess.run(
        [sys.executable, ROOT / "scripts/figures.py", tmp_path], check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    made = sorted(tmp_path.iterdir())
    assert len(made) == 4
    for figure in made:
        assert figure.read_bytes() == (DOCS / "images" / figure.name).read_bytes(), figure.name


# ---- the site -----------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation() -> None:
    def leaves(part: object) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for below in part.values() if isinstance(part, dict) else part:
            if not isinstance(part, str):
                yield from leaves(below)

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(leaves(settings["nav"])) == [page.name for page in PAGES]
    assert settings["theme"]["font"] is False


def zensical() -> str:
    """The site builder of this environment, or of the path."""
    beside = shutil.which("zensical", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("zensical")
    if found is None:
        pytest.skip("SITE NOT BUILT: zensical is missing (pip install '.[docs]')")
    return found


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    subprocess.run([sys.executable, ROOT / "scripts/site_source.py", folder], check=True)
    return run_builder(folder)


def run_builder(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [zensical(), "build", "--clean", "--strict"], cwd=folder, capture_output=True, text=True
    )


def test_the_site_builds_and_loads_nothing_external(tmp_path: Path) -> None:
    built = build(tmp_path / "site_source")
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "site_source" / "site"
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|"
        r"<link\b(?![^>]*canonical)[^>]*\bhref=[\"']?(?:https?:)?//|@import|url\((?:https?:)?//"
    )
    for page in pages:
        assert not loads.search(page.read_text(encoding="utf-8")), page.name
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not any(re.search(r"url\([\"']?(?:https?:)?//", style) for style in styles)
    # The API page holds docstrings, and a link out of docs/ became a page.
    assert "Clipped objective plus KL" in (site / "api.html").read_text(encoding="utf-8")
    assert (site / "source/recipes/demo.yaml.html").is_file()


@pytest.mark.parametrize(
    "planted",
    ["[gone](nowhere.md)", "[gone](start.md#nowhere)", "::: dancegrpo_fast.ops.nowhere"],
    ids=["page", "anchor", "name"],
)
def test_a_planted_fault_stops_the_build(planted: str, tmp_path: Path) -> None:
    # A site of two pages: what a whole one costs is paid once, above.
    zensical()
    source = tmp_path / "site_source"
    (source / "docs").mkdir(parents=True)
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings["nav"] = [{"Start": "start.md"}, {"Index": "index.md"}]
    (source / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (source / "dancegrpo_fast").symlink_to(ROOT / "dancegrpo_fast")
    (source / "docs/start.md").write_text("# Start\n", encoding="utf-8")
    (source / "docs/index.md").write_text("# Index\n\n[start](start.md)\n", encoding="utf-8")
    assert run_builder(source).returncode == 0
    (source / "docs/index.md").write_text(f"# Index\n\n{planted}\n", encoding="utf-8")
    assert run_builder(source).returncode != 0


def test_a_link_out_of_docs_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / "docs").mkdir(parents=True)
    shutil.copy(ROOT / "mkdocs.yml", root)
    (root / "recipes").mkdir()
    (root / "recipes/one.yaml").write_text("a: 1\n", encoding="utf-8")
    page = "# A\n\n[one](../recipes/one.yaml) [two](../recipes/two.yaml)\n"
    (root / "docs/a.md").write_text(page, encoding="utf-8")
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        site_source = importlib.import_module("site_source")
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    with pytest.raises(ValueError, match="is emptied, and holds the project"):
        site_source.prepare(tmp_path, root)
    assert site_source.prepare(tmp_path / "out", root) == ["docs/a.md: ../recipes/two.yaml"]
    assert "(source/recipes/one.yaml.md)" in (tmp_path / "out/docs/a.md").read_text()
    assert "a: 1" in (tmp_path / "out/docs/source/recipes/one.yaml.md").read_text()
