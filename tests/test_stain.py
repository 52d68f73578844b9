"""Stains: found again where they are known, the same whatever is inferred, and applied to each tile by its own slide's."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save

import pathology
from pathology.errors import ModelError, UsageError
from pathology.geometry import Box
from pathology.job import key_of
from pathology.job_slide import key_fields
from pathology.model import Model, ModelSpec, StainInput, answer
from pathology.models import load_model, load_spec
from pathology.models.checks import warm_up
from pathology.models.network import QueuedNetwork, TorchNetwork
from pathology.models.pool import pooled
from pathology.models.stained import Stainer
from pathology.predictor import Predictor, predict_in_order
from pathology.result import open_heatmap
from pathology.runner import run
from pathology.slide import Slide
from pathology.stain import (
    LEAST_STAINED_PX,
    PARAMETERS,
    SAMPLE_MPP,
    SQUARE_PX,
    SQUARES,
    TARGET_AMOUNTS,
    TARGET_EOSIN,
    TARGET_HAEMATOXYLIN,
    TARGET_WHITE,
    Colour,
    Stains,
    fit_stains,
    made_up_stains,
    parameters,
    sample,
    separating,
    stains_of,
)
from pathology.store import STORE_NAME
from pathology.testing import array_slide
from pathology.tissue import TissueMask, find_tissue
from pipelines.compare import compare
from tests.networks import Pixels
from tests.slides import write_tiff
from tests.test_cards import folder_of
from tests.test_network import FakeQueues

KINDS: tuple[StainInput, ...] = ("macenko", "eosin-haematoxylin-od")
SIDE, BATCH = 16, 4
OTHER = ((0.55, 0.76, 0.35), (0.12, 0.93, 0.34))


def unit(vector: Colour) -> NDArray[np.float64]:
    return np.array(vector) / np.linalg.norm(vector)


def mixed(
    amounts: NDArray[np.float64], haematoxylin: Colour = OTHER[0], eosin: Colour = OTHER[1], white: float = 236.0
) -> NDArray[np.uint8]:
    """(..., 3) uint8 RGB of (..., 2) amounts of haematoxylin and eosin."""
    density = amounts @ np.stack([unit(haematoxylin), unit(eosin)])
    return (white * 10**-density).round().astype(np.uint8)


def amounts(count: int, seed: int = 0) -> NDArray[np.float64]:
    """(count, 2): a third of the pixels hold haematoxylin alone, a third eosin, a third both."""
    both = np.random.default_rng(seed).uniform(0.2, 1.0, (count, 2))
    both[: count // 3, 1] = both[count // 3 : 2 * count // 3, 0] = 0
    return both


def field(side: int, seed: int = 0, white: float = 236.0, **stains: Colour) -> NDArray[np.uint8]:
    """(side, side, 3) uint8: tissue in a frame of glass, nuclei of haematoxylin in waves of eosin."""
    y, x = np.mgrid[0:side, 0:side]
    turn = np.random.default_rng(seed).uniform(0, 6.28, 4)
    nuclei = np.clip(2 * np.sin(y / 9 + turn[0]) * np.sin(x / 11 + turn[1]) - 0.6, 0, 1)
    ground = np.clip(0.4 + 0.4 * np.sin(y / 60 + turn[2]) * np.cos(x / 47 + turn[3]), 0, 1) * (nuclei == 0)
    inside = (np.minimum(y, x) > side // 8) & (np.maximum(y, x) < side - side // 8)
    return mixed(np.stack([nuclei, ground], axis=-1) * inside[..., None], white=white, **stains)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return field(1600)


@pytest.fixture(scope="module")
def slide(pixels: NDArray[np.uint8]) -> Slide:
    return array_slide(pixels, mpp=0.5)


def whole(slide: Slide) -> TissueMask:
    return find_tissue(slide, "none")


# The fit


@pytest.mark.parametrize("white", [236.0, 250.0])
@pytest.mark.parametrize("swapped", [False, True])
def test_known_stains_are_found_again(white: float, swapped: bool) -> None:
    given = amounts(60_000)[:, ::-1] if swapped else amounts(60_000)
    glass = np.full((500, 3), white, np.uint8)
    rgb = np.concatenate([mixed(given, white=white), glass])
    found = stains_of(rgb, np.arange(len(rgb)) < len(given))
    assert found.reference == ""
    assert found.pixels == len(given)
    assert found.white == white
    np.testing.assert_allclose(found.haematoxylin, unit(OTHER[0]), atol=0.01)
    np.testing.assert_allclose(found.eosin, unit(OTHER[1]), atol=0.01)
    high = np.percentile(given, 99, axis=0)
    np.testing.assert_allclose((found.high[1], found.high[0]), high, rtol=0.02)
    np.testing.assert_allclose(found.low[:2], 0, atol=0.02)


def test_amounts_are_those_of_least_squares() -> None:
    vectors = np.stack([unit(OTHER[0]), unit(OTHER[1])])
    np.testing.assert_allclose(separating(OTHER[0], OTHER[1]), np.linalg.pinv(np.array(OTHER)).T, atol=1e-12)
    colours: list[Colour] = [(float(v[0]), float(v[1]), float(v[2])) for v in vectors]
    np.testing.assert_allclose(vectors @ separating(*colours).T, np.eye(2), atol=1e-12)


def test_white_is_the_glass_and_pure_white_is_none() -> None:
    tissue = mixed(amounts(5000))
    inside = np.arange(6000) < 5000

    def white(glass: int) -> float:
        return stains_of(np.concatenate([tissue, np.full((1000, 3), glass, np.uint8)]), inside).white

    assert (white(244), white(214), white(255), white(90)) == (244.0, 214.0, 240.0, 240.0)


@pytest.mark.parametrize(
    ("rgb", "why"),
    [
        (np.full((20_000, 3), 243, np.uint8), f"only 0 stained pixels in the sample, {LEAST_STAINED_PX} are needed"),
        (np.empty((0, 3), np.uint8), "only 0 stained pixels"),
        (mixed(amounts(LEAST_STAINED_PX - 1)), f"only {LEAST_STAINED_PX - 1} stained"),
        (mixed(np.stack([np.linspace(0.3, 1, 5000), np.zeros(5000)], axis=-1)), "one stain: its colours lie"),
    ],
    ids=["glass", "nothing", "little", "one stain"],
)
def test_what_cannot_be_fitted_has_a_references_stains_and_says_why(rgb: NDArray[np.uint8], why: str) -> None:
    found = stains_of(rgb, np.ones(len(rgb), bool))
    assert why in found.reference
    assert found.haematoxylin == TARGET_HAEMATOXYLIN
    for kind in KINDS:
        assert np.isfinite(parameters(kind, found)).all()


def test_the_fit_is_the_same_every_time_and_reads_a_bounded_sample(pixels: NDArray[np.uint8], slide: Slide) -> None:
    tissue = find_tissue(slide)
    found = fit_stains(slide, tissue)
    again = array_slide(pixels, mpp=0.5)
    assert fit_stains(again, find_tissue(again)) == found
    assert json.loads(json.dumps(found.record()))["eosin"] == list(found.eosin)
    large = array_slide(np.tile(pixels, (3, 3, 1)), mpp=0.5)
    rgb, inside = sample(large, whole(large))
    assert len(rgb) == len(inside) == SQUARES * SQUARE_PX**2


def test_a_real_slides_finer_levels_do_not_matter_to_where_the_sample_lies(pixels: NDArray[np.uint8]) -> None:
    one, several = array_slide(pixels, mpp=0.5), array_slide(pixels, mpp=0.5, downsamples=(1, 4))
    np.testing.assert_allclose(fit_stains(one, whole(one)).eosin, fit_stains(several, whole(several)).eosin, atol=0.01)


def test_only_tissue_is_looked_at(pixels: NDArray[np.uint8]) -> None:
    """A slide whose right half is stained otherwise: with the left half as tissue, it has the left half's stains."""
    both = np.concatenate([pixels, field(1600, 1, haematoxylin=(0.8, 0.5, 0.3), eosin=(0.3, 0.9, 0.3))], axis=1)
    slide = array_slide(both, mpp=0.5)
    mask = np.zeros((100, 200), bool)
    mask[20:80, 20:80] = True
    found = fit_stains(slide, TissueMask(mask, (16.0, 16.0), 0.5, (1600, 3200)))
    np.testing.assert_allclose(found.haematoxylin, unit(OTHER[0]), atol=0.03)
    assert 0 < found.pixels <= mask.sum() * (16 * 0.5 / SAMPLE_MPP) ** 2


