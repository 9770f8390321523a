"""Claims about silence and a clock that keeps its own temperature."""

import numpy as np
import pytest
import torch

from lib.env.errors import UserError
from lib.generate.__main__ import parse, warn
from lib.generate.breath import different_keys, longest_rest, short_of_breath
from lib.generate.sampling import Sampling
from lib.music.notes import Music, make_notes


def notes(*rows):
    """Rows of (start, end, key)."""
    start, end, pitch = np.array(rows, float).T
    return make_notes(start, end, pitch, np.full(len(rows), 70))


def test_silence_is_what_lies_between_the_end_of_all_sound_and_the_next_note():
    music = notes((0, 9, 40), (1, 2, 60), (12, 13, 62))
    assert longest_rest(music, 0, 13) == (3, 9), "the bass sounds on under the melody"
    assert longest_rest(music, 0, 30) == (17, 13), "the end counts as well"
    assert longest_rest(notes((5, 6, 60)), 0, 6) == (5, 0), "and the beginning"
    assert longest_rest(notes((0, 20, 60)), 0, 20)[0] == 0
    assert longest_rest(make_notes([], [], [], []), 2, 9) == (7, 2)


def test_only_the_new_music_is_judged():
    music = notes((0, 1, 60), (20, 21, 61), (21, 22, 62), (22, 23, 63))
    assert longest_rest(music, 20, 23)[0] == 0 and different_keys(music, 20, 23) == 3


def test_a_piece_that_fell_silent_or_got_stuck_is_told_so_and_a_lively_one_is_not(capsys):
    lively = notes(*((i / 2, i / 2 + 0.4, 40 + i % 30) for i in range(120)))
    stuck = notes(*((i / 2, i / 2 + 0.4, 60 + i % 2) for i in range(120)))
    assert short_of_breath(lively, 0, 60) == ""
    assert short_of_breath(lively[:40], 0, 60) == "it is silent for 40 s from second 20 on"
    assert short_of_breath(stuck, 0, 60) == "it strikes 2 different keys only"
    assert short_of_breath(stuck[:20], 0, 10) == "", "ten seconds may do with two keys"
    warn(Music(lively), 0, 60)
    assert not capsys.readouterr().out
    warn(Music(stuck), 0, 60)
    assert "--clock-temperature 1" in capsys.readouterr().out


MOVES = torch.tensor([True, True, False, False])
LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0], [0.0, 3.0, -torch.inf, 1.0]])


def test_a_clock_at_one_moves_as_often_as_the_model_would_however_cold_the_rest_is():
    model = torch.softmax(LOGITS.double(), -1)
    for temperature in (0.0, 0.3, 0.7):
        p = Sampling(temperature, top_p=1, clock_temperature=1.0).probabilities(LOGITS, MOVES)
        torch.testing.assert_close(p[:, MOVES], model[:, MOVES])
        cold = Sampling(temperature, top_p=1).probabilities(LOGITS[:, 2:])
        share = model[:, ~MOVES].sum(1, keepdim=True)
        torch.testing.assert_close(p[:, ~MOVES], share * cold)


def test_a_floor_below_the_temperature_changes_nothing():
    plain = Sampling(0.9).probabilities(LOGITS, MOVES)
    for floor in (0.0, 0.5, 0.9):
        assert torch.equal(
            Sampling(0.9, clock_temperature=floor).probabilities(LOGITS, MOVES), plain
        )


def test_where_the_clock_must_or_must_not_move_the_others_share_everything():
    stay = torch.tensor([[-torch.inf, -torch.inf, 1.0, 0.0]])
    move = torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]])
    sampling = Sampling(0.5, top_p=1, clock_temperature=1.0)
    cold = torch.softmax(stay[0, 2:].double() / 0.5, -1)
    torch.testing.assert_close(sampling.probabilities(stay, MOVES)[0, 2:], cold)
    model = torch.softmax(move[0, :2].double(), -1)
    torch.testing.assert_close(sampling.probabilities(move, MOVES)[0, :2], model)


def test_the_command_line_hands_the_floor_on_and_refuses_what_is_none():
    assert parse(["--clock-temperature", "1"]).sampling.clock_temperature == 1
    assert parse([]).sampling == Sampling()
    with pytest.raises(UserError, match="clock-temperature -1"):
        parse(["--clock-temperature", "-1"])
