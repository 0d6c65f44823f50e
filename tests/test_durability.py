"""Snapshots beside a running iteration, locks, and stopping together."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from snapshot_cases import loaded, saver, snapshot
from tiny_models import CPU, tiny_config
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from dancegrpo_fast import checkpoint
from dancegrpo_fast.config import Interrupted, UserError
from dancegrpo_fast.parallel.lock import FolderLock
from dancegrpo_fast.parallel.meeting import agree
from dancegrpo_fast.parallel.stopping import NOW, SOON, Stopping, StopRequested
from dancegrpo_fast.parallel.world import World, scorers, weight_axes
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer

LORA = {"policy.train": "lora", "policy.ema_decay": 0.9}


@pytest.mark.parametrize("background", [False, True])
def test_a_snapshot_is_of_the_moment_it_was_asked_for(tmp_path, background):
    """The next iteration changes the very tensors while they are written."""
    one = saver(tmp_path, background=background)
    now = snapshot(1)
    one.save(now)
    now.tensors["w"].fill_(2.0)
    one.finish()
    assert loaded(tmp_path) == (1, 1.0)


def test_what_is_kept(tmp_path):
    one = saver(tmp_path, keep=2, keep_every=4)
    for iteration in range(1, 12):
        one.save(snapshot(iteration))
    one.finish()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"iteration-{i:06d}" for i in (4, 8, 10, 11)]


def test_a_damaged_later_snapshot_takes_no_place(tmp_path):
    """The run went back to 5 because 10 is damaged: 6 is kept, and is what the run goes on from."""
    one = saver(tmp_path, keep=2)
    for iteration in (5, 10):
        one.save(snapshot(iteration))
    one.finish()
    assert one.newest == 10
    file = next((tmp_path / "iteration-000010").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    shutil.copytree(tmp_path / "iteration-000005", tmp_path / "iteration-backup")  # A user's.
    assert loaded(tmp_path)[0] == 5
    again = saver(tmp_path, keep=1)
    again.save(snapshot(6, 3.0))
    again.finish()
    assert again.newest == 6 and loaded(tmp_path) == (6, 3.0)


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def forged(folder: Path, changed: bytes) -> None:
    """Another table under `.metadata`, with a manifest that vouches for it."""
    table, manifest = folder / ".metadata", folder / "manifest.json"
    table.write_bytes(changed)
    fields = json.loads(manifest.read_text())
    del fields["sha256"]
    entry = {"bytes": len(changed), "sha256": checkpoint.file_hash(table)}
    fields["files"][".metadata"] = entry
    manifest.write_text(json.dumps(fields | {"sha256": checkpoint._own_digest(fields)}))


@pytest.mark.parametrize("where", ["in the table", "behind an entry of the table"])
def test_a_snapshot_of_somebody_else_runs_nothing(tmp_path, monkeypatch, where):
    """torch's own reader unpickles its table, and whatever an entry that is no tensor names.

    Hashes say that a file is whole, not whose it is.
    """
    monkeypatch.chdir(tmp_path)
    one = saver(tmp_path)
    one.save(snapshot(1))
    one.finish()
    folder = tmp_path / "iteration-000001"
    if where == "in the table":
        forged(folder, pickle.dumps(Runs()))
        named = "posix.mkdir"
    else:
        table = pickle.loads((folder / ".metadata").read_bytes())
        ((name, tensor),) = table.state_dict_metadata.items()
        bytes_entry = BytesStorageMetadata()
        bytes_entry.size = tensor.size  # So that it passes for the tensor.
        table.state_dict_metadata[name] = bytes_entry
        ((index, place),) = table.storage_data.items()
        file = folder / place.relative_path
        torch.save(Runs(), file)
        info = dataclasses.replace(place, offset=0, length=file.stat().st_size)
        table.storage_data = {MetadataIndex(index.fqn): info}
        forged(folder, pickle.dumps(table))
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["sha256"]
        manifest["files"][file.name] = {
            "bytes": file.stat().st_size, "sha256": checkpoint.file_hash(file),
        }  # fmt: skip
        manifest["sha256"] = checkpoint._own_digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        named = "torch.distributed.checkpoint.metadata.BytesStorageMetadata"
    with pytest.raises(UserError, match=rf"is not torch's \({named}\): nothing of it was run"):
        loaded(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_unfinished_snapshot_is_no_snapshot(tmp_path):
    """A process killed while writing leaves a temporary name that nobody loads."""
    one = saver(tmp_path)
    one.save(snapshot(1))
    one.finish()
    (tmp_path / "iteration-000002.partial").mkdir()
    (tmp_path / "iteration-000002.partial" / "__0_0.distcp").write_bytes(b"half")
    assert loaded(tmp_path)[0] == 1
    again = saver(tmp_path)
    again.save(snapshot(2))
    again.finish()
    assert loaded(tmp_path)[0] == 2


# ---- one run per folder -------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, LORA)
    lock = FolderLock(Path(config.output), CPU)
    lock.take()
    with pytest.raises(UserError, match=rf"another run is writing here \(process {os.getpid()} on"):
        train(config)
    lock.release()
    train(config)


def test_other_ranks_take_no_lock(tmp_path):
    FolderLock(tmp_path, World(1, 2, torch.device("cpu"))).take()
    assert not (tmp_path / "run.lock").exists()


# ---- stopping -----------------------------------------------------------------------------------


def test_a_request_stops_where_nothing_is_lost_and_later_everywhere():
    handler = signal.getsignal(signal.SIGTERM)
    stopping = Stopping(CPU, grace_seconds=1000)
    with stopping.listening():
        stopping.ask(until=SOON)
        signal.raise_signal(signal.SIGTERM)
        stopping.ask(until=NOW)  # In an update phase: it goes on.
        with pytest.raises(StopRequested):
            stopping.ask(until=SOON)
    assert stopping.told_by == "SIGTERM" and signal.getsignal(signal.SIGTERM) == handler
    late = Stopping(CPU, grace_seconds=0)
    with late.listening():
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(StopRequested):
            late.ask(until=NOW)


def test_a_second_interrupt_does_not_wait():
    stopping = Stopping(CPU, grace_seconds=1000)
    with stopping.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_interrupted_at_once_says_what_there_is(tmp_path, tiny_wan_folder, monkeypatch):
    config = tiny_config(tmp_path, tiny_wan_folder, LORA | {"checkpoint.every": 1})
    sample, calls = Trainer.sample, []

    def patched(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return sample(self, *arguments)

    monkeypatch.setattr(Trainer, "sample", patched)
    with pytest.raises(Interrupted, match="interrupted at once; "):
        train(config)


# ---- meeting ------------------------------------------------------------------------------------


def test_restarted_processes_never_meet_an_earlier_start():
    """torchrun's store keeps what every start wrote; the first one here lacked a process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meet(ranks: range, seconds: float) -> list[str | Exception]:
        def one(rank: int) -> str | Exception:
            own = dist.TCPStore("127.0.0.1", store.port, is_master=False)
            time.sleep((2 - rank) * 0.05)  # The others read before the main one writes.
            try:
                return agree(own, rank, 3, timedelta(seconds=seconds))
            except RuntimeError as error:
                return error

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, ranks))

    assert all(isinstance(found, dist.DistStoreError) for found in meet(range(2), 0.5))
    starts = [meet(range(3), 60.0) for _ in range(4)]
    assert all(names[0] == names[1] == names[2] for names in starts)
    assert len({names[0] for names in starts}) == 4


