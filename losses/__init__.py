"""What makes gradients and has no weights."""
