"""What the command line says of options that cannot be."""

import pytest
from pydantic import ValidationError

from flows.cli.shared import in_words
from flows.parameters import Generation, Policy


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
