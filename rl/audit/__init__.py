"""Which operators training dispatches, and whether MPS has them; needs no Mac: `python -m rl audit`."""
