"""Claims about lib.lab.bench.playing: it measures what it says, keeps what it measured,
and only of one model.
"""

import json

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.generate.player import generate, load_model
from lib.lab.bench.playing import main, summary
from lib.music.notes import read_midi

SMALL = ["--quick", "--pieces", "8", "--seconds", "10", "--seeds", "5", "--stream-tokens", "2000"]


def test_the_report_measures_and_keeps(tmp_path, capsys):
    result = tmp_path / "r.json"
    where = ["--out", str(tmp_path / "pieces"), "--result", str(result)]
    main([*SMALL, *where, "--parts", "pieces", "bits"])
    found = json.loads(result.read_text())
    assert found["pieces"]["invalid_tokens"] == 0 and found["pieces"]["count"] == 8
    assert set(found["pieces"]["comparison"]["overlap"]) == {"model", "bigram", "noise", "real"}
    shared = found["pieces"]["passages"]
    assert {"other composers", "model", "bigram", "noise"} <= set(shared["groups"])
    assert shared["groups"]["other composers"]["above"] <= 0.2 and shared["threshold_bits"] > 0
    assert (
        5
        < found["bits"]["native"]["bits_per_note"]
        < found["bits"]["dequantised_10_ms"]["bits_per_note"]
        < 40
    )
    for seed in (0, 7):  # none picked: seed by seed what a user would get
        ours = read_midi(tmp_path / "pieces" / f"seed{seed}.mid").notes
        theirs = generate(*load_model(), seconds=10, seed=seed).notes
        assert (ours["pitch"] == theirs["pitch"]).all()
        np.testing.assert_allclose(ours["start"], theirs["start"], atol=0.001)
    main([*SMALL, *where, "--parts", "stream"])
    later = json.loads(result.read_text())
    assert later["pieces"] == found["pieces"] and later["bits"] == found["bits"]
    assert (
        len(later["stream"]["curve"]) == 20
        and len({row["state_bytes"] for row in later["stream"]["curve"]}) == 1
    )
    assert (
        "--parts stream" in later["measured_by"]["stream"]
        and "--parts pieces" in later["measured_by"]["pieces"]
    )
    assert "overlap area" in capsys.readouterr().out and "endless" in summary(later)
    result.write_text(json.dumps(later | {"model": "another"}))
    main([*SMALL, *where, "--parts", "stream"])
    # another model's numbers are not kept beside these
    assert "pieces" not in json.loads(result.read_text())


def test_numbers_too_small_to_say_anything_are_refused(tmp_path):
    for wrong in (
        ["--pieces", "3"],
        ["--seeds", "1"],
        ["--seconds", "1"],
        ["--stream-tokens", "10"],
    ):
        with pytest.raises(UserError, match="too small"):
            main([*SMALL, *wrong, "--result", str(tmp_path / "r.json")])
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        main([*SMALL, "--result", str(tmp_path / "r.json")])
