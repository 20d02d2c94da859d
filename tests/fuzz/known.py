"""Failures of the library that the fuzz found; take a line away when it is mended.

Call -> what happens in place of a result or a ValueError -> argument, kind, label.
"""

_FOUND = {
    "load_or_prepare[stored]": {
        "RuntimeError": [
            "inputs: shape, axis 1 of 0",
        ],
    },
}

KNOWN = {
    name: {what: why for why, whats in reasons.items() for what in whats}
    for name, reasons in _FOUND.items()
}
