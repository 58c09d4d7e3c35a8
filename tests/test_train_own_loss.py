"""Training with a confidence loss from the user's own file: one that breaks, one that draws."""

import pytest
import torch

import train
from tests.training import flags, rows_of, run_train

LOSSES = """
import random
import torch
from torch import nn
from torch.nn import functional as F

class Broken(nn.Module):
    def forward(self, logits, targets):
        return logits * float("nan")

class Steep(nn.Module):
    def forward(self, logits, targets):  # 0, but its gradient is 0 / 0
        return (logits - logits.detach()).abs().sqrt() * 0

class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, logits, targets):
        self.calls += self.training
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses * (float("nan") if self.calls > 1 else 1)

class Drawing(nn.Module):
    def __init__(self, numbers=1000):
        super().__init__()
        self.noise = torch.rand(numbers)
        random.random()

    def forward(self, logits, targets):
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
"""


@pytest.fixture
def folder(tmp_path):
    """A folder where the user keeps my_losses.py."""
    (tmp_path / "my_losses.py").write_text(LOSSES)
    return tmp_path


def test_a_loss_that_is_never_finite_stops_with_terms_and_images(tiny_voc, folder):
    more = {"conf_loss": "my_losses:Broken", "batch_size": 1}
    done = run_train(*flags(tiny_voc, folder / "run", **more), cwd=folder)
    assert done.returncode == 2
    assert "5 updates in a row" in done.stderr
    assert "conf nan" in done.stderr
    assert "image " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("conf_loss", "last_words"),
    [
        ("my_losses:Broken", "confidence loss, my_losses:Broken. Not finite: conf alone."),
        ("my_losses:Steep", "Not finite: the gradient, though the loss is."),
    ],
)
def test_a_short_run_without_a_single_update_is_an_error_that_names_the_term(
    tiny_voc, folder, conf_loss, last_words
):
    more = {"conf_loss": conf_loss, "epochs": 2}  # four updates: fewer than stop a run by count
    done = run_train(*flags(tiny_voc, folder / "run", **more), cwd=folder)
    assert done.returncode == 2
    assert "done." not in done.stdout
    assert "nothing was learnt: all 4 updates were skipped" in done.stderr
    assert done.stderr.strip().endswith(last_words)
    assert "Traceback" not in done.stderr


def test_one_update_is_enough_to_end_well_also_when_looked_at_again(tiny_voc, folder):
    more = {"conf_loss": "my_losses:Late", "epochs": 1}
    done = run_train(*flags(tiny_voc, folder / "run", **more), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "conf nan" in done.stderr + done.stdout
    assert rows_of(folder / "run")[-1]["skipped_steps"] == "1"
    again = run_train("--resume", folder / "run", "--conf_loss", "my_losses:Late", cwd=folder)
    assert again.returncode == 0, again.stderr


def test_initial_weights_do_not_depend_on_what_a_loss_draws(tiny_voc, folder, monkeypatch):
    monkeypatch.chdir(folder)
    weights = []

    class Stop(Exception):
        """Ends a training where it would begin."""

    def note_weights(model, **_):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        raise Stop

    monkeypatch.setattr(train, "Trainer", note_weights)
    for number, spec in enumerate(("bce", "my_losses:Drawing", "my_losses:Drawing(numbers=7)")):
        arguments = flags(tiny_voc, folder / str(number), conf_loss=spec)
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        with pytest.raises(Stop):
            train.main()
    for others in weights[1:]:
        assert all(torch.equal(value, others[name]) for name, value in weights[0].items())
    assert weights[0]["backbone.stem.conv.weight"].std() > 0
