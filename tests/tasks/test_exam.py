import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import tables
from tasks.adapters import write_adapter
from tasks.exam import Exam, ExamTooSmall, check_size, held_out_prompts, is_held_out, manifest_of, not_learnt
from tasks.ingest import ingest
from tasks.store import Store, layout
from tasks.verify import verify
from tests.tasks.adapters.loras import facts, small_lora

KNOWN = [f"a picture of thing {n}" for n in (1, 10, 13, 18, 30, 38, 6, 7)]
TEXTS = [f"a picture of thing {n}" for n in range(4_000)]


def held(texts: list[str], share: float) -> set[str]:
    frame = pl.DataFrame({"prompt": texts}, schema={"prompt": pl.String})
    return set(frame.filter(is_held_out(pl.col("prompt"), share))["prompt"])


def test_about_that_share_is_held_out_and_more_with_a_larger_one() -> None:
    few, many = held(TEXTS, 0.1), held(TEXTS, 0.3)
    assert 340 <= len(few) <= 460 and 1_080 <= len(many) <= 1_320
    assert few < many
    assert held(TEXTS, 0) == set() and held(TEXTS, 1) == set(TEXTS)


def test_it_is_the_same_prompts_for_good() -> None:
    """A change of these would move prompts that adapters were trained on into the exam."""
    assert sorted(held(TEXTS[:40], 0.2)) == KNOWN


@given(st.text(max_size=30), st.floats(0, 1))
def test_case_and_white_space_make_no_other_prompt(text: str, share: float) -> None:
    assert len(held([text], share)) == len(held([f"  {text} \n"], share)) == len(held([text.lower()], share))


def test_the_exams_manifest_leaves_the_numbers_to_the_exam(any_store: Store, tmp_path) -> None:
    rows = pl.DataFrame({"prompt": TEXTS[:200], "n_candidates": 7, "k_min": 2, "guidance": 3.0, "tag": "x"})
    rows.write_parquet(tmp_path / "a.parquet")
    whole = ingest(str(tmp_path / "a.parquet"), any_store)
    chosen = held_out_prompts(any_store, whole, 0.25)
    exam = manifest_of(any_store, chosen)
    kept = any_store.read_frame(layout.manifest(exam.sha256))
    assert set(kept["prompt"]) == held(TEXTS[:200], 0.25) and exam.prompts == kept.height
    assert kept.columns == tables.PROMPTS.names and kept["guidance"].unique().to_list() == [3.0]
    assert kept["n_candidates"].null_count() == kept["k_min"].null_count() == kept.height
    assert manifest_of(any_store, chosen) == exam
    assert verify(any_store).problems == []


def test_too_few_prompts_are_refused_before_anything_is_made() -> None:
    check_size(20, 100, Exam())
    with pytest.raises(ExamTooSmall, match=r"19 of 100 prompts are held out, and without 20.*--held-out 0.3\)"):
        check_size(19, 100, Exam())
    with pytest.raises(ExamTooSmall, match=r"19 of 100 .* not learnt from by the challenger \(5 were\).*--exam"):
        check_size(19, 100, Exam(), learnt=5)


def test_a_prompt_is_asked_once_however_often_it_is_spelt(any_store: Store, tmp_path) -> None:
    texts = [spelling(text) for text in TEXTS[:8] for spelling in (str, str.upper, str.title)]
    pl.DataFrame({"prompt": texts}).write_parquet(tmp_path / "a.parquet")
    assert (
        held_out_prompts(any_store, ingest(str(tmp_path / "a.parquet"), any_store), 1.0)["prompt"].to_list()
        == TEXTS[:8]
    )


def test_what_the_challenger_saw_is_not_asked(any_store: Store, tmp_path) -> None:
    pl.DataFrame({"prompt": TEXTS[:30]}).write_parquet(tmp_path / "a.parquet")
    rows = held_out_prompts(any_store, ingest(str(tmp_path / "a.parquet"), any_store), 1.0)
    digest = write_adapter(any_store, small_lora(), facts(training="t"))
    assert not_learnt(any_store, rows, digest).height == not_learnt(any_store, rows, "0" * 32).height == 30
    seen = [("x", "demo@1", text.upper(), 1, False) for text in TEXTS[:12]]
    any_store.write_table(
        layout.lessons("t"), tables.LESSONS.conform(pl.DataFrame(seen, tables.LESSONS.names, orient="row"))
    )
    assert not_learnt(any_store, rows, digest)["prompt"].to_list() == TEXTS[12:30]
