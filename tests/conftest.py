"""What tests share: where the published fixtures are, and a small model file with a tokenizer."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from localdepth.engine.toy import random_weights
from localdepth.loading import load
from localdepth.model import Model
from localdepth.record import TokenizerRecord
from tests import engines
from tests.published import EXPECTED

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for m in messages %}<user>{{ m.content }}<answer>{% endfor %}"

torch.set_num_threads(1)  # small tensors; more threads only wait for each other

# What tests start obeys signals as from a terminal, also where the tests run in the background or under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of numerical fixtures and real data; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("LOCALDEPTH_FIXTURES", ROOT.parent / "shared"))
    if not (folder / "parity").is_dir():
        pytest.skip(f"no fixtures in {folder}; set LOCALDEPTH_FIXTURES")
    return folder


def tokenizer_json() -> str:
    """A byte-level BPE of 300 tokens with control tokens 0 <bos>, 1 <eos>, 2 <user>, 3 <answer>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>", "<user>", "<answer>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the rat ate the oats"] * 4, trainer)
    text: str = tokenizer.to_str()
    return text


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Huginn-shaped model with random weights, tokenizer and chat template, as F32."""
    config = replace(EXPECTED["huginn"], n_vocab=300, n_ctx=64)
    record = TokenizerRecord(tokenizer_json(), bos=0, eos=(1,), add_bos=True, chat_template=TEMPLATE)
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return engines.write_model(path, config, random_weights(config, seed=3), tokenizer=record)


@pytest.fixture
def model(model_file: Path) -> Iterator[Model]:
    """That model, loaded with a float32 cache."""
    with load(model_file, kv_type="f32") as loaded:
        yield loaded
