"""slide2vec's own command line on the CPU, with a TorchScript network as its encoder. Run by the Python of its venv.

    python slide2vec_run.py SLIDE RESULTS --model FOLDER

FOLDER holds torchscript_model.pt, whose outputs are taken as features. Everything else is as slide2vec chooses by itself. Two
things are put right before it is imported: torchvision asks for operators that only its CUDA build registers, and encoders are
registered where every process that it starts will find them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from slide2vec.cli import main as slide2vec  # noqa: E402  # torchvision's operators come first
from slide2vec.encoders import TorchTileEncoder, register_encoder  # noqa: E402

MODEL = "SLIDE2VEC_RUN_MODEL"
OUTPUTS = 2


@register_encoder(
    "benchmark",
    encode_dim=OUTPUTS,
    input_size=224,
    supports_variable_input_size=False,
    supported_spacing_um=0.5,
    precision="fp32",
)
class Encoder(TorchTileEncoder):
    def __init__(self, *, output_variant: str | None = None) -> None:
        network = torch.jit.load(str(Path(os.environ[MODEL]) / "torchscript_model.pt"), map_location="cpu")
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        super().__init__(network, encode_dim=OUTPUTS, input_size=224, mean=mean, std=std, output_variant=output_variant)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("slide", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    os.environ[MODEL] = options.model
    options.results.mkdir(parents=True)
    slides, config = options.results / "slides.csv", options.results / "config-given.yaml"
    slides.write_text(f"sample_id,image_path\n{options.slide.stem},{options.slide}\n")
    config.write_text(f"csv: {slides}\noutput_dir: {options.results}\nmodel:\n  name: benchmark\n")
    slide2vec(["--run-on-cpu", "--skip-datetime", str(config)])


if __name__ == "__main__":
    main()
