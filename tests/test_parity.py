"""Each training step equals PyTorch's: same weights, batches and masks in, same losses, parameters and moments out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import parity
import pytest

ROOT = Path(__file__).parents[1]
STEPS = 300


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_float32_steps_equal_pytorch_s(rate):
    differences = parity.compare(rate, STEPS)
    print(json.dumps(differences, indent=1))
    assert differences["loss (relative)"] < 1e-4
    assert differences["parameters"] < 1e-3
    # The moments' own sizes: gradients are of the order of 1e-2, their squares of 1e-4.
    assert differences["Adam's first moment"] < 1e-4
    assert differences["Adam's second moment"] < 1e-6
    assert differences["Adam's step count"] == 0
    assert differences["evaluation loss (relative)"] < 1e-6
    # One example of 10,000 may be a tie within rounding.
    assert differences["evaluation accuracy"] < 1.5e-4
    # 28,672 units a step, one of which is now and then 0 within rounding.
    assert differences["steps with a sign that differed"] < 15


def test_float64_steps_equal_pytorch_s_so_that_only_rounding_is_left():
    command = [sys.executable, "tests/parity.py", str(STEPS), "0.0", "0.2"]
    environment = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    of_rates = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(of_rates) == 2
    for differences in of_rates:
        print(json.dumps(differences, indent=1))
        for name, difference in differences.items():
            assert difference < 1e-10, name
