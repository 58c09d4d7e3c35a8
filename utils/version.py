"""The version of this program: in checkpoints and behind --version."""

__version__ = "0.2.0"
