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
NEIGHBOURS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def object_rows(
    answer: torch.Tensor, form: Form, spec: ModelSpec, rule: DetectionRule, rank: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, most, columns) float32, of objects first and NaN after them. ModelError where the answer is not of that form.

    rank  of `peaks`: what tells scores apart that are equal after the activation, as those near 1 are; the scores themselves
    """
    import torch

    width = {"boxes": 6, "rows": rule.columns}.get(form)
    fits = answer.dim() == 4 and answer.shape[1] == len(spec.classes) if width is None else answer.dim() == 3
    if not fits or (width is not None and (answer.shape[2] != width or answer.shape[1] > rule.most)):
        wanted = f"(batch, {len(spec.classes)}, h, w)" if width is None else f"(batch, up to {rule.most}, {width})"
        raise ModelError(
            f"model {spec.name} answered {tuple(answer.shape)}, but detections from {form} are {wanted}; correct the card"
        )
    if form == "peaks":
        return _peaks(answer, answer if rank is None else rank, spec, rule)
    if form == "boxes":
        x0, y0, x1, y1, score, number = answer.unbind(dim=2)
        answer = torch.stack([(y0 + y1) / 2, (x0 + x1) / 2, number, score, y0, x0, y1, x1], dim=2)
    threshold = torch.tensor(spec.threshold, device=answer.device)
    number = answer[..., 2].nan_to_num().clamp(0, len(spec.classes) - 1).to(torch.int64)
    # Not `score < threshold`: a score of NaN is no object.
    rows = answer.masked_fill(~(answer[..., 3] >= threshold[number]).unsqueeze(2), torch.nan)
    missing = torch.full((len(rows), rule.most - rows.shape[1], rule.columns), torch.nan, device=rows.device)
    return torch.cat([rows, missing], dim=1)


def log_odds(logits: torch.Tensor) -> torch.Tensor:
    """(B, C, ...) -> the same: of each class against all others, which grows with its softmax but does not end at 1."""
    import torch

    if logits.dim() < 2 or logits.shape[1] < 2:
        return logits
    each = range(logits.shape[1])
    others = [torch.logsumexp(torch.stack([logits[:, j] for j in each if j != k], dim=1), dim=1) for k in each]
    return logits - torch.stack(others, dim=1)


def _peaks(scores: torch.Tensor, rank: torch.Tensor, spec: ModelSpec, rule: DetectionRule) -> torch.Tensor:
    """Of equally high pixels side by side the first is the peak, and it lies in the middle of those around it."""
    import torch

    height, width = scores.shape[2:]
    highest, number = rank.max(dim=1)
    best = scores.gather(1, number.unsqueeze(1)).squeeze(1)
    padded = torch.nn.functional.pad(highest, (1, 1, 1, 1), value=-torch.inf)
    threshold = torch.tensor(spec.threshold, device=scores.device)
    # Written so that NaN passes, and is refused by whoever checks the answer.
    no_peak = best < threshold[number]
    down, right, equals = (torch.zeros_like(highest) for _ in range(3))
    for dy, dx in NEIGHBOURS:
        other = padded[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        equal = other == highest
        no_peak |= (other > highest) | equal if (dy, dx) < (0, 0) else other > highest
        down, right, equals = down + dy * equal, right + dx * equal, equals + equal
    ranked = best.masked_fill(no_peak, -torch.inf).flatten(1)
    top, at = ranked.topk(min(rule.most, height * width), dim=1)
    down, right = ((shift / (1 + equals)).flatten(1).gather(1, at) for shift in (down, right))
    row, col = at // width + down, at % width + right
    y, x = (row + 0.5) * (spec.input_px / height), (col + 0.5) * (spec.input_px / width)
    found = torch.stack([y, x, number.flatten(1).gather(1, at).to(torch.float32), top], dim=2)
    rows = torch.full((len(scores), rule.most, rule.columns), torch.nan, device=scores.device)
    rows[:, : found.shape[1]] = found.masked_fill((top == -torch.inf).unsqueeze(2), torch.nan)
    return rows
