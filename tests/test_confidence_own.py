"""A user's own class that breaks the contract of a confidence loss is told so before it trains."""

import sys

import pytest

from losses.conf import build_conf_loss
from utils.errors import UserError

BROKEN = """
from torch import nn

class Plain(nn.Module):
    def forward(self, logits, targets):
        return {body}

class NoMask(Plain):
    wants_mask = True

class NoSuper(nn.Module):
    def __init__(self):
        self.layer = nn.Identity()
"""


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("Plain", "(logits - targets).mean()", r'shape \(\) .* reduction="none"'),
        ("Plain", "(logits - targets).mean(0, keepdim=True)", r"shape \(1, 3\)"),
        ("Plain", "None", r"returns None"),
        ("Plain", "logits @ targets", r"raised RuntimeError: .*my_conf_losses\.py, line 6"),
        ("Plain", "logits - targets.fill_(1)", r"changes its targets"),
        ("NoMask", "logits", r"forward\(logits, targets, mask\) raised TypeError"),
        ("NoSuper", "logits", r"cannot be made: raised AttributeError"),
        ("Plane", "logits", r"It has Plain, NoMask, NoSuper"),
    ],
)
def test_a_users_class_that_breaks_the_contract_is_told_how(
    tmp_path, monkeypatch, name, body, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_conf_losses", raising=False)
    (tmp_path / "my_conf_losses.py").write_text(BROKEN.replace("{body}", body))
    with pytest.raises(UserError, match=message):
        build_conf_loss(f"my_conf_losses:{name}")
    sys.modules.pop("my_conf_losses", None)
