"""Completions of a sum and what they are worth, for the tests of the rules that pay for them.

`{answer}` stands for the right one, a negative number or not.
"""

COMPLETIONS = [
    ("{answer}", 1.0),
    ("5 + 7 = 12\n12 - 9 = 3\n{answer}", 1.0),
    ("{answer}\n\n  \n", 1.0),
    ("5 + 7 = 12\n  {answer}  ", 1.0),
    ("{answer}.0", 1.0),
    ("{answer},", 1.0),
    ("{answer}.", 1.0),
    ("<think>7777</think>{answer}", 1.0),
    ("7777</think>\n{answer}", 1.0),
    ("x" * 9000 + "\n{answer}", 1.0),
    ("<think>{answer}", 0.0),
    ("<think>{answer}</think>", 0.0),
    ("{answer}</think>7777", 0.0),
    ("{answer}\n7777", 0.0),
    ("5 + 7 = {answer}", 0.0),
    ("{answer} {answer}", 0.0),
    ("{answer}7", 0.0),
    ("--{answer}", 0.0),
    ("sNaN", 0.0),
    ("nan", 0.0),
    ("Infinity", 0.0),
    ("1e999999999999999999999", 0.0),
    ("", 0.0),
    (" \n", 0.0),
]