def test_squares_that_cannot_be_decoded_are_left_out(pixels: NDArray[np.uint8], slide: Slide) -> None:
    broken = array_slide(pixels, mpp=0.5, bad=[(0, Box(0, 0, 700, 1600))])
    rgb, _ = sample(broken, whole(broken))
    assert 0 < len(rgb) < len(sample(slide, whole(slide))[0])
    assert fit_stains(broken, whole(broken)).reference == ""
    nothing = array_slide(pixels, mpp=0.5, bad=[(0, Box(0, 0, 1600, 1600))])
    assert "only 0 stained pixels" in fit_stains(nothing, whole(nothing)).reference


# What a device makes of them


def by_hand(kind: StainInput, rgb: NDArray[np.uint8], stains: Stains) -> NDArray[np.float64]:
    """(..., 3) 0..255 by the formulas as they are written, without the parameters."""
    density = np.maximum(0, np.log10(stains.white / np.maximum(rgb.astype(np.float64), 1)))
    found = density @ np.linalg.pinv(np.stack([stains.haematoxylin, stains.eosin]))
    if kind == "macenko":
        scaled = found / np.array([stains.high[1], stains.high[0]]) * TARGET_AMOUNTS
        return np.minimum(255, TARGET_WHITE * 10 ** -(scaled @ np.array([TARGET_HAEMATOXYLIN, TARGET_EOSIN])))
    channels = np.stack([found[..., 1], found[..., 0], density.mean(axis=-1)], axis=-1)
    return 255 * np.clip((channels - stains.low) / (np.array(stains.high) - stains.low), 0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_stained_as_by_hand_each_by_its_own_slide(kind: StainInput) -> None:
    every = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    stains = [stains_of(field(200, k, white=230 + 5 * k).reshape(-1, 3), np.ones(40_000, bool)) for k in range(3)]
    assert len({parameters(kind, s).tobytes() for s in stains}) == 3
    given = torch.from_numpy(np.stack([parameters(kind, s) for s in stains]))
    stained = Stainer(kind, torch.device("cpu"))(torch.from_numpy(every), given).numpy()
    for tile, found, own in zip(every, stained, stains, strict=True):
        np.testing.assert_allclose(found, by_hand(kind, tile, own), atol=2e-3)


def test_normalised_to_itself_a_reference_slide_stays() -> None:
    density = amounts(60_000) * (np.array(TARGET_AMOUNTS) / np.percentile(amounts(60_000), 99, axis=0))
    rgb = mixed(density, TARGET_HAEMATOXYLIN, TARGET_EOSIN, TARGET_WHITE)
    stains = stains_of(rgb, np.ones(len(rgb), bool))
    tiles = torch.from_numpy(rgb[:250].reshape(1, 10, 25, 3))
    stained = Stainer("macenko", torch.device("cpu"))(tiles, torch.from_numpy(parameters("macenko", stains)[None]))
    assert np.abs(stained.numpy() - tiles.numpy()).mean() < 2


# Models that take stains


def spec(kind: StainInput) -> ModelSpec:
    return ModelSpec("stained", "0" * 64, ("a", "b", "c"), 0.5, SIDE, SIDE, SIDE, scores="value", stain=kind)


def network(kind: StainInput) -> TorchNetwork:
    return TorchNetwork(spec(kind), Pixels(), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


def noise(count: int, seed: int) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8))


