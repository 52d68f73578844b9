"""From a detection network's answer to rows of objects, on the device it was computed on.

Promise: rows have one fixed shape, so that they travel like scores; what is below its class's threshold is a row of NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pathology.errors import ModelError
from pathology.model import DetectionRule, ModelSpec

if TYPE_CHECKING:
    import torch

# peaks   (B, C, h, w) scores: a pixel that none around it beats is an object
# boxes   (B, N, 6) x0, y0, x1, y1 in input px, score, class: what exported YOLO networks with suppression answer
# rows    (B, N, columns) as `pathology.model.DetectionRule.columns` has it
Form = Literal["peaks", "boxes", "rows"]

# A peak is the highest of the 3 x 3 pixels around it.
PEAK_PX = 3


def object_rows(answer: torch.Tensor, form: Form, spec: ModelSpec, rule: DetectionRule) -> torch.Tensor:
    """(B, most, columns) float32, of objects first and NaN after them. ModelError where the answer is not of that form."""
    import torch

    width = {"boxes": 6, "rows": rule.columns}.get(form)
    fits = answer.dim() == 4 and answer.shape[1] == len(spec.classes) if width is None else answer.dim() == 3
    if not fits or (width is not None and (answer.shape[2] != width or answer.shape[1] > rule.most)):
        wanted = f"(batch, {len(spec.classes)}, h, w)" if width is None else f"(batch, up to {rule.most}, {width})"
        raise ModelError(
            f"model {spec.name} answered {tuple(answer.shape)}, but detections from {form} are {wanted}; correct the card"
        )
    if form == "peaks":
        return _peaks(answer, spec, rule)
    if form == "boxes":
        x0, y0, x1, y1, score, number = answer.unbind(dim=2)
        answer = torch.stack([(y0 + y1) / 2, (x0 + x1) / 2, number, score, y0, x0, y1, x1], dim=2)
    threshold = torch.tensor(spec.threshold, device=answer.device)
    number = answer[..., 2].nan_to_num().clamp(0, len(spec.classes) - 1).to(torch.int64)
    # Not `score < threshold`: a score of NaN is no object.
    rows = answer.masked_fill(~(answer[..., 3] >= threshold[number]).unsqueeze(2), torch.nan)
    missing = torch.full((len(rows), rule.most - rows.shape[1], rule.columns), torch.nan, device=rows.device)
    return torch.cat([rows, missing], dim=1)


def _peaks(scores: torch.Tensor, spec: ModelSpec, rule: DetectionRule) -> torch.Tensor:
    import torch

    height, width = scores.shape[2:]
    best, number = scores.max(dim=1)
    around = torch.nn.functional.max_pool2d(best.unsqueeze(1), PEAK_PX, 1, PEAK_PX // 2).squeeze(1)
    threshold = torch.tensor(spec.threshold, device=scores.device)
    # Written so that NaN passes, and is refused by whoever checks the answer.
    no_peak = (best < around) | (best < threshold[number])
    ranked = best.masked_fill(no_peak, -torch.inf).flatten(1)
    top, at = ranked.topk(min(rule.most, height * width), dim=1)
    row, col = at // width, at % width
    y, x = (row + 0.5) * (spec.input_px / height), (col + 0.5) * (spec.input_px / width)
    found = torch.stack([y, x, number.flatten(1).gather(1, at).to(torch.float32), top], dim=2)
    rows = torch.full((len(scores), rule.most, rule.columns), torch.nan, device=scores.device)
    rows[:, : found.shape[1]] = found.masked_fill((top == -torch.inf).unsqueeze(2), torch.nan)
    return rows
