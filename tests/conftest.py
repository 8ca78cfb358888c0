"""What tests share: where the published fixtures are, and model files made on the spot."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # small tensors; more threads only wait for each other


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of numerical fixtures and real data; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("LOCALDEPTH_FIXTURES", ROOT.parent / "shared"))
    if not (folder / "parity").is_dir():
        pytest.skip(f"no fixtures in {folder}; set LOCALDEPTH_FIXTURES")
    return folder
