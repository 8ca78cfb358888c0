"""Where a model computes: the CPU, or a device of its own with the CPU behind it."""

import subprocess
import sys
from pathlib import Path

import pytest

from localdepth.engine.ggml.lib import GPU_TYPES, library
from localdepth.errors import ConfigError, EngineError
from localdepth.loading import load

ROOT = Path(__file__).parent.parent
HAS_GPU = any(library().ggml_backend_dev_type(device) in GPU_TYPES for device in library().devices())
# Runs in a process of its own: a registered server cannot be taken back, and ggml aborts when it goes away.
PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from localdepth.engine.base import KvType, Limits
from localdepth.engine.ggml.device import DeviceName
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.toy import random_weights
from localdepth.gguf import read
from localdepth.loading import load
from localdepth.model import Model
from localdepth.prefix import PrefixCache
from localdepth.quant import Quant
from tests import engines
from tests.published import FAMILIES
from tests.rpc.build import build
from tests.rpc.device import register, serve

folder = Path(sys.argv[1])
rpc = build(folder)
with serve(rpc) as endpoint:
    register(rpc, endpoint)
    for name, config in FAMILIES.items():
        config = replace(config, n_ctx=64)
        weights = random_weights(config, 1)
        for quant, ring in ((Quant.F32, None), (Quant.F32, 3), (Quant.Q8_0, None)):
            limits = Limits(n_ctx=64, kv_depth=8, kv_type=KvType.F32, n_batch=7, ring=ring, low_memory=True)
            with read(engines.write_model(folder / "model.gguf", config, weights, quant)) as file:
                cpu, gpu = (GgmlEngine(file, limits, device) for device in (DeviceName.CPU, DeviceName.AUTO))
            assert gpu.device.name == endpoint and not gpu.device.is_host
            ids = np.arange(20, dtype=np.int32)
            for one, other in zip(*(engines.run(e, ids, [1, 2, 5]) for e in (cpu, gpu)), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
            # stopped positions are copied forward between planes of the device
            (tokens, one), (same, other) = (engines.greedy(e, [1, 2, 3], [3, 1, 5, 2, 4]) for e in (cpu, gpu))
            assert tokens == same
            np.testing.assert_allclose(one, other, atol=1e-5)
            logits = []
            for e in (cpu, gpu):
                cache = PrefixCache(e)
                for depth in (2, 6):
                    prefix = cache.take(tuple(range(20)), None, engines.fixed(depth))
                    logits.append(prefix.begin(e, range(20), engines.fixed(depth))[0])
                    cache.keep(prefix)
            np.testing.assert_allclose(logits[1], logits[3], atol=1e-5)
            cpu.close(), gpu.close()
    question = "Start with 22. Take away 9. Add 8. Which digit is last?"
    with load(device="gpu") as model:
        print(model.generate(question, depth=16).text)
"""


@pytest.mark.skipif(HAS_GPU, reason="this build of ggml has a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu() -> None:
    with pytest.raises(EngineError, match=r"no GPU device \(it has CPU\).*device='cpu'"):
        load(device="gpu")
    with load(device="auto") as model:
        assert model.generate("Turn left.", max_tokens=2).text


def test_unknown_devices_and_a_toy_on_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="device='tpu' is not one of auto, cpu, gpu"):
        load(device="tpu")
    with pytest.raises(ConfigError, match="toy engine runs on the CPU"):
        load(engine="toy", device="gpu")


@pytest.mark.slow
def test_another_device_computes_what_the_cpu_does(tmp_path: Path) -> None:
    """On ggml's RPC device over loopback: no host memory, as on a graphics processor, its own copy of the weights."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "The last digit is 1."
