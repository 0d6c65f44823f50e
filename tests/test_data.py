"""Prompt files and the order in which prompts are drawn."""

from collections import Counter

import pytest

from dancegrpo_fast.config import UserError
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.prompt import Prompt


def prompt_set(count: int) -> PromptSet:
    return PromptSet(tuple(Prompt(f"prompt {i}") for i in range(count)))


def test_load_keeps_order_and_repeated_lines_and_skips_blank_ones(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red square\r\n\n  \nblue \u2028 ring\na red square".encode())
    prompts = PromptSet.load(path).texts
    assert prompts == ("a red square", "blue \u2028 ring", "a red square")


def test_jsonl_lines_hold_images_and_what_rewards_are_told(tmp_path):
    (tmp_path / "frame.png").write_bytes(b"")
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a cat", "image": "frame.png"}\n\n'
        '{"prompt": "a dog", "count": 2, "tags": ["x"]}'
    )
    first, second = PromptSet.load(path).prompts
    assert first == Prompt("a cat", tmp_path / "frame.png")
    assert second == Prompt("a dog", None, {"count": 2, "tags": ["x"]})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "is not JSON"),
        ("[1]", 'must be an object with a text under "prompt"'),
        ('{"prompt": 3}', 'must be an object with a text under "prompt"'),
        ('{"prompt": "a", "image": "../x.png"}', "image '../x.png' lies outside"),
        ('{"prompt": "a", "image": "/etc/hostname"}', "image '/etc/hostname' lies outside"),
        ('{"prompt": "a", "image": "gone.png"}', "image 'gone.png': no such file"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(UserError) as caught:
        PromptSet.load(path)
    message = str(caught.value)
    assert message.startswith(f"data.prompts = {str(path)!r}: line 2: {reason}")
    assert "\n" not in message


def test_prompts_without_images_are_refused_where_one_is_needed(tmp_path):
    whole = PromptSet((Prompt("a", tmp_path / "a.png"),))
    whole.need_images("data.prompts")
    with pytest.raises(UserError, match="data.prompts: prompt 2 of 3 has no image .2 have none."):
        PromptSet((*whole.prompts, Prompt("b"), Prompt("c"))).need_images("data.prompts")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file; give a text file with one prompt a line"),
        (b"", "holds no prompt; write one a line"),
        (b" \n\t\n", "holds no prompt; write one a line"),
        (b"\xff\xfe\xfa", "cannot be read as UTF-8 text"),
    ],
)
def test_bad_files_give_one_line_with_field_value_and_way_out(tmp_path, content, reason):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        PromptSet.load(path, field="evaluation.prompts")
    message = str(caught.value)
    assert message.startswith(f"evaluation.prompts = {str(path)!r}: {reason}")
    assert "\n" not in message


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.prompts = .*cannot be read"):
        PromptSet.load(tmp_path)


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