def slides(kind: StainInput, count: int) -> list[NDArray[np.float32]]:
    fields = [field(200, k, white=225 + 5 * k).reshape(-1, 3) for k in range(count)]
    return [parameters(kind, stains_of(rgb, np.ones(len(rgb), bool))) for rgb in fields]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_given_stained_tiles_normalised(kind: StainInput) -> None:
    tiles, (stain,) = np.stack(noise(2, 0)), slides(kind, 1)
    stained = Stainer(kind, torch.device("cpu"))(torch.from_numpy(tiles), torch.from_numpy(np.stack([stain] * 2))).numpy()
    mean, std = np.array((0.1, 0.2, 0.3)) * 255, np.array((0.5, 0.6, 0.7)) * 255
    scores = network(kind)(tiles, np.stack([stain] * 2))
    np.testing.assert_allclose(scores, ((stained - mean) / std).transpose(0, 3, 1, 2), atol=1e-5)


class Sometimes:
    """A network that fails on tiles of 13."""

    def __init__(self, inner: TorchNetwork) -> None:
        self.inner, self.spec = inner, inner.spec

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32]) -> NDArray[np.float32]:
        if (tiles == 13).all(axis=(1, 2, 3)).any():
            raise ValueError("a tile of 13")
        return self.inner(tiles, stains)


