"""The JSON schema of `[[reward]] name = "json"`: each keyword by hand, and what must be refused rather than ignored."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.rewards import json_schema

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["x"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [0, -3, 1.0], [1.5, True, "1", None]),  # true is no 1; 1.0 is an integer
        ({"type": ["number", "null"]}, [1, 0.5, None], [False, "x"]),
        ({"enum": [1, "a", [True]]}, [1, 1.0, "a", [True]], [True, "b", [1]]),
        ({"const": {"a": 1}}, [{"a": 1.0}], [{"a": True}, {"a": 1, "b": 2}]),
        ({"minimum": 0, "exclusiveMaximum": 1}, [0, 0.99, "any text"], [-1, 1]),
        ({"exclusiveMinimum": 0, "maximum": 1}, [1, 0.1], [0, 1.01]),
        ({"multipleOf": 0.1}, [0.3, 1, "x"], [0.35]),  # 0.3 / 0.1 is 2.9999999999999996
        ({"minLength": 2, "maxLength": 3, "pattern": "^a"}, ["ab", "abc", 7], ["a", "abcd", "ba"]),
        ({"minItems": 1, "maxItems": 2, "uniqueItems": True}, [[1], [1, True]], [[], [1, 2, 3], [1, 1.0]]),
        (POINT, [{"x": 1}, {"x": 0, "tags": ["a"]}], [{}, {"x": -1}, {"x": 1, "y": 2}, {"x": 1, "tags": [1]}, []]),
        ({"properties": {"a": False}}, [{}, {"b": 1}, 3], [{"a": 1}]),
        ({"additionalProperties": {"type": "string"}}, [{"a": "b"}], [{"a": 1}]),
        ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, ["x", 5], [4]),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1, 2], [0, 3]),
        ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, [2, 3], [6, 1]),
        ({"not": {"type": "null"}}, [0, ""], [None]),
    ],
)
def test_each_keyword(schema: Any, good: list, bad: list) -> None:
    json_schema.check(schema)
    assert [value for value in good if not json_schema.valid(value, schema)] == []
    assert [value for value in bad if json_schema.valid(value, schema)] == []


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"propertys": {}}, "schema: unknown keyword 'propertys'; valid: type, enum"),
        ({"$ref": "#/x"}, "unknown keyword '\\$ref'"),
        ({"type": "int"}, "schema.type: found 'int', must be one of object"),
        ({"properties": {"a": {"minimum": "1"}}}, "schema.properties.a.minimum: found '1', must be a number"),
        ({"items": [{"type": "string"}]}, "schema.items: found .* must be a table"),
        ({"pattern": "("}, "schema.pattern: found '\\(', must be a regular expression"),
        ({"multipleOf": 0}, "must be a number above 0"),
        ({"minItems": True}, "must be a whole number, 0 or more"),
        ({"anyOf": []}, "must be a list of schemas"),
        ({"required": "a"}, "must be a list of names"),
    ],
)
def test_a_schema_that_would_be_ignored_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        json_schema.check(schema)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_a_document_is_read_back_and_is_what_it_is(value: Any) -> None:
    read = json_schema.parse(json.dumps(value))
    assert json_schema.equal(read, value)
    assert json_schema.valid(read, {"const": value})
    assert json_schema.valid(read, True)
    assert not json_schema.valid(read, {"not": {}})


@pytest.mark.parametrize("text", ["", "{", "{} {}", "NaN", "[Infinity]", '{"a": 1, "a": 2}', "[" * 100_000, "'a'"])
def test_what_is_no_document(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  json's own texts
        json_schema.parse(text)
