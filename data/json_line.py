"""One line of JSON lines: its text, or what is wrong with it."""

import json

from data.long_line import BadText


def parse_line(line: bytes, key: str) -> str:
    """The string under `key` of a JSON object. Raises BadText with what is wrong."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadText(f"not UTF-8 at byte {error.start} of the line; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadText(f"malformed JSON ({error.msg} at column {error.colno}); each line must be one JSON object") from None
    except RecursionError:
        raise BadText("malformed JSON (nested too deeply); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise BadText(f"a JSON {type(record).__name__}; each line must be one JSON object")
    if key not in record:
        raise BadText(f"no key {key!r}; the line has {', '.join(map(repr, record)) or 'no keys'}: choose another key")
    return text_of(record[key], key)


def text_of(value: object, key: str) -> str:
    """`value` if it is text. Raises BadText when it is no string, or a string that UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise BadText(f"{key!r} is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair, which is no character
        raise BadText(f"{key!r} has a lone surrogate at character {error.start}, which is not text") from None
    return value