def queued(kind: StainInput) -> QueuedNetwork:
    inner = network(kind)
    inner._shift, inner._scale = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    return QueuedNetwork(inner, FakeQueues(("upload",)))


@pytest.mark.parametrize("make", [network, queued, lambda kind: Sometimes(network(kind))], ids=["plain", "queued", "failing"])
@pytest.mark.parametrize("kind", KINDS)
def test_slides_that_share_batches_get_the_bits_they_get_alone(kind: StainInput, make: Callable[[StainInput], object]) -> None:
    stains, counts = slides(kind, 4), [1, 6, 9, 3]
    lanes = [noise(count, seed) for seed, count in enumerate(counts)]
    model = make(kind)
    if isinstance(model, Sometimes):
        lanes[3][1] = np.full((SIDE, SIDE, 3), 13, np.uint8)
    predictor = Predictor(model, BATCH)  # type: ignore[arg-type]
    together = threading.Barrier(len(lanes))

    def fed(own: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        for place, tile in enumerate(own):
            if place == 0:
                together.wait(30)
            yield tile

    def answers(own: list[NDArray[np.uint8]], stain: NDArray[np.float32]) -> list[bytes] | Exception:
        try:
            return [a.tobytes() for a in predictor.predict(fed(own), stain)]
        except ValueError as error:
            return error

    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(answers, own, stain) for own, stain in zip(lanes, stains, strict=True)]
        found = [future.result(30) for future in futures]
    predictor.close()
    for place, (own, stain) in enumerate(zip(lanes, stains, strict=True)):
        if isinstance(model, Sometimes) and place == 3:
            assert isinstance(found[place], ValueError)
        else:
            assert found[place] == [a.tobytes() for a in predict_in_order(network(kind), BATCH, own, stain)]
    first = [next(predict_in_order(network(kind), BATCH, noise(1, 0), stain)) for stain in stains]
    assert len({answer.tobytes() for answer in first}) == 4  # the stains do matter


