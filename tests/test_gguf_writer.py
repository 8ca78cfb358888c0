"""Files are written whole or not at all, in little memory, and say what they were told."""

import os
import resource
import stat
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdepth.config import ModelConfig
from localdepth.errors import ConfigError, ModelFileError, StorageError
from localdepth.gguf import ARCHITECTURE, Key, read
from localdepth.quant import Quant
from localdepth.record import Check, CheckStatus, TokenizerRecord
from localdepth_export.gguf_writer import write, write_check
from tests.strategies import configs, quants, stored

CONFIG = ModelConfig(
    n_prelude=1,
    n_core=1,
    n_coda=1,
    n_embd=32,
    n_head=2,
    n_head_kv=1,
    head_dim=16,
    n_ff=64,
    n_vocab=50,
    n_ctx=128,
    norm_eps=1e-6,
    default_depth=8,
    max_depth=32,
)
QUANTS = {name: Quant.F32 if len(shape) == 1 else Quant.Q8_0 for name, shape in CONFIG.tensors().items()}
TOKENIZER = TokenizerRecord('{"model": "é"}', bos=1, eos=(2, 7), add_bos=True, chat_template="{{ x }}")
PROVENANCE = {"source": "örg/model", "license": "apache-2.0", "exporter": "0.1", "quant": "Q8_0"}
CHECK = Check(CheckStatus.VERIFIED, depths=(1, 16), max_abs=(1e-5, 0.1), kl=(1e-17, 2e-4), top1=(1.0, 0.1 + 0.2))

some_files = settings(max_examples=40, deadline=None)  # each example writes a file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write(path, CONFIG, QUANTS, stored(CONFIG, QUANTS).items(), tokenizer=TOKENIZER, provenance=PROVENANCE)
    return path


def failing(error: BaseException) -> Iterator[tuple[str, np.ndarray]]:
    """Half of the tensors, then ``error``."""
    tensors = list(stored(CONFIG, QUANTS).items())
    yield from tensors[: len(tensors) // 2]
    raise error


@some_files
@given(st.data())
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    config = data.draw(configs())
    kinds = data.draw(quants(config))
    weights = stored(config, kinds, seed=data.draw(st.integers(0, 9)))
    path = tmp_path_factory.mktemp("files") / "model.gguf"
    write(path, config, kinds, weights.items())
    with read(path) as file:
        assert file.config == config
        assert list(file.tensors) == list(config.tensors())
        for name, info in file.tensors.items():
            assert (info.shape, info.quant) == (config.tensors()[name], kinds[name])
            assert info.offset % 32 == 0
            np.testing.assert_array_equal(file.data(name), weights[name])
        assert (file.tokenizer, file.provenance, file.check, file.router) == (None, {}, None, {})


@some_files
@given(st.data())
def test_the_gguf_package_reads_the_same_numbers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    config = data.draw(configs())
    kinds = data.draw(quants(config))
    path = tmp_path_factory.mktemp("files") / "model.gguf"
    write(path, config, kinds, stored(config, kinds).items(), tokenizer=TokenizerRecord("{}", eos=(2,)))
    theirs = gguf.GGUFReader(path)
    assert theirs.get_field("general.architecture").contents() == ARCHITECTURE
    assert theirs.get_field("localdepth.norm_eps").contents() == config.norm_eps
    assert theirs.get_field("tokenizer.ggml.eos_token_id").contents() == 2
    with read(path) as ours:
        assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            assert (tensor.data_offset, tensor.n_bytes) == (info.offset, info.n_bytes)
            assert tuple(reversed(tensor.shape.tolist())) == info.shape
            values = ours.array(tensor.name)
            assert (values.dtype, values.shape, values.flags.writeable) == (np.float32, info.shape, True)
            np.testing.assert_array_equal(values, gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def test_tokenizer_provenance_and_check_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    provenance = PROVENANCE | {"fallbacks": ("core.0.ffn_down.weight: Q8_0 -> F16", "output.weight: Q8_0 -> F16")}
    write(path, CONFIG, QUANTS, stored(CONFIG, QUANTS).items(), tokenizer=TOKENIZER, provenance=provenance, check=CHECK)
    with read(path) as file:
        assert (file.tokenizer, file.provenance, file.check) == (TOKENIZER, provenance, CHECK)


def test_empty_texts_and_lists_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tokenizer = TokenizerRecord("{}", chat_template="")
    provenance = {"source": "", "fallbacks": ()}
    check = Check(CheckStatus.UNVERIFIED)
    write(path, CONFIG, QUANTS, stored(CONFIG, QUANTS).items(), tokenizer=tokenizer, provenance=provenance, check=check)
    with read(path) as file:
        assert (file.tokenizer, file.provenance, file.check) == (tokenizer, {"source": ""}, check)


def test_numpy_numbers_are_accepted_in_a_check(model: Path) -> None:
    check = Check(CheckStatus.VERIFIED, (np.int64(4),), (np.float32(0.5),), (np.float64(0.25),), (np.float32(1),))
    write_check(model, check)
    with read(model) as file:
        assert file.check == check


def test_writing_twice_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.gguf"
    write(again, CONFIG, QUANTS, stored(CONFIG, QUANTS).items(), tokenizer=TOKENIZER, provenance=PROVENANCE)
    assert again.read_bytes() == model.read_bytes()


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    config = replace(CONFIG, n_embd=512, n_ff=2048, n_core=4)
    kinds = dict.fromkeys(config.tensors(), Quant.F32)
    largest = 512 * 2048 * 4
    made = ((name, np.zeros(kinds[name].n_bytes(shape), np.uint8)) for name, shape in config.tensors().items())
    tracemalloc.start()
    try:
        write(tmp_path / "model.gguf", config, kinds, made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * largest
    assert (tmp_path / "model.gguf").stat().st_size > 10 * largest


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), FileNotFoundError("shard 2")])
def test_a_failure_in_between_leaves_the_old_file_and_nothing_else(model: Path, error: BaseException) -> None:
    before = model.read_bytes()
    with pytest.raises(type(error)):
        write(model, CONFIG, QUANTS, failing(error))
    assert model.read_bytes() == before
    assert os.listdir(model.parent) == [model.name]


