"""The YAML reader: what its values mean, where its keys stand, and what it refuses."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.yaml_reader import MAX_BYTES, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("1.", 1.0), ("3.14", 3.14),
        ("0", 0), ("-7", -7), ("+7", 7), ("0x1f", 31), ("0o17", 15),
        ("010", "010"), ("1_000", "1_000"),
        (".inf", math.inf), ("-.inf", -math.inf),
        ("~", None), ("", None), ("null", None),
        ("true", True), ("False", False), ("no", "no"), ("off", "off"), ("yes", "yes"), ("NO", "NO"),
        ("y", "y"),
        ("2024-01-31", "2024-01-31"), ("1:30", "1:30"), ("'1e-3'", "1e-3"), ('"true"', "true"),
        ("a b", "a b"),
        ("[1, no, 1e-3]", [1, "no", 0.001]), ("{a: {b: [c]}}", {"a": {"b": ["c"]}}), ("|\n  1\n", "1\n"),
    ],
)  # fmt: skip
def test_a_value_means_what_it_says(text, value):
    read = read_yaml(text).content
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number():
    assert math.isnan(read_yaml(".nan").content)


def test_each_key_and_item_has_its_line_and_column():
    document = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n")
    assert document.place(("a",)) == (1, 1)
    assert document.place(("a", "b")) == (2, 3)
    assert document.place(("a", "c", 1)) == (5, 7)
    assert document.place(("a", "c", 1, "d")) == (5, 8)
    assert document.place(("a", "missing", "deeper")) == (1, 1)
    assert document.place(("nothing",)) == (1, 1)
    assert "recipe.yaml, line 2, column 3: wrong" in str(
        read_yaml("a:\n  b: 1\n", name="recipe.yaml").error("a", "b", what="wrong")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key 'a' appears twice"),
        ("x: {1: a, 1.0: b}", "line 1, column 11: the key 1.0 appears twice"),
        ("a: !!python/object:os.system x", "line 1, column 4: tags are not allowed"),
        ("a: !!str 1", "line 1, column 4: tags are not allowed"),
        ("!x a: 1", "line 1, column 1: tags are not allowed"),
        ("c:\n  <<: {x: 1}\n", r"line 2, column 3: merge keys \(<<\) are not allowed"),
        ("a: &x [1]\nb: *x\n", r"line 2, column 4: aliases are not allowed \(\*x\)"),
        ("base: &b {x: 1}\nc:\n  <<: *b\n", r"line 3, column 7: aliases are not allowed"),
        ("a: *b", r"line 1, column 4: aliases are not allowed \(\*b\)"),
        ("a: &b [*b]", r"line 1, column 8: aliases are not allowed \(\*b\)"),
        ("*a : 1", r"line 1, column 1: aliases are not allowed \(\*a\)"),
        ("? [a]\n: 1", "line 1, column 3: a key must be a name or a number"),
        ("~: 1", "line 1, column 1: a key is missing"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: a second document begins here"),
        ("a: [1, 2\nb: 3\n", "line 2, column"),
        ("a: 'open", "line 1, column"),
        ("a: b: c", "line 1, column"),
        ("\ta: 1", "line 1, column"),
        ("a: 1\nb: \x07", "line 2, column 4: a character that YAML does not allow"),
        ("[" * 100 + "]" * 100, "more than 64 levels deep"),
        ("a: " + "9" * 1001, "line 1, column 4: a whole number of more than 1000 digits"),
    ],
)
def test_what_is_refused_is_refused_with_line_and_column(text, message):
    with pytest.raises(UsageError, match=message):
        read_yaml(text, name="r.yaml")


def test_text_is_refused_when_aliases_would_multiply_it():
    flood = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
    flood += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    with pytest.raises(UsageError, match=r"line 2, column 10: aliases are not allowed \(\*a0\)"):
        read_yaml(flood)


def test_a_file_is_read_with_its_name_in_errors(tmp_path):
    path = tmp_path / "zoo.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path).content == {"a": 1}
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(UsageError, match=r"zoo\.yaml, line 2, column 4: not UTF-8 text"):
        read_yaml(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        read_yaml(path)
    with pytest.raises(MissingInputError, match=r"(?s)no file .*did you mean 'zoo\.yaml'"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(MissingInputError, match="is a folder, not a file"):
        read_yaml(tmp_path)


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#, \n\t0123456789.e~<?%@`\x00\x85\ud800", max_size=40))
def test_any_text_is_read_or_refused_with_our_error(text):
    with contextlib.suppress(UsageError):
        assert read_yaml(text).place(()) == (1, 1)
