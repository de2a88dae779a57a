"""Tables of paths, patterns of files, and options that a kind of source does not have."""

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import BetonReader
from pipelines.convert import convert
from pipelines.convert.sources import SourceOptions, build_source, find_files
from pipelines.errors import DataError


def save_images(folder, num):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        Image.fromarray(np.full((4, 5, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")


def levels(path):
    reader = BetonReader(path)
    return [int(reader.decode(i)[0, 0, 0]) for i in range(reader.num_samples)]


def test_csv_keeps_its_order_and_numbers_class_names(tmp_path):
    save_images(tmp_path / "images", 4)
    table = tmp_path / "list.csv"
    table.write_text("\ufefflabel,path\ndog,images/2.png\ncat,images/0.png\n,images/3.png\ndog,images/2.png\n")
    report = convert("csv", str(table), tmp_path / "x.beton")
    reader = BetonReader(report.out)
    assert levels(report.out) == [20, 0, 30, 20]
    assert reader.labels.tolist() == [1, 0, -1, 1]
    assert reader.class_names == ["cat", "dog"]


@pytest.mark.parametrize(("labels", "expected"), [(["7", "0"], [7, 0]), (["", ""], [-1, -1]), (None, [-1, -1])])
def test_csv_with_numbers_or_without_labels(tmp_path, labels, expected):
    save_images(tmp_path, 2)
    lines = ["path", "0.png", "1.png"]
    if labels is not None:
        lines = [f"{line},{label}" for line, label in zip(lines, ["label", *labels], strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    reader = BetonReader(convert("csv", str(tmp_path / "list.csv"), tmp_path / "x.beton").out)
    assert reader.labels.tolist() == expected
    assert reader.class_names is None


def test_bad_tables(tmp_path):
    table = tmp_path / "list.csv"
    with pytest.raises(DataError, match=r"list\.csv: no such file"):
        convert("csv", str(table), tmp_path / "x.beton")
    for content, reason in (
        (b"", "no column path in it; it has: nothing"),
        (b"file\na.png", "no column path in it; it has: file"),
        (b"path\n", "no images"),
        (b"path,label\n,1\n", "row 2 has no path"),
        (b"path,label\na.png,1000000\n", r"integer in -1\.\."),
        (b"path\n\xff\xfe.png\n", "UTF-8"),
        (b"path\nnowhere.png\n", "nowhere.png: .*No such file"),
    ):
        table.write_bytes(content)
        with pytest.raises(DataError, match=reason) as caught:
            convert("csv", str(table), tmp_path / "x.beton", on_error="fail")
        assert "\n" not in str(caught.value)


def test_only_the_classes_of_a_list_are_read(tmp_path):
    for number, name in enumerate(("ant", "bee", "cat", "dog")):
        (tmp_path / "all" / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 5, 3), 10 * number, np.uint8)).save(tmp_path / "all" / name / "x.png")
    names = tmp_path / "classes.txt"
    names.write_text("\ufeffdog\r\n\n bee \n")
    report = convert("folder", str(tmp_path / "all"), tmp_path / "x.beton", classes=str(names))
    reader = BetonReader(report.out)
    assert levels(report.out) == [10, 30]
    assert reader.labels.tolist() == [0, 1]
    assert reader.class_names == ["bee", "dog"]
    for content, reason in (
        (b"dog\nemu\nfox\n", "all: no sub-folder for 2 of 3 classes: emu, fox"),
        (b"dog\nbee\ndog\n", "the class dog is in it twice"),
        (b"\n", "no class in it"),
        (b"\xff\xfe", "not a readable list of classes in UTF-8"),
    ):
        names.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            convert("folder", str(tmp_path / "all"), tmp_path / "y.beton", classes=str(names))
    with pytest.raises(DataError, match=r"none\.txt: not a readable list .*No such file"):
        convert("folder", str(tmp_path / "all"), tmp_path / "y.beton", classes=str(tmp_path / "none.txt"))
    assert not (tmp_path / "y.beton").exists()


def test_options_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^classes: only for sources of kind folder, not csv"):
        build_source("csv", str(tmp_path), SourceOptions(classes="x"))
    for options in ({"root": "x"}, {"download": True}, {"image_column": "x"}, {"label_column": "x"}, {"split": "x"}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: only for sources of kind"):
            build_source("folder", str(tmp_path), SourceOptions(**options))


def test_find_files(tmp_path):
    for k in range(9, 12):
        (tmp_path / f"a-{k:03d}.tar").touch()
    expected = [str(tmp_path / f"a-{k:03d}.tar") for k in range(9, 12)]
    assert find_files(f"{tmp_path}/a-{{009..011}}.tar", (".tar",)) == expected
    assert find_files(f"{tmp_path}/*.tar", (".tar",)) == expected
    assert find_files(str(tmp_path), (".tar",)) == expected
    assert find_files(expected[1], (".tar",)) == expected[1:2]
    for pattern, reason in (
        (f"{tmp_path}/a-{{009..012}}.tar", "a-012.tar: no such file"),
        (f"{tmp_path}/a-{{3..1}}.tar", "the range must rise"),
        (f"{tmp_path}/a-{{0..99999999}}.tar", "the range must rise"),
        (f"{tmp_path}/b*", "no such files"),
    ):
        with pytest.raises(DataError, match=reason):
            find_files(pattern, (".tar",))


def test_too_many_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.convert.source.MAX_LABEL", 1)
    (tmp_path / "x.csv").write_text("path,label\na.png,ant\nb.png,bee\nc.png,cat\n")
    with pytest.raises(DataError, match=r"x\.csv: 3 classes; a file holds at most 2"):
        convert("csv", str(tmp_path / "x.csv"), tmp_path / "x.beton")