@pytest.mark.parametrize("make", [network, queued, lambda kind: Sometimes(network(kind))], ids=["plain", "queued", "wrapped"])
def test_pooled_maps_are_of_stained_tiles(make: Callable[[StainInput], Model]) -> None:
    tiles, stains = np.stack(noise(BATCH, 0)), np.stack([slides("macenko", 1)[0]] * BATCH)
    fine = network("macenko")(tiles, stains)
    model = pooled(make("macenko"), 4 * 0.5)
    assert model.spec.output_px == SIDE // 4
    means = fine.reshape(BATCH, 3, SIDE // 4, 4, SIDE // 4, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(answer(model, tiles, stains), means, atol=1e-6)


def test_stains_are_asked_for_where_they_belong_and_nowhere_else() -> None:
    stained, plain = network("macenko"), TorchNetwork(replace(spec("macenko"), stain=""), Pixels())
    stain = slides("macenko", 1)[0]
    with pytest.raises(ModelError, match="stained takes tiles stained as macenko, and was given no stains of their slide"):
        list(predict_in_order(stained, BATCH, noise(1, 0)))
    with pytest.raises(ModelError, match="takes no stains, and was given some"):
        list(predict_in_order(plain, BATCH, noise(1, 0), stain))
    with pytest.raises(ModelError, match="was given no stains"):
        stained(np.stack(noise(2, 0)))
    with pytest.raises(UsageError, match="takes the stains of a whole slide, which tiles do not show"):
        compare(network_of_one(), Path(), Path())


def network_of_one() -> TorchNetwork:
    return TorchNetwork(replace(spec("macenko"), output_px=1), Pixels())


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_tiles_have_made_up_stains(kind: StainInput) -> None:
    assert made_up_stains(kind, 3).shape == (3, PARAMETERS)
    warm_up(network(kind), 5)


# Cards


def stained_folder(place: Path, **given: object) -> Path:
    return folder_of(
        place,
        data=save({"gain": torch.ones(1)}),
        weights={"architecture": "tests.networks:Pixels"},
        input={"mean": [0, 0, 0], "std": [1, 1, 1], **given},
        output={"kind": "map", "activation": "none", "classes": [{"name": name} for name in ("a", "b", "c")]},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_names_the_stain_input(tmp_path: Path, kind: StainInput) -> None:
    assert load_spec(str(stained_folder(tmp_path / "m", stain=kind))).stain == kind
    assert load_spec(str(stained_folder(tmp_path / "n"))).stain == ""


def test_a_stain_input_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"input\.stain must be one of"):
        load_spec(str(stained_folder(tmp_path / "m", stain="reinhard")))
    with pytest.raises(ModelError, match=r"input\.channels is the order of colours"):
        load_spec(str(stained_folder(tmp_path / "m", stain="eosin-haematoxylin-od", channels="bgr")))
    assert load_spec(str(stained_folder(tmp_path / "m", stain="macenko", channels="bgr"))).stain == "macenko"


# Whole runs


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, pixels: NDArray[np.uint8]) -> Path:
    return write_tiff(tmp_path_factory.mktemp("stained") / "slide.tiff", [pixels], mpp=0.5)


@pytest.fixture
def job(file: Path, tmp_path: Path) -> pathology.Job:
    model = stained_folder(tmp_path / "model", stain="eosin-haematoxylin-od", mpp=2.0, tile_px=64)
    return pathology.Job(
        slide=str(file),
        slide_id="s",
        root=str(file),
        model=str(model),
        out=str(tmp_path / "out"),
        overlap=0.5,
        batch_size=4,
        block=4,
    )


def finished(job: pathology.Job, scheduler: str = "sync") -> tuple[dict[str, object], Path]:
    (outcome,) = run([job], scheduler)
    assert outcome.record is not None, outcome.message
    return outcome.record, job.result_folder(load_spec(job.model).name)


