"""Every exercise refuses plausible wrong answers, in words that say what is wrong."""

import pytest
from answers import WRONG
from wrong_answers import codes, refused, silent

CODES = codes()


def test_every_exercise_has_its_wrong_answers():
    assert set(WRONG) == set(CODES)
    assert all(len(answers) >= 2 for answers in WRONG.values())


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_a_check_never_shows_a_bare_assert(code):
    assert not silent(code)


@pytest.mark.parametrize(
    "exercise, answer, words",
    [
        pytest.param(exercise, answer, words, id=f"{exercise} {what}")
        for exercise, answers in WRONG.items()
        for what, answer, words in answers
    ],
)
def test_a_wrong_answer_is_refused_in_words(exercise, answer, words, tmp_path, capsys, monkeypatch):
    refused(CODES[exercise], answer, words, tmp_path, capsys, monkeypatch)
