"""The order in which prompts are drawn, and which are skipped."""

import json
from collections import Counter

import pytest

from dancegrpo_fast.config import DataConfig, UserError
from dancegrpo_fast.data import Draws, PromptSet
from dancegrpo_fast.prompt import Prompt


def prompt_set(count: int) -> PromptSet:
    return PromptSet(tuple(Prompt(f"prompt {i}") for i in range(count)))


def draws(total: int, count: int, epochs: int | None, seed: int = 0) -> Draws:
    config = DataConfig(prompts="p", prompts_per_iteration=count, skip_zero_variance=epochs)
    return Draws(prompt_set(total), config, seed)


def test_draws_without_skipping_are_the_batches():
    plain = draws(7, 3, None)
    for iteration in range(9):
        assert plain.batch(iteration) == prompt_set(7).batch(iteration, 0, 3)
        assert plain.finish([True] * 3) == {}


def test_without_silent_prompts_skipping_changes_nothing():
    """Also the rest of an epoch that is too short is left out alike."""
    skipping = draws(7, 3, 2)
    for iteration in range(9):
        assert skipping.batch(iteration) == prompt_set(7).batch(iteration, 0, 3)
        assert skipping.finish([False] * 3) == {"data/skipped": 0.0}


def test_silent_prompts_come_back_after_so_many_epochs():
    """Prompts 0 and 3 are silent: drawn in epoch 0, skipped in 1 and 2, drawn in 3."""
    skipping, seen = draws(8, 2, 2), [Counter() for _ in range(4)]
    shares = []
    for iteration in range(4 + 3 + 3 + 4):
        epoch = skipping.place // 8
        batch = skipping.batch(iteration)
        seen[epoch].update(index for index, _ in batch)
        shares.append(skipping.finish([index in (0, 3) for index, _ in batch])["data/skipped"])
    assert all(max(counter.values()) == 1 for counter in seen)
    assert [sorted(set(range(8)) - set(counter)) for counter in seen] == [[], [0, 3], [0, 3], []]
    assert shares[3:7] == [0.25] * 4 and shares[-1] == 0.25


def test_skipping_goes_on_from_a_snapshot():
    """State through JSON, at any iteration: the same prompts from there on."""
    whole = draws(10, 3, 2, seed=5)
    for iteration in range(30):
        resumed = draws(10, 3, 2, seed=5)
        resumed.state = json.loads(json.dumps(whole.state))
        batch = whole.batch(iteration)
        assert resumed.batch(iteration) == batch == whole.batch(iteration)
        silent = [index % 3 == 0 for index, _ in batch]
        assert resumed.finish(silent) == whole.finish(silent)
        assert resumed.state == whole.state


def test_when_everything_is_silent_epochs_pass():
    skipping = draws(4, 2, 3)
    for iteration in range(12):
        batch = skipping.batch(iteration)
        assert len({index for index, _ in batch}) == 2
        skipping.finish([True, True])
    assert skipping.place // 4 == 5 * 4 + 1  # Two iterations of an epoch, then three epochs pass.


def test_skipping_needs_prompts_to_skip():
    with pytest.raises(UserError, match="data.skip_zero_variance = 1: each iteration draws all 4"):
        draws(4, 5, 1)


@pytest.mark.parametrize(
    ("total", "count"), [(1, 1), (7, 1), (7, 3), (7, 7), (8, 3), (8, 4), (8, 7), (64, 4), (64, 7)]
)
def test_an_epoch_holds_every_prompt_at_most_once(total, count):
    prompts = prompt_set(total)
    per_epoch = total // count
    for epoch in range(3):
        seen = Counter(
            index
            for iteration in range(epoch * per_epoch, (epoch + 1) * per_epoch)
            for index, _ in prompts.batch(iteration, 0, count)
        )
        assert len(seen) == per_epoch * count and set(seen.values()) == {1}


def test_more_prompts_than_the_set_go_round_it_evenly():
    prompts = prompt_set(5)
    seen = Counter(index for i in range(3) for index, _ in prompts.batch(i, 9, 12))
    assert sum(seen.values()) == 36 and max(seen.values()) - min(seen.values()) <= 1


def test_a_batch_is_a_function_of_seed_and_iteration_alone():
    forward = [prompt_set(10).batch(i, 3, 4) for i in range(6)]
    backward = [prompt_set(10).batch(i, 3, 4) for i in reversed(range(6))][::-1]
    assert forward == backward
    assert all(p.text == f"prompt {index}" for batch in forward for index, p in batch)
    assert forward != [prompt_set(10).batch(i, 4, 4) for i in range(6)]
    # Two iterations an epoch: epochs differ, and so does what an epoch leaves out.
    epochs = [sorted(i for b in forward[e : e + 2] for i, _ in b) for e in (0, 2, 4)]
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_is_uniform():
    """Each of 4 prompts comes first in a quarter of the epochs: 1000 epochs, 6 standard errors."""
    first = Counter(prompt_set(4).batch(4 * epoch, 1, 1)[0][0] for epoch in range(1000))
    assert all(abs(first[i] - 250) < 6 * (1000 * 0.25 * 0.75) ** 0.5 for i in range(4))


@pytest.mark.parametrize(("iteration", "count"), [(-1, 1), (0, 0)])
def test_impossible_arguments_are_refused(iteration, count):
    with pytest.raises(ValueError, match=f"iteration = {iteration}, count = {count}"):
        prompt_set(2).batch(iteration, 0, count)
