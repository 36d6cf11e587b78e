"""Checks that run on several processes, which form a gloo process group: many checks for one start of the processes."""

import multiprocessing
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def shared_folder():
    """A folder that all ranks see."""
    return Path(os.environ["SHARED_FOLDER"])


def check_cases(checks):
    """A test for each check, given by the number of processes that it runs on; it asks for `failures`."""
    return pytest.mark.parametrize(
        ("world", "check"), [(world, check.__name__) for world in checks for check in checks[world]]
    )


def failures_on(world, checks, folder):
    """The tracebacks of each check, by its name, from the ranks on which it failed: none where it passed on all."""
    folder = Path(folder)
    # The ranks are forked off a server, which imports what they need once for all of them, from where we import it.
    multiprocessing.set_forkserver_preload([checks[0].__module__])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    mp.start_processes(_rank, (world, checks, folder), nprocs=world, start_method="forkserver")
    return {
        check.__name__: "\n".join(path.read_text() for path in sorted(folder.glob(f"{check.__name__}.rank*")))
        for check in checks
    }


def _rank(rank, world, checks, folder):
    # What torchrun sets, for those who ask; the ranks meet in a file, so that no port has to be free.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "SHARED_FOLDER": str(folder)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    in_step = True
    for check in checks:
        torch.manual_seed(0)
        try:
            if not in_step:
                raise RuntimeError("not run: the ranks are out of step after a check that failed on some of them")
            check()
        except Exception:
            (folder / f"{check.__name__}.rank{rank}").write_text(f"rank {rank} of {world}\n{traceback.format_exc()}")
        try:
            if in_step:
                dist.barrier()
        except RuntimeError:
            in_step = False
    if in_step:
        dist.destroy_process_group()
