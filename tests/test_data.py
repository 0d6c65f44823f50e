"""Prompt files: every format, every mistake, and the filters."""

import io
import json
import logging
import random
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from dancegrpo_fast.config import DataConfig, UserError
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.prompt import Prompt


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


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), (level, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_images_in_a_table_are_kept_by_content(tmp_path, monkeypatch):
    """As data sets of the hub are saved: a struct of bytes and the name they once had."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(9))
    images = [
        {"bytes": picture(1), "path": "../../a.png"}, {"bytes": picture(2), "path": None},
        {"bytes": picture(1), "path": "c.png"}, {"bytes": b"GIF89a no", "path": "d.gif"},
        {"bytes": None, "path": str(secret)}, None,
    ]  # fmt: skip
    rows = [{"prompt": f"p{i}", "image": image} for i, image in enumerate(images)]
    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError) as caught:
        PromptSet.load(path)
    broken, outside = str(caught.value).split("\n")
    assert "row 4: image cannot be read: " in broken
    assert "row 5: image is not in the table itself" in outside
    for _ in range(2):  # The second time they are there.
        found = PromptSet.load(path, malformed="skip").prompts
        assert [p.text for p in found] == ["p0", "p1", "p2", "p5"] and found[3].image is None
        assert [p.image.read_bytes() for p in found[:3]] == [picture(1), picture(2), picture(1)]
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert found[0].image == found[2].image and len(files) == 2
    with Image.open(found[0].image) as image:
        assert image.size == (5, 3)


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


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """A stand-in for the package: what is asked of it, and what its errors become."""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class ImageColumn:
        def __init__(self, *, decode):
            assert not decode

    class Rows(list):
        features = {"image": ImageColumn(decode=False)}

        def cast_column(self, name, feature):
            assert name == "image" and isinstance(feature, ImageColumn)
            return self

    def load_dataset(name, *, split):
        if split != "test":
            raise ValueError(f"Unknown split {split!r}")
        assert name == "some/prompts"
        image = {"bytes": picture(7), "path": "a.png"}
        return Rows([{"prompt": "a", "tag": 1, "image": image}, {"prompt": "b", "tag": None}])

    package = SimpleNamespace(load_dataset=load_dataset, Image=ImageColumn)
    monkeypatch.setitem(sys.modules, "datasets", package)
    first, second = PromptSet.load("some/prompts:test").prompts
    assert (first.text, first.metadata) == ("a", {"tag": 1}) and second == Prompt("b")
    assert first.image.read_bytes() == picture(7)
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


def test_lengths_that_exclude_everything_are_refused(tmp_path):
    """The fields of a recipe that contradict each other, by the recipe's own check."""
    from tiny_models import tiny_config

    changes = {"data.min_length": 9, "data.max_length": 3}
    with pytest.raises(ValueError, match="data.max_length = 3: must be at least data.min_length"):
        tiny_config(tmp_path, tmp_path, changes)
