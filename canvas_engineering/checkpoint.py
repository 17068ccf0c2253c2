"""Loop parameters and action heads on disk, without the backbone."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checked import checked_depth, checked_ints, checked_items, checked_kind, checked_path, parsed_json
from .files import replace_file
from .looped_block import LOOP_PARAMETER_NAMES, Loops, can_loop
from .models.block import LoopedBlock

__all__ = ["load_loop_checkpoint", "save_loop_checkpoint"]

FORMATS = ("1.0.0",)
_KEY = "canvas_engineering"
_Tensors = dict[str, dict[str, torch.Tensor]]


def save_loop_checkpoint(
    looped_blocks: list[nn.Module],
    action_head: nn.Module | None,
    path: str | os.PathLike,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write the loop parameters of all blocks, and the action head if there is one.

    A path that ends in ".safetensors" gives a safetensors file whose metadata holds, as JSON under
    "canvas_engineering", the format, the versions, what the blocks are, their canvas declaration and ``metadata``.
    Any other path gives a ``torch.save`` of ``{"loop_blocks": {"block_0": {"loop_emb": …}, …}, "action_head": …,
    "metadata": …}``, which the published package loads too. Either is written to a temporary file and then renamed.

    Args:
        looped_blocks: as ``graft_looped_blocks`` gives them.
        metadata: anything that JSON holds.

    Raises:
        ValueError: metadata that JSON does not hold.

    >>> import tempfile
    >>> from canvas_engineering import LoopedBlockWrapper
    >>> block = LoopedBlockWrapper(nn.Linear(8, 8), 0, 3, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_loop_checkpoint([block], None, f"{folder}/loops.pt", {"step": 100})
    ...     load_loop_checkpoint([block], None, f"{folder}/loops.pt")["metadata"]
    {'step': 100}
    """
    path, looping = checked_path(path, "path"), _checked_blocks(looped_blocks, action_head)
    description = _describe(looping, action_head)
    checked_depth(metadata, "metadata")
    description |= {"versions": _versions(), "metadata": {} if metadata is None else metadata}
    try:
        text = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be of the kinds that JSON holds: {error}") from None
    blocks = {f"block_{i}": _parameters(block) for i, block in enumerate(looping)}
    head = None
    if action_head is not None:
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in action_head.state_dict().items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        tensors = {f"loop_blocks.{b}.{name}": t for b, group in blocks.items() for name, t in group.items()}
        tensors |= {f"action_head.{name}": tensor for name, tensor in (head or {}).items()}
        content = save(tensors, metadata={_KEY: text})
    else:
        buffer = io.BytesIO()
        torch.save({"loop_blocks": blocks, "action_head": head, "metadata": json.loads(text)}, buffer)
        content = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


def load_loop_checkpoint(
    looped_blocks: list[nn.Module], action_head: nn.Module | None, path: str | os.PathLike
) -> dict[str, Any]:
    """Read what :func:`save_loop_checkpoint` wrote, either format, or a checkpoint of the published package.

    The blocks get the file's parameters, and its number of loops where it says one. Nothing is changed if anything does
    not fit. The tensors of an action head under other names are taken in order.

    Returns:
        what the file says of itself (format, versions, metadata); empty for a file of the published package.

    Raises:
        OSError: the file cannot be read.
        ValueError: no loop checkpoint, one that was cut short, one of another format, or one of another model: the
            message names the file, and lists what differs.

    >>> import tempfile
    >>> from canvas_engineering import LoopedBlockWrapper
    >>> one, other = (LoopedBlockWrapper(nn.Linear(8, 8), 0, 3, 8) for _ in range(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_loop_checkpoint([one], None, f"{folder}/loops.pt")
    ...     _ = load_loop_checkpoint([other], None, f"{folder}/loops.pt")
    >>> torch.equal(one.loop_emb, other.loop_emb)
    True
    """
    path, looping = checked_path(path, "path"), _checked_blocks(looped_blocks, action_head)
    try:
        blocks, head, description = _read(path)
        loops = _checked_loops(description, len(blocks))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a loop checkpoint: {error}") from error
    moves, differences = _compared(blocks, head, description, looping, action_head)
    if differences:
        shown = "; ".join(differences[:8]) + ("; …" if len(differences) > 8 else "")
        raise ValueError(f"{path} is a loop checkpoint of another model: it has {shown}")
    with torch.no_grad():
        for target, source in moves:
            target.copy_(source)
    for block, count in zip(looping, loops):
        block.set_loops(count)
    return description


def _checked_loops(description: dict[str, Any], n_blocks: int) -> list[int]:
    """Loops by block; none where the file does not say. ValueError: another format, or numbers that are none."""
    if not description:
        return []
    if description.get("format") not in FORMATS:
        raise ValueError(
            f"its format is {_short(description.get('format'))}, known are {', '.join(FORMATS)}: use a newer "
            "version of this package"
        )
    loops = checked_ints(description.get("loops"), "loops", 1)
    if len(loops) != n_blocks:
        raise ValueError(f"it says the loops of {len(loops)} blocks, and holds {n_blocks}")
    return list(loops)


