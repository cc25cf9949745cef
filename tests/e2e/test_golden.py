"""The golden curve: loss, gradient norm and zero count of 50 steps, equal to the last bit.

A processor without a record of its own may differ from the recorded ones in the last bit of an exponential.
It is held to them by the first steps, where such a bit has not grown: a change of mathematics shows there.
"""

import importlib.util
import math
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("golden_curve", Path(__file__).with_name("golden_curve.py"))
assert spec is not None and spec.loader is not None
golden_curve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden_curve)

HOW_TO_RECORD = "record it with: python tests/e2e/golden_curve.py"
# Between two processors the loss of steps 2 to 10 differed by up to 3e-9 (relative), the norm by 9e-8.
# A hundred roundings of fp32 are far above that and far below any change of a rule.
FIRST_STEPS, FIRST_STEPS_RTOL = 5, 100 * 2.0**-24


def first_difference(recorded: list[dict[str, str]], actual: list[dict[str, str]]) -> str | None:
    for step, (expected, found) in enumerate(zip(recorded, actual, strict=True), 1):
        if found != expected:
            return f"step {step} moved: {expected} -> {found}"
    return None


def close(expected: dict[str, str], found: dict[str, str]) -> bool:
    pairs = [(float.fromhex(expected[name]), float.fromhex(found[name])) for name in expected]
    return all(math.isclose(a, b, rel_tol=FIRST_STEPS_RTOL) for a, b in pairs)


@pytest.mark.slow
def test_the_curve_is_the_recorded_one() -> None:
    records, actual = golden_curve.records(), golden_curve.run()
    assert records, f"no golden curve for {golden_curve.key()}; {HOW_TO_RECORD}"
    assert len(actual) == golden_curve.NUM_STEPS
    differences = {name: first_difference(recorded, actual) for name, recorded in records.items()}
    if None in differences.values():
        return
    own = golden_curve.record_file().name
    assert own not in records, (
        f"{own}: {differences[own]}. If numerics were meant to change, add a CHANGELOG entry under Numerics "
        f"and {HOW_TO_RECORD}"
    )
    recorded = next(iter(records.values()))
    for step in range(FIRST_STEPS):
        assert close(recorded[step], actual[step]), f"step {step + 1}: {recorded[step]} -> {actual[step]}"


@pytest.mark.slow
def test_the_curve_notices_another_seed() -> None:
    # The first step is compared: it does not know how many steps follow.
    first = golden_curve.run("run.seed=4321", "run.train_steps=16")[0]
    for recorded in golden_curve.records().values():
        assert first != recorded[0] and not close(recorded[0], first)
