"""Networks' weights by name: out of a checkpoint, and into a network.

Promise: nothing in a checkpoint is executed, whatever the environment says, and weights fit a network whole or are refused.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathology.errors import ModelError, one_line

if TYPE_CHECKING:
    import torch

# Where training programs keep a network's weights among other things, the likeliest first.
KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "weights")
NAMED = 4  # names listed in a message
# A counter that only training uses; checkpoints of older torch lack it.
COUNTER = "num_batches_tracked"

# What tensors of a checkpoint may come to: so many times the file, since some share their numbers, and so many bytes of
# small ones that are repeated.
SHARED, REPEATED_BYTES = 4, 2**28

State = dict[str, "torch.Tensor"]


def read_weights(file: Path, sha256: str) -> bytes:
    """The bytes of `file`, whose hash must be `sha256`. ModelError where it is another, or cannot be read."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file.name} in {file.parent} cannot be read ({error.strerror}); fetch the whole folder") from error
    if (actual := hashlib.sha256(data).hexdigest()) != sha256:
        raise ModelError(
            f"{file.name} in {file.parent} has sha256 {actual}, its card says {sha256}: it is not the card's file, or damaged; "
            "fetch both again"
        )
    return data


def read_safetensors(data: bytes, name: str) -> State:
    """The tensors in `data`. ModelError where it is no whole safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state: State = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{name} is no whole safetensors file ({error}); fetch it again") from error
    return state


def read_script(data: bytes, name: str, device: str) -> torch.jit.ScriptModule:
    """The TorchScript in `data`, which may run code: for trusted bytes. ModelError where torch cannot load it."""
    import torch

    try:
        with warnings.catch_warnings():
            # Models are shipped as it: that torch would rather see another format helps no one here.
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
            script: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ModelError(f"torch cannot load {name} ({one_line(error)}); fetch the file again") from error
    return script


def read_checkpoint(file: Path) -> State:
    """The network's weights in a checkpoint: a state dict, or one among what training programs keep beside it.

    ModelError where loading it would run code, and where no weights are found.
    """
    import torch

    if not file.is_file():
        raise ModelError(f"checkpoint {file} is no file; name the one that training wrote")
    if file.suffix == ".safetensors":
        return read_safetensors(file.read_bytes(), file.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused in the next moment
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} holds more than weights, and loading that would run code ({_cause(error)}); where it was made, save the "
            "weights alone: torch.save(network.state_dict(), ...)"
        ) from error
    except Exception as error:  # of a damaged file torch raises nearly anything
        raise ModelError(f"{file} is no whole checkpoint of torch ({_cause(error)}); fetch it again") from error
    state = _state(content, file)
    _check_claims(state, file)
    return state


def _check_claims(state: State, file: Path) -> None:
    """Raise ModelError where tensors claim far more numbers than the file holds: one that is repeated by a stride of zero takes
    a few bytes there, and terabytes as soon as anything is done with it."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    held = file.stat().st_size
    if claimed > SHARED * held + REPEATED_BYTES:
        largest = max(state, key=lambda key: state[key].numel())
        raise ModelError(
            f"{file} holds {held} bytes, but its tensors claim {claimed}, {largest} alone {tuple(state[largest].shape)}; "
            "it is no honest checkpoint: do not use it"
        )


def check_finite(state: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise ModelError where a weight is NaN or infinite: the network would answer that everywhere."""
    # Of types that are stored and not computed with, such as float8, torch asks none.
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.float().isfinite().all()]
    if bad:
        raise ModelError(
            f"{name} holds NaN or infinity in {some(bad)}; it is damaged, or training diverged: use another checkpoint"
        )


def common_prefix(keys: Iterable[str], wanted: Collection[str], name: str = "it") -> str:
    """What stands before most of `keys` that are `wanted` without it, with its dot; "" where that is nothing.

    ModelError where another would do as well: then there are several networks in `name`.
    """
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        counts.update(".".join([*parts[:n], ""]) for n in range(len(parts)) if ".".join(parts[n:]) in wanted)
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    if len(best) > 1 and most > 1:
        raise ModelError(f"{name} holds several networks that fit: {some(best)}; say which is meant: --prefix {best[0]}")
    return min(best, key=len, default="")


def fill(network: torch.nn.Module, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Give `network` the weights of `state`. ModelError names what is missing, too much, or of another shape."""
    try:
        _fill(network, state, name)
    except ModelError:
        raise
    except Exception as error:  # uninitialised weights, or state of an author's own making
        raise ModelError(f"{name} cannot be put into the architecture: {type(error).__name__}: {one_line(error)}") from error


def _fill(network: torch.nn.Module, state: Mapping[str, torch.Tensor], name: str) -> None:
    own = network.state_dict()
    missing = [key for key in own if key not in state and not key.endswith(COUNTER)]
    extra = [key for key in state if key not in own]
    reshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    retyped = [
        f"{key} {state[key].dtype} for {own[key].dtype}" for key in own if key in state and _kind(state[key]) != _kind(own[key])
    ]
    found = (("without", missing), ("also with", extra), ("another shape:", reshaped), ("another kind of number:", retyped))
    wrong = [f"{what} {some(keys)}" for what, keys in found if keys]
    if wrong:
        raise ModelError(f"{name} does not fit the architecture: {'; '.join(wrong)}; correct the architecture or its arguments")
    network.load_state_dict(dict(state), strict=False)  # only counters may be missing


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def some(names: Collection[str]) -> str:
    """The first of `names`, and how many there are."""
    listed = ", ".join(list(names)[:NAMED])
    return listed if len(names) <= NAMED else f"{listed} and {len(names) - NAMED} more"


def _state(content: Any, file: Path) -> State:
    if _tensors(content):
        return dict(content)
    named = {key: value for key, value in content.items() if _tensors(value)} if isinstance(content, Mapping) else {}
    for key in (*KEYS, *(named if len(named) == 1 else ())):
        if key in named:
            return dict(named[key])
    found = f"weights under {some([str(k) for k in named])}, and cannot tell which are meant" if named else "no weights"
    raise ModelError(f"{file} holds {found}; save the network's state_dict() alone")


def _tensors(value: Any) -> bool:
    import torch

    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided for k, v in value.items())
        and not any(v.is_meta or v.is_quantized for v in value.values())
    )


def _cause(error: BaseException) -> str:
    """What torch says is wrong, in a line: of its advice, which is to run the code, only the reason."""
    text = " ".join(str(error).split())
    at = text.find("WeightsUnpickler error:")
    reason = text[at:] if at >= 0 else text
    return reason.split(" was not an allowed", 1)[0].split(". ", 1)[0][:200] or type(error).__name__
