"""Keys are what resume, tables and committed results hang on: they must never move."""

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_bench.case import Case, Record

CASE = Case(
    suite="efficiency",
    arch="cat:chunk_size=8",
    batch_size=4,
    prompt_len=8,
    seq_len=64,
    dtype="bfloat16",
    device="cuda",
    decode_path="cuda_graph",
    scale="h100",
    settings=(("reference", "0"),),
)
KEY = "f61cc7f21c22"  # of CASE; if it changes, every stored run loses its cases

texts = st.text(st.characters(codec="utf-8"), max_size=12)
sizes = st.integers(min_value=1, max_value=2**40)
cases = st.builds(
    Case,
    suite=texts,
    arch=texts,
    batch_size=sizes,
    prompt_len=sizes,
    seq_len=sizes,
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
    device=st.sampled_from(["cpu", "cuda"]),
    seed=st.integers(min_value=0, max_value=2**63),
    protocol=st.none() | texts,
    settings=st.lists(st.tuples(texts, texts), max_size=3).map(sorted).map(tuple),
)


def test_the_key_is_pinned():
    assert CASE.key == KEY


def test_the_key_is_the_same_in_another_process():
    program = (
        "import sys, json; from cat_bench.case import Case;"
        "print(Case.from_dict(json.load(sys.stdin)).key)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(asdict(CASE)),
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == KEY


OTHER_VALUES = {
    "suite": "training",
    "arch": "dense",
    "batch_size": 5,
    "prompt_len": 9,
    "seq_len": 65,
    "dtype": "float32",
    "device": "cpu",
    "seed": 1,
    "decode_path": "eager",
    "forward_path": "flex",
    "scale": "paper",
    "weights": "0123456789ab",
    "protocol": "jrt@1",
    "settings": (("reference", "1"),),
}


def test_every_field_is_tried():
    assert set(OTHER_VALUES) == {field.name for field in fields(Case)}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_field_is_part_of_the_key(name: str):
    assert replace(CASE, **{name: OTHER_VALUES[name]}).key != KEY


def test_asking_for_the_key_changes_nothing():
    fresh, asked = replace(CASE), replace(CASE)
    assert asked.key == KEY
    assert asked == fresh and hash(asked) == hash(fresh) and asdict(asked) == asdict(fresh)


@settings(max_examples=50, deadline=None)
@given(cases)
def test_a_case_survives_json(case: Case):
    back = Case.from_dict(json.loads(json.dumps(asdict(case))))
    assert back == case
    assert back.key == case.key
    assert len(case.key) == 12 and int(case.key, 16) >= 0


def test_settings_come_back_as_a_tuple_of_pairs():
    back = Case.from_dict(json.loads(json.dumps(asdict(CASE))))
    assert back.settings == (("reference", "0"),)
    assert hash(back) == hash(CASE)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="colour"):
        Case.from_dict({**asdict(CASE), "colour": "red"})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch_size", "one", "batch_size is 'one', expected a whole number"),
        ("seq_len", 64.5, "seq_len is 64.5, expected a whole number"),
        ("arch", None, "arch is None, expected a text"),
        ("protocol", 3, "protocol is 3, expected a text"),
    ],
)
def test_a_value_of_another_type_is_refused(field: str, value: object, words: str):
    with pytest.raises(ValueError, match=words):
        Case.from_dict({**asdict(CASE), field: value})


def test_new_tokens():
    assert CASE.new_tokens == 56


def test_cases_and_records_are_frozen():
    with pytest.raises(FrozenInstanceError):
        CASE.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    record = Record(case=KEY, metric="latency_s", value=1.0, unit="s")
    with pytest.raises(FrozenInstanceError):
        record.value = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_records_do_not_share_their_samples():
    first, second = (Record(case=KEY, metric="m", value=None, unit="s") for _ in range(2))
    first.samples.append(1.0)
    assert second.samples == []