# ---- meshes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "size", "axes"),
    [({}, 1, (1, 1)), ({}, 8, (1, 8)), ({"sp": 2}, 8, (1, 8)),
     ({"dp_replicate": 2}, 8, (2, 4)), ({"dp_replicate": 2, "sp": 2, "dp_shard": 2}, 8, (2, 4))],
)  # fmt: skip
def test_weight_axes(settings, size, axes):
    from dancegrpo_fast.config import ParallelConfig

    assert weight_axes(ParallelConfig(**settings), size) == axes


def test_a_mesh_that_does_not_fit_is_refused():
    from dancegrpo_fast.config import ParallelConfig

    with pytest.raises(UserError, match="dp_replicate = 1, dp_shard = null, sp = 3: they must mul"):
        weight_axes(ParallelConfig(sp=3), 8)


def test_what_is_not_verified_together_is_refused(tmp_path, tiny_wan_folder):
    from dancegrpo_fast.models import open_family
    from dancegrpo_fast.networks import check

    settings = {"parallel.engine": "deepspeed", "parallel.sp": 2}
    config = tiny_config(tmp_path, tiny_wan_folder, settings)
    with pytest.raises(UserError, match="parallel.sp = 2: not verified with .*deepspeed; use fsdp"):
        check(config, open_family(config.model), CPU)


def test_ranks_of_a_group_share_the_scoring():
    import numpy as np

    owner = np.array([[0, 0, 0], [0, 0, 1]])
    assert scorers(owner, 1).tolist() == owner.tolist()
    assert scorers(owner, 2).tolist() == [[0, 0, 0], [1, 1, 2]]
