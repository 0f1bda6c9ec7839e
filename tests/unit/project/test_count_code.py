"""What tools/count_code.py counts."""

from __future__ import annotations

from tools.count_code import code_lines

SOURCE = '''"""A docstring
of two lines."""

import os  # counts; the comment does not

LIMIT = 3
"""What it means."""


def f() -> str:
    """Return a text."""
    # nothing here
    return """two
lines"""
'''


def test_blanks_comments_and_docstrings_are_no_code() -> None:
    assert code_lines(SOURCE) == 5
    assert code_lines("") == 0


def test_a_statement_beside_a_docstring_is_code() -> None:
    assert code_lines("class A:\n    'text'\n    x = (1,\n\n         2)\n") == 3