def _compared(
    blocks: _Tensors, head: dict[str, torch.Tensor] | None, description: dict[str, Any], looped_blocks, action_head
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[str]]:
    """Returns the copies to make, and the differences that forbid them."""
    differences = [] if len(blocks) == len(looped_blocks) else [f"{len(blocks)} blocks, the model {len(looped_blocks)}"]
    if description:
        own = _describe(looped_blocks, action_head)
        for name in ("gate", "sharpening", "canvas"):
            _compare(name, description.get(name), own[name], differences)
    elif any(block.loop.gate != "sigmoid" for block in looped_blocks):
        differences.append('gate "sigmoid" (it does not say, as the published package), the model "tanh"')
    moves: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, block in enumerate(looped_blocks):
        own = {name: getattr(block, name, None) for name in LOOP_PARAMETER_NAMES}
        own = {name: tensor for name, tensor in own.items() if tensor is not None}
        _match(f"block_{number}", blocks.get(f"block_{number}", {}), own, moves, differences)
    if action_head is not None and head is not None:
        own = action_head.state_dict()
        if set(head) != set(own) and len(head) == len(own):
            head = dict(zip(own, head.values()))
        _match("action_head", head, own, moves, differences)
    elif action_head is not None:
        differences.append("no action head, the model has one")
    return moves, differences


def _checked_blocks(looped_blocks: Any, action_head: Any) -> tuple[Loops, ...]:
    checked_kind(action_head, "action_head", nn.Module, optional=True)
    blocks = checked_items(looped_blocks, "looped_blocks", "looped blocks")
    for number, block in enumerate(blocks):
        if not isinstance(block, nn.Module) or not can_loop(block):
            raise ValueError(f"looped_blocks[{number}] must be a block that loops, got a {type(block).__name__}")
    return blocks


def _parameters(block: Loops) -> dict[str, torch.Tensor]:
    named = {name: getattr(block, name, None) for name in LOOP_PARAMETER_NAMES}
    return {name: t.detach().cpu().contiguous() for name, t in named.items() if t is not None}


def _describe(blocks: Sequence[Loops], action_head: nn.Module | None) -> dict[str, Any]:
    first = blocks[0] if blocks else None
    attention = first.attention if isinstance(first, LoopedBlock) else "attn1"
    declaration = getattr(getattr(getattr(first, attention, None), "processor", None), "declaration", None)
    return {
        "format": FORMATS[-1],
        "blocks": [type(block).__name__ for block in blocks],
        "max_loops": [block.max_loops for block in blocks],
        "loops": [block.loops for block in blocks],
        "gate": None if first is None else first.loop.gate,
        "sharpening": getattr(first, "sharpening", None),
        "canvas": None if declaration is None else declaration(),
        "action_head": None if action_head is None else type(action_head).__name__,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"torch": str(torch.__version__)}
    for package in ("canvas-engineering", "diffusers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _read(path: Path) -> tuple[_Tensors, dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Tensors by block, those of an action head, and the description. ValueError: the file is something else."""
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    blocks, head, description = _read_zip(path) if is_zip else _read_safetensors(path)
    for where, group in {**blocks, "action_head": {} if head is None else head}.items():
        is_valid = isinstance(group, dict) and all(isinstance(name, str) and _is_plain(t) for name, t in group.items())
        if not is_valid:
            raise ValueError(f"its {where} holds something else than plain tensors by name")
    return blocks, head, checked_kind(description, "its description", dict)


def _is_plain(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized


def _read_zip(path: Path) -> tuple[_Tensors, Any, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that was cut short, or is something else, may raise anything
        raise ValueError(f"torch cannot load it: {error}") from error
    blocks = content.get("loop_blocks") if isinstance(content, dict) else None
    if not isinstance(blocks, dict):
        raise ValueError("it has no loop_blocks")
    metadata = content.get("metadata")
    return blocks, content.get("action_head"), {} if metadata is None else metadata


def _read_safetensors(path: Path) -> tuple[_Tensors, Any, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:  # an empty file is an OSError to it
        raise ValueError(f"{path.name} is neither a safetensors file nor one of torch.save: {error}") from error
    if text is None:
        raise ValueError(f"its metadata has no {_KEY!r}")
    blocks: _Tensors = {}
    head = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        block, _, parameter = rest.partition(".")
        if group == "loop_blocks" and parameter:
            blocks.setdefault(block, {})[parameter] = tensor
        else:
            head[name.removeprefix("action_head.")] = tensor
    return blocks, head or None, parsed_json(text)


def _match(where, saved, own, moves, differences) -> None:
    """Pairs tensors of one group for the copy, or says what differs."""
    for name in sorted(saved.keys() | own.keys()):
        if name not in own or name not in saved:
            differences.append(f"{where}.{name} {'only in the file' if name in saved else 'only in the model'}")
        elif saved[name].shape != own[name].shape:
            differences.append(f"{where}.{name} {tuple(saved[name].shape)}, the model {tuple(own[name].shape)}")
        elif saved[name].is_floating_point() != own[name].is_floating_point() or saved[name].is_complex():
            differences.append(f"{where}.{name} of {saved[name].dtype}, the model {own[name].dtype}")
        else:
            moves.append((own[name], saved[name]))


def _compare(where: str, saved: Any, own: Any, differences: list[str]) -> None:
    """Collects the differences between two JSON values, by path."""
    if isinstance(saved, dict) and isinstance(own, dict):
        for name in sorted(saved.keys() | own.keys()):
            _compare(f"{where}.{name}", saved.get(name), own.get(name), differences)
    elif isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        for number, pair in enumerate(zip(saved, own)):
            _compare(f"{where}[{number}]", *pair, differences)
    elif saved != own:
        differences.append(f"{where} {_short(saved)}, the model {_short(own)}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
