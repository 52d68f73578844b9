"""Slides that may only be read, by a user who is not root: all works, and nothing is written beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathology.integrity import verify
from tests.slides import smooth_pixels, write_tiff

ROOT = Path(__file__).parent.parent
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
# In a view of the file system of its own: the interpreter lies below a home that nobody else may enter.
OPEN_HOME = """
set -e
mkdir -p "$3"
mount --bind "$2" "$3"
mount -t tmpfs -o mode=755 none "$1"
mkdir -p "$2"
mount --bind "$3" "$2"
shift 3
exec "$@"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everyone may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))
    folder.chmod(0o755)
    yield folder
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    shutil.rmtree(folder)


@pytest.fixture
def somebody(folder: Path) -> list[str]:
    """What to put before a command so that it is not run by root."""
    if os.geteuid():
        return []
    closed = next((p for p in reversed(Path(sys.base_prefix).parents) if not p.stat().st_mode & 0o001), None)
    words = ["unshare", "-m", "sh", "-c", OPEN_HOME, "sh", str(closed), sys.base_prefix, str(folder / "kept")] if closed else []
    words += NOBODY
    try:
        done = subprocess.run(
            [*words, sys.executable, "-c", "import pipelines.cli"], cwd=ROOT, capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("needs setpriv and unshare: apt-get install util-linux")
    if done.returncode:
        pytest.skip(f"nobody but root can run this interpreter: {done.stderr.decode()[-200:]}")
    return words


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Of everything below a folder: mode, size, and when it was last written to."""
    states = {path: path.stat() for path in (folder, *sorted(folder.rglob("*")))}
    return {str(path): (found.st_mode, found.st_size, found.st_mtime_ns) for path, found in states.items()}


@pytest.mark.slow
@pytest.mark.fault("F11")
def test_slides_that_may_only_be_read(folder: Path, somebody: list[str]) -> None:
    slides, out, home = folder / "slides", folder / "out", folder / "home"
    for path in (slides / "deeper", out, home):
        path.mkdir(parents=True)
    for path in (slides / "a.svs", slides / "deeper" / "b.tiff"):
        write_tiff(path, [smooth_pixels(200, 300)])
        path.chmod(0o444)
    for path in (slides / "deeper", slides):
        path.chmod(0o555)
    if not os.geteuid():
        for path in (out, home):
            os.chown(path, 65534, 65534)
    before = state(slides)
    environment = {**os.environ, "HOME": str(home), "PATHOLOGY_HOME": str(home), "TMPDIR": str(home)}

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        whole = [*somebody, sys.executable, "-m", "pipelines.cli", *words]
        done = subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    model = ["--model", "pathology.testing:mean_colour?tile_px=32&mpp=0.5", "--tissue", "none"]
    command("check", str(slides), *model)
    command("run", str(slides), *model, "--out", str(out), "--hash-input", "--export", "csv")
    assert len(list(out.glob("slides/*/*/manifest.json"))) == 2
    assert state(slides) == before
    assert (next(out.glob("slides/*/*/manifest.json")).stat().st_uid == 0) == (os.geteuid() == 0 and not somebody)
    command("run", str(slides), *model, "--out", str(out), "--hash-input")
    command("verify", str(out), "--verify-input")
    assert state(slides) == before
    assert list(verify(out)) == []
