"""Fields of a recipe that are valid alone and contradict each other."""
# ruff: noqa: F811 -- an imported fixture is named again by each test that uses it

from __future__ import annotations

import pytest
from recipe_cases import lines, recipe  # noqa: F401

from dancegrpo_fast.config import load_config

WINDOW = ["rollout.tree.kind=window"]
POINTS = ["rollout.tree.kind=branch_points"]
TRUNK = ["rollout.tree.kind=trunk_with_branches"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([*WINDOW], "window_size = null: kind window needs a size from 1 to 9 (9 of 10 steps"),
        ([*WINDOW, "rollout.tree.window_size=10"], "window_size = 10: must be from 1 to 9 (9 of"),
        (
            [*WINDOW, "rollout.tree.window_size=3", "rollout.tree.window_start=7"],
            "window_start = 7: a window of 3 must start in 0 to 6 (9 of 10 steps can be trained)",
        ),
        (
            [*WINDOW, "rollout.tree.window_size=3", "rollout.tree.window_range=[4, 10]"],
            "window_range = [4, 10]: must be [first, end) inside [0, 9] (9 of 10 steps can be",
        ),
        (
            [*WINDOW, "rollout.tree.window_size=3", "rollout.tree.window_range=[4, 6]"],
            "window_range = [4, 6]: must hold at least window_size = 3 steps",
        ),
        (
            [*WINDOW, "rollout.tree={kind: window, window_size: 2, window_start: 1, "
             "window_range: [0, 5]}"],
            "window_range = [0, 5]: has no effect beside window_start; set one of them to null",
        ),
        (
            [*POINTS, "rollout.tree.branches=2", "rollout.tree.branch_steps=[4, 4]"],
            "branch_steps = [4, 4]: must ascend from 0 to at most 8 (9 of 10 steps can be trained)",
        ),
        ([*POINTS, "rollout.tree.branch_steps=[0]"], "branches = null: kind branch_points needs"),
        ([*POINTS, "rollout.tree.branches=2"], "branch_steps = []: kind branch_points needs a"),
    ],
)  # fmt: skip
def test_a_tree_must_fit_its_schedule(recipe, overrides, expected):
    found = lines(recipe, overrides)
    assert any(expected in line for line in found)
    assert all(": rollout.tree." in line for line in found)


@pytest.mark.parametrize(
    ("overrides", "leaves", "formula"),
    [
        (
            [*POINTS, "rollout.tree.branches=3", "rollout.tree.branch_steps=[0, 4]"],
            9,
            "branches ** steps = 3 ** 2",
        ),
        (
            [*TRUNK, "rollout.tree.branches=4", "rollout.tree.branch_steps=[0, 2, 8]",
             "rollout.tree.trunks=2"],
            24,
            "trunks * steps * branches = 2 * 3 * 4",
        ),
    ],
)  # fmt: skip
def test_group_size_must_be_the_leaves_and_the_error_says_how_many(
    recipe, overrides, leaves, formula
):
    (line,) = lines(recipe, overrides)
    assert line == (
        f"r.yaml: rollout.group_size = 12: must be {leaves}, the leaves of this tree ({formula})"
    )
    assert load_config(recipe, [*overrides, f"rollout.group_size={leaves}"])


def test_last_step_is_trained_only_when_it_has_a_density(recipe):
    window = [*WINDOW, "rollout.tree.window_size=3", "rollout.tree.window_start=7"]
    last = ["rollout.final=sample", "rollout.train_last=true"]
    assert load_config(recipe, window + last).rollout.tree.window_start == 7
    assert lines(recipe, [*last, "rollout.dynamics=cps"]) == [
        "override: rollout.train_last = true: cps adds no noise in its last step; set it to false"
    ]


