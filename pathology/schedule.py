"""Where tasks run: in this thread, in threads, in local worker processes, or on a scheduler started elsewhere.

Promise: whatever runs a task, its end arrives on one queue, once, as a `Done`. The only import of distributed.
"""

from __future__ import annotations

import ipaddress
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pathology.calls import WorkerDied
from pathology.cores import core_count, reading_processes
from pathology.errors import EnvironmentFault, UsageError, one_line
from pathology.plan import REGIONS_AT_ONCE, regions_at_once
from pathology.process import Kind, WorkerProcesses, load_behind
from pathology.watch import Limits

# Tasks for slides at once in a worker: one begins while another ends.
SLIDES_AT_ONCE = 2
# Name of the plugin by which a Dask worker knows its processes.
OWN_PROCESSES = "own-processes"
# Tasks that reach none of the processes for so long, while these have nothing to do, never will.
LOST_S = 60.0
SCHEDULERS = "sync, threads, processes, tls://HOST:PORT, or tcp://127.0.0.1:PORT"
# Where Dask's own programs look for certificates as well; also set by DASK_DISTRIBUTED__COMM__TLS__CA_FILE and its like.
CERTIFICATES = {
    "tls_ca_file": "distributed.comm.tls.ca-file",
    "tls_client_cert": "distributed.comm.tls.client.cert",
    "tls_client_key": "distributed.comm.tls.client.key",
}


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
    apart: bool  # tasks for slides have processes of their own

    def submit(self, token: object, function: Callable[..., Any], *arguments: Any, kind: Kind = "device") -> None:
        """Run `function(*arguments)`: where the model is, or, if it needs none, for "slides", where it holds no region up."""
        ...

    def slots(self) -> int:
        """How many regions run at once."""
        ...

    def close(self) -> None:
        """Let go of workers; what still runs is abandoned."""
        ...


class InOrder:
    """The reference: every task runs where it is submitted."""

    in_order, apart = True, False

    def __init__(self) -> None:
        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()

    def submit(self, token: object, function: Callable[..., Any], *arguments: Any, kind: Kind = "device") -> None:
        try:
            self.done.put(Done(token, value=function(*arguments)))
        except WorkerDied as error:
            self.done.put(Done(token, error=error, died=True))
        except Exception as error:
            self.done.put(Done(token, error=error))

    def slots(self) -> int:
        return 1

    def close(self) -> None:
        """Nothing runs between tasks."""


class OnDask:
    """Tasks as futures of a distributed client; keys are random, so that no name of a slide reaches the scheduler."""

    in_order = False

    def __init__(self, client: Any, own_cluster: Any = None, own: Sequence[WorkerProcesses] = (), regions: int = 0) -> None:
        from distributed import KilledWorker

        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self.apart = bool(own)
        self._client = client
        self._cluster = own_cluster
        self._own = own
        self._regions = regions  # at once for each of them
        self._deaths: tuple[type[BaseException], ...] = (KilledWorker, WorkerDied)
        self._futures: dict[object, Any] = {}
        self._lost = False
        self._closed = threading.Event()
        if self.apart:
            threading.Thread(target=self._watch, name="lost-tasks", daemon=True).start()

    def submit(self, token: object, function: Callable[..., Any], *arguments: Any, kind: Kind = "device") -> None:
        options: dict[str, Any] = {"key": f"task-{uuid.uuid4().hex}", "pure": False, "retries": 0}
        if self.apart:
            future = self._client.submit(_in_process, kind, function, *arguments, **options, resources={kind: 1})
        else:
            future = self._client.submit(function, *arguments, **options)
        self._futures[token] = future
        future.add_done_callback(lambda done: self._end(token, done))

    def _watch(self) -> None:
        """End all tasks where they no longer reach the processes: Dask's own threads may be out of memory, and tell nobody."""
        idle_s, last = 0.0, time.monotonic()
        while not self._closed.wait(LOST_S / 60):
            # Of a time in which this process itself stood still nothing counts.
            last, passed = (now := time.monotonic()), min(now - last, LOST_S / 30)
            waiting = list(self._futures)
            idle_s = idle_s + passed if waiting and not any(each.busy for each in self._own) else 0.0
            if idle_s <= LOST_S:
                continue
            lost = EnvironmentFault(
                f"tasks reached no worker process for {LOST_S:g} s; see that there is memory (ulimit -v); then run it again"
            )
            self._lost = True
            for token in waiting:
                self.done.put(Done(token, error=lost))
            return

    def _end(self, token: object, future: Any) -> None:
        self._futures.pop(token, None)
        if self._lost:  # all were told
            return
        try:
            # Waits again where the worker died after the task's end and before its value was fetched: Dask then repeats it.
            done = Done(token, value=future.result())
        except self._deaths as error:
            done = Done(token, error=error, died=True)
        except CancelledError:
            gone = EnvironmentFault("the scheduler gave up a task; see that it runs, then run the same again")
            done = Done(token, error=gone)
        except Exception as error:
            done = Done(token, error=error)
        self.done.put(done)

    def slots(self) -> int:
        if self.apart:
            return len(self._own) * self._regions
        threads: dict[str, int] = self._client.nthreads()
        return max(1, sum(threads.values()))

    def close(self) -> None:
        self._closed.set()
        # What is done is on disk, and what is not may be cut off anywhere: ending workers in good order only takes time.
        for each in self._own:
            each.close()
        with suppress(TimeoutError):
            self._client.close(timeout=1)
            if self._cluster is not None:
                self._cluster.close(timeout=1)  # in vain where one of its threads is in a task


