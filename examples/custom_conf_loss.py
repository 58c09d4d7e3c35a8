"""A confidence loss of your own, and half a minute of training with it on the drawn sample.

python examples/custom_conf_loss.py    (in the project's folder; more flags go on to train.py)
"""

import shlex
import sys

from torch import Tensor, nn, where

sys.path.insert(0, ".")  # a script's own folder is on Python's path, the project's is not
from losses.conf import conf_loss
from losses.focal import upcast
from tools.train_sample import SAMPLE, run


@conf_loss("modified_huber")  # for a program that imports this file, a name as good as "bce"
class ModifiedHuber(nn.Module):
    """Squared hinge with a linear tail: a cell beyond the margin is silent (T. Zhang, 2004)."""

    prior_pi = 0.02  # new heads start as background should end: at logit -4, the margin

    def __init__(self, margin: float = 4.0):
        super().__init__()
        self.margin = margin

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = upcast(logits, targets)  # the square of a half overflows early
        certainty = where(targets > 0, logits, -logits) / self.margin
        return where(certainty > -1, (1 - certainty).clamp(min=0) ** 2, -4 * certainty)


if __name__ == "__main__":
    if not SAMPLE.exists():
        run("-m tools.make_sample_voc")
    own = "--conf_loss 'examples.custom_conf_loss:ModifiedHuber(margin=4)'"
    data = f"--train {SAMPLE}:train --val {SAMPLE}:val --classes_path {SAMPLE}/classes.txt"
    small = "--width 0.125 --depth 0.1 --input_shape 160 160 --epochs 4 --num_workers 0 --cache"
    run(f"train.py {own} {data} {small} {shlex.join(sys.argv[1:])}")