def test_cps_level_is_an_angle(recipe):
    assert lines(recipe, ["rollout.dynamics=cps", "rollout.noise_level=1.1"]) == [
        "override: rollout.noise_level = 1.1: cps takes a level in (0, 1], such as 0.7"
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["rollout.dynamics=cps", "loss.ratio_norm=true"],
            "loss.ratio_norm = true: needs a Gaussian log-prob, which cps has with "
            "rollout.exact_density = true; or leave it at false",
        ),
        (
            ["model.family=sd", "rollout.dynamics=ddim", "loss.timestep_weights=inverse_dt"],
            "loss.timestep_weights = 'inverse_dt': dynamics ddim has no step length; use std or "
            "uniform",
        ),
        (
            [*WINDOW, "rollout.tree.window_size=2", "loss.timesteps=[0]"],
            "loss.timesteps = [0]: kind window trains the steps of rollout.tree.window_start; use "
            "that",
        ),
        (
            ["loss.timesteps=[0, 1]", "loss.timestep_fraction=0.5"],
            "loss.timestep_fraction = 0.5: has no effect beside a list of timesteps; set it to 1",
        ),
        (
            [*TRUNK, "rollout.tree.branches=4", "rollout.tree.branch_steps=[0, 2, 8]",
             "rollout.group_size=12", "loss.timestep_fraction=0.5"],
            "loss.timestep_fraction = 0.5: of kind trunk_with_branches each sample has one trained "
            "step; use 1, or loss.timestep_scope = group",
        ),
        (
            ["model.family=sd", "rollout.dynamics=ddim", *WINDOW,
             "rollout.tree={kind: window, window_size: 2, flash: 0.5}"],
            "rollout.tree.flash = 0.5: DPM-Solver++ is written for a flow's velocity here; with "
            "dynamics ddim use null",
        ),
        (
            ["rollout.tree={kind: window, window_size: 2, window_start: 1, "
             "window_order: decaying}"],
            "rollout.tree.window_order = 'decaying': has no effect beside window_start, which "
            "stands still",
        ),
    ],
)  # fmt: skip
def test_algorithm_settings_that_make_no_sense_together(recipe, overrides, expected):
    assert lines(recipe, overrides) == [f"override: {expected}"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.fps=8"],
         "model.fps = 8: has no effect with model.frames = 1, which draws images; use null"),
        (["data.column=caption"], "data.column = 'caption': has no effect with text files, a "
         "prompt a line; leave it out"),
        (["data.prompts=P.TXT", "data.column=caption"], "data.column = 'caption': has no effect "
         "with text files, a prompt a line; leave it out"),
        ([*WINDOW, "rollout.tree.window_size=1", "loss.timestep_fraction=0.5"],
         "loss.timestep_fraction = 0.5: has no effect where one step is trained; use 1"),
        (["rollout.steps=2", "loss.timestep_fraction=0.5", "loss.timesteps=first"],
         "loss.timestep_fraction = 0.5: has no effect where one step is trained; use 1"),
        ([*TRUNK, "rollout.tree.branches=12", "rollout.tree.branch_steps=[1]",
          "loss.timestep_fraction=0.5", "loss.timestep_scope=group"],
         "loss.timestep_fraction = 0.5: has no effect where one step is trained; use 1"),
        (["loss.kind=nft", "rollout.tree.kind=independent_roots", "loss.timestep_range=[3, 4]",
          "loss.timestep_fraction=0.5"],
         "loss.timestep_fraction = 0.5: has no effect where one step is trained; use 1"),
        (["evaluation.seeds=4"], "evaluation.seeds = 4: has no effect without evaluation.prompts; "
         "name a file of held-out prompts, or leave this at 2"),
        (["loss.kl=x"], "loss.kl = 'x': has no effect with loss.kl_weight = 0.0; set that to a "
         "number above 0, or leave it at 'exact'"),
        (["loss.old_log_prob=rollout", "loss.max_log_prob_gap=0.1"], "loss.max_log_prob_gap = 0.1: "
         "has no effect with loss.old_log_prob = 'rollout'; set that to auto or on_policy or "
         "recompute, or leave it at 0.001"),
    ],
)  # fmt: skip
def test_settings_that_nothing_reads_are_refused(recipe, overrides, expected):
    assert lines(recipe, overrides) == [f"override: {expected}"]


def test_a_column_of_the_held_out_file_alone_is_read(recipe):
    config = load_config(recipe, ["data.column=caption", "evaluation.prompts=held_out.csv"])
    assert config.data.column == "caption"