@pytest.mark.parametrize("scheduler", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_stained_heatmaps_are_the_same_however_they_are_made(job: pathology.Job, tmp_path: Path, scheduler: str) -> None:
    record, folder = finished(job)
    assert record["stain"] == fit_stains_of(job).record()
    again, other = finished(replace(job, out=str(tmp_path / "other"), block=3), scheduler)
    assert again["stain"] == record["stain"]
    assert (other / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def fit_stains_of(job: pathology.Job) -> Stains:
    with pathology.open_slide(job.slide) as slide:
        return fit_stains(slide, find_tissue(slide))


def test_a_stained_heatmap_is_the_stained_slide(job: pathology.Job) -> None:
    record, folder = finished(job)
    heatmap = open_heatmap(folder / STORE_NAME)
    assert heatmap.attrs["provenance"]["stain"] == record["stain"]
    with pathology.open_slide(job.slide) as slide:
        rgb = slide.read_mpp(Box(0, 0, *heatmap.frame.shape), 2.0)
    scores = heatmap.read(0, Box(0, 0, *heatmap.frame.shape)).transpose(1, 2, 0)
    there = np.isfinite(scores).all(axis=-1)
    assert there.sum() > 20_000
    expected = by_hand("eosin-haematoxylin-od", rgb, fit_stains_of(job)) / 255
    np.testing.assert_allclose(scores[there], expected[there], atol=1e-4)


def test_a_region_of_interest_changes_no_stain(job: pathology.Job, tmp_path: Path) -> None:
    roi = tmp_path / "roi.geojson"
    ring = [[300, 300], [900, 300], [900, 900], [300, 900], [300, 300]]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    record, folder = finished(job)
    part, other = finished(replace(job, roi=str(roi), out=str(tmp_path / "other")))
    assert part["stain"] == record["stain"]
    whole, inside = (open_heatmap(f / STORE_NAME) for f in (folder, other))
    box = Box(100, 100, 100, 100)  # wholly inside, so all tiles that touch it are in both
    np.testing.assert_array_equal(whole.read(0, box), inside.read(0, box))


def test_a_slide_of_glass_says_so(job: pathology.Job, tmp_path: Path) -> None:
    file = write_tiff(tmp_path / "glass.tiff", [np.full((600, 600, 3), 243, np.uint8)], mpp=0.5)
    glass = replace(job, slide=str(file), root=str(file), slide_id="glass")
    assert finished(glass)[0]["status"] == "ok_empty"
    record, _ = finished(replace(glass, tissue="none", slide_id="glass-all"))
    assert record["status"] == "ok"
    stain = record["stain"]
    assert isinstance(stain, dict)
    assert "only 0 stained pixels" in stain["reference"]
    assert "only 0 stained pixels" in str(record["message"])


def test_keys_cover_how_stains_are_fitted_and_stay_as_they_were_without(job: pathology.Job, slide: Slide) -> None:
    with_stain, without = (
        key_fields(job, slide, replace(spec("macenko"), output_px=1, tile_px=64, stain=kind)) for kind in ("macenko", "")
    )
    assert with_stain["stain"] == "macenko 1"
    assert "stain" not in without
    plain = replace(spec(""), output_px=1, tile_px=64)
    old = {name: value for name, value in asdict(plain).items() if name not in ("stain", "margin_px", "features", "detections")}
    assert without["card"] == key_of(old) != with_stain["card"]


# ONNX whose weights lie in a second file


def onnx_in_two_files(place: Path) -> tuple[bytes, bytes]:
    import onnx

    from tests.networks import seeded
    from tests.test_cards import onnx_bytes

    model = onnx.load_from_string(onnx_bytes(seeded()))
    place.mkdir()
    onnx.save(
        model, place / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=True, location="m.data", size_threshold=0
    )
    return (place / "m.onnx").read_bytes(), (place / "m.data").read_bytes()


def test_onnx_takes_weights_from_a_second_file_of_known_bytes(tmp_path: Path) -> None:
    graph, data = onnx_in_two_files(tmp_path / "two")
    tiles = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    weights = {"data": "m.data", "data_sha256": hashlib.sha256(data).hexdigest()}
    folder = folder_of(tmp_path / "m", "onnx", graph, weights=weights)
    with pytest.raises(ModelError, match=r"has no m\.data; fetch the whole model folder"):
        pathology.models.add_model(folder)
    (folder / "m.data").write_bytes(data)
    np.testing.assert_array_equal(load_model(str(folder))(tiles), load_model(str(folder_of(tmp_path / "one", "onnx")))(tiles))
    (folder / "m.data").write_bytes(data[:-1] + b"\0")
    with pytest.raises(ModelError, match="sha256"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="cannot be loaded by onnxruntime"):  # what the card does not name is not looked for
        load_model(str(folder_of(tmp_path / "two", "onnx", graph)))


@pytest.mark.parametrize(
    ("format", "weights"),
    [
        ("onnx", {"data": "m.data"}),
        ("onnx", {"data_sha256": "0" * 64}),
        ("onnx", {"data": "../m.data", "data_sha256": "0" * 64}),
        ("safetensors", {"data": "m.data", "data_sha256": "0" * 64}),
    ],
)
def test_a_second_file_that_makes_no_sense_is_refused(tmp_path: Path, format: str, weights: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="data"):
        load_spec(str(folder_of(tmp_path / "m", format, weights=weights)))
