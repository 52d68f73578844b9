"""ONNX networks as torch modules, computed by onnxruntime. The only import of onnxruntime.

Promise: nothing in the file is executed but its graph of known operators; no file beside it is read but what is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pathology.errors import ModelError, one_line

if TYPE_CHECKING:
    import torch


def onnx_module(data: bytes, name: str, beside: Mapping[str, bytes] | None = None) -> torch.nn.Module:
    """The network in `data` on the CPU, from (B, 3, H, W) float32 to its one answer. ModelError where it is none such.

    beside  weights that lie outside the graph, by the name of their file

    It computes on the thread that calls it. A graph made for batches of a fixed size is given such, the last one padded.
    """
    import torch

    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            f"{name} needs onnxruntime, which is not installed; install the extra: pathology-pipeline[onnx]"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # pieces of a batch are computed side by side as it is
    options.log_severity_level = 3
    if beside:
        if not hasattr(options, "add_external_initializers_from_files_in_memory"):
            raise ModelError(
                f"{name} keeps weights in a second file, which onnxruntime {onnxruntime.__version__} cannot take; update it"
            )
        contents = list(beside.values())
        options.add_external_initializers_from_files_in_memory(list(beside), contents, [len(content) for content in contents])
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each way to fail
        raise ModelError(f"{name} cannot be loaded by onnxruntime: {one_line(error)}; fetch it again") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"{name} has {len(inputs)} inputs and {len(outputs)} outputs; a model has one of each: export the answer alone"
        )
    shape, kind, wanted = inputs[0].shape, inputs[0].type, inputs[0].name
    if kind != "tensor(float)" or len(shape) != 4 or (shape[1] not in (3, None) and not isinstance(shape[1], str)):
        raise ModelError(f"{name} takes {kind} {shape}; a model takes float32 pictures (batch, 3, height, width)")
    if outputs[0].type not in ("tensor(float)", "tensor(float16)", "tensor(double)"):
        raise ModelError(f"{name} answers {outputs[0].type}; a model answers numbers: export logits or scores as float32")
    fixed = shape[0] if isinstance(shape[0], int) else 0

    class Onnx(torch.nn.Module):
        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            batch = np.ascontiguousarray(tiles.numpy())
            if not fixed or len(batch) == fixed:
                return torch.from_numpy(_run(batch))
            padded = np.concatenate([batch, np.zeros((-len(batch) % fixed, *batch.shape[1:]), np.float32)])
            parts = [_run(padded[at : at + fixed]) for at in range(0, len(padded), fixed)]
            return torch.from_numpy(np.concatenate(parts)[: len(batch)])

    def _run(batch: Any) -> Any:
        return session.run(None, {wanted: batch})[0]

    return Onnx()
