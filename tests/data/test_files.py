import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from kd_jax.data import source
from kd_jax.errors import UserError


def read(path, **keys):
    return list(source.read({"source": "files", "path": path, **keys}, "data.train"))


def write(file, text):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_every_kind_gives_the_same_documents(tmp_path):
    want = ["first, “quoted”", "second"]
    write(tmp_path / "a.txt", "first, “quoted”\n\nsecond\n")
    write(tmp_path / "a.raw", "\ufefffirst, “quoted”\r\nsecond\r\n")
    write(tmp_path / "a.jsonl", "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in want))
    write(tmp_path / "a.csv", 'id,text\n1,"first, “quoted”"\n\n2,second\n')
    write(tmp_path / "a.tsv", "id\ttext\n1\tfirst, “quoted”\n2\tsecond\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": want}), tmp_path / "a.parquet")
    for suffix in ("txt", "raw", "jsonl", "csv", "tsv", "parquet"):
        assert read(str(tmp_path / f"a.{suffix}")) == want, suffix
    assert read(str(tmp_path)) == want * 6
    assert read([str(tmp_path / "*.?sv"), str(tmp_path / "a.txt")]) == want * 3


def test_blank_lines_within_a_file_make_paragraphs(tmp_path):
    assert read(write(tmp_path / "a.txt", "\na\nb\n\nc\n")) == ["a\nb", "c"]
    assert read(write(tmp_path / "b.txt", "\na\nb\n\n")) == ["a", "b"]  # only at its ends


def test_csv_keeps_line_ends_within_quotes_and_tsv_keeps_quotes(tmp_path):
    assert read(write(tmp_path / "a.csv", 'text\n"one\ntwo ""x"""\n')) == ['one\ntwo "x"']
    assert read(write(tmp_path / "a.tsv", 'n\ttext\n1\t"open\n')) == ['"open']


def test_folders_are_searched_to_the_bottom_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "2.txt", "three")
    write(tmp_path / "a.txt", "one\ntwo")
    write(tmp_path / "notes.md", "not read")
    assert read(str(tmp_path)) == ["one", "two", "three"]


def test_another_column(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"body": "x"}\n{"body": null}\n\n{"body": "y"}\n')
    assert read(file, text="body") == ["x", "y"]


def test_documents_can_be_read_again(tmp_path):
    documents = source.read({"path": write(tmp_path / "a.txt", "one\ntwo")}, "data.train")
    assert list(documents) == list(documents) == ["one", "two"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", " \n\n", "a.txt holds no text"),
        ("a.txt", b"good\nb\xe9d\n", r"a.txt, line 2: byte 6 \(0xe9\) is not UTF-8"),
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", '{"a": "x", "b": 1}\n', "line 1: no column 'text'; .* one of: a, b"),
        ("a.jsonl", '{"text": 0}\n', "line 1: 'text' holds int"),
        ("a.csv", "id,txt\n1,x\n", "a.csv, row 2: no column 'text'; .* one of: id, txt"),
        ("a.csv", 'text\n"open\n', "a.csv, after row 1: "),
        ("a.tsv", "id\ttext\n1\n", "a.tsv, row 2: 1 fields, the header 2"),
        ("a.tsv", "text\n", "a.tsv holds no text"),
        ("a.tsv", "\n", "a.tsv holds no text"),
        ("a.parquet", "PAR1 no", "a.parquet is no parquet file"),
        ("a.gz", gzip.compress(b"x", mtime=0), "a.gz: cannot read .gz; have: .txt, .raw, .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / name, content))


def test_columns_of_parquet_are_listed(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"], "b": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column 'text'; .* one of: a, b"):
        read(str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match="'b' holds int"):
        read(str(tmp_path / "x.parquet"), text="b")


def test_damaged_parquet_is_named(tmp_path):
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"] * 999}), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(UserError, match="x.parquet is no parquet file, or a damaged one"):
        read(str(file))


def test_paths_without_files_are_named(tmp_path):
    with pytest.raises(UserError, match="train.path='.*nothing.txt': no such file"):
        read(str(tmp_path / "nothing.txt"))
    with pytest.raises(UserError, match=r"\*.jsonl': no such file"):
        read(str(tmp_path / "*.jsonl"))
    with pytest.raises(UserError, match="no file of this folder is .txt, .raw"):
        read(str(tmp_path))
