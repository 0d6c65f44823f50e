"""What the planner says of meshes: exchanges, the best mesh, the largest batches, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_config, tiny_recipe, tiny_wan

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import ParallelConfig, RunConfig, UserError, load_config
from dancegrpo_fast.models import open_family
from dancegrpo_fast.planner import Hardware, Planner, largest_batches
from dancegrpo_fast.planner.batches import FIELDS, _largest, image_tokens
from dancegrpo_fast.planner.meshes import COMPARED, engines, meshes
from dancegrpo_fast.planner.network import Networks
from dancegrpo_fast.planner.table import batch_lines, compared_text, mesh_text
from dancegrpo_fast.planner.traffic import Mesh, exchanged
from dancegrpo_fast.planner.work import work_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("planner") / "wan")


def planner_of(config: RunConfig) -> Planner:
    return Planner(config, open_family(config.model))


@pytest.fixture(scope="module")
def networks(model, tmp_path_factory) -> Networks:
    """Of the recipe without changes: recipes that differ in `parallel` share what calls cost."""
    return planner_of(tiny_config(tmp_path_factory.mktemp("planner"), model)).networks


# ---- traffic -------------------------------------------------------------------------------------


def test_exchanges_of_sequence_parallelism(tmp_path, model):
    """By hand: 3 latent frames of 4 x 4 are 12 tokens of 24 float32 numbers, 2 blocks, guided."""
    config = tiny_config(tmp_path, model, {"model.guidance": 3.0})
    family, parallel = open_family(config.model), ParallelConfig(sp=2)
    work = work_of(config, family, 2, sp=2)
    networks = Networks(config, family).networks
    rollout, update = exchanged(family, parallel, Mesh(1, 2, 8), networks, work)
    forward = 4 * 6 * 24 * 4 * 2 * 2 // 2
    assert rollout.inside == forward * sum(work.rollout["transformer"])
    trained = sum(sum(batches["transformer"]) for batches in work.training)
    assert update.inside == 2 * forward * trained
    assert rollout.between == update.between == 0


def test_reused_forwards_exchange_tensor_by_tensor(tmp_path, model):
    """The same bytes as DDP's one bucket; one collective more says which tensors are used."""
    changes = {"parallel.engine": "ddp", "rollout.batch_size": 2, "loss.micro_batch_size": 2}
    found = []
    for reuse in (False, True):
        changes["loss.reuse_forwards"] = reuse
        planner = planner_of(tiny_config(tmp_path, model, changes))
        found.append(planner.estimate(Hardware(2)).received["train"])
    tensors = len(list(planner.networks._make("transformer").parameters()))
    assert found[0].collectives == 1 and found[1].collectives == tensors + 1
    assert found[0].inside == found[1].inside


# ---- meshes and the command ----------------------------------------------------------------------


def test_the_recommended_mesh_fits_and_is_the_fastest(tmp_path, model):
    planner = planner_of(tiny_config(tmp_path, model, {"rollout.group_size": 8}))
    hardware = Hardware(4, machine=2, link=1e6, inside=1e9)
    found = planner.recommend(hardware)
    assert found is not None
    best, reasons = found
    assert best.fits(hardware)
    assert best.config.parallel.checkpointing == "none", "there is room for all activations"
    assert best.config.parallel.gather_rollout
    assert any("gather_rollout=false takes" in reason for reason in reasons)
    others = list(planner._candidates(hardware, planner.config.parallel))
    assert len(others) > 10 and all(best.total <= other.total for other in others)
    # Less memory: blocks are computed again, or weights are spread wider.
    need = best.memory.total(best.memory.peak)
    least = planner.smallest(hardware)
    assert least is not None and least.memory.total(least.memory.peak) < need
    small = Hardware(4, machine=2, link=1e6, inside=1e9, memory=0.99 * need / 0.9)
    tight = planner.recommend(small)
    assert tight is not None and tight[0].fits(small) and tight[0].total >= best.total
    assert planner.recommend(Hardware(4, machine=2, memory=1e3)) is None


