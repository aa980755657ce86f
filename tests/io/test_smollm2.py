"""SmolLM2-135M, a real checkpoint: greedy continuations equal transformers' own, token by token."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("greedy_table", Path(__file__).with_name("greedy_table.py"))
assert _spec is not None and _spec.loader is not None
greedy_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(greedy_table)


@pytest.mark.slow
def test_greedy_continuations_equal_those_of_transformers(tmp_path: Path):
    for name in ("torch", "accelerate"):
        pytest.importorskip(name, reason="needs the extra `parity`")
    file = greedy_table.find_file()
    if file is None:
        pytest.skip("make smollm2 fetches the model")
    model, rows = greedy_table.compare(file, tmp_path / "model")
    print(greedy_table.table(model, rows))
    assert len(rows) == 20
    for row in rows:
        assert row.same_prompt, row.prompt
        assert row.ours == row.theirs and len(row.ours) == 32, row.prompt
