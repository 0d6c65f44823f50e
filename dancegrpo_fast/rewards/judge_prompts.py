"""What judges are asked: official texts by hash (see `templates`), and texts of our own.

UnifiedReward was trained on fixed texts of its authors. In their files such a text is an f-string
whose only field is `{prompt}`; it is read out of the file's syntax tree.
"""

from __future__ import annotations

import ast

from dancegrpo_fast.rewards.templates import Template, load_source

_COMMIT = "ff6f520247a2d36e2aff7b2ba53a935afd437f66"


def _unified(path: str, sha256: str) -> Template:
    return Template(
        source=f"CodeGoat24/UnifiedReward @ {_COMMIT[:8]}, {path}",
        url=f"https://raw.githubusercontent.com/CodeGoat24/UnifiedReward/{_COMMIT}/{path}",
        member="",
        sha256=sha256,
        constants=("prompt",),
    )


_OLD, _NEW = "inference_qwen", "inference_qwen/UnifiedReward-2.0-inference"
_THINK = "UnifiedReward-Think/inference_qwen"
_THINK3 = f"{_THINK}/UnifiedReward-Think-qwen3-inference"

#: (judge, version, image or video).
UNIFIED: dict[tuple[str, str, str], Template] = {
    ("point", "1", "image"): _unified(
        f"{_OLD}/image_generation/qwen_point_score_image_generation.py",
        "5c8c2efcb7f07283a3a4b3685043e2da0ee909c876829a9edbe4938a4881971c",
    ),
    ("point", "2", "image"): _unified(
        f"{_NEW}/point_score_ACS_image_generation.py",
        "fa67c436c6742084b43581d17bf3c98fa53aad5816ccd5ec39717c27c2a1dfa3",
    ),
    ("point", "2", "video"): _unified(
        f"{_NEW}/point_score_APS_video_generation.py",
        "a901e1b0df28a26988cd22778a25868a68f1f2cf8f56f4d665b21fd1f8229ab7",
    ),
    ("pair", "1", "image"): _unified(
        f"{_OLD}/image_generation/qwen_pair_rank_image_generation.py",
        "6e574817f88b86542a1de1cd0201dd5754f6d292ab1fc8a4d4a73501412bd5ac",
    ),
    ("pair", "1", "video"): _unified(
        f"{_OLD}/video_generation/qwen_pair_rank_video_generation.py",
        "ef374d740464127ca60db5555e823ac2b2cf28ad3eec194f168863f1e69486ca",
    ),
    ("pair", "2", "image"): _unified(
        f"{_NEW}/pair_score_image_generation.py",
        "0560fa85dfbd5861b3298b877bbdff064b135e17314b8c18fbe490d734aca567",
    ),
    ("think", "1", "image"): _unified(
        f"{_THINK}/image_generation/qwen_infer_cot_image_generation.py",
        "a9d33d0c19975461931834d0630ec1cc5db4d354baaae578c7618cbe514269e4",
    ),
    ("think", "2", "image"): _unified(
        f"{_THINK3}/image_generation/qwen3_infer_cot_image_generation.py",
        "bffcd30e553292ec3c0a09e3e9ce047704f5de9071314620fb79a9c89c66c902",
    ),
    ("think", "2", "video"): _unified(
        f"{_THINK3}/video_generation/qwen3_infer_cot_video_generation.py",
        "e0a3521a00fe0e168acb444124b0f6a80328c14a2136c388379424440e7b4a33",
    ),
}


def official(judge: str, version: str, file: str | None) -> dict[str, str]:
    """Official texts with `{prompt}` where the prompt goes, by kind of sample (image, video).

    Args:
        judge: point, pair or think.
        version: Of the judge.
        file: The authors' file for one kind; None takes the cache, else fetches for all kinds.

    Raises:
        ValueError: No text can be had.
    """
    texts, problems = {}, []
    for (its_judge, its_version, kind), template in UNIFIED.items():
        if (its_judge, its_version) == (judge, version):
            try:
                texts[kind] = caption_text(load_source(template, file))
            except ValueError as error:
                problems.append(f"{kind}s: {error}")
    if not texts:
        raise ValueError("; ".join(problems))
    return texts


def caption_text(source: str) -> str:
    """The one f-string of a file that holds `{prompt}`, with exactly that field.

    Raises:
        ValueError: There is none, or there are several.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        texts = [
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None
            for part in node.values
        ]
        fields = [part for part in node.values if isinstance(part, ast.FormattedValue)]
        names = [f.value.id if isinstance(f.value, ast.Name) else "" for f in fields]
        if names == ["prompt"]:
            found.append("".join("{prompt}" if text is None else text for text in texts))
    if len(found) != 1:
        raise ValueError(f"the template file has {len(found)} texts with {{prompt}}, not one")
    return found[0]


def fill(text: str, prompt: str) -> str:
    """The text with the prompt in its place; no other brace means anything."""
    return text.replace("{prompt}", prompt)


# ---- ours: for models that follow instructions and were trained on no text of their own ----------

SCORE = """\
The pictures above are {what} that was made for this request:
{prompt}

How good is it? Look first at whether everything that the request names is there, as it is \
described, and then at mistakes in the picture itself. First give your reasons in at most three \
sentences. Then end with one line that reads
Score: X
where X is a number from 0 (useless) to 10 (nothing to improve); decimals are allowed."""

PAIR = """\
Two {what}s were made for this request:
{prompt}

Above, {what} 1 comes first and {what} 2 second; of videos you see {frames} pictures each. Which \
one serves the request better? Look first at whether everything that the request names is there, \
and then at mistakes in the pictures. First give your reasons in at most three sentences. Then end \
with one line that reads
<answer>1</answer> or <answer>2</answer> or, if neither is better, <answer>tie</answer>"""

YES = """\
The pictures above are {what} that was made for this request:
{prompt}

{criterion} Answer with one word, yes or no."""

YES_REFERENCE = """\
Two {what}s were made for this request:
{prompt}

Above, {what} 1 comes first and {what} 2 second. {criterion} Is {what} 1 better than {what} 2 in \
this respect? Answer with one word, yes or no."""
