"""Claims about lib.scan.copying: the task is what it says,
the models differ in their system alone.
"""

import pytest
import torch

from lib.env.errors import UserError
from lib.scan import copying, ssm
from lib.scan.copying import SELECTIVE, Copier, FixedSystem, SelectiveSystem, Task, Training
from lib.scan.selective import selective_scan


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "task",
    [
        Task(),
        Task(fixed_gaps=True),
        Task(notes=2, keep=1, length=1),
        Task(notes=5, keep=7, length=7),
    ],
)
def test_answers_are_the_notes_in_their_order(task):
    tokens, answers = task.batch(50, dice())
    assert tokens.shape == (50, task.length + task.keep) and answers.shape == (50, task.keep)
    assert (tokens[:, task.length :] == task.cue).all() and tokens.max() < task.vocab_size
    for line, right in zip(tokens, answers, strict=True):
        assert torch.equal(line[line < task.notes], right)
        assert (line == task.rest).sum() == task.length - task.keep


def test_gaps_are_fixed_or_random():
    places = [
        (task.batch(200, dice())[0] < 8).nonzero()[:, 1].view(200, -1)
        for task in (Task(fixed_gaps=True), Task())
    ]
    assert torch.equal(places[0], torch.arange(6).expand(200, -1))
    assert len(places[1].unique(dim=0)) > 190
    counts = torch.bincount(places[1].flatten(), minlength=58)
    assert counts.min() > 0 and counts.max() < 3 * counts.double().mean(), (
        "every position is as likely as another"
    )


