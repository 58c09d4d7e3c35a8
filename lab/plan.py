"""The plan of lab.compare: its runs, their folders, and plan.json."""

import ast
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from losses.conf.spec import SPEC
from utils.errors import UserError

# Flags of train.py that the plan sets: each run gets other values.
OWN_FLAGS = {
    *("conf_loss", "focal_loss", "no_focal_loss", "focal_alpha", "focal_gamma"),
    *("seed", "resume"),
}
UNKNOWN_VERSION = "unknown"


@dataclass(frozen=True)
class Run:
    """One training of one loss with one seed."""

    loss: str
    seed: int
    folder: Path  # train.py's --save_dir

    def __str__(self) -> str:
        return f"{self.loss}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """The output of train.py and evaluate.py."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def test_folder(self) -> Path:
        """The output folder of evaluate.py on the test split."""
        return self.folder.with_name(f"{self.folder.name}-test")

    @property
    def source_hash(self) -> Path:
        """File with the hash of the user's loss file at the start of the training."""
        return self.folder.with_name(f"{self.folder.name}.sha256")

    @property
    def failure(self) -> Path:
        """File that tells how the last attempt failed; absent if it did not fail."""
        return self.folder.with_name(f"{self.folder.name}.failed")

    def evaluation(self) -> dict[str, Any] | None:
        """evaluation.json of the test split; None until the run is finished."""
        return read_json(self.test_folder / "evaluation.json")


@dataclass(frozen=True)
class Plan:
    """Every loss with every seed, all else equal.

    Attributes:
        test: The split for evaluate.py.
        flags: Flag of train.py, with underscores -> its values as typed.
        version: Of this project; "" where git knows none.
        variants: Name that is not a confidence loss -> what it changes, as further flags of
            train.py.
    """

    losses: tuple[str, ...]
    seeds: tuple[int, ...]
    test: str
    flags: Mapping[str, Sequence[str]]
    version: str = ""
    variants: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def flags_of(self, name: str) -> list[str]:
        """The flags of train.py that select this loss or variant."""
        return list(self.variants.get(name, ("--conf_loss", name)))

    @property
    def epochs(self) -> int:
        return int(self.flags["epochs"][0])

    def runs(self, save_dir: Path) -> list[Run]:
        """All runs, seed by seed, so that an early report compares all losses."""
        return [
            Run(loss, seed, save_dir / "runs" / slug(loss) / f"seed-{seed}")
            for seed in self.seeds
            for loss in self.losses
        ]

    def command(self, save_dir: Path) -> str:
        """The shell command that runs this plan."""
        losses = shlex.join(self.losses)
        seeds = " ".join(map(str, self.seeds))
        flags = shlex.join(["--test", self.test, *as_arguments(self.flags)])
        return (
            f"python -m lab.compare --losses {losses} --seeds {seeds} {flags} "
            f"--save_dir {shlex.quote(str(save_dir))}"
        )


def slug(loss: str) -> str:
    """A folder name for a loss: readable, and unique by its checksum."""
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", loss).strip("-.")[:48]
    return readable if readable == loss else f"{readable}-{zlib.crc32(loss.encode()):08x}"


