"""A script as a user may write it: torch at its top, and two workers. Started as a program, since workers import what started them."""

import multiprocessing
import os

import torch

from flows import worker


def threads(said: "multiprocessing.Queue[int]") -> None:
    spawn = multiprocessing.get_context("spawn")
    cells = (spawn.Value("q", 0, lock=False) for _ in range(3))
    worker.begin(os.getppid(), *cells, {"OMP_NUM_THREADS": "1"})
    said.put(torch.get_num_threads())


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    said = spawn.Queue()
    spawn.Process(target=threads, args=[said]).start()
    print(said.get(timeout=120))