OF_ZERO = {"parallel.engine": "deepspeed", "parallel.zero_stage": 3}
ENGINES = {
    "ddp": {"parallel.engine": "ddp"},
    "zero": OF_ZERO,
    "zero, host": OF_ZERO | {"parallel.offload_optimizer": True},
}


@pytest.mark.parametrize("changes", ENGINES.values(), ids=ENGINES)
def test_the_engine_is_the_recipes_unless_nothing_of_it_fits(tmp_path, model, networks, changes):
    """And what is recommended is a recipe that is accepted, with the overrides as printed."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path, model, changes)))
    config = load_config(recipe)
    planner, given = Planner(config, networks.family, networks), config.parallel
    hardware = Hardware(2)
    found = planner.recommend(hardware)
    assert found is not None
    assert found[0].config.parallel.engine == given.engine
    assert f"engine {given.engine}, the recipe's, with" in compared_text(found[0], given)
    pasted = load_config(recipe, mesh_text(found[0], given).split())
    assert pasted.parallel == found[0].config.parallel
    # Whole weights, or whole gradients beside activations: only FSDP's slices are smaller.
    kinds = list(engines(given, hardware))
    assert [kind.engine for kind in kinds] == [given.engine, "fsdp"]
    need = [
        min(e.memory.total(e.memory.peak) for e in planner._candidates(hardware, kind))
        for kind in kinds
    ]
    assert need[1] < need[0]
    tight = Hardware(2, memory=sum(need) / 2 / 0.9)
    found = planner.recommend(tight)
    assert found is not None and found[0].config.parallel.engine == "fsdp"
    assert f"engine {given.engine}, the recipe's, of which nothing fits, and fsdp" in (
        compared_text(found[0], given)
    )
    pasted = load_config(recipe, mesh_text(found[0], given).split())
    assert pasted.parallel == found[0].config.parallel
    assert Planner(pasted, networks.family, networks).estimate(tight).fits(tight)


def test_reasons_name_what_is_compared(tmp_path, model, networks):
    planner = Planner(tiny_config(tmp_path, model, OF_ZERO), networks.family, networks)
    found = planner.recommend(Hardware(4, machine=2, link=1e6))
    assert found is not None
    best, why = found
    # 20216 weights: stage 2 exchanges them in every micro-batch, stage 3 gathers them as well.
    assert best.config.parallel.zero_stage == 1
    assert [text.partition("=")[0] for text in why] == [f for (f,) in COMPARED["deepspeed"]]
    assert len(list(meshes(planner.config.parallel, Hardware(4)))) == 3 * 3


def test_nothing_is_recommended_that_the_recipe_refuses(tmp_path, model, networks):
    """`rollout.pool_dtype` is refused with sp; a split would need the least memory here."""
    pool = {"rollout.group_size": 8, "advantage.best_of_n": 2, "rollout.redraw": True}
    degrees = {}
    for dtype in (None, "bfloat16"):
        changes = pool | {"rollout.pool_dtype": dtype}
        planner = Planner(tiny_config(tmp_path, model, changes), networks.family, networks)
        found = planner._candidates(Hardware(2), planner.config.parallel)
        degrees[dtype] = {e.config.parallel.sp for e in found}
    assert degrees == {None: {1, 2}, "bfloat16": {1}}


@pytest.mark.parametrize("gpus", [3, 6, 7])
def test_gpus_of_one_machine_are_inside_it(tmp_path, model, networks, gpus):
    """Also where their number does not divide the machine's."""
    planner = Planner(tiny_config(tmp_path, model), networks.family, networks)
    received = planner.estimate(Hardware(gpus, machine=8)).received
    assert all(moved.inside > 0 and moved.between == 0 for moved in received.values())
    across = planner.estimate(Hardware(gpus, machine=2)).received
    assert all(moved.inside == 0 and moved.between > 0 for moved in across.values())
    assert Mesh(2, 6, 8).in_machine(6) is False, "the second copy stands in two machines"


