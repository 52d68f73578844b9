"""WSInfer's own command line, offline and beside a torch without CUDA. Run by the Python of its venv.

    python wsinfer_run.py FOLDER_OF_SLIDES RESULTS --model FOLDER [--workers 2] [--batch 32]

FOLDER holds config.json and torchscript_model.pt. Two things are put right before WSInfer is imported: torchvision asks for
operators that only its CUDA build registers, and the model zoo's registry would be fetched even for a model given by path.
"""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("slides")
    parser.add_argument("results")
    parser.add_argument("--model", required=True)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--batch", default="32")
    options = parser.parse_args()
    import wsinfer_zoo.client

    wsinfer_zoo.client.load_registry = lambda *arguments, **named: SimpleNamespace(models={})
    from wsinfer.cli.cli import cli

    sys.argv = ["wsinfer", "run", "--wsi-dir", options.slides, "--results-dir", options.results]
    sys.argv += ["--config", f"{options.model}/config.json", "--model-path", f"{options.model}/torchscript_model.pt"]
    sys.argv += ["--batch-size", options.batch, "--num-workers", options.workers]
    cli()


if __name__ == "__main__":
    main()