def test_a_preset_without_its_kl_keeps_no_form_of_it(recipe):
    config = load_config(recipe, ["algorithm=flow_grpo", "loss.kl_weight=0"])
    assert config.loss.kl == "exact" and config.rollout.dynamics == "flow"


def test_lists_of_steps_and_weights_are_read(recipe):
    loss = load_config(
        recipe, ["loss.timesteps=[0, 3]", "loss.timestep_weights=[1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    ).loss
    assert loss.timesteps == [0, 3] and loss.timestep_weights == [float(i) for i in range(1, 10)]


def test_two_siblings_are_refused_and_three_are_not(recipe):
    tree = [*TRUNK, "rollout.tree.branch_steps=[0, 3]", "advantage.credit=siblings"]
    (line,) = lines(recipe, [*tree, "rollout.tree.branches=2", "rollout.group_size=4"])
    assert line.startswith(
        "override: advantage.credit = 'siblings': needs rollout.tree.branches of 3 or more, here 2"
    )
    assert load_config(recipe, [*tree, "rollout.tree.branches=3", "rollout.group_size=6"])


@pytest.mark.parametrize("credit", ["depth", "siblings"])
def test_credit_inside_a_tree_has_no_other_scope(recipe, credit):
    tree = [*TRUNK, "rollout.tree.branch_steps=[0, 3]", "rollout.tree.branches=6"]
    assert lines(recipe, [*tree, f"advantage.credit={credit}", "advantage.scope=batch"]) == [
        f"override: advantage.scope = 'batch': credit {credit} normalises inside one prompt's "
        "tree; use group"
    ]


def test_on_policy_with_several_updates_is_refused(recipe):
    assert lines(recipe, ["loss.old_log_prob=on_policy", "loss.updates=2"]) == [
        "override: loss.old_log_prob = 'on_policy': with loss.updates = 2 the later updates are "
        "off-policy; use recompute (or auto), or updates = 1"
    ]


def test_updates_are_counted_against_the_selected_samples(recipe):
    assert lines(recipe, ["advantage.best_of_n=4", "loss.updates=5"]) == [
        "override: loss.updates = 5: a group has 4 trained samples, so at most 4 updates"
    ]
    assert load_config(recipe, ["advantage.best_of_n=4", "loss.updates=4"])


def test_a_single_sample_is_fine_with_another_scope(recipe):
    single = ["rollout.group_size=1", "data.prompts_per_iteration=1"]
    assert load_config(recipe, [single[0], "advantage.scope=batch"])
    assert load_config(recipe, [*single, "advantage.scope=running"])
    assert lines(recipe, [*single, "advantage.scope=batch"]) == [
        "override: rollout.group_size = 1: one sample of one prompt has nothing in its iteration "
        "to compare with; use 2 or more, or more prompts"
    ]


SPLIT = [*POINTS, "rollout.tree.branches=3", "rollout.tree.branch_steps=[0, 2]",
         "rollout.group_size=9", "advantage.credit=siblings"]  # fmt: skip


@pytest.mark.parametrize(
    ("window", "unsplit"),
    [
        (["window_size=2"], 1),
        (["window_size=2", "window_order=progressive"], 1),
        (["window_size=2", "window_order=progressive", "window_stride=2"], 4),
        (["window_size=2", "window_range=[2, 5]"], 3),
        (["window_size=2", "window_start=1"], 1),
    ],
)
def test_siblings_need_a_split_wherever_a_window_may_begin(recipe, window, unsplit):
    """Else the run would end in the iteration whose window begins at an only child."""
    assert lines(recipe, [*SPLIT, *(f"rollout.tree.{field}" for field in window)]) == [
        "override: advantage.credit = 'siblings': needs states that branch at the first trained "
        f"step, which may be {unsplit}; add it to rollout.tree.branch_steps, or use leaf or depth"
    ]


@pytest.mark.parametrize(
    "window",
    [
        [],
        ["window_size=2", "window_start=2"],
        ["window_size=2", "window_range=[2, 4]"],
        ["window_size=2", "window_order=decaying", "window_range=[0, 4]", "window_stride=2"],
    ],
)
def test_siblings_with_a_split_at_each_first_trained_step(recipe, window):
    assert load_config(recipe, [*SPLIT, *(f"rollout.tree.{field}" for field in window)])
