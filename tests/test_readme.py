"""The README's tables are what the files under benchmarks/results say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from verification_cases import MARKED, RECIPE, checkout, readme, record, results_table, row

from dancegrpo_fast.report.verification import (
    FILE,
    ROOT,
)


def test_the_readme_is_what_its_files_say() -> None:
    assert readme.main(["--check"]) == 0, "run python scripts/readme.py"


def test_families_are_those_of_the_package() -> None:
    from dancegrpo_fast.models import FAMILIES

    assert list(readme.FAMILIES)[-1] == "custom_family"
    assert set(readme.FAMILIES) == {*FAMILIES, "custom_family"}
    assert all((ROOT / f"tests/families/test_{name}.py").is_file() for name in readme.FAMILIES)


def test_what_the_gpu_script_writes_has_a_row() -> None:
    script = (ROOT / "scripts/gpu_models").read_text()
    models = re.search(r'"\$\{@:-([\w ]+)\}"', script)[1].split()  # type: ignore[index]
    told = {row.file for row in results_table.ROWS}
    assert {f"throughput_{m}_gpu.json" for m in models if m not in ("rewards", "sweep")} <= told


def test_check_finds_a_stale_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkout(tmp_path)
    root = ["--root", str(tmp_path)]
    assert readme.main([*root, "--check"]) == 1 and "run python" in capsys.readouterr().err
    assert readme.main(root) == 0 and readme.main([*root, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "between" in text and text.endswith("the end\n")
    lines = results_table.measured(tmp_path).splitlines()
    count = len([line for line in lines if "not measured" in line])
    assert count == len(results_table.ROWS)
    record.append(tmp_path / FILE, [row(tmp_path)])
    assert readme.main([*root, "--check"]) == 1
    assert "| [no record](tests/families/test_wan.py) | no record | 1 of 1 |" in (
        readme.verified(tmp_path)
    )
    (tmp_path / "recipes/one.yaml").write_text(RECIPE + "output: a\n")
    assert "| 0 of 1 |" in readme.verified(tmp_path)
    (tmp_path / FILE).parent.joinpath("noise_cpu.json").write_text('{"results": []}')
    assert readme.main(root) == 2
    assert "noise_cpu.json: not as its benchmark writes it" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "count"), [("<!-- end of measured -->\n", 0), ("", 2)])
def test_a_readme_without_its_marks_is_refused(
    tmp_path: Path, missing: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout(tmp_path)
    text = MARKED.replace(missing, "") if missing else MARKED * count
    (tmp_path / "README.md").write_text(text)
    assert readme.main(["--root", str(tmp_path)]) == 2
    assert "README.md: must hold one part" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def _demo_run(trained: float, error: float, base: float = 0.5) -> dict[str, Any]:
    reward = {"base": base, "trained": trained, "gain": trained - base, "standard_error": error}
    return {"reward": reward, "diversity": {"ratio": trained}, "wall_seconds": 100 * trained}


DEMO = {
    "runs": {
        "seed 0": _demo_run(0.75, 0.125),
        "seed 1": _demo_run(1.25, 0.25),
        "rewards shuffled within groups": _demo_run(0.25, 0.1),
        "negated reward": _demo_run(0.0, 0.1, base=-0.5),
    }
}


def _timed(provider: str, seconds: float, timing: str = "t") -> dict[str, Any]:
    share = 0.002 / seconds
    return {"provider": provider, "timing": timing, "seconds": {"median": seconds},
            "share_of_copy": share}  # fmt: skip


KERNELS = {
    "tasks": [
        {"task": "another", "rows": []},
        {
            "task": "policy loss, 4 x 1M, K = 1",
            "rows": [
                _timed("public, eager", 0.05), _timed("clean, eager", 0.012), _timed("o", 0.004),
                _timed("o", 1.0, "another way"),
            ],
        },
    ]
}  # fmt: skip
TRAFFIC = {
    "patterns": {
        "public": {
            "received": {"rollout/x/between": 2e6, "update/x/between": 3e6, "load/x/between": 9e9}
        },
        "ours": {"received": {"rollout/x/inside": 5e4, "update/x/inside": 1e6}},
    }
}
SEARCH = {
    "results": {
        name: {"budget": budget, "reward": [r, r + 0.5], "evaluations": 80.0, "reward_calls": 8.0}
        for name, budget, r in (
            ("plain sample", 10, 0.0), ("best of 8", 80, 0.1), ("beam", 80, 0.2), ("more", 160, 0.9)
        )
    }
}  # fmt: skip
THROUGHPUT = {
    "results": [
        {
            "model": "wan", "rollout": {"tree": {"kind": "window"}},
            "rows": [
                {"rung": "public pattern", "seconds": 6.0}, {"rung": "+ a", "seconds": 3.0},
                {"rung": "+ b", "seconds": 2.0}, {"rung": "a alone", "seconds": 1.0},
            ],
        },
        {"model": "wan", "points": []},
    ]
}  # fmt: skip
SHARING = {
    "results": [
        {
            "model": "wan", "rollout": {"tree": {"kind": "window"}},
            "rows": [
                {"rung": "public pattern", "seconds": 4.0},
                {"rung": "+ states shared in the rollout", "seconds": 3.0},
                {"rung": "+ states shared in training", "seconds": 2.0},
            ],
        },
    ]
}  # fmt: skip
FIGURES = [
    (
        results_table.demo_reward, DEMO,
        ".750, 1.250 (base .500): gains of .250, .750 (2.0, 3.0 standard ",
    ),
    (results_table.demo_diversity, DEMO, ".75, 1.25"),
    (results_table.demo_controls, DEMO, "gain -.250; gain -.500"),
    (results_table.demo_time, DEMO, "75 to 125 s a run"),
    (
        results_table.loss_speed("o", "t"), KERNELS,
        "4 ms, 0.50 of the copy bandwidth; 12 times as fast as the public eager formula, 3.0 times "
        "as fast as the clean one",
    ),
    (
        results_table.traffic, TRAFFIC,
        "rollout 2.00 MB, 0.05 MB; update phase, between machines 3.00 MB, 0.00 MB",
    ),
    (
        results_table.search, SEARCH,
        "plain sample: .250 (80 evaluations, 8 scored); best of 8: .350 (80 evaluations, 8 scored)"
        "; beam: .450 (80 evaluations, 8 scored)",
    ),
    (results_table.throughput, THROUGHPUT, "wan, window: 3.0 times"),
    (
        results_table.sharing, SHARING,
        "window: 2.00 times the public pattern, 1.50 times sharing in the rollout only",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("write", "contents", "text"), FIGURES, ids=lambda value: "")
def test_figures_are_those_of_the_files(write: Any, contents: Any, text: str) -> None:
    assert write(contents).startswith(text)
