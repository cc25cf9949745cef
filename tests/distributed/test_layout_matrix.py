from pathlib import Path

from tests.distributed.layout_matrix import CASES, LAYOUTS, VARIANTS, table

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"


def test_the_page_shows_what_the_tests_try():
    assert table() in PAGE.read_text(encoding="utf-8"), "print the table anew: layout_matrix.py"


def test_every_layout_is_tried_and_every_case_is_known():
    assert {layout for layout, _ in CASES} == set(LAYOUTS)
    assert {variant for _, variant in CASES} == set(VARIANTS)
    assert table().count("equal") == len(CASES) == len(set(CASES))
