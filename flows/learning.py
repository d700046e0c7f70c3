"""What was approved teaches the model, and the gate decides whether what it learnt makes the next images: a part of `nightly`.

    learn → (decide)

A release stands before any of this begins, and stays whatever becomes of it: that nothing could be learnt is an outcome, not a failure.
"""

import logging
from typing import Any

from flows import gate_steps, steps
from flows.decide import check_gate, decide
from flows.parameters import Exam, Generation, Learning, Scoring, Workers
from flows.pools import Pool, WorkerDied, absolute, open_pool
from flows.progress import Training, stop_training
from flows.steps import step
from tasks.adapters import ChangesNothing
from tasks.champions import ChampionChanged
from tasks.engines import DeviceFailed, Recipe
from tasks.learn import Learnt
from tasks.lessons import LessonError, Safeguards
from tasks.lineage import Events
from tasks.references import ManifestRef, ReleaseRef
from tasks.store import Store, layout
from tasks.trainers import BucketError, PictureError, TrainingError

STARTS = 3  # of a training whose worker dies; each goes on from the last checkpoint
LOOK_SECONDS = 0.5

log = logging.getLogger(__name__)


@step(name="learn", retries=0)
def learn(store: str, recipe: Recipe, sources: list[str], learning: Learning, exam: str | None, name: str) -> Learnt:
    """Train the recipe's model on releases (`name@version`) and Kohya dataset files, where a worker has a device for it.

    `exam`: the manifest snapshot of prompts that are never learnt from; None: a share of all.
    """
    from flows import worker
    from tasks.learn import learn_from

    worker.settle()
    place, safeguards = Store(store), safeguards_of(store, learning, exam)
    try:
        with Training(recipe.model, place) as progress:
            return learn_from(place, recipe, sources, learning.options, safeguards, progress.told, name)
    except DeviceFailed:
        worker.leave()
        raise


def safeguards_of(store: str, learning: Learning, exam: str | None) -> Safeguards:
    """As a form asks for them. Raises DatasetFileError: its anchors."""
    from tasks.kohya import read_toml

    held_out = gate_steps.not_to_be_learnt(Store(store), exam, learning.held_out)
    anchors = tuple(read_toml(learning.anchors)) if learning.anchors else ()
    return Safeguards(held_out, learning.most_generations, anchors, learning.anchor_share)


def teach(
    store: str,
    recipe: Recipe,
    sources: list[str],
    learning: Learning,
    exam: ManifestRef | None,
    name: str,
    workers: Workers,
) -> Learnt:
    """`learn`, by one of the workers; where that one dies, another goes on. Call it inside a flow."""
    held_out = exam.sha256 if exam else None
    if workers.runner == "ray":
        sources = [absolute(source) for source in sources]
        learning = learning.model_copy(update={"anchors": absolute(learning.anchors)})
    with open_pool(workers.model_copy(update={"workers": 1})) as pool:
        for left in reversed(range(STARTS)):
            pool.start(pool.idle[0], None, learn, store, recipe, sources, learning, held_out, name)
            outcome = _wait(pool)
            if not isinstance(outcome, BaseException):
                return outcome
            if not (isinstance(outcome, WorkerDied) and left):
                raise outcome
            log.warning("%s; the training goes on from its last checkpoint", outcome)
    raise AssertionError  # the last start returned or raised


def _wait(pool: Pool) -> Any:
    try:
        while (done := pool.next(LOOK_SECONDS)) is None:
            pass
    except BaseException:  # Ctrl-C, a cancelled run: nobody waits for the training any more
        stop_training()
        raise
    return done.result


def check_learning(generation: Generation, scoring: Scoring, learning: Learning) -> None:
    """What a night would else find wrong only after its release. Raises DarkroomError."""
    from tasks.kohya import read_toml
    from tasks.learn import settings_for
    from tasks.manifest_files import find_files

    check_gate(scoring)
    settings_for(generation.model, learning.options)
    if learning.anchors:
        read_toml(learning.anchors)
    if learning.exam_manifest:
        find_files(learning.exam_manifest)


def hold_out(
    store: str, whole: ManifestRef, learning: Learning, exam: Exam, generation: Generation, scoring: Scoring
) -> ManifestRef:
    """The prompts the gate will ask, before anything is made: those of a manifest of their own, or a share.

    Raises ExamTooSmall, ChangesNothing (a word is to be learnt that none of them has).
    """
    from tasks.adapters.words import is_said
    from tasks.learn import settings_for

    if learning.exam_manifest:
        whole = steps.ingest(store, learning.exam_manifest, generation.model, scoring.judge, "fail")
    held_out = gate_steps.hold_out(store, whole, 1.0 if learning.exam_manifest else learning.held_out, exam)
    settings = settings_for(generation.model, learning.options)
    if settings.method == "textual_inversion" and not is_said(Store(store), held_out, settings.placeholder):
        raise ChangesNothing(
            f"the night is to learn the word '{settings.placeholder}', and none of the gate's {held_out.prompts} prompts has it: no "
            "image would change. Write it into prompts, name a manifest that has it (--exam), or learn a LoRA (-o method=lora)"
        )
    return held_out


def learn_and_decide(
    store: str,
    released: ReleaseRef,
    recipe: Recipe,
    prompts: ManifestRef,
    events: Events,
    generation: Generation,
    scoring: Scoring,
    learning: Learning,
    exam: Exam,
    workers: Workers,
) -> dict[str, Any]:
    """Learn from the releases of a name up to this one, and let what was learnt challenge the champion on the exam's prompts.

    Returns `learnt` (Learnt) and `duel` (`gate_steps.summary`); or `nothing`, why one or both are missing.
    """
    from tasks.adapters import resolve
    from tasks.lessons import releases_of

    place, name = Store(store), released.name
    versions = [version for _, version in releases_of(place, name) if version <= released.version]
    sources = [f"{name}@{version}" for version in versions[-learning.releases :]]
    asked = prompts if learning.exam_manifest else None
    found: dict[str, Any] = {}
    try:
        with events.step("learn", inputs=list(released.files)) as event:
            found["learnt"] = learnt = teach(store, recipe, sources, learning, asked, name, workers)
            event.outputs.append(layout.adapter_card(learnt.adapter))
        with events.step("promote", inputs=[layout.adapter_card(learnt.adapter)]) as event:
            challenger = resolve(learnt.adapter, place)
            duel = decide(store, name, challenger, recipe, prompts, generation, scoring, exam, workers)
            found["duel"] = duel
            event.outputs += [duel["evidence"]] if "evidence" in duel else []
    except (LessonError, BucketError, PictureError, TrainingError, ChangesNothing, ChampionChanged) as error:
        log.warning("%s", error)
        found["nothing"] = str(error)
    return found


def in_short(learnt: dict[str, Any]) -> dict[str, str]:
    """What `learn_and_decide` came to, for the run's report."""
    told = {"learnt": learnt["learnt"].in_words} if "learnt" in learnt else {}
    if duel := learnt.get("duel"):
        told["promoted"] = "yes" if duel.get("promoted") else f"no: {'; '.join(duel.get('reasons', ()))}"
        told |= {name: duel[name] for name in ("decision", "sheet") if name in duel}
    return told | ({"not learnt": learnt["nothing"]} if "nothing" in learnt else {})
