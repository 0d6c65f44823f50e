"""Embedded prompts on several processes, and ahead of a run."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from embedding_cases import GUIDED, TEXTS, equal, make, no_encoders
from tiny_models import CPU, PROMPTS, tiny_config

from dancegrpo_fast.models import open_family
from dancegrpo_fast.models.embeddings import Embeddings, embeddings_folder

_LOADING = threading.Lock()


class Thread:
    """One of several processes, as a thread: reductions and barriers meet in shared memory."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, seen: dict) -> None:
        self.rank, self.size, self._barrier, self._seen = rank, size, barrier, seen

    def barrier(self) -> None:
        self._barrier.wait(60)

    def all_reduce(self, values: torch.Tensor, op: str) -> None:
        assert op == "max"
        self._seen[self.rank] = values.clone()
        self.barrier()
        values.copy_(torch.stack([self._seen[rank] for rank in range(self.size)]).amax(0))
        self.barrier()


def make_on(world: Thread, folder: Path, model: Path) -> Embeddings:
    """`make`, with the encoders loaded by one thread at a time: diffusers loads for processes."""
    with _LOADING:
        embeddings = make(folder, model, world=world)
        with embeddings.family.encoder_pipeline():
            return embeddings


def on_threads(size: int, job) -> list:
    barrier, seen, found, errors = threading.Barrier(size), {}, [None] * size, []

    def work(rank: int) -> None:
        try:
            found[rank] = job(Thread(rank, size, barrier, seen))
        except BaseException as error:  # A thread's error must not hang the others.
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def test_two_ranks_share_the_work_and_read_the_same(tmp_path, tiny_wan_folder):
    """Rank 0 cannot see one of the two files that are there: both must agree on what is not."""
    alone = make(tmp_path / "alone", tiny_wan_folder)
    expected = alone.conditions(TEXTS)
    make(tmp_path, tiny_wan_folder).conditions(TEXTS[:2])
    asked: dict[int, list[str]] = {0: [], 1: []}

    def job(world):
        embeddings = make_on(world, tmp_path, tiny_wan_folder)
        encode, readable = embeddings.family.encode, embeddings._readable
        hidden = embeddings.key(TEXTS[0])

        def noted(prompts):
            asked[world.rank] += [prompt.text for prompt in prompts]
            return encode(prompts)

        embeddings.family.encode = noted
        embeddings._readable = lambda key: (world.rank or key != hidden) and readable(key)
        found = embeddings.conditions(TEXTS)
        del embeddings._readable
        return found, embeddings.conditions(TEXTS)

    for pair in on_threads(2, job):
        for conditions in pair:
            rows = zip(conditions.rows, expected.rows, strict=True)
            assert all(equal(row, reference) for row, reference in rows)
    assert asked == {0: [PROMPTS[0], PROMPTS[3]], 1: [PROMPTS[2]]}


def test_prompts_of_one_rank(tmp_path, tiny_wan_folder):
    """Evaluation: each rank has prompts of its own, so nobody may wait for the others."""

    def job(world):
        embeddings = make_on(world, tmp_path, tiny_wan_folder)
        if world.rank:
            return embeddings.alone(TEXTS[:1])
        return embeddings.alone([TEXTS[1], TEXTS[2], TEXTS[1]])

    expected = make(tmp_path / "alone", tiny_wan_folder).conditions(TEXTS)
    first, second = on_threads(2, job)
    for rows, numbers in ((first.rows, (1, 2, 1)), (second.rows, (0,))):
        for row, number in zip(rows, numbers, strict=True):
            assert equal(row, expected.rows[number])
    later = make(tmp_path, tiny_wan_folder)
    no_encoders(later)
    assert equal(later.alone(TEXTS[2:3]).rows[0], expected.rows[2])


def test_ahead_of_a_run(tmp_path, tiny_wan_folder):
    """`embed`: split over ranks, once per prompt; a second time there is nothing to do."""

    def job(world):
        embeddings = make_on(world, tmp_path, tiny_wan_folder)
        planned: list[int] = []
        done: list[int] = []
        prompts = {embeddings.key(prompt): prompt for prompt in [*TEXTS, TEXTS[0]]}
        missing = embeddings.embed(prompts, planned.append, done.append)
        return missing, planned, len(done)

    assert on_threads(2, job) == [(4, [2], 2), (4, [2], 2)]
    assert on_threads(2, job) == [(0, [0], 0), (0, [0], 0)]
    later = make(tmp_path, tiny_wan_folder)
    expected = later.family.encode(TEXTS)
    no_encoders(later)
    found = later.conditions(TEXTS)
    assert all(equal(a, b) for a, b in zip(found.rows, expected.rows, strict=True))


def test_training_and_evaluation_run_without_encoders(tmp_path, tiny_wan_folder, monkeypatch):
    from dancegrpo_fast.run import train

    (tmp_path / "held_out.txt").write_text(PROMPTS[3])
    held_out = {"evaluation.prompts": str(tmp_path / "held_out.txt"), "iterations": 1}
    config = tiny_config(tmp_path, tiny_wan_folder, GUIDED | held_out)
    before = Embeddings(open_family(config.model), embeddings_folder(config), CPU)
    before.embed({before.key(prompt): prompt for prompt in TEXTS})

    def refuse(*arguments):
        raise AssertionError("the encoders were asked for")

    monkeypatch.setattr("dancegrpo_fast.models.Family.encoder_pipeline", refuse)
    train(config)
    assert (tmp_path / "run" / "report.html").is_file()
