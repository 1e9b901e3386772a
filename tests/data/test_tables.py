"""Tables as people and their tools write them: every row is read or counted."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coca_scale.data.rows import TableOptions, read_rows
from coca_scale.data.sample import BadSample, DataError, Skipped
from coca_scale.data.sources import open_source
from coca_scale.errors import UserError
from tests.conftest import tiny_recipe
from tests.data.lists import captioned_pictures, failure_of, packed, written

COLUMNS = TableOptions("filepath", "title")
# text that a table may hold: no NUL, no halves of surrogate pairs, no end of a line
lines_of_text = st.text(
    st.characters(exclude_characters="\0\r\n\t", exclude_categories=("Cs",)), max_size=20
)
many = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(path, options=COLUMNS):
    """Pairs (name, caption), and causes of what was left out."""
    rows = list(read_rows(path, options))
    good = [(Path(row[0]).name, row[1]) for row in rows if not isinstance(row, Skipped)]
    return good, Counter(row.cause for row in rows if isinstance(row, Skipped))


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    captions = [
        'a "big" dog',
        '"welcome sign',
        'nail of 5"',
        '"',
        '"whole"',
        "it's",
        '""',
        '"" b "c',
    ]
    lines = [f"{caption}\t{n}.jpg" for n, caption in enumerate(captions)]
    table = written(tmp_path / "t.tsv", "\n".join(["title\tfilepath", *lines]) + "\n")
    good, bad = rows_of(table)
    assert good == [(f"{n}.jpg", caption) for n, caption in enumerate(captions)]
    assert not bad


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "\ufeffsep=;"])
def test_a_first_line_of_excel_says_what_separates(line, tmp_path):
    table = written(tmp_path / "t.csv", f"{line}\r\nfilepath;title\r\n0.jpg;a cat, asleep\r\n")
    assert rows_of(table) == ([("0.jpg", "a cat, asleep")], Counter())
    tabs = written(tmp_path / "u.csv", 'sep=\t\nfilepath\ttitle\n0.jpg\ta 5" nail\n')
    assert rows_of(tabs) == ([("0.jpg", 'a 5" nail')], Counter())
    bars = written(tmp_path / "v.csv", "sep=|\nfilepath|title\n0.jpg|a, b; c\n")
    assert rows_of(bars) == ([("0.jpg", "a, b; c")], Counter())


@many
@given(captions=st.lists(lines_of_text, min_size=1, max_size=6), every=st.booleans())
def test_tables_of_csv_writers_come_back(tmp_path, captions, every):
    """As Python's csv, pandas and spreadsheets write them."""
    for suffix, delimiter, extra in ((".csv", ",", "\nline, two"), (".tsv", "\t", "")):
        buffer = io.StringIO(newline="")
        quoting = csv.QUOTE_ALL if every else csv.QUOTE_MINIMAL
        writer = csv.writer(buffer, delimiter=delimiter, quoting=quoting)
        writer.writerow(["filepath", "title"])
        expected = [(f"{n}.jpg", caption + extra) for n, caption in enumerate(captions)]
        writer.writerows(expected)
        table = written(tmp_path / f"t{suffix}", buffer.getvalue())
        assert rows_of(table) == (expected, Counter())


@many
@given(lines=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=12), max_size=6))
def test_every_line_of_a_tsv_is_a_row_or_counted(tmp_path, lines):
    text = "\n".join(["filepath\ttitle", "a.jpg\tgood", *lines])
    good, bad = rows_of(written(tmp_path / "t.tsv", text))
    found = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line]
    assert len(good) + bad.total() == len(found) - 1
    assert good[0] == ("a.jpg", "good")


