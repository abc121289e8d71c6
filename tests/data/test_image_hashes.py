"""The digest of a split's images: it follows what the files hold, not what they are called."""

import os
from pathlib import Path

import pytest
from PIL import Image

from blipfit.data.image_hashes import digest_images
from blipfit.data.question import Question
from blipfit.errors import UserError


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    for name, color in (("a", (255, 0, 0, 0)), ("b", (0, 255, 0, 255))):
        Image.new("RGBA", (4, 4), color).save(tmp_path / f"{name}.png")
    return [Question(name, tmp_path / f"{name}.png", "Which color?", "red") for name in "ab"]


def test_another_image_under_the_same_name_changes_the_digest(questions, tmp_path):
    before = digest_images(questions)
    assert digest_images(questions) == before
    Image.new("RGBA", (4, 4), "blue").save(tmp_path / "b.png")
    assert digest_images(questions) != before


def test_a_file_that_only_moved_keeps_the_digest(questions, tmp_path):
    before = digest_images(questions)
    moved = [Question(q.id, q.image.rename(tmp_path / f"moved-{q.id}.png"), q.question, q.answer) for q in questions]
    assert digest_images(moved) == before


def test_ids_order_and_transparency_are_part_of_it(questions):
    first, second = questions
    swapped = [Question("a", second.image, "", ""), Question("b", first.image, "", "")]
    dropped = [Question(q.id, q.image, "", "", transparency="dropped") for q in questions]
    digests = {digest_images(each) for each in (questions, swapped, questions[::-1], questions[:1], dropped, [])}
    assert len(digests) == 6


def test_a_file_is_read_once_per_process(questions):
    before, file = digest_images(questions), questions[0].image
    stat = file.stat()
    file.write_bytes(bytes(stat.st_size))  # the same size, time and inode: nothing shows that it changed
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_images(questions) == before


def test_a_missing_image_is_named(questions):
    questions[1].image.unlink()
    with pytest.raises(UserError, match=r"b\.png is missing"):
        digest_images(questions)
