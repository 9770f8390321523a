"""Claims about lib.generate.sampling: filters keep what they should, repetition is discouraged,
never rewarded.
"""

import numpy as np
import pytest
import torch

from lib.env.errors import UserError
from lib.generate.sampling import Sampling, draw

FOUR = torch.log(torch.tensor([0.5, 0.3, 0.12, 0.08]))


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 1.0}, [0, 1]),
        ({"top_p": 0.7}, [0, 1]),
        ({"top_p": 0.1}, [0]),
        ({"min_p": 0.3, "top_p": 1.0}, [0, 1]),
        ({"temperature": 0.0}, [0]),
    ],
)
def test_filters_keep_what_they_should(settings, kept):
    p = Sampling(**settings).probabilities(FOUR)
    assert torch.nonzero(p).flatten().tolist() == kept
    assert p.sum().item() == pytest.approx(1)
    if settings.get("temperature") != 0.0:  # what is kept keeps its proportions
        torch.testing.assert_close(p[kept] / p[0], torch.exp(FOUR[kept].double()) / 0.5)


def test_temperature_flattens_and_sharpens():
    logits = torch.log(torch.tensor([0.6, 0.4]))
    cold, warm = (Sampling(temperature=t, top_p=1.0).probabilities(logits)[0] for t in (0.5, 2.0))
    assert cold == pytest.approx(0.36 / 0.52) and warm == pytest.approx(
        0.6**0.5 / (0.6**0.5 + 0.4**0.5)
    )


@pytest.mark.parametrize("temperature", [5e-324, 1e-309, 1e-200])
def test_a_temperature_near_nothing_takes_the_likeliest_as_zero_does(temperature):
    logits = torch.tensor([[3.0, 20.0, -torch.inf, 7.0], [-9.0, -20.0, -30.0, -8.0]])
    moves = torch.tensor([True, False, False, True])
    likeliest = Sampling(temperature=0.0).probabilities(logits)
    assert likeliest.argmax(-1).tolist() == [1, 3]
    cold = Sampling(temperature=temperature)
    assert torch.equal(cold.probabilities(logits), likeliest)
    clock = Sampling(temperature=0.0, clock_temperature=temperature)
    assert torch.equal(clock.probabilities(logits, moves), likeliest)


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 0.8, 1.0, 3.0])
def test_a_usual_temperature_divides_the_logits_to_the_last_bit(temperature):
    logits = torch.randn(5, 257, generator=torch.Generator().manual_seed(0)).double() * 5
    p = Sampling(temperature=temperature, top_p=1.0).probabilities(logits)
    assert torch.equal(p, torch.softmax(logits / temperature, -1))


def test_rows_are_filtered_each_for_itself():
    rows = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)) * 3
    for sampling in (Sampling(0.8, 7, 0.9, 0.02), Sampling(0.0), Sampling(1.2, 0, 1.0, 0.0)):
        together = sampling.probabilities(rows)
        for row, p in zip(rows, together):
            torch.testing.assert_close(sampling.probabilities(row), p, rtol=0, atol=0)


def test_what_is_forbidden_is_never_drawn():
    logits = torch.zeros(3, 9)
    logits[:, ::2] = -torch.inf
    numbers = torch.tensor([0.0, 0.5, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_p=1.0), Sampling(temperature=0.0)):
        assert (draw(sampling.probabilities(logits), numbers) % 2 == 1).all()


def test_tokens_are_drawn_as_often_as_they_should():
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64).expand(20_000, 4)
    drawn = draw(p, torch.from_numpy(np.random.default_rng(0).random(20_000)))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (share - p[0]).abs().max() < 0.015 and share[1] == 0  # four standard errors


def test_repetition_divides_the_odds_whatever_the_sign_of_the_logits():
    recent = torch.tensor([True, False, False, True])
    sampling = Sampling(top_p=1.0, repetition=3.0)
    for shift in (-20.0, 0.0, 20.0):  # a softmax does not know where zero lies
        p = sampling.probabilities(sampling.discourage(FOUR + shift, recent))
        odds = p / p[1]
        torch.testing.assert_close(
            odds, torch.exp(FOUR.double()) / 0.3 / torch.tensor([3, 1, 1, 3]), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("value", [0.9, 0.0, -1, float("nan"), float("inf")])
def test_a_penalty_that_rewards_repeats_is_refused(value):
    with pytest.raises(UserError, match="repetition"):
        Sampling(repetition=value)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -3}, {"min_p": 1}],
)
def test_a_setting_out_of_range_is_one_sentence(settings):
    with pytest.raises(UserError) as error:
        Sampling(**settings)
    assert "\n" not in str(error.value)
