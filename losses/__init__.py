"""What makes gradients and has no weights. Importing it registers every confidence loss."""

import losses.confidence_family  # noqa: F401
