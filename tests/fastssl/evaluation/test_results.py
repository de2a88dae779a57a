"""The file of results of evaluations."""

import pytest

from fastssl.evaluation.results import append_line


@pytest.mark.parametrize(
    ("before", "kept"),
    [("", ""), ('{"a": 1}\n', '{"a": 1}\n'), ('{"a": 1}\n{"a": "cut', '{"a": 1}\n'), ('{"a": 1}', '{"a": 1}\n')],
)
def test_a_line_that_a_kill_has_cut_off_is_replaced(before, kept, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text(before)
    append_line(path, {"b": 2})
    assert path.read_text() == kept + '{"b": 2}\n'
