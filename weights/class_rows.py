"""Copy the outputs of classes that two networks share, matched by name."""

from collections.abc import Sequence

from torch import Tensor

from nets.yolo import ANCHORS_PER_SCALE, BOX_CHANNELS
from utils.errors import summarise


def shared_rows(
    in_file: Sequence[str] | None, wanted: Sequence[str] | None
) -> list[tuple[int, int]] | None:
    """Class ids of the classes that model and file share, matched by name.

    Args:
        in_file, wanted: Class names of the file and of the model; None if not known.

    Returns:
        Pairs (id in the model, id in the file). None: load the outputs as they are, because the
        classes are the same or not known on both sides.
    """
    if in_file is None or wanted is None or list(in_file) == list(wanted):
        return None
    ids = {name: index for index, name in enumerate(in_file)}
    return [(index, ids[name]) for index, name in enumerate(wanted) if name in ids]


def describe_rows(rows: Sequence[tuple[int, int]], wanted: Sequence[str]) -> str:
    """Text on which classes' outputs were carried over and which classes are new."""
    carried = {here for here, _ in rows}
    new = [name for index, name in enumerate(wanted) if index not in carried]
    names = summarise([wanted[here] for here in sorted(carried)])
    text = f"boxes, objectness and {len(carried)} of {len(wanted)} classes carried over: {names}"
    return f"{text}; new: {summarise(new)}" if new else text


def carry_rows(own: Tensor, theirs: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """Copy the file's boxes, objectness and shared classes into the model's output tensor.

    Args:
        own: (3 * (5 + C), ...), the model's.
        theirs: The file's, the same for another C.
        rows: As `shared_rows` returns them.

    Returns:
        A merged copy of `own` on the CPU.
    """
    merged = own.detach().cpu().clone()
    ours = merged.view(ANCHORS_PER_SCALE, -1, *own.shape[1:])
    theirs = theirs.reshape(ANCHORS_PER_SCALE, -1, *own.shape[1:]).to(own.dtype)
    ours[:, :BOX_CHANNELS] = theirs[:, :BOX_CHANNELS]
    for here, there in rows:
        ours[:, BOX_CHANNELS + here] = theirs[:, BOX_CHANNELS + there]
    return merged
