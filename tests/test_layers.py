"""Imports point downwards only, and heavy libraries come with the first call that needs them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up: a module imports only what stands above it in this list. A new module has to find its place here.
ORDER = [
    "pathology.errors",
    "pathology.clock",
    "pathology.pulse",
    "pathology.heap",
    "pathology.geometry",
    "pathology.model",
    "pathology.encoding",
    "pathology.stitch",
    "pathology.job",
    "pathology.alive",
    "pathology.faults",
    "pathology.durable",
    "pathology.records",
    "pathology.seal",
    "pathology.events",
    "pathology.lease",
    "pathology.cores",
    "pathology.device",
    "pathology.resample",
    "pathology.slide",
    "pathology.lazy",
    "pathology.testing",
    "pathology.thumbnail",
    "pathology.components",
    "pathology.outline",
    "pathology.tissue",
    "pathology.grid",
    "pathology.stain",
    "pathology.detections",
    "pathology.plan",
    "pathology.readers.tiff",
    "pathology.readers.dicom",
    "pathology.readers.inspect",
    "pathology.readers.fingerprint",
    "pathology.readers.mpp",
    "pathology.readers.opened",
    "pathology.readers.openslide_reader",
    "pathology.readers.plain",
    "pathology.readers.codecs",
    "pathology.readers.tile_cache",
    "pathology.readers.tiled_levels",
    "pathology.readers.direct",
    "pathology.readers",
    "pathology.models.refs",
    "pathology.models.checks",
    "pathology.models.pool",
    "pathology.models.trust",
    "pathology.models.pieces",
    "pathology.models.fold",
    "pathology.models.packed",
    "pathology.models.winograd",
    "pathology.models.stained",
    "pathology.models.objects",
    "pathology.models.network",
    "pathology.models.card",
    "pathology.models.weights",
    "pathology.models.halving",
    "pathology.models.hub",
    "pathology.models.timm_folder",
    "pathology.models.onnx",
    "pathology.models.folder",
    "pathology.models.checkpoint",
    "pathology.models.efficientnet",
    "pathology.models.nuclei",
    "pathology.models.python",
    "pathology.models.wsinfer",
    "pathology.models",
    "pathology.decide",
    "pathology.threads",
    "pathology.predictor",
    "pathology.batches",
    "pathology.together",
    "pathology.memory",
    "pathology.batch_size",
    "pathology.infer",
    "pathology.work",
    "pathology.export.colormap",
    "pathology.pyramid",
    "pathology.labels",
    "pathology.store",
    "pathology.features",
    "pathology.result",
    "pathology.areas",
    "pathology.export.table",
    "pathology.export.png",
    "pathology.export.ngff04",
    "pathology.export.qupath",
    "pathology.export",
    "pathology.outputs.ended",
    "pathology.outputs.scores",
    "pathology.outputs.features",
    "pathology.outputs.detections",
    "pathology.outputs",
    "pathology.finish",
    "pathology.shards",
    "pathology.integrity",
    "pathology.export.result",
    "pathology.staging",
    "pathology.calls",
    "pathology.apart",
    "pathology.job_slide",
    "pathology.slide_worker",
    "pathology.beside",
    "pathology.worker",
    "pathology.watch",
    "pathology.process",
    "pathology.schedule",
    "pathology.deaths",
    "pathology.trials",
    "pathology.outcome",
    "pathology.turns",
    "pathology.pending",
    "pathology.window",
    "pathology.runner",
    "pathology",
    "pipelines",
    "pipelines.stopping",
    "pipelines.printing",
    "pipelines.option_types",
    "pipelines.options",
    "pipelines.slides",
    "pipelines.config",
    "pipelines.summary",
    "pipelines.bottleneck",
    "pipelines.room",
    "pipelines.headers",
    "pipelines.preflight",
    "pipelines.check",
    "pipelines.status",
    "pipelines.benchmark",
    "pipelines.batch",
    "pipelines.repair",
    "pipelines.verify",
    "pipelines.compare",
    "pipelines.one_line",
    "pipelines.fetch",
    "pipelines.model_commands",
    "pipelines.result_commands",
    "pipelines.recipes",
    "pipelines.cli",
]

# `Slide.to_dask` is a method for the user's sake; what it does needs a Slide, and is imported when it is called.
UPWARD = {("pathology.slide", "pathology.lazy")}

# Packages imported by every import of a module in them; what they hold is checked as theirs.
PACKAGES = {"pathology", "pipelines", "pathology.export", "pathology.models", "pathology.outputs", "pathology.readers"}

HEAVY = {
    "openslide": ("pathology.readers.",),
    "torch": ("pathology.device", "pathology.models."),
    "distributed": ("pathology.schedule",),
    "dask": ("pathology.schedule", "pathology.result", "pathology.lazy"),
    "zarr": ("pathology.store", "pathology.pyramid", "pathology.result", "pathology.features", "pathology.export.ngff04"),
    "pyarrow": ("pathology.export.table",),
    "timm": ("pathology.models.timm_folder",),
    "huggingface_hub": ("pathology.models.hub",),
    "safetensors": ("pathology.models.weights", "pathology.models.checkpoint"),
    "fastjsonschema": ("pathology.models.card",),
    "onnxruntime": ("pathology.models.onnx",),
    "click": (
        "pipelines.cli",
        "pipelines.one_line",
        "pipelines.option_types",
        "pipelines.options",
        "pipelines.model_commands",
        "pipelines.recipes",
        "pipelines.result_commands",
    ),
    "tqdm": ("pipelines.batch",),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted([*(ROOT / "pathology").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(module: str) -> Iterator[str]:
    """The modules that `module` imports anywhere, but for those that only a type checker sees."""
    waiting: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if is_type_checking(node):
            assert isinstance(node, ast.If)
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; name the package"
            assert node.module is not None
            # `from package import module` imports the module; `from module import name` imports the module too.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & MODULES.keys()
            if not names <= MODULES.keys():
                yield node.module
        waiting.extend(ast.iter_child_nodes(node))


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(MODULES), "put new modules into ORDER, above all that import them"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    own = {name for name in imports(module) if name in MODULES}
    allowed = set(ORDER[: ORDER.index(module)]) | {target for source, target in UPWARD if source == module}
    assert sorted(own - allowed) == []


def test_nothing_imports_pipelines() -> None:
    assert [m for m in MODULES if m.startswith("pathology") for name in imports(m) if name.startswith("pipelines")] == []


def test_every_exception_is_used() -> None:
    assert [(source, target) for source, target in UPWARD if target not in set(imports(source))] == []


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {m for m in MODULES for name in imports(m) if name.partition(".")[0] == library}
    assert users, f"nothing imports {library}"
    places = HEAVY[library]
    assert sorted(m for m in users if m not in places and not m.startswith(tuple(p for p in places if p.endswith(".")))) == []


LOADED = "import sys; print(*sorted({n.partition('.')[0] for n in sys.modules} & set(sys.argv[1:])))"


@pytest.mark.parametrize(
    "code",
    [
        "import pathology",
        "import pathology; pathology.Job, pathology.Box, pathology.make_plan, pathology.PathologyError",
        "from pipelines.cli import main; main(['--help'], standalone_mode=False)",
        "from pipelines.cli import main; main(['run', '--help'], standalone_mode=False)",
    ],
    ids=["package", "names", "help", "run help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    heavy = ["torch", "dask", "distributed", "openslide", "zarr", "pyarrow"]
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LOADED}", *heavy], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == ""


def test_processes_are_started_before_numpy_is_loaded() -> None:
    """It takes as long as all else that the command imports until then, and a second core is idle meanwhile."""
    code = f"import pipelines.cli, pathology.process\n{LOADED}"
    ended = subprocess.run([sys.executable, "-c", code, "numpy"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.split() == []


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """`pathology.run` must stay the function after anyone imported a module: no module may have a public name's name."""
    import pathology

    modules = {path.stem for path in (ROOT / "pathology").iterdir()}
    assert not modules & set(pathology.__all__)
