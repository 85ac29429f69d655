"""The text files that a flag names."""

import pytest

from kozero.data.readers import text_files
from kozero.errors import UserError


def test_a_folder_is_searched_to_the_bottom_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.dat", "a/b/c.txt", "c.md", "a/d.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("글", encoding="utf-8")
    (tmp_path / "folder.txt").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in text_files("--files", tmp_path)]
    assert found == ["a/b/c.txt", "a/z.dat", "b.txt"]


def test_a_single_file_may_have_any_name(tmp_path):
    (tmp_path / "corpus.md").touch()
    assert text_files("--files", tmp_path / "corpus.md") == [tmp_path / "corpus.md"]


@pytest.mark.parametrize(("name", "message"), [("none", "no such file or folder"), ("empty", "no .* file in it")])
def test_a_path_without_files_is_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"--corpus_path .*{name}: {message}"):
        text_files("--corpus_path", tmp_path / name)
