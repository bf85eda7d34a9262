"""A run kept on the disk while it goes on: where it begins, when it is saved, what becomes of a save that fails."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import ConfigError, FileError, MiniloraError, StateError
from ...flags import option
from ...formats.tensors.faults import place
from ..beside import Beside
from ..distributed.agreement import agree
from ..distributed.comm import Comm
from ..distributed.gradients import sums
from ..interruption import Interrupted, Interruption
from ..run import Run, Update
from .contents import MODEL, capture, misfits, put_back
from .files import write
from .identity import FREE, PERMITTED, Difference, differences, held, identity
from .lock import alone
from .scan import holds_run, newest, place_of, remove_others, somebody_elses, steps

__all__ = ["Keeper", "load_run", "save_run"]


def save_run(folder: Any, run: Run, comm: Comm, *, known: Mapping[str, Any] | None = None, room: int = 0) -> Path:
    """Save a run as it is now, and then remove the checkpoints that need not stay: `settings.keep` do, and the best one.

    Parameters
    ----------
    folder : path
        Of the run; the checkpoint stands in ``checkpoints/`` inside.
    run : Run
    comm : Comm
        Rank 0 writes.
    known : dict, optional
        `identity` of the run, which reads all frozen weights, if it was asked before.
    room : int
        See `files.write`.

    Returns
    -------
    Path
        The folder of the checkpoint.

    Raises
    ------
    FileError
        If it cannot be written: then no other was removed.
    """
    target = place(folder)
    made = place_of(target, run.step)
    if comm.rank == 0:
        write(made, capture(run), identity(run) if known is None else known, room)
        stay = set(steps(target)[-run.settings.keep:])
        remove_others(target, stay | ({run.best.step} if run.best is not None else set()))
    return made


def load_run(folder: Any, run: Run, permit: Iterable[str] = (), *, known: Mapping[str, Any] | None = None) -> bool:
    """Take the newest checkpoint of a folder into a run, all of it or nothing.

    Parameters
    ----------
    folder : path
    run : Run
        Newly made, in the same way as the one that was saved.
    permit : iterable of str
        Differences from that one that are wanted, by name: ``["steps"]`` for a longer run. See `identity`.
    known : dict, optional
        As in `save_run`.

    Returns
    -------
    bool
        Whether there was one. Without any nothing changes.

    Raises
    ------
    FileError, FormatError
        If the newest checkpoint is damaged, or of another version of minilora's format.
    StateError
        If it belongs to another run: with a line for each difference. Nothing has changed.
    """
    permitted = names_permitted(permit, run)
    saved = newest(place(folder))
    if saved is None:
        return False
    found = list(differences(saved.identity, identity(run) if known is None else known))
    step = saved.contents.values["step"]
    if type(step) is int and step > run.total:
        found.append(Difference(None, f"step {step} was made, and the run would end at step {run.total}"))
    refused = [each for each in found if each.name not in permitted]
    try:
        lines = [each.words for each in refused] + misfits(run, saved.contents)
        if lines:
            raise StateError(f"{saved.folder} is a checkpoint of another run; nothing was loaded:\n  " + "\n  ".join(lines)
                             + f"\n{_cure(refused, len(lines), permitted)}")
        put_back(run, saved.contents)
    except MiniloraError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # made up, with sums that are right
        raise StateError(f"{saved.folder}: what it holds is no state of a run ({error!r:.80}); nothing was loaded. Start the "
                         "run anew, in another folder") from error
    return True


def names_permitted(permit: Iterable[str], run: Run) -> set[str]:
    """The names of differences that are permitted, checked."""
    names = {permit} if isinstance(permit, str) else set(permit)
    own = {*run.settings.as_dict(), *(key for group in run.optimizer.groups for key in group.settings if key != "lr")}
    known = sorted({*PERMITTED, *(own - FREE)})
    if unknown := sorted(map(str, names - {*known})):
        raise ConfigError(f"permit: there is no difference called {', '.join(map(repr, unknown))}: expected some of "
                          f"{', '.join(known)}")
    return names


def _cure(refused: list[Difference], lines: int, permitted: set[str]) -> str:
    """What to do about differences."""
    names = list(dict.fromkeys(each.name for each in refused if each.name is not None))
    cannot = "Make model, data and settings as they were (run.json in its folder tells them)"
    if len(names) < len({each.name for each in refused}) or lines > len(refused):
        return f"{cannot}, or start anew in another folder: not all of this can be permitted"
    wanted = sorted({*names, *permitted})
    say = option(f"resume=True, permit={wanted}", f"--resume --permit {','.join(wanted)}")
    return f"{cannot}. If all of it is wanted, say so: {say}. The bits are then not those of the run that went on"


class Keeper(Beside):
    """Keeps a run in its folder, from its beginning to its end; and ends it where Ctrl-C or SIGTERM asks.

    A context around the loop, and the last of the objects beside it. It begins with the lock of the folder, with loading if
    `resume`, and with a checkpoint of the step where the run begins: in full size, in the real place, so that a disk that is
    full or cannot be written to is found before any training. A save that fails later is told, and tried again.

    Parameters
    ----------
    run : Run
        With ``run.folder`` None nothing is kept; an interrupted run ends after a whole step even so.
    resume : bool
        Go on from the newest checkpoint, if there is one. Without it a folder that holds a run is refused.
    permit : iterable of str
        As in `load_run`.

    Attributes
    ----------
    resumed : bool
        Whether there was a checkpoint to go on from.

    Raises
    ------
    FileError
        If the folder cannot be written to, is held by another process, or holds a run and `resume` is False. In the end, if the
        last state cannot be saved.
    StateError, FormatError
        As `load_run`.
    Interrupted
        At the end of the context, if a signal ended the run.
    """

    def __init__(self, run: Run, resume: bool = False, permit: Iterable[str] = ()) -> None:
        if run.folder is None and resume:
            raise ConfigError("resume=True needs the folder of the run: fit(..., folder=\"runs/mine\", resume=True)")
        self.folder = None if run.folder is None else place(run.folder)
        self.run, self.resume, self.permit = run, resume, names_permitted(permit, run)
        self.resumed = False
        self._saved: int | None = None  # the step of the newest checkpoint
        self._failed, self._again = 0, 0
        self._interruption, self._stopped = Interruption(), ""
        self._identity: Mapping[str, Any] = {}
        self._stack = contextlib.ExitStack()
        self._made = False  # whether the folder was not there before

    def __enter__(self) -> Keeper:
        with contextlib.ExitStack() as stack:
            if self.folder is not None or self.run.comm.size > 1:
                self._identity = identity(self.run)
                agree(self.run.comm, held(self.run, self._identity))
            if self.folder is not None:
                self._begin(self.folder, stack)
            stack.enter_context(self._interruption)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if error is not None and self.folder is not None:
                self._take_back(self.folder)
            if error is None and any(sums(self.run.comm, self._interruption.asked)):  # the same end in all processes
                raise Interrupted(self._stopped or "interrupted; the run had come to its end and is complete")

    def _begin(self, folder: Path, stack: contextlib.ExitStack) -> None:
        run = self.run
        if folder.exists() and not folder.is_dir():
            raise FileError(f"cannot write {str(folder)!r}: this is a file: give the path of a folder, or remove the file")
        base = getattr(getattr(run.model, "origin", None), "folder", None)
        if base is not None and place(base) == folder:
            raise FileError(f"{str(folder)!r} is the folder that the model was read from, and would be written over by what "
                            "becomes of it: give another folder")
        self._made = not folder.exists()
        if run.comm.rank == 0:
            stack.enter_context(alone(folder))
        if not self.resume and holds_run(folder):
            raise FileError(f"{str(folder)!r} holds a run already (its last checkpoint: step {max(steps(folder), default=0)}). "
                            f"To go on with it: {option('resume=True', '--resume')}; to begin a new one, give another folder, "
                            "or remove this one")
        if there := somebody_elses(folder):
            raise FileError(f"{str(folder)!r} holds a model or an adapter already, of no run ({', '.join(there)}), which "
                            "would be written over by what is trained: give another folder")
        run.comm.barrier()  # all have looked before one writes
        if self.resume:
            self.resumed = load_run(folder, run, self.permit, known=self._identity)
            run.comm.barrier()  # all have read
        state = capture(run)
        later = run.valid is not None and not run.best_weights  # the best weights have no place in it yet
        room = sum(array.nbytes for array in state.inside(MODEL).values()) if later else 0
        if run.comm.rank == 0:
            check_space(folder, run, room + sum(array.nbytes for array in state.arrays.values()))
        try:
            self._save(folder, room)
        except BaseException:
            self._take_back(folder)
            raise

    def after_step(self, run: Run, made: Update) -> None:
        """Save the run where that is due; end it if a signal came.

        Raises
        ------
        FileError
            If the run is over and its last state cannot be saved.
        """
        run.asked = run.asked or self._interruption.asked  # of several processes, all know it after the next update
        stopped = run.over and not run.complete
        due = run.due(run.settings.save_every or run.settings.steps_per_eval)
        if self.folder is not None and (run.over or due or 0 < self._again <= run.step):
            self._try(self.folder, must=run.over and not self._interruption.asked)
        if stopped:
            self._stopped = self._how_it_ended()

    def _take_back(self, folder: Path) -> None:
        """Remove the checkpoint of a run that failed before its first step; the folder too, if it was made for it."""
        if self.run.step or self.resumed or self.run.comm.rank:
            return
        first = place_of(folder, 0)
        shutil.rmtree(first, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: somebody else's
            first.parent.rmdir()
            if self._made:
                folder.rmdir()

    def _save(self, folder: Path, room: int = 0) -> None:
        save_run(folder, self.run, self.run.comm, known=self._identity, room=room)
        self._saved, self._failed, self._again = self.run.step, 0, 0

    def _try(self, folder: Path, must: bool) -> None:
        """Save; if that fails, the last checkpoint stays, and it is tried again, after more and more steps."""
        try:
            self._save(folder)
        except FileError as error:
            kept = f"{error}. The last checkpoint, of step {self._saved}, is whole"
            if must:
                raise type(error)(f"{kept}; what was trained after it is in memory only") from error
            self._failed += 1
            self._again = self.run.step + 2 ** (self._failed - 1)
            self.run.notes.append(f"after step {self.run.step}: {kept}")
            warnings.warn(f"{kept}. Saving is tried again after step {self._again}", RuntimeWarning, stacklevel=5)

    def _how_it_ended(self) -> str:
        """What to say of a run that was interrupted."""
        run = self.run
        here = f"stopped after step {run.step} of {run.total}"
        if self.folder is None:
            return f"{here}; the model is as it was trained so far, and nothing was saved: fit had no folder"
        saved = "saved" if self._saved == run.step else f"NOT saved; the last checkpoint is of step {self._saved}"
        again = option(f"fit(..., folder={os.fspath(self.folder)!r}, resume=True)", "the same command and --resume")
        return f"{here}, and {saved}. It goes on with {again}"


def check_space(folder: Path, run: Run, size: int) -> None:
    """Refuse a disk that has less room than the checkpoints, each of so many bytes, will need together."""
    most = run.settings.keep + 2  # with the best one, and a new one before an old one goes
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    need = size * max(1, most - len(steps(folder)))
    if free < need:
        raise FileError(f"{str(folder)!r}: the disk has {free:,} bytes left, and the run's checkpoints, up to {most} of "
                        f"{size:,} bytes each, need {need:,}: free space, choose a folder on another disk, or keep fewer: "
                        f"keep={max(1, run.settings.keep - 1)}")
