"""Many runs at once, each in a process of its own."""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm


def workers_argument(description: str) -> int:
    """The command line of an experiment that has one option, --workers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    return parser.parse_args().workers


def in_parallel(function: Callable, jobs: Sequence, workers: int) -> list:
    """`function` of every job, in the order of the jobs.

    Processes are started afresh: a fork of one that has touched a GPU could not use it.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.imap(function, jobs), total=len(jobs)))
