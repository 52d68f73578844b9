"""Where tasks run: in this thread, in threads, in local worker processes, or on a scheduler started elsewhere.

Promise: whatever runs a task, its end arrives on one queue, once, as a `Done`. The only import of distributed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, Protocol

from pathology.errors import EnvironmentFault, UsageError

# Regions a worker works on at once: one reads while another's last batch is with the model.
REGIONS_A_WORKER = 2
SCHEDULERS = "sync, threads, processes or tcp://HOST:PORT"


@dataclass(frozen=True, slots=True)
class Done:
    """A task's end: its value, or the error it raised, or the death of its worker."""

    token: object
    value: Any = None
    error: BaseException | None = None
    died: bool = False


class Tasks(Protocol):
    """Runs tasks; `done` receives the end of each."""

    done: queue.SimpleQueue[Done]
    in_order: bool  # tasks run one after another in the submitting thread

    def submit(self, token: object, function: Callable[..., Any], *arguments: Any) -> None: ...

    def slots(self) -> int:
        """How many tasks run at once."""
        ...

    def close(self) -> None:
        """Let go of workers; what still runs is abandoned."""
        ...


class InOrder:
    """The reference: every task runs where it is submitted."""

    in_order = True

    def __init__(self) -> None:
        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()

    def submit(self, token: object, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            self.done.put(Done(token, value=function(*arguments)))
        except Exception as error:
            self.done.put(Done(token, error=error))

    def slots(self) -> int:
        return 1

    def close(self) -> None:
        """Nothing runs between tasks."""


class OnDask:
    """Tasks as futures of a distributed client; keys are random, so that no name of a slide reaches the scheduler."""

    in_order = False

    def __init__(self, client: Any, own_cluster: Any = None) -> None:
        from distributed import KilledWorker, Nanny

        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._client = client
        self._cluster = own_cluster
        self._killed: type[BaseException] = KilledWorker
        self._nanny: type[Any] = Nanny
        self._futures: dict[object, Any] = {}

    def submit(self, token: object, function: Callable[..., Any], *arguments: Any) -> None:
        future = self._client.submit(function, *arguments, key=f"task-{uuid.uuid4().hex}", pure=False, retries=0)
        self._futures[token] = future
        future.add_done_callback(lambda done: self._end(token, done))

    def _end(self, token: object, future: Any) -> None:
        self._futures.pop(token, None)
        try:
            # Waits again where the worker died after the task's end and before its value was fetched: Dask then repeats it.
            done = Done(token, value=future.result())
        except self._killed as error:
            done = Done(token, error=error, died=True)
        except CancelledError:
            gone = EnvironmentFault("the scheduler gave up a task; see that it runs, then run the same again")
            done = Done(token, error=gone)
        except Exception as error:
            done = Done(token, error=error)
        self.done.put(done)

    def slots(self) -> int:
        threads: dict[str, int] = self._client.nthreads()
        return max(1, sum(threads.values()))

    def close(self) -> None:
        if self._cluster is not None:
            # What is done is on disk, and what is not may be cut off anywhere: ending workers in good order only takes time.
            for worker in self._cluster.workers.values():
                if isinstance(worker, self._nanny):
                    worker.auto_restart = False
                    if worker.pid is not None:
                        os.kill(worker.pid, signal.SIGKILL)
        self._client.close(timeout=2)
        if self._cluster is not None:
            self._cluster.close(timeout=5)


def open_tasks(scheduler: str, devices: int = 1, dashboard: str | None = None) -> Tasks:
    """The runner for `scheduler`: sync, threads, processes (one worker per device), or the address of one that runs.

    dashboard  address for Dask's dashboard on loopback, e.g. ":8787"; None: off
    Raises UsageError for another word, EnvironmentFault where no scheduler answers.
    """
    if scheduler == "sync":
        return InOrder()
    if scheduler not in ("threads", "processes") and not scheduler.startswith("tcp://"):
        raise UsageError(f"scheduler {scheduler!r} is unknown; use {SCHEDULERS}")
    if scheduler.startswith("tcp://"):
        from distributed import Client

        client: Callable[..., Any] = Client
        try:
            return OnDask(client(scheduler, timeout=10, set_as_default=False))
        except OSError as error:
            raise EnvironmentFault(
                f"no Dask scheduler answers at {scheduler}; start it, or choose another --scheduler"
            ) from error
    return _local(scheduler == "processes", devices, dashboard)


# What worker processes begin with. Torch alone has threads of its own, by `set_threads`. Freed memory is kept: given back to
# the kernel at every tile, as Dask would have it, it comes back as pages to be cleared again.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "DASK_LOGGING__DISTRIBUTED": "critical",
}


# Not torch: it takes as long to load as all the rest, time in which the first worker can look at the first slide.
WORKER_MODULES = [
    "distributed.nanny",
    "pathology.worker",
    "pathology.result",
    "pathology.store",
    "pathology.readers.direct",
    "pathology.readers.openslide_reader",
]


def prestart() -> None:
    """Begin to load what worker processes need, in the process that they are forked from, while this one goes on.

    Without this call the first `open_tasks` makes it.
    """
    multiprocessing.set_forkserver_preload(WORKER_MODULES)
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _local(processes: bool, devices: int, dashboard: str | None) -> OnDask:
    """A cluster of this run's own: a process per device, or threads of this process. Listens on loopback at most."""
    import dask

    dask.config.set(
        {
            # One death must not count against the tasks that shared the worker: `run` repeats each of them alone.
            "distributed.scheduler.allowed-failures": 0,
            "distributed.worker.multiprocessing-method": "forkserver",
        }
    )
    from distributed import Client, Nanny, Scheduler, SpecCluster, Worker

    if processes:
        prestart()  # nothing, if it was done before
    place: dict[str, Any] = {"host": "127.0.0.1", "port": 0} if processes else {"protocol": "inproc://"}
    # Every node serves HTTP, dashboard or not. Left to itself the scheduler does so on port 8787 (a second run warns that
    # it is taken), and on the machine's outer address where its protocol is inproc.
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    port = (dashboard or "").rpartition(":")[2]
    shown = quiet if dashboard is None else {"dashboard": True, "dashboard_address": f"127.0.0.1:{port}"}
    scheduler = {"cls": Scheduler, "options": {**place, **shown}}
    workers: dict[int, dict[str, Any]] = {}
    for device in range(devices if processes else 1):
        options: dict[str, Any] = {**place, "nthreads": REGIONS_A_WORKER, "memory_limit": 0, **quiet}
        if processes and devices > 1:
            options["env"] = {"CUDA_VISIBLE_DEVICES": str(device)}
        workers[device] = {"cls": Nanny if processes else Worker, "options": options}
    make_cluster: Callable[..., Any] = SpecCluster
    make_client: Callable[..., Any] = Client
    cluster = make_cluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL)
    return OnDask(make_client(cluster, set_as_default=False), cluster)
