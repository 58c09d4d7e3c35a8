"""The confidence losses, one idea a file. Importing it registers them all."""

from losses.conf import asymmetric, bce, focal, ghm, ohem, poly, quality  # noqa: F401
from losses.conf.registry import CONF_LOSSES, ConfSettings, conf_loss, conf_settings
from losses.conf.spec import build_conf_loss

__all__ = ["CONF_LOSSES", "ConfSettings", "build_conf_loss", "conf_loss", "conf_settings"]
