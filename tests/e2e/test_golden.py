"""The golden curve: loss, gradient norm and zero count of 50 steps, equal to the last bit."""

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("golden_curve", Path(__file__).with_name("golden_curve.py"))
assert spec is not None and spec.loader is not None
golden_curve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden_curve)

HOW_TO_RECORD = "record it with: python tests/e2e/golden_curve.py"


@pytest.mark.slow
def test_the_curve_is_the_recorded_one() -> None:
    path = golden_curve.record_file()
    assert path.exists(), f"no golden curve for {golden_curve.key()}; {HOW_TO_RECORD}"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert len(recorded) == golden_curve.NUM_STEPS
    for step, (expected, actual) in enumerate(zip(recorded, golden_curve.run(), strict=True), 1):
        assert actual == expected, (
            f"step {step} moved: {expected} -> {actual}. If numerics were meant to change, add a CHANGELOG "
            f"entry under Numerics and {HOW_TO_RECORD}"
        )


@pytest.mark.slow
def test_the_curve_notices_another_seed() -> None:
    recorded = json.loads(golden_curve.record_file().read_text(encoding="utf-8"))
    assert golden_curve.run("run.seed=4321")[0] != recorded[0]