@pytest.mark.parametrize("missing_bytes", [1, 50, 1800, 100_000])
def test_a_full_disk_is_a_storage_error_wherever_it_fills(model: Path, missing_bytes: int) -> None:
    before = model.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - missing_bytes, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            write(model, CONFIG, QUANTS, stored(CONFIG, QUANTS).items(), tokenizer=TOKENIZER, provenance=PROVENANCE)
        with pytest.raises(StorageError, match="cannot be written"):
            write_check(model, CHECK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert model.read_bytes() == before
    assert os.listdir(model.parent) == [model.name]


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        write(tmp_path / "nowhere" / "model.gguf", CONFIG, QUANTS, stored(CONFIG, QUANTS).items())


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a directory"):
        write(tmp_path, CONFIG, QUANTS, stored(CONFIG, QUANTS).items())


def test_the_mode_of_a_replaced_file_is_kept(model: Path) -> None:
    model.chmod(0o640)
    write(model, CONFIG, QUANTS, stored(CONFIG, QUANTS).items())
    assert stat.S_IMODE(model.stat().st_mode) == 0o640
    write_check(model, CHECK)
    assert stat.S_IMODE(model.stat().st_mode) == 0o640


def test_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(tmp_path / "model.gguf", CONFIG, QUANTS, stored(CONFIG, QUANTS).items())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model.gguf").stat().st_mode) == 0o640


def test_a_symbolic_link_is_followed(model: Path) -> None:
    link = model.with_name("link.gguf")
    link.symlink_to(model)
    write_check(link, CHECK)
    assert link.is_symlink()
    with read(model) as file:
        assert file.check == CHECK


def test_a_check_changes_its_own_keys_only(model: Path) -> None:
    before = gguf.GGUFReader(model)
    write_check(model, replace(CHECK, depths=(1,), max_abs=(9.0,), kl=(9.0,), top1=(0.0,)))
    write_check(model, CHECK)
    after = gguf.GGUFReader(model)
    with read(model) as file:
        assert (file.config, file.tokenizer, file.provenance, file.check) == (CONFIG, TOKENIZER, PROVENANCE, CHECK)
    kept = [key for key in after.fields if not key.startswith(("localdepth.check.", "GGUF."))]
    assert kept == [key for key in before.fields if not key.startswith("GGUF.")]
    assert len(after.fields) == len(before.fields) + 5
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.tensor_type) == (new.name, new.tensor_type)
        np.testing.assert_array_equal(old.data, new.data)


