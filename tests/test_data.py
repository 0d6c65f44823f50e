"""Prompt files and the order in which prompts are drawn."""

import json
import logging
import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from dancegrpo_fast.config import DataConfig, UserError
from dancegrpo_fast.data import Draws, PromptSet
from dancegrpo_fast.prompt import Prompt


def prompt_set(count: int) -> PromptSet:
    return PromptSet(tuple(Prompt(f"prompt {i}") for i in range(count)))


def test_load_keeps_order_and_repeated_lines_and_skips_blank_ones(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red square\r\n\n  \nblue \u2028 ring\na red square".encode())
    prompts = PromptSet.load(path).texts
    assert prompts == ("a red square", "blue \u2028 ring", "a red square")


def test_the_ending_counts_in_any_case_and_json_is_no_text(tmp_path):
    """Read as text, a header or a bracket would be trained on."""
    (tmp_path / "P.CSV").write_text("prompt,n\na cat,1\n")
    assert PromptSet.load(tmp_path / "P.CSV").prompts == (Prompt("a cat", None, {"n": "1"}),)
    (tmp_path / "p.json").write_text('["a cat",\n"a dog"]')
    with pytest.raises(UserError, match=r"p.json': is JSON in one piece; give a .jsonl file"):
        PromptSet.load(tmp_path / "p.json")


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
        ('{"prompt": "a", "image": "' + "x" * 5000 + '"}', "image 'xxxxxxxxxx"),
        ('{"prompt": "a", "image": 5}', "image must be the name of a file"),
        ('{"prompt": " "}', "the prompt is empty"),
        ('{"prompt": "a\\u0000"}', "holds a control character, U+0000"),
        ('{"prompt": "\\ud83d"}', "holds half of a surrogate pair"),
        ('{"prompt": "a", "prompt": "b"}', "has a key twice, 'prompt'"),
        ('{"prompt": "a", "score": NaN}', "holds a number that JSON has not, NaN"),
        ("[" * 100_000, "is not JSON: "),
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
        ("a".encode("utf-16"), "cannot be read as UTF-8 text: it is UTF-16"),
        (b"\xff\xfa", "line 1: is not UTF-8 text: byte 1 is 0xff"),
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


KINDS = {
    "is not JSON": b'{"prompt": "cut',
    "must be an object with a text under": b'"a text"',
    'a text under "prompt"; it has': b'{"text": "a"}',
    "the prompt is empty": b'{"prompt": ""}',
    "lies outside": b'{"prompt": "a", "image": "../a.png"}',
    "no such file": b'{"prompt": "a", "image": "gone.png"}',
    "image must be the name": b'{"prompt": "a", "image": ["a.png"]}',
    "is not UTF-8 text": b'{"prompt": "\xe9"}',
    "holds half of a surrogate": b'{"prompt": "\\udc00"}',
    "has a key twice": b'{"prompt": "a", "x": 1, "x": 2}',
}


def big_file(path, bad_of_each: int) -> tuple[list[str], dict[int, str]]:
    """10,000 lines with ten kinds of malformed ones at drawn places: good texts, kind by line."""
    rng = random.Random(0)
    places = rng.sample(range(1, 10_001), bad_of_each * len(KINDS))
    kinds = {place: list(KINDS)[i % len(KINDS)] for i, place in enumerate(places)}
    good = [f"prompt {n}, \u4e2d \u2028" for n in range(1, 10_001) if n not in kinds]
    good = [text.strip() for text in good]
    texts = iter(good)
    lines = [
        KINDS[kinds[n]] if n in kinds else json.dumps({"prompt": next(texts)}).encode()
        for n in range(1, 10_001)
    ]
    path.write_bytes(b"\n".join(lines))
    return good, kinds


def test_ten_kinds_of_malformed_lines_are_all_named(tmp_path):
    """4 of each of ten kinds among 10,000: forty lines, each with its number and its reason."""
    path = tmp_path / "prompts.jsonl"
    _, kinds = big_file(path, 4)
    with pytest.raises(UserError) as caught:
        PromptSet.load(path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 40
    for line, (number, kind) in zip(lines, sorted(kinds.items()), strict=True):
        assert line.startswith(f"data.prompts = {str(path)!r}: line {number}: ") and kind in line


def test_many_malformed_lines_are_capped_but_each_kind_and_number_is_there(tmp_path):
    path = tmp_path / "prompts.jsonl"
    _, kinds = big_file(path, 20)
    with pytest.raises(UserError) as caught:
        PromptSet.load(path)
    *lines, last = str(caught.value).split("\n")
    assert len(lines) == 50 and all(any(kind in line for line in lines) for kind in KINDS)
    told = [int(line.split(": line ")[1].split(":")[0]) for line in lines]
    assert "malformed too, 200 in all: lines " in last
    rest = [int(number) for number in last.split(": lines ")[1].split(", ")]
    assert sorted(told + rest) == sorted(kinds)


def test_what_differs_from_line_to_line_is_no_kind_of_its_own(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": "a", "image": f"{way}{n}.png"})
             for n in range(200) for way in ("../", "")]  # fmt: skip
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        PromptSet.load(path)
    *told, last = str(caught.value).split("\n")
    assert len(told) == 50 and "malformed too, 400 in all" in last


def test_a_kind_that_comes_late_is_still_explained(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{\n" * 300 + '{"prompt": ""}\n{\n')
    with pytest.raises(UserError) as caught:
        PromptSet.load(path)
    *lines, last = str(caught.value).split("\n")
    assert len(lines) == 50 and lines[-1].endswith("line 301: the prompt is empty")
    assert last.endswith(", 249 and 52 more")  # Of 302, 50 are explained and 200 numbered.


def test_skipping_malformed_lines_loses_nothing_else(tmp_path, caplog):
    path = tmp_path / "prompts.jsonl"
    good, kinds = big_file(path, 100)
    with caplog.at_level(logging.WARNING):
        assert list(PromptSet.load(path, malformed="skip").texts) == good
    assert len(kinds) == 1000 and len(good) == 9000
    assert "malformed too, 1000 in all" in caplog.text
    assert "going on without 1000 of them" in caplog.text


def test_csv(tmp_path):
    """Quotes, newlines in fields, empty fields, another column, and a byte order mark."""
    (tmp_path / "a.png").write_bytes(b"")
    path = tmp_path / "prompts.csv"
    path.write_bytes(
        b"\xef\xbb\xbfCategory,Prompts,image\r\n"
        b'"colour, two","a ""red"" cat\non a mat",a.png\r\n'
        b"\r\n,a dog,\r\n"
    )
    first, second = PromptSet.load(path, column="Prompts").prompts
    assert first == Prompt('a "red" cat\non a mat', tmp_path / "a.png", {"Category": "colour, two"})
    assert second == Prompt("a dog")
    (tmp_path / "p.tsv").write_text("prompt\ttag\na, b\tx\n")
    assert PromptSet.load(tmp_path / "p.tsv").prompts == (Prompt("a, b", None, {"tag": "x"}),)


def test_csv_an_open_quote_costs_its_own_line_only(tmp_path):
    path = tmp_path / "prompts.csv"
    lines = ["prompt,tag", "a,1", '"open,2', "b,3", "c,4,5", "d", '"q"x,6', "f,8", '"open,9', "g,1"]
    path.write_bytes("\n".join([*lines, "e\xff,7"]).encode("latin-1"))
    with pytest.raises(UserError) as caught:
        PromptSet.load(path)
    found = [line.split(": line ")[1] for line in str(caught.value).split("\n")]
    assert [int(line.split(":")[0]) for line in found] == [3, 5, 6, 7, 9, 11]
    assert found[-1] == "11: is not UTF-8 text"
    assert PromptSet.load(path, malformed="skip").texts == ("a", "b", "f", "g")


def test_csv_header_with_a_column_twice(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(UserError, match="line 1: the header names a column twice: prompt, prompt"):
        PromptSet.load(path)


def test_csv_without_the_column_says_which_there_are(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("Prompts,Category\na,b\n")
    with pytest.raises(UserError, match='a text under "prompt"; it has Prompts, Category'):
        PromptSet.load(path)


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "prompts.parquet"
    rows = [{"prompt": "a", "n": 1}, {"prompt": None, "n": 2}, {"prompt": "b", "n": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match='row 2: must be an object with a text under "prompt"'):
        PromptSet.load(path)
    found = PromptSet.load(path, malformed="skip").prompts
    assert found == (Prompt("a", None, {"n": 1}), Prompt("b"))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="is no readable parquet file"):
        PromptSet.load(path)


@pytest.mark.parametrize(
    ("source", "package"), [("p.parquet", "pyarrow"), ("some/prompts:test", "datasets")]
)
def test_missing_packages_are_named(tmp_path, monkeypatch, source, package):
    (tmp_path / "p.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        PromptSet.load(source)
    assert f"data.prompts = '{source}': needs the package {package} (pip" in str(caught.value)


def test_a_data_set_of_the_hub(monkeypatch):
    """A stand-in for the package: what is asked of it, and what its errors become."""

    def load_dataset(name, *, split):
        if split != "test":
            raise ValueError(f"Unknown split {split!r}")
        assert name == "some/prompts"
        return [{"prompt": "a", "tag": 1}, {"prompt": "b", "tag": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = PromptSet.load("some/prompts:test").prompts
    assert found == (Prompt("a", None, {"tag": 1}), Prompt("b"))
    with pytest.raises(UserError, match="some/prompts': is no file, and cannot .* split 'train'"):
        PromptSet.load("some/prompts")


def test_filters(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na\na very long dog\na red cat, nsfw\n")

    def of(**settings):
        return PromptSet.of(DataConfig(prompts=str(path), prompts_per_iteration=1, **settings))

    assert of(min_length=2, max_length=14).texts == ("a cat",)
    assert of(match="cat|dog", exclude=r"\bnsfw\b").texts == ("a cat", "a very long dog")
    assert len(of().texts) == 4
    with pytest.raises(UserError, match="leave none of its 4 prompts .1 by data.exclude, 3 by"):
        of(match="nsfw", exclude="red")


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


def test_lengths_that_exclude_everything_are_refused(tmp_path):
    """The fields of a recipe that contradict each other, by the recipe's own check."""
    from tiny_models import tiny_config

    changes = {"data.min_length": 9, "data.max_length": 3}
    with pytest.raises(ValueError, match="data.max_length = 3: must be at least data.min_length"):
        tiny_config(tmp_path, tmp_path, changes)
