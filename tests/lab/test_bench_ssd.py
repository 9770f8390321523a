"""Claims about the benchmark of one decay a head: its forms do the same work, at every place."""

import pytest

from lib.env import machine as env
from lib.env.errors import UserError
from lib.lab.bench import ssd
from lib.scan import cpu as scan_cpu

needs_compiler = pytest.mark.skipif(not scan_cpu.available(), reason="no C++ compiler")
SMALL = ssd.Sizes(batch=2, heads=2, head_dim=4, lengths=(5, 70), states=(3, 6), length=9, state=3)


@needs_compiler
def test_all_forms_give_the_same_and_stand_at_every_place():
    rows = ssd.measure(SMALL, 3, 0.01)
    assert len(rows) == len(ssd.FORMS) * 4
    for row in rows:
        assert row["off"] < (0.02 if row["form"] == "ssd_bf16" else 1e-6)  # bfloat16 keeps 8 bits
        assert row["forward"]["count"] >= 3 and row["both"]["median_ms"] > 0


def test_the_courses_result_has_every_form_at_every_place():
    found = env.read_results("ssd_cpu")
    sizes = ssd.Sizes()
    places = {(length, sizes.state) for length in sizes.lengths} | {
        (sizes.length, n) for n in sizes.states
    }
    wanted = {(form, *place) for form in ssd.FORMS for place in places}
    assert {(row["form"], row["length"], row["d_state"]) for row in found["rows"]} == wanted


def test_too_few_rounds_are_refused():
    with pytest.raises(UserError, match="quartiles"):
        ssd.main(["--repeats", "2"])