def test_what_of_zero_3_is_whole_and_what_in_slices(tmp_path, model, networks):
    """A rollout has the whole network; the average is of slices, and so is a snapshot's copy."""
    config = tiny_config(tmp_path, model, OF_ZERO | {"policy.ema_decay": 0.9})
    planner = Planner(config, networks.family, networks)
    memory = planner.estimate(Hardware(4)).memory
    phases, network = memory.phases, networks.networks["transformer"]
    assert memory.host == 4 * 4 * network.elements() / 4, "weights, two moments, the average"
    two = planner.estimate(Hardware(4), config.parallel.model_copy(update={"zero_stage": 2}))
    assert two.memory.host == 4 * network.elements() * (2 / 4 + 2)
    assert phases["rollout"]["gathered weights"] == phases["train"]["gathered weights"]
    assert phases["rollout"]["gathered weights"] == network.stored() == 4 * network.elements()
    assert phases["step"]["average"] == network.elements()
    assert "gathered weights" not in phases["step"]


def test_the_iteration_that_is_planned(tmp_path, model, networks):
    """A later window has a longer trunk, which all samples share."""
    changes = {"rollout.tree": {"kind": "window", "window_size": 1, "window_order": "progressive",
                                "window_iterations": 1}}  # fmt: skip
    config = tiny_config(tmp_path, model, changes)
    drawn = []
    for iteration in (0, 2):
        planner = Planner(config, networks.family, networks, iteration=iteration)
        work = planner.work(1, 1)
        drawn.append(sum(work.rollout["transformer"]))
        window = [s.step for s in work.plan.states if s.trained]
        assert set(window) == {iteration + 1}
    assert drawn == [2 * (1 + 3 * 4), 2 * (3 + 1 * 4)]


def test_zero_steps_its_own_slice(tmp_path, model):
    """The plain optimizer's temporary copy: of a process's slice, and none where the host steps."""
    for stage in (1, 2, 3):
        rows = {}
        for host in (False, True):
            changes = {"parallel.engine": "deepspeed", "parallel.zero_stage": stage,
                       "parallel.offload_optimizer": host}  # fmt: skip
            planner = planner_of(tiny_config(tmp_path, model, changes))
            rows[host] = planner.estimate(Hardware(4)).memory.phases["step"]
        trained = planner.networks.networks["transformer"].elements(trained=True)
        assert rows[False]["temporary"] == 4 * trained / 4
        assert "temporary" not in rows[True]


def test_a_search_decodes_and_scores_beside_the_gathered_networks(tmp_path, model):
    search = {"rollout.tree.kind": "search", "rollout.tree.branches": 3,
              "rollout.tree.branch_steps": [0], "rollout.group_size": 3,
              "advantage.credit": "siblings", "data.prompts_per_iteration": 2}  # fmt: skip
    hardware, plain = Hardware(2), {"data.prompts_per_iteration": 2}
    rows = {}
    for name, changes in (("search", search), ("plain", plain)):
        planner = planner_of(tiny_config(tmp_path, model, changes))
        rows[name] = planner.estimate(hardware).memory.phases
    whole = rows["search"]["rollout"].keys() - {"activations"}
    assert whole - rows["plain"]["score"].keys(), "nothing that only a rollout holds"
    assert rows["search"]["score"].keys() >= whole and rows["search"]["decode"].keys() >= whole
    assert rows["search"]["rollout"]["VAE"] == rows["search"]["decode"]["VAE"]


def test_meshes_use_all_gpus():
    for gpus, machine in ((1, 8), (3, 8), (12, 8), (64, 8), (16, 4)):
        found = list(meshes(ParallelConfig(), Hardware(gpus, machine)))
        assert found, gpus
        assert all(p.dp_replicate * p.dp_shard * p.sp == gpus for p in found)
        assert (1, gpus) in {(p.dp_replicate, p.dp_shard * p.sp) for p in found}


def test_a_mesh_that_does_not_multiply_is_refused(tmp_path, model):
    planner = planner_of(tiny_config(tmp_path, model, {"parallel.dp_replicate": 3}))
    with pytest.raises(UserError, match=r"must multiply to the 4"):
        planner.estimate(Hardware(4))
    with pytest.raises(UserError, match=r"cannot be spread over 16"):
        planner_of(tiny_config(tmp_path, model)).estimate(Hardware(16))
    parallel = ParallelConfig(sp=3)
    with pytest.raises(UserError, match=r"parallel.sp = 3"):
        planner_of(tiny_config(tmp_path, model)).estimate(Hardware(3), parallel)


