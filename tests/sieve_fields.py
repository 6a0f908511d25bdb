"""The fields of a header, in a form in which they can be compared."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from email.errors import HeaderParseError
from email.header import decode_header, make_header

# A name in lower case, and a value.
Field = tuple[str, str]


def fields_of(header: bytes, trace: Collection[str]) -> Iterator[Field]:
    """The fields but for the trace, their names in lower case, their values unfolded and decoded."""
    for field in re.split(rb"\n(?![ \t])", header.strip(b"\n")):
        name, colon, value = field.decode("utf-8", "backslashreplace").partition(":")
        if name.lower() in trace or (name.lower() == "received" and "by mx.example.com" in value):
            continue
        yield name.lower().rstrip(), decoded_value(" ".join(value.split())) if colon else ""


def decoded_value(value: str) -> str:
    """A value with its encoded words as text."""
    try:
        return str(make_header(decode_header(value)))
    except (HeaderParseError, LookupError, ValueError):
        return value
