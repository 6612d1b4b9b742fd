"""Results as JSON."""

import json


def to_json(value) -> str:
    """As text; NaN, which JSON does not know, as null."""

    def known(value):
        if isinstance(value, dict):
            return {name: known(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [known(part) for part in value]
        return None if isinstance(value, float) and value != value else value

    return json.dumps(known(value), indent=1, allow_nan=False) + "\n"
