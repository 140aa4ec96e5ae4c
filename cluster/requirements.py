"""What a value has to be, in the words of whoever chose it: pydantic's errors as the ends of sentences."""

from __future__ import annotations

from pydantic_core import ErrorDetails

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a block of options",
    "dict_type": "a block of options",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
    "literal_error": ("one of", "expected"),
}


def requirement(error: ErrorDetails) -> str:
    """Return `must be at least 1`, say; a validator's own words are taken as they are."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {str(context[bound]).replace('True', 'true')}"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind == "too_long":
        return f"must have at most {context['max_length']} entries"
    if kind in _EXPECTED:
        return f"must be {expected(error)}"
    return error["msg"].replace("Input should", "must", 1)


def expected(error: ErrorDetails) -> str:
    """Return the type of value that was expected."""
    return _EXPECTED[error["type"]]
