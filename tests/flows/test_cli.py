"""What the command line says of its options, and of those that cannot be."""

from pathlib import Path

import pytest
import typer
from pydantic import ValidationError
from typer.core import TyperOption
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.help import FORMS, field_of
from flows.cli.shared import in_words, learning_fields
from flows.parameters import Generation, Policy
from tasks.learn import settings_for
from tasks.trainers import Settings
from tests.flows.conftest import MODEL


def refused(*command: str) -> str:
    """What the command line says of it, in one line, before anything is started."""
    result = CliRunner().invoke(app, command)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.output.replace("│", " ").split())


def helped(command: str) -> str:
    """What its --help says, in one line."""
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_the_help_of_run_tells_what_is_taken_where_nothing_is_given():
    told = helped("run")
    assert f"Images to make per prompt. [default: ({Generation().candidates})]" in told
    assert "Sampling steps. [default: (the model's own)]" in told
    assert f"Rejection rate, exact: 0.6 or 3/5. [default: ({Policy().reject})]" in told
    assert "Candidates in all rounds, at most. [default: (no limit)]" in told
    assert told.index("─ Policy") < told.index("--reject") < told.index("─ Generation") < told.index("--candidates")
    assert helped("run") == told


def test_every_option_that_sets_a_form_stands_in_its_panel():
    own = {"store", "name", "on_bad_rows", "edition", "verbose"}
    for command, forms in FORMS.items():
        options = [param.name for param in get_command(app).commands[command].params if isinstance(param, TyperOption)]
        found = {option: field_of(option, command) for option in options}
        assert {form for form, field in found.values() if field} == set(forms)
        if command == "run":
            assert {option for option, (_, field) in found.items() if not field} == own


def test_the_help_of_train_lists_all_settings():
    told = helped("train")
    for name, field in Settings.model_fields.items():
        assert f" {name} {field.description or ''}".strip() in told
    assert "learning_rate [default: 0.0001]" in told


def test_options_that_contradict_each_other_are_told_in_one_sentence():
    with pytest.raises(ValidationError) as error:
        Policy(k_min=3, k_max=2)
    assert in_words(error.value) == "k_min 3 is above k_max 2: lower one or raise the other"


def test_a_bad_option_is_named_with_what_was_received():
    with pytest.raises(ValidationError) as error:
        Generation(guidance=-0.5, batch_size=0)
    words = in_words(error.value)
    assert "--guidance: guidance -0.5 lies between -1 and 0" in words
    assert "--batch-size: " in words and "received 0" in words


def test_each_setting_of_a_training_keeps_its_commas():
    options = learning_fields(["sample_prompts=a red circle, rank=4", "steps=3"], None)["options"]
    found = settings_for(MODEL, options)
    assert (found.sample_prompts, found.rank, found.steps) == ("a red circle, rank=4", 16, 3)
    assert settings_for(MODEL, learning_fields(["targets=to_q, rank=4"], None)["options"]).rank == 16
    assert learning_fields(None, None) == {}


@pytest.mark.parametrize("bad", ["steps", "", "=3", "token=a\nrank=4"])
def test_a_setting_that_is_none_is_named_alone(bad: str):
    with pytest.raises(typer.BadParameter, match=r"write name=value in one line") as told:
        learning_fields(["text_encoder=false", bad], None)
    assert str(told.value).startswith(f"--option {bad!r}: ")


@pytest.mark.parametrize("name", ["../x", "a/b", "x" * 300])
def test_a_bad_name_is_told_before_a_training_is_started(name: str, tmp_path: Path):
    store = tmp_path / "store"
    told = refused(
        "train", "demo@1", "--store", str(store), "--name", name, "--to", str(tmp_path / "to"), "--model", MODEL
    )
    assert "adapter name" in told and "is not usable" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", ["nan", "1.5", "-0.1", "inf"])
def test_a_share_that_is_none_is_told_in_one_sentence(share: str):
    told = refused("promote", "3f9a41c2", "--exam", "prompts.parquet", "--held-out", share)
    assert "--held-out" in told and share in told


@pytest.mark.parametrize("share", [float("nan"), 1.5, -0.1])
def test_the_form_refuses_such_a_share_too(share: float):
    from prefect.exceptions import ParameterTypeError

    from flows.promote import promote

    with pytest.raises(ParameterTypeError, match="held_out"):
        promote.validate_parameters({"challenger": "3f9a41c2", "held_out": share})
    assert promote.validate_parameters({"challenger": "3f9a41c2", "held_out": 1})["held_out"] == 1
