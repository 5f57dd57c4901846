"""Kinds of command-line arguments that several commands take, for argparse's `type`."""

import argparse


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, valid: a whole number ≥ 1")
    return int(text)
