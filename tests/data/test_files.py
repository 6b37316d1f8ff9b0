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


def rows(path, **keys):
    return source.table({"path": path, **keys}, "data.train").columns


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
        ("a.csv", 'text\n"open\n', "a.csv, row 2: unexpected end"),
        ("a.tsv", "id\ttext\n1\n", "a.tsv, row 2: 1 fields instead of 2 .id, text."),
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


def test_hidden_files_are_not_data(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,x\n")
    for name in (".ipynb_checkpoints/train-checkpoint.csv", "__MACOSX/train.csv", "b/._train.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "text,label\nold,y\n")
    assert rows(str(tmp_path)) == {"text": ["a"], "label": ["x"]}
    assert read(str(tmp_path)) == ["a"]
    assert rows(str(tmp_path / ".ipynb_checkpoints"))["text"] == ["old"]  # when it is asked for
    (tmp_path / "train.csv").unlink()
    with pytest.raises(UserError, match=r"no file of this folder .* \(hidden ones are not read\)"):
        rows(str(tmp_path))


def test_rows_of_empty_cells_are_rows_and_blank_lines_are_not(tmp_path):
    two = write(tmp_path / "two.csv", "text,pair\none,x\n,\n\ntwo,y\n\n")
    assert rows(two) == {"text": ["one", "", "two"], "pair": ["x", "", "y"]}
    assert rows(write(tmp_path / "two.tsv", "a\tb\n\t\n\n1\t2\n")) == {
        "a": ["", "1"],
        "b": ["", "2"],
    }
    # In one column an empty cell may be a blank line, unless nothing follows it.
    assert rows(write(tmp_path / "one.csv", 'text\na\n""\nb\n\nc\n\n'))["text"] == [
        "a",
        "",
        "b",
        "",
        "c",
    ]
    assert rows(write(tmp_path / "one.tsv", "text\na\n\nb\n\n"))["text"] == ["a", "", "b"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,label,text\na,x,b\n", "a.csv, row 1: two columns are called 'text'"),
        ("a.tsv", "label\ttext\tlabel\n0\ta\t1\n", "a.tsv, row 1: two columns are called 'label'"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: an object has the key 'a' twice"),
        ("a.json", '[{"text": {"b": 1, "b": 1}}]', "a.json: an object has the key 'b' twice"),
        ("a.jsonl", r'{"text": "so \ud83d"}', r"line 1 holds half of a character, \\ud83d, after"),
        ("a.json", r'[{"text": "\udE00"}]', r"a.json holds half of a character, \\ude00, after"),
        ("a.jsonl", "[" * 99999, "line 1 is not JSON: "),
        ("a.csv", "text,label\ra,x\rb,y\r", r"a.csv is one line, with lone carriage returns in it"),
        ("a.csv", '"text"s,label\na,x\n', "a.csv, row 1: .* expected after"),
        ("a.csv", '"text,label\na,x\n', "a.csv, row 1: unexpected end"),
        ("a.csv", "text,label\n".encode("utf-16"), "a.csv is UTF-16, .* iconv -f utf-16 -t utf-8"),
        ("a.tsv", "text\n".encode("utf-16-be"), "to be UTF-16; .* iconv -f utf-16be -t utf-8"),
        ("._a.csv", b"\x00\x05\x16\x07\x00\xff", "what macOS notes down .*; remove it"),
        ("a.csv", gzip.compress(b"text\na\n", mtime=0), "a.csv is compressed, .* with gunzip"),
        ("a.csv", "text;label\na, b;x\n", "one column, 'text;label'; .* set delimiter=';' next to"),
        ("a.tsv", "text,label|b\n", r"one column, .* delimiter='\|' .* write the file with 'tabs"),
        ("a.tsv", 'text\tlabel\n"a\nb"\tx\n', r"row 2: 1 fields .* quoted, set delimiter='\\t'"),
    ],
)
def test_bad_tables_are_named(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        rows(write(tmp_path / name, content))


def test_whole_emoji_and_columns_without_a_name_are_read(tmp_path):
    file = write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude00"}')
    assert rows(file) == {"text": ["\U0001f600"]}
    assert rows(write(tmp_path / "a.csv", "text,,\na,,\n"))["text"] == ["a"]


def test_another_delimiter(tmp_path):
    file = write(tmp_path / "a.csv", 'text;label\n"a; ""b""";x\n')
    assert rows(file, delimiter=";") == {"text": ['a; "b"'], "label": ["x"]}
    assert read(file, delimiter=";") == ['a; "b"']
    with pytest.raises(UserError, match="delimiter='::' must be one character, such as ';'"):
        rows(file, delimiter="::")


def test_a_quoted_tsv_is_read_as_it_stands_and_it_is_said(tmp_path, caplog):
    file = write(tmp_path / "a.tsv", 'text\tlabel\n"he said ""no"""\tx\n')
    assert rows(file)["text"] == ['"he said ""no"""']
    assert "a.tsv, row 2: the quotes are read as they stand" in caplog.text
    assert "set delimiter='\\t'" in caplog.text
    for tab in ("\t", "\\t"):
        assert rows(file, delimiter=tab)["text"] == ['he said "no"']


def test_columns_of_parquet_have_names_of_their_own(tmp_path):
    two = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(two, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet: two columns are called 'text'"):
        rows(str(tmp_path / "x.parquet"))
