"""``<out>.partial``, the folder in which a run works, and the step that makes its result ``<out>``.

    progress.json, .lock     what says that the folder is ours; who works in it
    block-…, tuning-…, …     files of the run, all by names that only ptq gives
    finished/                the result, complete but not yet in its place
    publishing               from here on finished/ may become <out>; if it is gone, it has
    previous/                with --overwrite: what stood at <out>, until the result stands there

Nothing else is ever removed: no folder without our mark is worked in, files of other names stay,
and what came to ``<out>`` during the run ends it before anything is lost. Every state in which a
run can be killed is one that the same command goes on from.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ptq.checkpoint.destination import is_ours
from ptq.checkpoint.progress_file import NAME as PROGRESS
from ptq.checkpoint.reader import PARTIAL
from ptq.checkpoint.safetensors_files import TEMPORARY, sync_folder, write_file

logger = logging.getLogger(__name__)

LOCK, FINISHED, PREVIOUS, PUBLISHING = ".lock", "finished", "previous", "publishing"
FILES = re.compile(
    rf"(?:((converted-|tuned-)*block-.+|rest-\d+|tuning-\d+)\.safetensors|{re.escape(PROGRESS)}|{PUBLISHING})"
    rf"({re.escape(TEMPORARY)})?"
)
# What a run that was killed in its first or its last moments leaves without progress.json.
BARE = {LOCK, PUBLISHING, PROGRESS + TEMPORARY}

Listing = dict[str, tuple[int, int] | None]


class WorkFolder:
    """The folder of the run that writes ``out``, of which one process takes possession.

    Attributes:
        path: ``<out>.partial``.
        finished: where the result is put together.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out, self.overwrite = out, overwrite
        self.path = out.with_name(out.name + PARTIAL)
        self.finished, self._previous = self.path / FINISHED, self.path / PREVIOUS
        self._lock: int | None = None
        self._stood: Listing = {}  # at <out> when the run began

    @property
    def held(self) -> bool:
        """Whether this process has taken possession."""
        return self._lock is not None

    @property
    def published(self) -> bool:
        """Whether all that is left to do is to remove the folder."""
        marked = (self.path / PUBLISHING).is_file() and not os.path.lexists(self.finished)
        return marked and is_ours(self.out)

    def check(self) -> None:
        """Make sure that a run may work here; nothing is written.

        Raises:
            ValueError: the folder exists and ptq did not make it.
            FileExistsError: something is at ``<out>`` that may not be replaced.
        """
        if os.path.lexists(self.path):
            if self.path.is_symlink() or not self.path.is_dir():
                raise ValueError(
                    f"{self.path}, where ptq would work, exists and is no directory: move it away, "
                    "or choose another --out"
                )
            names = set(os.listdir(self.path))
            if PROGRESS not in names and (foreign := sorted(names - BARE)):
                raise ValueError(
                    f"{self.path}, where ptq would work, is not the unfinished work of ptq (it "
                    f"holds {_some(foreign)}): move it away, or choose another --out"
                )
        if os.path.lexists(self.out) and not self.out.is_dir():
            raise FileExistsError(f"{self.out} exists and is not a directory: choose another --out")
        if not self.overwrite and self.out.is_dir() and any(self.out.iterdir()):
            raise FileExistsError(
                f"{self.out} exists and is not empty: choose another directory, or --overwrite"
            )

    def open(self) -> None:
        """Take possession, and put back what an earlier run was replacing when it was killed.

        Raises:
            ValueError: another process has it; or as :meth:`check`.
            FileExistsError: as :meth:`check`.
        """
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            self._restore()
            self.check()
            self._stood = _listing(self.out)
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> None:
        file = self.path / LOCK
        self._lock = os.open(file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = not file.exists() or os.fstat(self._lock).st_ino != file.stat().st_ino
        except BlockingIOError:
            gone = None
        if gone is not False:
            self.close()
            doing = "is writing" if gone is None else "has just removed"
            raise ValueError(
                f"another process {doing} {self.path}: wait for it, or choose another directory"
            )

    def _restore(self) -> None:
        """The earlier checkpoint back to its place, unless the new one is there."""
        if not self._previous.is_dir() or self.published:
            return
        try:
            os.rename(self._previous, self.out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise ValueError(
                f"{self._previous} is the checkpoint that was being replaced, and {self.out} "
                "exists again: move one of them away"
            ) from error

    def close(self) -> None:
        """Let go of the folder; what is in it stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the files of earlier runs, but for those in ``keep``; :meth:`begin` follows, once
        progress.json is that of this run."""
        published = self.published
        if not published:  # first: without finished/ it would say that the result is in its place
            _remove(self.path / PUBLISHING)
        for name in sorted(set(os.listdir(self.path)) - {PUBLISHING, LOCK, *keep}):
            if FILES.fullmatch(name) or name == FINISHED or (name == PREVIOUS and published):
                _remove(self.path / name)

    def begin(self) -> None:
        """Nothing is left of earlier runs but what this one goes on from."""
        _remove(self.path / PUBLISHING)

    def publish(self) -> None:
        """``finished`` takes the place of ``<out>``, as the last step.

        Raises:
            FileExistsError: something has come to ``<out>`` since the run began. It stays, and so
                does the work.
            OSError: of the file system; what stood at ``<out>`` stands there again.
        """
        assert self.held, "only by the process that has the folder"
        sync_folder(self.finished)
        write_file(self.path / PUBLISHING, [b""])
        replaces = bool(self._stood) and os.path.lexists(self.out)
        if replaces:
            self._refuse_new(self.out)
            os.rename(self.out, self._previous)
        try:
            if replaces:  # what came between the look and the rename
                self._refuse_new(self._previous)
            try:
                os.rename(self.finished, self.out)
            except OSError as error:  # an empty directory would have been replaced
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    self._refuse_new(self.out, error)
                raise
        except OSError:
            if replaces:
                os.rename(self._previous, self.out)
            raise
        sync_folder(self.out.parent)

    def _refuse_new(self, where: Path, error: OSError | None = None) -> None:
        found = _listing(where)
        new = sorted(name for name, facts in found.items() if self._stood.get(name, ()) != facts)
        if new or error:
            raise FileExistsError(
                f"{self.out} was changed during the run ({_some(new) or 'it is no directory'}): "
                "move that away and run the same command again, it only has to finish"
            ) from error

    def settle(self) -> None:
        """Remove what is left of a run whose result is in its place.

        Raises:
            ValueError: another process has the folder.
        """
        if self.published or (self.path.is_dir() and set(os.listdir(self.path)) <= BARE):
            self._acquire()
            self.remove()

    def remove(self) -> None:
        """Remove what a run left, and the folder if that was all; files of others stay, and are
        named in a warning.

        A failure is a warning too: what counts, the result, is in its place or was never there.
        """
        try:
            if self.path.is_dir():
                published = self.published
                ours = [name for name in os.listdir(self.path) if FILES.fullmatch(name)]
                folders = [FINISHED] + ([PREVIOUS] if published else [])
                last = (PROGRESS, PUBLISHING)  # while they are there, it is known what this is
                for name in (*folders, *sorted(set(ours) - set(last)), *last):
                    _remove(self.path / name)
                self.close()  # an open file cannot be removed everywhere
                _remove(self.path / LOCK)
                self.path.rmdir()
        except OSError as error:
            left = sorted(os.listdir(self.path)) if self.path.is_dir() else []
            reason = error.strerror or str(error)
            logger.warning("%s stays (%s): it holds %s", self.path, reason, _some(left))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _listing(folder: Path) -> Listing:
    """(size, time of change) of every file in a directory, links not followed; None for
    directories. Nothing where there is no directory."""
    found: Listing = {}
    for parent, folders, files in os.walk(folder):
        place = Path(parent)
        for name in folders:
            found[str((place / name).relative_to(folder))] = None
        for name in files:
            facts = (place / name).lstat()
            found[str((place / name).relative_to(folder))] = facts.st_size, facts.st_mtime_ns
    return found


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
