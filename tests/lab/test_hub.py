"""Claims about lib.lab.hub: the rehearsal of an upload finds what the Hub would refuse,
and sends nothing.
"""

import shutil

import pytest
from huggingface_hub import HfApi

from lib.env.errors import UserError
from lib.env.machine import read_results
from lib.generate.player import MODEL
from lib.lab import hub, release


@pytest.fixture(autouse=True)
def no_upload(monkeypatch):
    """Whoever calls the Hub fails the test."""
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, lambda *args, **named: pytest.fail("the Hub was called"))


def test_the_shipped_model_can_be_sent(capsys):
    hub.main(["someone/a-mamba"])
    said = capsys.readouterr().out
    assert "a rehearsal" in said and "https://huggingface.co/someone/a-mamba" in said
    assert all(name in said for name in hub.FILES)


def test_the_header_of_the_card_says_licence_and_result():
    card = hub.checked(MODEL)
    found = read_results("model")
    (result,) = card.data.eval_results
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.library_name == "transformers"
    assert result.metric_value == round(found["test_bits_per_note"], 2)


def test_the_shipped_card_is_that_of_the_measured_model():
    assert (MODEL / "README.md").read_text(encoding="utf-8") == release.card(read_results("model"))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda folder: (folder / "tokens.json").unlink(), "tokens.json"),
        (lambda folder: (folder / "README.md").unlink(), "no README.md"),
        (lambda folder: (folder / "README.md").write_text("# a card"), "lacks the licence"),
        (
            lambda folder: (folder / "README.md").write_text("---\nlicense: [\n---\n"),
            "cannot be read",
        ),
    ],
)
def test_a_folder_that_is_not_complete_is_refused(tmp_path, spoil, says):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=says):
        hub.main(["someone/a-mamba", "--model", str(folder)])


@pytest.mark.parametrize("name", ["a/b/c", "-", "some one/x", ".."])
def test_what_is_no_name_on_the_hub_is_refused(name):
    with pytest.raises(UserError, match="no name on the Hub"):
        hub.main([name])


def test_what_is_sent_is_the_model_and_nothing_else(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **named: asked.append(name))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **named: asked.append(named) or "there"
    )
    hub.main(["someone/a-mamba", "--send"])
    assert asked == [
        "someone/a-mamba",
        {"repo_id": "someone/a-mamba", "folder_path": MODEL, "allow_patterns": list(hub.FILES)},
    ]
    assert capsys.readouterr().out.endswith("there\n")