@many
@given(
    content=st.binary(max_size=60), header=st.booleans(), suffix=st.sampled_from([".csv", ".tsv"])
)
def test_no_bytes_in_a_table_are_more_than_a_data_error(tmp_path, content, header, suffix):
    table = tmp_path / f"t{suffix}"
    table.write_bytes((b"filepath,title\n" if header else b"") + content)
    for encoding in (None, "utf-16", "shift_jis", "utf-7"):
        try:
            rows_of(table, TableOptions("filepath", "title", encoding=encoding))
        except DataError as error:
            assert str(table) in str(error)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", 'filepath,title\na.jpg,b\nb.jpg,"open\nc.jpg,d\n', "line 3: a field begins"),
        # a second quote far below would have closed the first, and eaten the rows between
        ("t.csv", 'title,filepath\n"sign,a.jpg\nb,b.jpg\nof 5",c.jpg\n', "line 2: .*other rows"),
        ("t.csv", 'filepath,title\na.jpg,"one" two\n', "line 2: a field begins"),
        ("t.csv", "filepath,title,title\na.jpg,b,c\n", "several columns are called 'title'"),
        ("t.csv", "a.jpg,a red circle\nb.jpg,c\n", "found a.jpg, a red circle; the first line"),
        ("t.csv", "", "no column 'filepath', found nothing"),
        ("t.csv", "PK\3\4\0\0", "not a text in UTF-8; --encoding says"),
        ("t.tsv", "filepath\ttitle\n\n\n", "no rows"),
        ("t.tsv", "filepath\ttitle\n" + "x" * 2**20 + "y", "line 2: over a million characters"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        rows_of(written(tmp_path / name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "filepath,title\r\na.jpg,b c\r\n"),
        ("T.CSV", "\n\nfilepath, title \n\na.jpg,b c\n\n"),
        ("t.csv", "filepath\ttitle\ra.jpg\tb c\r"),
        ("t.csv", "filepath;title\na.jpg;b c\n"),
        ("t.TSV", '"filepath"\t"title"\n"a.jpg"\t"b c"\n'),
        ("t.csv", "id,title,filepath,more\n1,b c,a.jpg\n"),
        ("t.csv", "filepath,title\na.jpg,b c,,\n"),
        ("t.csv", "title, filepath\nb c, a.jpg\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_tables_in_the_wild(tmp_path, name, text, encoding):
    table = written(tmp_path / name, text, encoding)
    for told in (encoding, None) if encoding != "utf-16-le" else (encoding,):
        options = TableOptions("filepath", "title", encoding=told)
        assert rows_of(table, options)[0] == [("a.jpg", "b c")]
    if encoding == "utf-8-sig":
        assert rows_of(table, TableOptions("filepath", "title", encoding="utf-8"))[0]


def test_rows_that_cannot_be_used_are_counted_in_packing_and_training(tmp_path):
    captioned_pictures(tmp_path / "p")
    rows = [
        "filepath,title",
        "p/0.jpg,good",
        "p/1.jpg",
        "p/1.jpg,a red, round circle",
        ",no picture",
        "p/1.jpg,",
        "p/gone.jpg,gone",
        "p/1.jpg,caf\udce9",
        "p/1.jpg,a\0b",
        "p,a folder",
        "p/2.jpg," + "long " * 40_000,
    ]
    table = tmp_path / "t.csv"
    table.write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    said, bad = packed(tmp_path, table)
    assert bad == {
        "short_row": 1,
        "long_row": 1,
        "missing_image": 2,
        "missing_caption": 1,
        "caption_not_utf8": 1,
        "broken_row": 1,
        "not_a_file": 1,
    }
    assert "2 samples" in said and "--encoding" in said
    source = open_source(str(table), tiny_recipe().data, 0)
    found = list(source.ordered(0, 1))
    assert source.count() == len(found) == len(rows) - 1
    bad["missing_caption"] = 0  # an empty one is counted where it is drawn
    causes = Counter(sample.cause for sample in found if isinstance(sample, BadSample))
    assert causes == +Counter(bad)


def test_a_table_in_another_encoding_is_read_when_it_is_named(tmp_path):
    captioned_pictures(tmp_path / "p", ["0.jpg"])
    table = written(tmp_path / "t.csv", "filepath,title\np/0.jpg,café\n", "cp1252")
    assert "1 × caption_not_utf8" in failure_of("data", "pack", table, "--out", tmp_path / "no")
    packed(tmp_path, table, "--encoding", "cp1252")
    data = tiny_recipe(data__train=str(table), data__encoding="cp1252").data
    assert [sample.caption for sample in open_source(str(table), data, 0).ordered(0, 1)] == ["café"]
    assert "no encoding" in failure_of("data", "pack", table, "--out", "no", "--encoding", "hex")
    with pytest.raises(UserError, match="'latin-9x' is no encoding"):
        tiny_recipe(data__encoding="latin-9x")
    with pytest.raises(DataError, match=r"data\.encoding is for tables"):
        open_source("synthetic://shapes?count=4", data, 0)