def test_a_check_leaves_foreign_keys_and_alignment_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_custom_alignment(4096)
    writer.add_uint32(Key.FORMAT_VERSION, 1)
    for name, value in CONFIG.to_dict().items():
        {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float64, str: writer.add_string}[type(value)](
            f"localdepth.{name}", value
        )
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ü"])
    writer.add_array("localdepth.router.weights", [0.5, 0.25])
    weights = stored(CONFIG, dict.fromkeys(CONFIG.tensors(), Quant.F32))
    for name, shape in CONFIG.tensors().items():
        writer.add_tensor(name, weights[name].view(np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_check(path, CHECK)
    theirs = gguf.GGUFReader(path)
    assert theirs.alignment == 4096
    assert theirs.get_field("tokenizer.ggml.tokens").contents() == ["a", "", "ü"]
    with read(path) as file:
        assert (file.config, file.check) == (CONFIG, CHECK)
        np.testing.assert_array_equal(file.router["weights"], [0.5, 0.25])
        for name in file.tensors:
            assert file.tensors[name].offset % 4096 == 0
            np.testing.assert_array_equal(file.data(name), weights[name])


def test_a_check_is_not_written_into_a_broken_file(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="cut short"):
        write_check(model, CHECK)


def test_tensors_must_come_in_order(tmp_path: Path) -> None:
    weights = stored(CONFIG, QUANTS)
    with pytest.raises(ConfigError, match=r"token_embd\.weight comes next in the file, output\.weight was given"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS, reversed(weights.items()))
    with pytest.raises(ConfigError, match=r"tensor output\.weight comes next in the file, nothing was given"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS, list(weights.items())[:-1])
    with pytest.raises(ConfigError, match="tensor extra comes after the last one"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS, [*weights.items(), ("extra", np.zeros(1, np.uint8))])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("wrong", [np.zeros(3, np.uint8), np.zeros(50 * 34, np.int8), np.zeros((50, 32), np.float32)])
def test_tensor_bytes_must_have_their_size(tmp_path: Path, wrong: np.ndarray) -> None:
    weights = stored(CONFIG, QUANTS) | {"token_embd.weight": wrong}
    with pytest.raises(ConfigError, match=r"token_embd\.weight needs 1700 bytes of uint8"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS, weights.items())


@pytest.mark.parametrize("quant", [Quant.Q4_K, Quant.Q6_K])
def test_a_quant_must_fit_the_rows(tmp_path: Path, quant: Quant) -> None:
    with pytest.raises(ConfigError, match=f"cannot be stored as {quant}"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS | {"token_embd.weight": quant}, [])


def test_norms_must_be_float32(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output_norm\.weight of shape \[32\] cannot be stored as F16"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS | {"output_norm.weight": Quant.F16}, [])


def test_quants_must_name_every_tensor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"do not name the tensors of the model: output\.weight"):
        write(tmp_path / "model.gguf", CONFIG, {n: q for n, q in QUANTS.items() if n != "output.weight"}, [])


@pytest.mark.parametrize(
    "tokenizer",
    [TokenizerRecord("{}", bos=50), TokenizerRecord("{}", eos=(1, -1)), TokenizerRecord("{}", add_bos=True)],
)
def test_token_ids_must_exist(tmp_path: Path, tokenizer: TokenizerRecord) -> None:
    with pytest.raises(ConfigError, match="token"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS, [], tokenizer=tokenizer)


@pytest.mark.parametrize("provenance", [{"author": "me"}, {"source": ("a",)}, {"fallbacks": "a"}])
def test_provenance_has_a_fixed_form(tmp_path: Path, provenance: dict[str, str | tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError, match="provenance"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS, [], provenance=provenance)


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not Unicode"):
        write(tmp_path / "model.gguf", CONFIG, QUANTS, [], tokenizer=TokenizerRecord("{}", chat_template="\ud83d"))
    assert os.listdir(tmp_path) == []


def test_a_check_compares_at_each_of_its_depths() -> None:
    with pytest.raises(ConfigError, match="each of the depths"):
        Check(CheckStatus.VERIFIED, depths=(1, 2), max_abs=(0.0,), kl=(0.0, 0.0), top1=(1.0, 1.0))
    with pytest.raises(ConfigError, match="with 0 depths"):
        Check(CheckStatus.VERIFIED)
