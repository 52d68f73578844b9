"""A scheduler elsewhere: only over TLS, with certificates that both ends know."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import dask
import distributed
import pytest
from commands import invoke
from slides import smooth_pixels, write_tiff

import pathology
from pathology.errors import EnvironmentFault, UsageError
from pathology.runner import run
from pathology.schedule import CERTIFICATES, open_tasks

NAMES = ("ca-file", "cert", "key")


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    """An authority, and a certificate and key of it: of Dask's own temporary ones, on disk."""
    return write_certificates(tmp_path / "certificates")


def write_certificates(folder: Path) -> dict[str, Path]:
    made = distributed.Security.temporary()
    folder.mkdir()
    for name, text in zip(NAMES, (made.tls_ca_file, made.tls_client_cert, made.tls_client_key), strict=True):
        (folder / f"{name}.pem").write_text(text)
    return {name: folder / f"{name}.pem" for name in NAMES}


def configured(certificates: dict[str, Path]) -> dask.config.set:
    return dask.config.set(
        {setting: str(path) for setting, path in zip(CERTIFICATES.values(), certificates.values(), strict=True)}
    )


@contextmanager
def program(name: str, log: Path, *arguments: object) -> Iterator[None]:
    """One of Dask's own programs, as a person starts it; what it says goes to `log`."""
    command = [sys.executable, "-m", f"distributed.cli.dask_{name}", *map(str, arguments)]
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def cluster(folder: Path, *tls: object) -> Iterator[str]:
    """The address of a scheduler with one worker, each a process of its own."""
    where, log = folder / "scheduler.json", folder / "scheduler.log"
    quiet = ("--no-dashboard", "--dashboard-address", "127.0.0.1:0")
    scheduler = ("--port", 0, "--scheduler-file", where, "--host", "127.0.0.1", *quiet, *tls)
    worker = ("--scheduler-file", where, "--nthreads", 2, "--no-nanny", *quiet, *tls)
    with ExitStack() as stack:
        stack.enter_context(program("scheduler", log, *scheduler))
        address = _address(where, log)
        stack.enter_context(program("worker", folder / "worker.log", *worker))
        yield address


def _address(where: Path, log: Path) -> str:
    """What the scheduler writes to `where` once it listens: the file is there, empty, before it is whole."""
    end = time.monotonic() + 60
    while True:
        with suppress(FileNotFoundError, json.JSONDecodeError):
            return str(json.loads(where.read_text())["address"])
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def options(certificates: dict[str, Path]) -> list[object]:
    return [part for name, path in certificates.items() for part in (f"--tls-{name}", path)]


@pytest.mark.slow
def test_over_tls_it_equals_the_reference(
    certificates: dict[str, Path], reference: Path, reference_job: pathology.Job, tmp_path: Path
) -> None:
    with cluster(tmp_path, "--protocol", "tls", *options(certificates)) as address, configured(certificates):
        assert address.startswith("tls://")
        job = replace(reference_job, out=str(tmp_path / "out"))
        (outcome,) = run([job], address)
        assert (outcome.status, outcome.message) == ("ok", "")
        assert (job.result_folder("identity") / "manifest.json").read_bytes() == (reference / "manifest.json").read_bytes()


@pytest.mark.slow
def test_with_certificates_of_another_authority_nobody_is_let_in(certificates: dict[str, Path], tmp_path: Path) -> None:
    others = write_certificates(tmp_path / "others")
    with cluster(tmp_path, "--protocol", "tls", *options(certificates)) as address:
        with configured(others), pytest.raises(EnvironmentFault, match=r"no Dask scheduler answers at tls://.*certificate"):
            open_tasks(address)
        with pytest.raises(EnvironmentFault, match="no Dask scheduler answers at tcp://"):
            open_tasks(address.replace("tls://", "tcp://"))


@pytest.mark.parametrize("host", ["10.1.2.3", "node7.cluster", "0.0.0.0", "[2001:db8::1]", "127.0.0.1.example.org", ""])
def test_without_tls_only_loopback_is_spoken_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "Client", None)
    with pytest.raises(UsageError, match=r"start scheduler and workers with certificates, and give tls://") as refused:
        open_tasks(f"tcp://{host}:8786")
    assert f"tcp://{host}:8786" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "[::1]"])
def test_on_loopback_tcp_will_do(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(Exception):
        pass

    def found(address: str, **_: object) -> None:
        raise Found(address)

    monkeypatch.setattr(distributed, "Client", found)
    with pytest.raises(Found, match="tcp://"):
        open_tasks(f"tcp://{host}:8786")


@pytest.mark.parametrize("missing", NAMES)
def test_tls_without_certificates_is_refused_with_the_setting(
    missing: str, certificates: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "Client", None)
    with pytest.raises(UsageError, match="DASK_DISTRIBUTED__COMM__TLS__CA_FILE"):
        open_tasks("tls://node7:8786")
    certificates[missing].unlink()
    with (
        configured(certificates),
        pytest.raises(UsageError, match=f"{missing} of Dask's configuration is .*pem; name"),
    ):
        open_tasks("tls://node7:8786")


def test_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.svs", [smooth_pixels(64, 64)])
    model = "pathology.testing:mean_colour?tile_px=64&mpp=0.5"
    ended = invoke("run", slide, "--model", model, "--out", tmp_path / "out", "--scheduler", "tcp://node7:8786")
    assert ended.exit_code == 2
    assert ended.stderr.count("\n") == 1
    assert "give tls://node7:8786" in ended.stderr
