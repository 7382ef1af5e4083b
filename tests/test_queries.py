"""Queries as they are made and as JSON has them, and what is none."""

import base64
import json
import math
from typing import Any

import pytest

from pipelines.indexes.filters import Condition
from pipelines.indexes.queries import Part, Query, query_from_json


def test_json_says_all_that_python_does():
    record = {
        "parts": [
            {"text": "red shoe", "weight": 2},
            {"image": base64.b64encode(b"\x00\xff picture").decode()},
            {"key": "k7", "weight": -0.5},
            {"key": 7},
            {"vector": [0.5, 1]},
        ],
        "where": [{"column": "price", "operator": "lt", "value": 20}],
    }
    assert query_from_json(json.loads(json.dumps(record))) == (
        Query(
            parts=(
                Part(text="red shoe", weight=2),
                Part(image=b"\x00\xff picture"),
                Part(key="k7", weight=-0.5),
                Part(key=7),
                Part(vector=(0.5, 1)),
            )
        ),
        (Condition(column="price", operator="lt", value=20),),
    )
    assert query_from_json({"parts": [{"text": "a"}]}) == (Query(parts=(Part(text="a"),)), ())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "has nothing to look for; give it exactly one of text, image, key, vector"),
        ({"text": "a", "key": "b"}, "has text and key; give it exactly one"),
        ({"text": "  "}, "query text is empty"),
        ({"text": "\ud800"}, "no valid Unicode"),
        ({"text": 3}, "text is 3; expected a string"),
        ({"image": "é"}, "no base64"),
        ({"image": "data:image/png;base64,AAAA"}, "no base64"),
        ({"image": 3}, "no base64"),
        ({"key": 1.5}, r"key=1\.5: expected text or an integer"),
        ({"key": True}, "key=True: expected"),
        ({"vector": "abc"}, "vector is 'abc'; expected a list"),
        ({"vector": ["a"]}, "expected numbers"),
        ({"vector": [True]}, "expected numbers"),
        ({"vector": []}, "is zero"),
        ({"vector": [0.0, 0]}, "is zero"),
        ({"vector": [1, math.nan]}, "not finite"),
        ({"vector": [10**400]}, "not finite"),
        ({"text": "a", "weight": 0}, "weight=0: expected a finite number but 0"),
        ({"text": "a", "weight": math.inf}, "weight=inf: expected"),
        ({"text": "a", "weight": 10**400}, r"weight=10+\.\.\.: expected"),
        ({"text": "a", "weight": "1"}, "weight='1': expected"),
        ({"text": "a", "wieght": 1}, "a part of a query is .*wieght.*; expected such as"),
        ("red shoe", "a part of a query is 'red shoe'; expected such as"),
    ],
)
def test_what_is_no_part_is_said(part: Any, message: str):
    with pytest.raises(ValueError, match=message):
        query_from_json({"parts": [part]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "a query is None; expected such as"),
        ({"part": []}, "expected such as"),
        ({"parts": [{"text": "a"}], "k": 3}, "expected such as"),
        ({"parts": {"text": "a"}}, "parts are .*; expected a list"),
        ({"parts": []}, "has no parts; say what to be near to"),
        ({"parts": [{"text": "a", "weight": -1}]}, "only what to be far from; say what"),
        ({"parts": [{"text": "a"}], "where": {}}, "expected a list of conditions"),
    ],
)
def test_what_is_no_query_is_said(record: Any, message: str):
    with pytest.raises(ValueError, match=message):
        query_from_json(record)