def test_the_same_seed_gives_the_same_sequences():
    one, two, other = (Task().batch(9, dice(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("wrong", [{"notes": 1}, {"keep": 0}, {"keep": 9, "length": 8}])
def test_a_task_that_makes_no_sense_is_one_sentence(wrong):
    with pytest.raises(UserError, match="^a task needs"):
        Task(**wrong)


@pytest.mark.parametrize("selective", [SELECTIVE, ("delta",), ("B", "C"), ()])
@pytest.mark.parametrize("length", [1, 65])
def test_selective_system_is_the_scan_of_what_it_selects(selective, length):
    system, x = SelectiveSystem(7, 3, selective), torch.randn(2, length, 7, generator=dice())
    delta, B, C = system.select(x)
    assert (
        delta.shape == (2, length, 7) and B.shape == C.shape == (2, length, 3) and (delta > 0).all()
    )
    y = selective_scan(x, delta, system.A, B, C, system.D, backend="loop")
    torch.testing.assert_close(system(x), y, rtol=1e-5, atol=1e-5)
    moves = {
        name
        for name, t in zip(
            SELECTIVE, system.select(torch.randn(2, 65, 7, generator=dice(1))), strict=True
        )
        # vector and scalar lanes round differently
        if (t - t[:, :1]).abs().max() > 1e-5
    }
    assert moves == set(selective), "only what is selective follows the input"


def test_steps_begin_between_their_bounds():
    torch.manual_seed(0)
    delta, _, _ = SelectiveSystem(500, 2, ()).select(torch.zeros(1, 1, 500))
    assert (
        copying.DT_MIN * 0.999 < delta.min() < 0.02 and 0.2 < delta.max() < copying.DT_MAX * 1.001
    )


def test_both_systems_do_tomorrow_what_they_do_today_and_only_the_fixed_one_is_linear():
    """Shift the input, and the output is shifted; double it, and only a convolution is doubled."""
    torch.manual_seed(0)
    x = torch.randn(1, 40, 6, generator=dice())
    later = torch.cat([torch.zeros(1, 5, 6), x], 1)
    for system, fixed in ((FixedSystem(6, 4), True), (SelectiveSystem(6, 4), False)):
        with torch.no_grad():
            shifted = torch.allclose(system(later)[:, 5:], system(x), atol=1e-5)
            doubled = torch.allclose(system(2 * x), 2 * system(x), atol=1e-5)
        assert shifted and doubled == fixed


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_fixed_system_is_the_convolution_of_its_kernel(length):
    torch.manual_seed(0)
    system, x = FixedSystem(5, 4), torch.randn(3, length, 5, generator=dice())
    with torch.no_grad():
        by_fft = ssm.convolve(x, ssm.kernel(*system.system(), length).real) + system.D * x
        torch.testing.assert_close(system(x), by_fft, rtol=1e-5, atol=1e-5)
        for channel, matrix in enumerate(system.matrix(length)):
            torch.testing.assert_close(
                matrix @ x[0, :, channel],
                (by_fft - system.D * x)[0, :, channel],
                atol=1e-5,
                rtol=1e-5,
            )


def test_unknown_part_is_one_sentence():
    with pytest.raises(UserError, match="'A' cannot be selective: choose among delta, B, C"):
        SelectiveSystem(4, 2, ("A",))


def test_unknown_system_is_one_sentence():
    with pytest.raises(UserError, match="'lstm' is no system: choose fixed, selective, gru"):
        Copier(Task(), "lstm")


@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_models_to_compare_are_about_equally_large(n_layer):
    sizes = [Copier(Task(), system, n_layer=n_layer).parameter_count() for system in copying.WIDTHS]
    assert max(sizes) < 1.06 * min(sizes), sizes


@pytest.mark.parametrize("system", list(copying.WIDTHS))
@pytest.mark.parametrize("d_conv", [0, 4])
def test_a_model_hears_the_past_only_and_every_parameter_learns(system, d_conv):
    torch.manual_seed(0)
    task = Task(keep=3, length=20)
    model = Copier(task, system, d_conv=d_conv, widths=(8, 16))
    tokens, answers = task.batch(4, dice())
    logits = model(tokens)
    assert logits.shape == (4, 23, 8)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % task.vocab_size
    # an FFT rounds globally
    torch.testing.assert_close(model(changed)[:, :12], logits[:, :12], rtol=1e-4, atol=1e-4)
    assert (model(changed)[:, 12:] - logits[:, 12:]).abs().max() > 1e-3
    torch.nn.functional.cross_entropy(logits[:, -3:].flatten(0, 1), answers.flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert model.parameter_count() == sum(p.numel() for p in model.parameters())


def test_inputs_are_what_the_systems_see():
    torch.manual_seed(0)
    model, seen = Copier(Task()), []
    for block in model.layers:
        block.system.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    tokens, _ = Task().batch(2, dice())
    model(tokens)
    for ours, hooked in zip(model.inputs(tokens), seen[:2], strict=True):
        torch.testing.assert_close(ours, hooked)


class Oracle(torch.nn.Module):
    """Right about all notes, or about all but the last."""

    def __init__(self, task, mistake=False):
        super().__init__()
        self.task, self.mistake = task, mistake

    def forward(self, tokens):
        answers = tokens[tokens < self.task.notes].view(len(tokens), -1).clone()
        if self.mistake:
            answers[:, -1] = (answers[:, -1] + 1) % self.task.notes
        logits = torch.zeros(*tokens.shape, self.task.notes)
        logits[:, -self.task.keep :] = torch.nn.functional.one_hot(answers, self.task.notes).float()
        return logits


def test_accuracy_counts_notes_and_whole_answers():
    task = Task()
    assert copying.accuracy(Oracle(task), task, size=300) == (1, 1)
    assert copying.accuracy(Oracle(task, mistake=True), task, size=300) == (pytest.approx(5 / 6), 0)


def small(task=None):
    torch.manual_seed(0)
    return Copier(task or Task(keep=2, length=5), d_state=2, n_layer=1, widths=(8, 16))


def test_training_can_be_repeated():
    task = Task(keep=2, length=5)
    one, two = (copying.train(small(task), task, 10, batch=8, every=4) for _ in range(2))
    assert one == two and [step for step, _ in one] == [0, 4, 8, 10]


def test_the_rate_warms_up_stays_and_falls():
    training = Training(small(), Task(keep=2, length=5), 80, settle=20, learning_rate=0.5)
    rates = []
    for training.step in range(100):
        rates.append(training.rate())
    assert rates[0] == pytest.approx(0.01) and rates[49:81] == [0.5] * 32
    assert rates[81:] == pytest.approx([0.5 * (1 - n / 20) for n in range(1, 20)])
    training.step = 100
    assert training.finished


def test_the_decay_begins_where_the_task_is_solved():
    """Solved from the start: three checks, then the decay."""
    task = Task(keep=2, length=5)
    training = Training(small(task), task, 1000, settle=4, solved=0.0, every=2, batch=8)
    assert training.run() and training.settles_at == 4 and training.step == 8
    assert [step for step, _, _ in training.curve] == [0, 2, 4, 6, 8]


def test_training_that_was_put_down_goes_on_as_if_it_had_not_been(tmp_path):
    task = Task(keep=2, length=5)
    kinds = dict(settle=3, batch=8, every=2, lengths=(4, 9))
    whole = Training(small(task), task, 6, **kinds)
    assert whole.run()
    first = Training(small(task), task, 6, **kinds)
    for _ in range(5):
        first.train_step()
        if first.step % 2 == 0:
            first.check()
    assert not first.finished
    torch.save(first.state_dict(), tmp_path / "kept.pt")
    second = Training(small(task), task, 6, **kinds)
    second.load_state_dict(torch.load(tmp_path / "kept.pt", weights_only=True))
    assert second.run() and second.curve == whole.curve and second.step == 9
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_no_time_is_no_training():
    training = Training(small(), Task(keep=2, length=5), 6)
    assert not training.run(seconds=0) and training.step == 0


def test_training_at_many_lengths_sees_them_all():
    task = Task(keep=2, length=5)
    seen = set()

    class Listener(torch.nn.Linear):
        def forward(self, tokens):
            if self.training:
                seen.add(tokens.shape[1] - task.keep)
            return super().forward(torch.nn.functional.one_hot(tokens, task.vocab_size).float())

    model = Listener(task.vocab_size, task.notes)
    training = Training(model.eval(), task, 60, lengths=(4, 7), batch=2, every=1000)
    model.train()
    while training.step < 59:  # before the last one is checked
        training.train_step()
    assert seen == {4, 5, 6, 7}


def test_training_solves_a_task_of_one_note():
    """Small enough for the tests; the full task is trained in notebook 04."""
    task = Task(notes=2, keep=1, length=6)
    curve = copying.train(small(task), task, 150, batch=32, learning_rate=0.02, every=50)
    assert curve[0][1] < 0.8 and curve[-1][1] > 0.98
