"""What the command line prints of a run."""

from typing import Any

from flows.printing import print_summary

SUMMARY: dict[str, Any] = {
    "run": "0123456789ab", "prompts": 12, "merged": 0, "bad_rows": 0, "strata": 3, "candidates": 60, "made": 60, "found": 0,
    "images_per_second": 1.5, "rounds": 1, "given_up": 0, "seconds": 40.0, "rejection_rate": 0.6, "lift": "", "dataset": "demo",
    "counts": {"accepted": 24, "rejected": 36, "unsafe": 0, "degenerate": 0, "error": 0},
    "version": 1, "release": "file:///release", "report": "file:///report.html", "made_by": None, "with": "",
}  # fmt: skip


def test_costs_and_an_early_end_are_told_where_there_are_any(capsys) -> None:
    print_summary(SUMMARY)
    plain = capsys.readouterr().out
    assert "cost" not in plain and "early" not in plain
    cost = "412 GPU s on 2 × NVIDIA H100 · 1.9 s and 0.0013 per accepted image · denoise 81% wait 4%"
    print_summary({**SUMMARY, "cost": cost, "ended": "612 s, of 600 s [allowed]; 4 of 10 shards were finished by then"})
    lines = capsys.readouterr().out.splitlines()
    assert f"cost          {cost}" in lines
    assert "ended early   by its budget: 612 s, of 600 s [allowed]; 4 of 10 shards were finished by then" in lines
