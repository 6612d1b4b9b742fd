"""Convert results to JSON."""

import json


def to_json(value, compact: bool = False) -> str:
    """Return a value as JSON text; NaN, which JSON lacks, becomes null.

    Parameters
    ----------
    value : numbers, text, lists and dicts
    compact : write one line without spaces, for long lists of numbers
    """

    def without_nan(value):
        if isinstance(value, dict):
            return {name: without_nan(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [without_nan(part) for part in value]
        return None if isinstance(value, float) and value != value else value  # NaN differs from itself

    layout = {"separators": (",", ":")} if compact else {"indent": 1}
    return json.dumps(without_nan(value), allow_nan=False, **layout) + "\n"
