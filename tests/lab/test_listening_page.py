"""Claims about lib.lab.judge.listening_page: one file, offline, blind, with every pair;
its analysis counts right.
"""

import base64
import io
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
import soundfile
from browser import browser, found

from lib.env.errors import UserError
from lib.lab.judge.listening_page import analyse, main, page, pairs, read_ratings, report
from lib.music.notes import Music, make_notes, write_midi


def music(seed):
    rng = np.random.default_rng(seed)
    start = np.sort(rng.uniform(0, 6, 20))
    return Music(make_notes(start, start + 0.5, rng.integers(40, 80, 20), rng.integers(30, 90, 20)))


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    page(
        {"real": [music(0), music(1)], "model </script>": [music(2)], "noise": [music(3)]},
        path,
        count=6,
        seconds=3.0,
    )
    return path.read_text()


def content(html):
    return json.loads(re.search(r"const content = (\{.*\});", html)[1].replace("<\\/", "</"))


def test_every_pair_of_groups_comes_equally_often_on_both_sides():
    dealt = pairs({"a": 5, "b": 2, "c": 9}, 60, seed=0)
    kinds = Counter(frozenset(name for name, _ in pair) for pair in dealt)
    assert kinds == {frozenset(k): 20 for k in itertools.combinations("abc", 2)}
    first = Counter(pair[0][0] for pair in dealt)
    assert all(10 <= first[name] <= 30 for name in "abc")
    # no clip is left out
    assert {i for pair in dealt for name, i in pair if name == "c"} == set(range(9))


def test_the_page_needs_nothing_but_itself(html):
    page = re.sub(r"[A-Za-z0-9+/=]{200,}", "", html)
    page = page.replace("http://www.w3.org/2000/svg", "")  # a name
    assert not re.search(r"https?:|//[a-z]|<link|src=\"(?!data:)|@import|fetch\(", page)
    held = content(html)
    assert len(held["pairs"]) == len(held["rolls"]) == 6 and html.count("</script>") == 1
    for pair in held["pairs"]:
        for sound in pair:
            audio, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)))
            assert 3 < len(audio) / rate < 6 and np.abs(audio).max() > 0.3


def test_the_page_does_not_say_who_plays(html):
    text = re.sub(r'"(?:[A-Za-z0-9+/=]{40,})"', "", html)
    for name in ("model", "noise", "real/"):
        assert name not in text
    key = json.loads(base64.b64decode(content(html)["key"]))
    assert {clip.rpartition("/")[0] for pair in key for clip in pair} == {
        "real",
        "model </script>",
        "noise",
    }


def file_of(listener, rows):
    return {
        "format": "listening 1",
        "listener": listener,
        "ratings": [{"clips": [f"{a}/0", f"{b}/1"], "choice": choice} for a, b, choice in rows],
    }


def test_the_analysis_counts_sides_and_ties():
    files = [
        file_of("x", [("m", "n", "a"), ("n", "m", "b"), ("n", "m", "same")]),
        file_of("y", [("m", "n", "b")]),
    ]
    result = analyse(files)
    (row,) = result["comparisons"]
    assert (row["first"], row["second"], row["answers"], row["listeners"]) == ("m", "n", 4, 2)
    assert row["preferred_first"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert row["interval_95"][0] <= row["preferred_first"] <= row["interval_95"][1]
    assert "62%" in report(result) and report(analyse([file_of("z", [])])) == "no ratings yet"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "x", "listener": "a", "ratings": []}',
        '{"format": "listening 1", "listener": "a", '
        '"ratings": [{"clips": ["a/0"], "choice": "a"}]}',
        '{"format": "listening 1", "listener": "a", '
        '"ratings": [{"clips": ["a/0", "b/0"], "choice": "best"}]}',
    ],
)
def test_a_file_that_holds_no_ratings_is_one_sentence(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match="is damaged .*: export it again"):
        read_ratings([tmp_path / "r.json"])


def test_every_file_is_a_listener_whatever_name_was_given_and_none_counts_twice(tmp_path):
    answers = [("m", "n", "a")] * 6
    named = [file_of(name, answers) for name in "xyz"] + [file_of("w", [("n", "m", "a")] * 6)]
    nameless = [{**file, "listener": "anonymous"} for file in named]
    assert analyse(nameless) == analyse(named)
    paths = []
    for number, file in enumerate(nameless):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps({**file, "who": f"{number % 3}"}))
    assert len(read_ratings(paths[:3])) == 3
    with pytest.raises(UserError, match="0.json and .*3.json are by one listener"):
        read_ratings(paths)
    with pytest.raises(UserError, match="1.json and .*1.json are by one listener"):
        read_ratings([paths[1], paths[1]])


def test_the_command_writes_the_page(tmp_path, capsys):
    for name in ("one", "two"):
        write_midi(music(0), tmp_path / name / "x.mid")
    groups = [f"--group={name}={tmp_path / name}" for name in ("one", "two")]
    main([*groups, "--pairs", "2", "--seconds", "3", "--out", str(tmp_path / "page.html")])
    assert "2 pairs" in capsys.readouterr().out and (tmp_path / "page.html").stat().st_size > 20_000
    for wrong in (
        groups[:1],
        [*groups, "--pairs", "0"],
        [*groups, "--seconds", "1"],
        ["--group", "x=nowhere"],
    ):
        with pytest.raises(UserError):
            main([*wrong, "--out", str(tmp_path / "no.html")])
    assert not (tmp_path / "no.html").exists()


@pytest.mark.skipif(found() is None, reason="needs Chromium or Chrome")
def test_in_a_browser_the_rolls_are_hidden_until_there_is_a_choice_and_then_move(html, tmp_path):
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    with browser(tmp_path) as opened:
        opened.open((tmp_path / "page.html").as_uri())
        seen = "[...document.querySelectorAll('#test svg')].map((roll) => roll.getBoundingClientRect().height > 50)"
        assert opened.run(seen) == [False, False]
        opened.run("document.querySelector('#a audio').play()")
        opened.until("document.querySelector('#a audio').currentTime > 0.2")
        opened.run("document.querySelector('[data-choice=b]').click()")
        assert opened.run(seen) == [True, True]
        # a choice does not stop the music
        assert not opened.run("document.querySelector('#a audio').paused")
        at = "document.querySelector('#a svg').lastChild.getAttribute('d')"
        before = opened.run(at)
        opened.until(f"{at} !== '{before}'")
        opened.run("document.querySelector('#next').click()")
        assert (
            opened.run(seen) == [False, False]
            and opened.run("$('where').textContent") == "Pair 2 of 6"
        )
        assert not opened.errors() and len(opened.requests()) == 1
