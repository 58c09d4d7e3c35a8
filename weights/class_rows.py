"""Outputs of classes that two networks share by name, carried from one to the other."""

from collections.abc import Sequence

from torch import Tensor

from nets.yolo import ANCHORS_PER_SCALE, BOX_CHANNELS
from utils.errors import summarise


def shared_rows(
    in_file: Sequence[str] | None, wanted: Sequence[str] | None
) -> list[tuple[int, int]] | None:
    """(class id here, class id in the file) of the classes that both have, by name.

    None: load the outputs as they are, for the classes are the same, or not known on both sides.
    """
    if in_file is None or wanted is None or list(in_file) == list(wanted):
        return None
    ids = {name: index for index, name in enumerate(in_file)}
    return [(index, ids[name]) for index, name in enumerate(wanted) if name in ids]


def describe_rows(rows: Sequence[tuple[int, int]], wanted: Sequence[str]) -> str:
    """Which classes' outputs were carried over."""
    carried = {here for here, _ in rows}
    new = [name for index, name in enumerate(wanted) if index not in carried]
    names = summarise([wanted[here] for here in sorted(carried)])
    text = f"boxes, objectness and {len(carried)} of {len(wanted)} classes carried over: {names}"
    return f"{text}; new: {summarise(new)}" if new else text


def carry_rows(own: Tensor, theirs: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """The model's output tensor with the file's boxes, objectness and shared classes in it.

    own: (3 * (5 + C), ...), theirs the same for another C. rows: of `shared_rows`.
    """
    merged = own.detach().cpu().clone()
    ours = merged.view(ANCHORS_PER_SCALE, -1, *own.shape[1:])
    theirs = theirs.reshape(ANCHORS_PER_SCALE, -1, *own.shape[1:]).to(own.dtype)
    ours[:, :BOX_CHANNELS] = theirs[:, :BOX_CHANNELS]
    for here, there in rows:
        ours[:, BOX_CHANNELS + here] = theirs[:, BOX_CHANNELS + there]
    return merged
