"""What reading a split found: counts, repairs, faults, and the text that shows them."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_SHOWN_FAULTS = 20


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split, as read.

    backgrounds: images without objects. boxes: class name -> boxes, difficult ones among them.
    swapped, clipped, dropped_tiny: repaired boxes; rotated: images whose boxes were turned
    with their EXIF orientation; duplicates: ids listed again. faults: "path: what" of all that
    was skipped; notes: what else is worth knowing.
    """

    spec: str
    images: int = 0
    backgrounds: int = 0
    boxes: Mapping[str, int] = field(default_factory=dict)
    difficult: int = 0
    swapped: int = 0
    clipped: int = 0
    dropped_tiny: int = 0
    rotated: int = 0
    duplicates: int = 0
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.spec}: {self.images:,} images ({self.backgrounds:,} without objects), "
            f"{sum(self.boxes.values()):,} boxes ({self.difficult:,} difficult)",
            _wrapped(f"{name} {count:,}" for name, count in self.boxes.items()),
            *self._repaired(),
            *(f"  note: {note}" for note in self.notes),
        ]
        if self.faults:
            lines += [f"  skipped: {len(self.faults):,} files", list_faults(self.faults)]
        return "\n".join(lines)

    def _repaired(self) -> list[str]:
        counts = (
            (self.swapped, "swapped (min > max)"),
            (self.clipped, "clipped to the image"),
            (self.dropped_tiny, "dropped (below one pixel)"),
        )
        repaired = ", ".join(f"{count:,} {what}" for count, what in counts if count)
        lines = [f"  boxes repaired: {repaired}"] if repaired else []
        if self.rotated:
            lines.append(f"  images whose boxes were rotated by EXIF orientation: {self.rotated:,}")
        if self.duplicates:
            lines.append(f"  ids listed again, used once: {self.duplicates:,}")
        return lines


def list_faults(faults: Sequence[str]) -> str:
    """The first twenty, one a line, and how many more there are."""
    lines = [f"    {fault}" for fault in faults[:_SHOWN_FAULTS]]
    if len(faults) > _SHOWN_FAULTS:
        lines.append(f"    ... and {len(faults) - _SHOWN_FAULTS:,} more")
    return "\n".join(lines)


def _wrapped(counts: Iterable[str]) -> str:
    return textwrap.fill(", ".join(counts), 100, initial_indent="  ", subsequent_indent="  ")