def open_tasks(scheduler: str, devices: int = 1, dashboard: str | None = None, limits: Limits | None = None) -> Tasks:
    """The runner for `scheduler`: sync, threads, processes (one that infers and readers, for each device), or an address.

    dashboard  address for Dask's dashboard on loopback, e.g. ":8787"; None: off
    limits     for processes of our own; nobody looks after those of another scheduler, and this one cannot end itself

    Raises UsageError for another word, or an address that is neither on loopback nor given with certificates,
    EnvironmentFault where no scheduler answers.
    """
    if scheduler == "sync":
        return InOrder()
    if outside(scheduler):
        return _outside(scheduler)
    if scheduler not in ("threads", "processes"):
        raise UsageError(f"scheduler {scheduler!r} is unknown; use {SCHEDULERS}")
    return _local(scheduler == "processes", devices, dashboard, limits)


def outside(scheduler: str) -> bool:
    """Whether this is the address of a scheduler that was started elsewhere."""
    return scheduler.startswith(("tcp://", "tls://"))


def _outside(address: str) -> OnDask:
    """On a scheduler that runs. Who can speak to it, or alter what is said to it, runs code on its workers and here."""
    from distributed import Client, Security

    make_security: Callable[..., Any] = Security
    make_client: Callable[..., Any] = Client
    security = make_security()  # as Dask's configuration has it
    if address.startswith("tls://"):
        _check_certificates(address, security)
    elif not _on_loopback(address):
        raise UsageError(
            f"scheduler {address} is not on loopback, and without TLS whoever reaches it runs code there and here; "
            f"start scheduler and workers with certificates, and give tls://{address.removeprefix('tcp://')}"
        )
    try:
        return OnDask(make_client(address, timeout=10, set_as_default=False, security=security))
    except OSError as error:
        why = one_line(error.__cause__ or error)
        raise EnvironmentFault(
            f"no Dask scheduler answers at {address} ({why}); start it, or choose another --scheduler"
        ) from error


def _on_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check_certificates(address: str, security: Any) -> None:
    """UsageError unless Dask's configuration names an authority, a certificate and a key, and the files are there."""
    for name, setting in CERTIFICATES.items():
        path = getattr(security, name)
        if not path or not Path(path).is_file():
            raise UsageError(
                f"{address} needs certificates, and {setting} of Dask's configuration is {path or 'not set'}; "
                f"name files by {', '.join(CERTIFICATES.values())}, there or in variables like {_variable(setting)}"
            )


def _variable(setting: str) -> str:
    """The environment variable that gives a setting of Dask's."""
    return "DASK_" + setting.replace(".", "__").replace("-", "_").upper()


def _in_process(kind: Kind, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in the process of that kind that belongs to the Dask worker of this thread."""
    from distributed import get_worker

    worker: Any = get_worker
    return worker().plugins[OWN_PROCESSES].own.call(kind, function, *arguments)


def _plugin(own: WorkerProcesses) -> Any:
    """What ties `own` to a Dask worker."""
    from distributed import WorkerPlugin

    base: Any = WorkerPlugin

    class OwnProcesses(base):  # type: ignore[misc]  # distributed has no types here
        name = OWN_PROCESSES

        def __init__(self) -> None:
            self.own = own

    return OwnProcesses()


def _local(processes: bool, devices: int, dashboard: str | None, limits: Limits | None) -> OnDask:
    """A cluster in this process: its workers' threads run the tasks, or hand each to a process of their worker's.

    So a death is known at once and concerns that worker alone, and the processes need nothing of Dask. Listens on loopback
    at most.
    """
    load_behind("dask")
    import dask

    # Its workers' threads only wait: a look at their stacks a hundred times a second, and a tick fifty times, are for nothing.
    # So is the history of what they did, which is 10 MB of the driver's memory.
    dask.config.set(
        {
            "distributed.worker.profile.enabled": False,
            "distributed.admin.tick.interval": "1s",
            "distributed.admin.low-level-log-length": 10,
            "distributed.diagnostics.computations.max-history": 1,
        }
    )
    load_behind("distributed")
    from distributed import Client, Scheduler, SpecCluster, Worker

    # Every node serves HTTP, dashboard or not. Left to itself the scheduler does so on port 8787 (a second run warns that
    # it is taken), and on the machine's outer address.
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    port = (dashboard or "").rpartition(":")[2]
    shown = quiet if dashboard is None else {"dashboard": True, "dashboard_address": f"127.0.0.1:{port}"}
    scheduler = {"cls": Scheduler, "options": {"protocol": "inproc://", **shown}}
    options: dict[str, Any] = {"protocol": "inproc://", "nthreads": REGIONS_AT_ONCE, "memory_limit": 0, **quiet}
    workers: dict[int, dict[str, Any]] = {0: {"cls": Worker, "options": options}}
    own: list[WorkerProcesses] = []
    cores = core_count() // devices
    slots: dict[Kind, int] = {"device": regions_at_once(cores), "slides": SLIDES_AT_ONCE}
    if processes:
        for device in range(devices):
            visible = {"CUDA_VISIBLE_DEVICES": str(device)} if devices > 1 else {}
            own.append(WorkerProcesses(visible, limits, reading_processes(cores)))
            more = {"nthreads": sum(slots.values()), "resources": slots, "plugins": [_plugin(own[device])]}
            workers[device] = {"cls": Worker, "options": {**options, **more}}
    make_cluster: Callable[..., Any] = SpecCluster
    make_client: Callable[..., Any] = Client
    cluster = make_cluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL)
    return OnDask(make_client(cluster, set_as_default=False), cluster, own, slots["device"])
