"""Run a plan: train.py and evaluate.py as child processes, with progress over all."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from engine.process import stop_on_signal
from engine.runlog import is_running
from lab.plan import Plan, Run, as_arguments, read_json
from lab.sources import check_source, record_source, source_hash
from metrics.plots import number
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.5
STOP_SECONDS = 60  # after these a child is asked again to stop
LOG_LINES = 15  # shown of a run that failed
USER_ERROR = 2  # exit status of an error that the user can fix
EVALUATION_FLAGS = ("device", "batch_size", "num_workers", "skip_bad", "include_difficult")


class Child:
    """The process that works on a run: its training, then its evaluation.

    Args:
        threads: Default of OMP_NUM_THREADS.
        held: File descriptors that it keeps open, those of the folder's lock.
    """

    def __init__(
        self,
        run: Run,
        command: Sequence[str],
        *,
        threads: int,
        evaluates: bool,
        held: Sequence[int] = (),
    ):
        self.run, self.evaluates = run, evaluates
        # A progress bar per child would fill its log; one thread too many slows all of them down.
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment |= {"TQDM_MININTERVAL": "60", "PYTHONUNBUFFERED": "1"}
        run.log.parent.mkdir(parents=True, exist_ok=True)
        run.failure.unlink(missing_ok=True)
        with open(run.log, "a", encoding="utf-8") as log:
            print("\n$ python", *command, file=log, flush=True)
            # A session of its own: Ctrl-C in the terminal reaches the parent only, which asks each
            # child once.
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=held,
            )

    def stop(self) -> None:
        """Ask the process to stop; a training saves itself first."""
        # Not SIGINT: a child that is still importing would swallow it or print a traceback.
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)


class Laboratory:
    """Trains and evaluates a plan's unfinished runs, `jobs` at a time.

    Args:
        held: As for `Child`.

    Raises:
        UserError: For a run that a leftover process still trains, and for one that was trained with
            another version of the user's own loss.
    """

    def __init__(self, plan: Plan, save_dir: Path, *, jobs: int, held: Sequence[int] = ()):
        self.plan, self.jobs, self.held = plan, jobs, held
        self.runs = plan.runs(save_dir)
        self.finished = {run for run in self.runs if run.evaluation() is not None}
        self.waiting = deque(run for run in self.runs if run not in self.finished)
        self.children: list[Child] = []
        self.failures: list[str] = []
        self.stop_requested = False
        self.sources = {loss: source_hash(loss) for loss in plan.losses}
        for run in self.runs:
            check_source(run, self.sources[run.loss])
        for run in self.waiting:
            check_free(run)

    def work(self) -> bool:
        """Work until all runs are finished or have failed.

        Returns:
            False if asked to stop before.

        Raises:
            UserError: If a training rejects its flags or data, or the user's loss file has changed.
        """
        bar = tqdm(
            total=self.plan.epochs * len(self.runs),
            initial=self._epochs_done(),
            unit="epoch",
            dynamic_ncols=True,
            miniters=0,
            mininterval=1 if sys.stderr.isatty() else 60,  # a log file takes every refresh
            smoothing=0,  # the time that is left counts epochs of all losses alike
        )
        with bar, stop_on_signal(self._request_stop):
            try:
                while (self.waiting or self.children) and not self.stop_requested:
                    self._fill()
                    self._show(bar)
                    time.sleep(POLL_SECONDS)
                    self._reap()
                self._show(bar)
                bar.refresh()
            finally:
                self._stop_children()
        return not self.stop_requested

    def _request_stop(self) -> None:
        self.stop_requested = True

    def _fill(self) -> None:
        """Start runs while there is room."""
        while self.waiting and len(self.children) < self.jobs:
            run = self.waiting.popleft()
            self._check_unchanged(run.loss)
            record_source(run, self.sources[run.loss])
            self._start(run, train_command(run, self.plan), evaluates=False)

    def _check_unchanged(self, loss: str) -> None:
        """Raise UserError if the user's file was edited since this comparison was started."""
        if source_hash(loss) != self.sources[loss]:
            raise UserError(
                f"the file of {loss} has changed while the comparison was running. Bring the old "
                "file back and start again, or put the new formula into a file of its own."
            )

    def _start(self, run: Run, command: Sequence[str], *, evaluates: bool) -> None:
        threads = max(1, cores() // self.jobs)
        child = Child(run, command, threads=threads, evaluates=evaluates, held=self.held)
        self.children.append(child)

    def _reap(self) -> None:
        """Collect the children that have ended; a trained run is evaluated next."""
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            if self.stop_requested:
                continue
            if child.process.returncode != 0:
                self._failed(child)
            elif not child.evaluates:
                command = evaluate_command(child.run, self.plan)
                self._start(child.run, command, evaluates=True)
            else:
                self._evaluated(child.run)

    def _evaluated(self, run: Run) -> None:
        evaluation = run.evaluation()
        if evaluation is None:
            how = "left no evaluation.json"
            run.failure.write_text(how, encoding="utf-8")
            self.failures.append(f"{run} {how}, see {run.log}")
            return
        self.finished.add(run)
        tqdm.write(f"{run}: AP50 {number(evaluation['AP50']):.4f} on {self.plan.test}")

    def _failed(self, child: Child) -> None:
        """Print the end of the log. Other runs continue, unless they would fail in the same way."""
        status, run = child.process.returncode, child.run
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        run.failure.write_text(how, encoding="utf-8")
        message = f"{run} {how}; the end of {run.log}:\n{log_end(run.log)}"
        # train.py writes config.json once it has found flags and data in order.
        if status == USER_ERROR and not (run.folder / "config.json").exists():
            raise UserError(
                f"{message}\nAll other runs would fail too: correct the flags or the data."
            )
        tqdm.write(message)
        self.failures.append(f"{run} {how}, see {run.log}")

    def _stop_children(self) -> None:
        """Ask all children to stop and wait for them: a training saves its state."""
        asked = -float(STOP_SECONDS)
        while any(child.process.poll() is None for child in self.children):
            if time.monotonic() - asked > STOP_SECONDS:
                asked = time.monotonic()
                for child in self.children:
                    child.stop()
            time.sleep(POLL_SECONDS / 10)

    def _epochs_done(self) -> int:
        return sum(
            self.plan.epochs if run in self.finished else epochs_of(run) for run in self.runs
        )

    def _show(self, bar: tqdm) -> None:
        running = [
            f"{child.run} ({'test' if child.evaluates else epochs_of(child.run)})"
            for child in self.children
        ]
        bar.set_description(f"{len(self.finished)}/{len(self.runs)} runs", refresh=False)
        bar.set_postfix_str("; ".join(running), refresh=False)
        bar.update(self._epochs_done() - bar.n)


def check_free(run: Run) -> None:
    """Raise UserError if a leftover process, whose parent was killed, still trains this run."""
    lock = run.folder / "running.pid"
    number = lock.read_text(encoding="ascii").strip() if lock.exists() else ""
    if number.isdigit() and is_running(int(number)):
        raise UserError(
            f"process {number} still trains {run.folder}, left over from a comparison that was "
            f"killed. Wait for it or end it (kill {number}; it saves itself), then start again. "
            f"If that process is no training, delete {lock}."
        )


def train_command(run: Run, plan: Plan) -> list[str]:
    """The command that resumes a run from last.pt.

    Without last.pt the command starts the run anew, and the run's folder is deleted here.
    """
    script = str(ROOT / "train.py")
    if (run.folder / "last.pt").exists():
        own = ["--conf_loss", run.loss] if ":" in run.loss else []
        return [script, "--resume", str(run.folder), *own]
    if run.folder.exists():
        shutil.rmtree(run.folder)
    return [
        *(script, *plan.flags_of(run.loss), "--seed", str(run.seed)),
        *("--save_dir", str(run.folder), *as_arguments(plan.flags)),
    ]


def evaluate_command(run: Run, plan: Plan) -> list[str]:
    """The command to evaluate best.pt on the test split, with the settings of the training."""
    config = read_json(run.folder / "config.json") or {}
    flags: dict[str, list[str]] = {}
    for name in EVALUATION_FLAGS:
        value = str(config.get(name, ""))
        if value not in ("", "False"):
            flags[name] = [] if value == "True" else [value]
    return [
        *(str(ROOT / "evaluate.py"), "--weights", str(run.folder / "best.pt")),
        *("--data", plan.test, "--save_dir", str(run.test_folder), *as_arguments(flags)),
    ]


def epochs_of(run: Run) -> int:
    """Epochs that the run has finished so far: the rows of its metrics.csv."""
    try:
        lines = (run.folder / "metrics.csv").read_text(encoding="utf-8").count("\n")
    except OSError:
        return 0
    return max(0, lines - 1)


def log_end(path: Path) -> str:
    """The last lines of a log."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-LOG_LINES:])


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