@pytest.mark.parametrize("most", [1, 2, 7, 8, 33])
def test_the_largest_that_fits_is_found(most):
    for limit in range(most + 3):

        def fits(size: int, limit: int = limit) -> bool:
            assert 1 <= size <= most
            return size <= limit

        assert _largest(most, fits) == min(limit, most)


def test_the_largest_batches_fit_and_larger_ones_do_not(tmp_path, model):
    """On so little memory that a rollout takes 3 to 7 of its 8 states."""
    config = tiny_config(tmp_path, model)
    planner = planner_of(config)

    def need(field: str, size: int) -> float:
        section, name = field.split(".")
        changed = planner_of(tiny_config(tmp_path, model, {field: size}))
        memory = changed.estimate(Hardware(1)).memory
        assert getattr(getattr(changed.config, section), name) == size
        return max(memory.total(phase) for phase in FIELDS[field])

    for field, most in (("rollout.batch_size", 8), ("loss.micro_batch_size", 18)):
        usable = (need(field, 3) + need(field, 4)) / 2
        hardware = Hardware(1, memory=usable / 0.9)
        assert largest_batches(planner, planner.estimate(hardware), hardware)[field] == 3
        # 2 prompts of 4 samples; trained are 2 roots and twice 8 states.
        plenty = Hardware(1)
        assert largest_batches(planner, planner.estimate(plenty), plenty)[field] == most
        none = Hardware(1, memory=1e3)
        assert largest_batches(planner, planner.estimate(none), none)[field] == 0
    # 5 frames of 16 x 16 are latents of 3 x 4 x 4, tokens of 1 x 2 x 2.
    assert image_tokens(planner.family) == 12


def test_batches_that_must_be_equal_are_found_together(tmp_path, model):
    """`loss.reuse_forwards`: whoever pastes both lines gets a recipe that is accepted."""
    changes = {"loss.reuse_forwards": True, "rollout.batch_size": 2, "loss.micro_batch_size": 2}
    planner = planner_of(tiny_config(tmp_path, model, changes))
    hardware = Hardware(1)
    found = largest_batches(planner, planner.estimate(hardware), hardware)
    assert found == dict.fromkeys(FIELDS, 8)
    tiny_config(tmp_path, model, changes | found)


def test_no_mesh_is_recommended_that_graphs_are_refused_on(tmp_path, model):
    planner = planner_of(tiny_config(tmp_path, model, {"parallel.compile": "graphs"}))
    found = planner._candidates(Hardware(1), planner.config.parallel)
    kinds = {e.config.parallel.checkpointing for e in found}
    assert kinds == {"none"}, "a start with another would be refused"
    with pytest.raises(UserError, match="parallel.compile = 'graphs': not verified on several"):
        planner.estimate(Hardware(2))


def test_the_command(tmp_path, model, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path, model)))
    assert main(["plan", str(recipe), "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    assert "nothing shared" in text and "recommended:" in text and "projected" in text
    assert "rollout.batch_size=4, 4 x 12 image tokens a call" in text
    assert "compared: engine fsdp, the recipe's, with values of dp_replicate" in text
    assert "gate/max_gap" not in text
    found = batch_lines({"rollout.batch_size": 2}, None, compared=True)
    assert found[1] == "  rollout.batch_size=2" and "gate/max_gap" in found[2]
    assert main(["plan", str(recipe), "--gpus", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["recipe"]["fits"]
    assert values["recommended"]["mesh"]["checkpointing"] == "none"
    assert values["recommended"]["largest_batches"] == dict(zip(FIELDS, (8, 18), strict=True))
    assert main(["plan", str(recipe), "--gpus", "1", "--memory", "0.0001"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    for wrong in (["--json"], ["--gpus", "0"], ["--gpus", "2", "--efficiency", "40"],
                  ["--gpus", "2", "--link", "0"]):  # fmt: skip
        assert main(["plan", str(recipe), *wrong]) == 2
        assert wrong[-2 if len(wrong) > 1 else -1] in capsys.readouterr().err
