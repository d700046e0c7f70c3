"""How far a run is: a bar in the terminal for the person watching, a progress artifact for the Prefect UI."""

import contextvars
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from httpx import HTTPError

from flows import worker
from tasks.errors import DarkroomError, Stopped
from tasks.store import Store

NUMBERS = 74  # characters beside a bar

_current: "Progress | None" = None


def advance(images: int) -> None:
    """Tell the run, here or in the process that started this worker, that images were just made or found. Raises Stopped."""
    if not worker.advance(images) and _current is not None:
        _current.images_done(images)


class Progress:
    """Shows shards done, images per second and time left while it is entered.

    `doing`: what it is, in a word; `elsewhere` tells how many images other processes have done, ever.
    """

    def __init__(self, doing: str, shards: int, images: int, elsewhere: Callable[[], int] = lambda: 0):
        self.shards, self.images = shards, images
        self._shards_done = self._images_done = self._in_shards = 0
        self._elsewhere, self._before = elsewhere, elsewhere()
        self._news, self._ended = threading.Event(), False
        self._started = time.monotonic()
        self._bar = _bar(doing, "images · {task.fields[shards]} shards · {task.fields[rate]} · {task.fields[left]}")
        self._task = self._bar.add_task("", total=images, **self._texts())

    def images_done(self, images: int) -> None:
        """So many more images were made or found. Raises Stopped: nobody waits for more."""
        if self._ended:
            raise Stopped("the run ended while its images were made; what was finished is kept")
        self._images_done += images
        self._show()

    def look(self) -> None:
        """See how far the other processes are."""
        self._images_done = max(self._images_done, min(self.images, self._elsewhere() - self._before))
        self._show()

    def shard_done(self, images: int) -> None:
        """One more shard, of so many images, was generated and scored; the artifact will soon say so."""
        self._shards_done += 1
        self._in_shards += images
        self._images_done = max(self._images_done, self._in_shards)
        self._show()
        self._news.set()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._images_done, **self._texts())

    def _texts(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._started
        rate = self._images_done / seconds if seconds > 0 else 0.0
        left = (self.images - self._images_done) / rate if rate > 0 else None
        return {
            "shards": f"{self._shards_done}/{self.shards}",
            "rate": f"{rate:.1f} images/s",
            "left": "…" if left is None else f"{left:.0f} s left",
        }

    def _publish_news(self) -> None:
        while not self._ended:
            self._news.wait()
            self._news.clear()
            with suppress(HTTPError):  # a server that does not answer is no reason to stop
                self._publish()

    def _publish(self) -> None:
        from prefect.artifacts import update_progress_artifact

        texts = self._texts()
        update_progress_artifact(
            self._artifact,
            progress=100 * self._shards_done / self.shards,
            description=f"{texts['shards']} shards, {self._images_done}/{self.images} images, {texts['rate']}, {texts['left']}",
        )

    def __enter__(self) -> Self:
        from prefect.artifacts import create_progress_artifact

        global _current
        self._artifact: Any = create_progress_artifact(progress=0.0, description=f"0/{self.shards} shards")
        # apart from the run, which should not wait for a busy Prefect server; with its context, where the server is named
        context = contextvars.copy_context()
        self._publisher = threading.Thread(target=context.run, args=[self._publish_news], name="progress", daemon=True)
        self._publisher.start()
        self._bar.start()
        _current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._news.set()
        if kind is KeyboardInterrupt:
            print("\nstopping as soon as the batches in flight are written …", file=sys.stderr)
        else:
            self._publisher.join()
        self._bar.stop()


class Training:
    """Shows the steps of a training, its loss and the time left: a bar in the terminal, an artifact in the Prefect UI, where the
    sample images of each checkpoint are seen, too."""

    PUBLISH_SECONDS = 5.0

    def __init__(self, model: str, store: Store):
        self.title, self._store = f"{model} learns", store
        self._bar = _bar("learning", "steps · {task.fields[told]}")
        self._published = 0.0
        self._context = (
            contextvars.copy_context()
        )  # where Prefect's server is named: models train in a thread of their own

    def told(self, progress: Any) -> None:
        """What `train` tells of each step. Raises Stopped: nobody waits for it any more."""
        if _stopped.is_set():
            raise Stopped("the run ended while its model learned; the training's checkpoints are kept")
        words = progress.in_words
        self._bar.update(self._task, total=progress.steps, completed=progress.step, told=words)
        if time.monotonic() - self._published > self.PUBLISH_SECONDS or progress.step == progress.steps:
            self._published = time.monotonic()
            with suppress(HTTPError):
                self._context.run(self._publish, 100 * progress.step / progress.steps, f"{self.title}: {words}")
        if progress.samples:
            with suppress(HTTPError, DarkroomError, OSError):  # they are to look at: no reason to stop
                self._context.run(self._publish_samples, progress.step, progress.samples)

    def _publish(self, percent: float, description: str) -> None:
        from prefect.artifacts import update_progress_artifact

        update_progress_artifact(self._artifact, progress=percent, description=description)

    def _publish_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        from prefect.artifacts import create_markdown_artifact

        from tasks.report.contact_sheet import contact_sheet, embedded
        from tasks.store.images import decode

        shown = [
            (decode(self._store.read(key)), f"{number}\n{prompt}") for number, (prompt, key) in enumerate(samples, 1)
        ]
        create_markdown_artifact(
            f"# After {step} steps\n\n{embedded(contact_sheet(shown), 'samples')}\n",
            description=f"{self.title}: samples after {step} steps",
        )

    def __enter__(self) -> Self:
        from prefect.artifacts import create_progress_artifact

        _stopped.clear()
        self._artifact: Any = create_progress_artifact(progress=0.0, description=self.title)
        self._task = self._bar.add_task("", total=None, told="the model is loaded …")
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()


def _bar(doing: str, told: str) -> Any:
    """A bar of rich, on a terminal only; where that is narrow, the bar itself becomes shorter, and no number is lost."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    console = Console(file=sys.stderr)
    return Progress(
        TextColumn(f"  {doing:10}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=max(4, min(32, console.width - NUMBERS))),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn(told, table_column=Column(no_wrap=True)),
        console=console,
        disable=not sys.stderr.isatty(),
    )


_stopped = threading.Event()


def stop_training() -> None:
    """Let a training in this process end at its next step."""
    _stopped.set()
