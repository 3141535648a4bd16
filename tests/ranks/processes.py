"""Running a function in several processes that form a process group, as ``torchrun`` or Lightning would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from helpers import ACCELERATOR

FORK = multiprocessing.get_context("fork")  # children have torch and Lightning imported already


class Processes:
    """``work(*args)`` once for each rank, each in a process of its own, and with ``nodes`` on a node of its own.

    Attributes:
        results: What each rank returned, or (type, message) of what it raised; None while it runs or if it was killed.
    """

    def __init__(self, world: int, work: Callable[..., Any], *args: Any, nodes: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.results: list[Any] = [None] * world
        self._pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_child, args=(rank, world, port, nodes, theirs, work, args), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def kill(self, signum: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signum)

    def wait(self, seconds: float = 90) -> list[Any]:
        """The results, when all are over.

        Raises:
            TimeoutError: If they hang; they are killed then.
        """
        deadline = time.monotonic() + seconds
        for rank, (pipe, process) in enumerate(zip(self._pipes, self.processes, strict=True)):
            try:
                if pipe.poll(max(0.0, deadline - time.monotonic())):
                    self.results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                pass
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
        if hanging:
            raise TimeoutError(f"ranks {hanging} still ran after {seconds} s")
        return self.results


def _child(
    rank: int, world: int, port: int, nodes: bool, pipe: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    settings = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank}
    if ACCELERATOR == "gpu":  # all ranks are on the first one, each on what NCCL takes for a host of its own
        nodes = True
        settings |= {"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    settings |= {"NODE_RANK": rank, "LOCAL_RANK": 0} if nodes else {"NODE_RANK": 0, "LOCAL_RANK": rank}
    if world > 1:
        os.environ.update({key: str(value) for key, value in settings.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    torch.set_num_threads(1)
    try:
        result = work(*args)
    except BaseException as error:
        traceback.print_exc()
        result = type(error).__name__, str(error)
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def run(world: int, work: Callable[..., Any], *args: Any, seconds: float = 90, nodes: bool = False) -> list[Any]:
    """What ``work(*args)`` returned on each rank."""
    return Processes(world, work, *args, nodes=nodes).wait(seconds)
