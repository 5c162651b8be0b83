"""The same bits in any company where products are computed as an older processor computes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OLDER = {
    "no vector unit": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


@pytest.mark.parametrize("processor", OLDER)
def test_company_changes_no_bit_on_an_older_processor(processor: str) -> None:
    cases = "company and (1-5 or 3-11) and (image or text-cnn or llama or bert)"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-rA", "-k", cases]
    told = subprocess.run(
        [*command, str(HERE / "test_cohort_models.py")],
        env=os.environ | OLDER[processor],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stdout[-3000:]
    assert told.stdout.count("PASSED") == 10
