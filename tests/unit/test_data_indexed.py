"""The token file format, and its agreement with megatron-core byte for byte."""

import numpy as np
import pytest

from nemomodel.data.indexed import HEADER, IndexedFile, IndexedWriter, file_of, token_dtype

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [1], [9] * 11 + [0]]


def write(prefix, documents, *, dtype="<u2"):
    writer = IndexedWriter(prefix, dtype=np.dtype(dtype))
    for tokens in documents:
        writer.add(np.array(tokens))
    writer.finish()
    return prefix


@pytest.fixture(scope="session")
def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_files_equal_those_of_megatron_byte_for_byte(megatron, tmp_path, dtype):
    theirs, ours = tmp_path / "theirs", write(tmp_path / "ours", DOCUMENTS, dtype=dtype)
    builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=getattr(np, dtype))
    for tokens in DOCUMENTS:
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{theirs}.idx")

    for suffix in (".bin", ".idx"):
        assert file_of(ours, suffix).read_bytes() == file_of(theirs, suffix).read_bytes()
    file = IndexedFile(theirs)
    assert file.tokens.tolist() == [token for tokens in DOCUMENTS for token in tokens]
    assert file.num_documents == len(DOCUMENTS)


def test_megatron_reads_our_files(megatron, tmp_path):
    dataset = megatron.IndexedDataset(str(write(tmp_path / "a", DOCUMENTS)))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_documents_of_several_sequences_have_one_number(megatron, tmp_path):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(np.array([6]), [1])
    builder.add_document(np.array([], dtype=np.int64), [0])
    builder.add_document(np.array([7, 8]), [2])
    builder.finalize(str(tmp_path / "a.idx"))
    file = IndexedFile(tmp_path / "a")
    assert file.documents(0, 8).tolist() == [0, 0, 0, 0, 0, 1, 2, 2]
    assert file.documents(3, 7).tolist() == [0, 0, 1, 2]
    assert file.documents(6, 8).tolist() == [0, 0]


@pytest.mark.parametrize("size", [300, 65499, 65500, 65536, 131072])
def test_the_dtype_is_the_one_megatron_takes(megatron, size):
    assert token_dtype(size) == np.dtype(megatron.DType.optimal_dtype(size))


def test_document_numbers_agree_with_a_plain_count(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 9, size=60)
    file = IndexedFile(write(tmp_path / "a", [[1] * n for n in lengths]))
    owner = np.repeat(np.arange(60), lengths)
    for start in range(0, len(file) - 20):
        expected = owner[start : start + 20] - owner[start]
        assert file.documents(start, start + 20).tolist() == expected.tolist()


def test_a_prefix_may_have_a_dot(tmp_path):
    assert len(IndexedFile(write(tmp_path / "v1.5", DOCUMENTS))) == 19


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: file_of(p, ".bin").unlink(), r"a\.bin: no such file"),
        (lambda p: file_of(p, ".idx").unlink(), r"a\.idx: no such file"),
        (lambda p: cut(file_of(p, ".bin"), 2), r"a\.bin: has 36 bytes, a\.idx describes 38"),
        (lambda p: file_of(p, ".bin").write_bytes(b""), r"a\.bin: has 0 bytes"),
        (lambda p: cut(file_of(p, ".idx"), 1), r"a\.idx: has 121 bytes, its header asks for 122"),
        (lambda p: file_of(p, ".idx").write_bytes(b"x" * 99), r"a\.idx: is not an index"),
        (lambda p: file_of(p, ".idx").write_bytes(b""), r"a\.idx: is not an index"),
        (
            lambda p: file_of(p, ".idx").write_bytes(HEADER.pack(b"MMIDIDX\0\0", 2, 8, 0, 1)),
            r"a\.idx: version 2, dtype code 8; readable are version 1",
        ),
        (
            lambda p: file_of(p, ".idx").write_bytes(HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 0)),
            r"a\.idx: holds no documents",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    prefix = write(tmp_path / "a", DOCUMENTS)
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        IndexedFile(prefix)


def test_offsets_that_do_not_fit_are_found(tmp_path):
    path = file_of(write(tmp_path / "a", DOCUMENTS), ".idx")
    data = bytearray(path.read_bytes())
    data[-8:] = (99).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.idx: its offsets do not span its 4 sequences"):
        IndexedFile(tmp_path / "a")