def normal_spec(loss: str) -> str:
    """One form for all spellings of a loss: no spaces, no empty brackets, sorted keys.

    A spec that cannot be parsed stays as it is: building the loss reports the error.
    """
    match = SPEC.fullmatch(loss)
    if match is None:
        return loss
    module, name, arguments = match.groups()
    try:
        call = ast.parse(f"f({arguments or ''}\n)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return loss
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        return loss
    call.keywords.sort(key=lambda pair: pair.arg or "")
    own = "" if module is None else f"{module}:"
    return f"{own}{name}{ast.unparse(call).removeprefix('f').removesuffix('()')}"


def as_spelled(losses: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The losses, each in its known spelling if it differs from that in spelling only."""
    spelling = {normal_spec(loss): loss for loss in known}
    return tuple(spelling.get(normal_spec(loss), loss.strip()) for loss in losses)


def parse_flags(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Flags of train.py as name -> values; `--lr 1` and `--lr=1`, - and _ in names are equivalent.

    Raises:
        UserError: For a flag that the plan sets itself, and for a value without a flag.
    """
    flags: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = [value] if equals else []
        elif name:
            flags[name].append(argument)
        else:
            raise UserError(f"{argument!r} belongs to no flag. See --help.")
    own = sorted(OWN_FLAGS & flags.keys())
    if own:
        raise UserError(
            f"--{own[0]} is not for a comparison, which sets it for each run: name the losses with "
            '--losses "focal(alpha=0.5, gamma=1)", the seeds with --seeds, and go on with an '
            "interrupted comparison by the same command."
        )
    return flags


def as_arguments(flags: Mapping[str, Sequence[str]]) -> list[str]:
    """The inverse of parse_flags."""
    return [text for name, values in flags.items() for text in (f"--{name}", *values)]


def check_distinct(plan: Plan) -> None:
    """Raise UserError if losses or seeds are empty or repeated, or if a seed is negative."""
    same = {"losses": [normal_spec(loss) for loss in plan.losses], "seeds": plan.seeds}
    for name, given in (("losses", plan.losses), ("seeds", plan.seeds)):
        if not given:
            raise UserError(f"--{name} is empty: give at least one.")
        twice = [
            value for value, key in zip(given, same[name], strict=True) if same[name].count(key) > 1
        ]
        if twice:
            raise UserError(f"--{name} names {twice[-1]!r} twice: {', '.join(map(str, given))}.")
    if min(plan.seeds) < 0:
        raise UserError(f"--seeds {min(plan.seeds)}: give 0 or more.")


def join_plans(old: Plan, new: Plan, save_dir: Path) -> Plan:
    """The old plan with the new one's further losses and seeds.

    Raises:
        UserError: With the first difference in anything else: such runs cannot be compared.
    """
    before, now = ({"test": [plan.test], **plan.flags} for plan in (old, new))
    for name in [*before, *now]:
        if list(before.get(name, ())) != list(now.get(name, ())) or (name in before) != (
            name in now
        ):
            raise UserError(
                f"{save_dir} was begun with {_typed(name, before)}, now there is "
                f"{_typed(name, now)}. Runs of one comparison differ in loss and seed only: give "
                "the same again, or another --save_dir."
            )
    losses = as_spelled(new.losses, old.losses)
    return replace(
        old,
        losses=tuple(dict.fromkeys((*old.losses, *losses))),
        seeds=tuple(dict.fromkeys((*old.seeds, *new.seeds))),
        version=join_versions(old.version, new.version),
    )


def join_versions(old: str, new: str) -> str:
    """ "v1 and v2": all versions that took part, UNKNOWN_VERSION for one unknown to git."""
    if old == new:
        return old
    versions = (*(old or UNKNOWN_VERSION).split(" and "), new or UNKNOWN_VERSION)
    return " and ".join(dict.fromkeys(versions))


def _typed(name: str, flags: Mapping[str, Sequence[str]]) -> str:
    return shlex.join((f"--{name}", *flags[name])) if name in flags else f"no --{name}"


def read_plan(save_dir: Path) -> Plan | None:
    """The plan of a folder, None if there is none; raise UserError for one of another version."""
    found = read_json(save_dir / "plan.json")
    if found is None:
        return None
    try:
        return Plan(**{**found, "losses": tuple(found["losses"]), "seeds": tuple(found["seeds"])})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{save_dir / 'plan.json'} is no plan of this version ({error}). Give another "
            "--save_dir."
        ) from None


def write_plan(save_dir: Path, plan: Plan) -> None:
    """Write plan.json."""
    text = json.dumps(asdict(plan), indent=2, ensure_ascii=False)
    write_text(save_dir / "plan.json", text + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None if there is no file or a crash cut it off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
