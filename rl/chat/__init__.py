"""A finished run to talk to, beside the model it came from."""
