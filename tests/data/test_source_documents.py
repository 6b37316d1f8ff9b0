import numpy as np

from kd_jax.data.source import Documents, from_lines, from_rows

WIKITEXT = [
    " \n",
    " = One = \n",
    " \n",
    " text \n",
    " = = Part = = \n",
    "more\n",
    " = Two = \n",
    "x\n",
]
ARTICLES = ["= One =\ntext\n= = Part = =\nmore", "= Two =\nx"]


def listed(texts):
    return Documents("listed", lambda: iter(texts))


def test_rows_are_documents_and_blank_rows_are_dropped():
    assert list(from_rows(["one", " ", "", "= not the first =", "two"])) == [
        "one",
        "= not the first =",
        "two",
    ]


def test_wikitext_gives_the_same_articles_from_lines_of_a_file_and_from_rows_of_the_hub():
    hub_rows = ["" if not line.strip() else line for line in WIKITEXT]
    assert list(from_lines(WIKITEXT, blank_lines=True)) == ARTICLES
    assert list(from_rows(hub_rows)) == ARTICLES


def test_text_is_split_at_blank_lines_or_else_at_every_line():
    lines = ["\n", "a \n", "  b\n", "\n", " \n", "c\n"]
    assert list(from_lines(lines, blank_lines=True)) == ["a\n  b", "c"]
    assert list(from_lines(["a\n", "b\n"], blank_lines=False)) == ["a", "b"]
    assert list(from_lines(["\n"], blank_lines=True)) == []


def test_identity_tells_texts_and_their_boundaries_apart():
    same = listed(["ab", "c"]).identity
    assert same == listed(["ab", "c"]).identity and same.count == 2
    assert same.digest != listed(["a", "bc"]).identity.digest
    assert same.digest != listed(["abc"]).identity.digest


def test_two_parts_are_the_whole_in_its_order():
    documents = listed([str(i) for i in range(40)])
    held_N = np.arange(40) % 7 == 3
    rest, held = documents.part(~held_N, "rest"), documents.part(held_N, "held")
    assert len(list(held)) == held.identity.count == held_N.sum()
    assert sorted([*rest, *held], key=int) == list(documents)
    assert list(rest) == sorted(rest, key=int)  # the order stays
    assert len({documents.digest, rest.digest, held.digest}) == 3


def test_parts_of_different_texts_have_different_identities():
    chosen = np.array([True, False])
    first, second = (listed(texts).part(chosen, "part") for texts in (["a", "b"], ["a", "c"]))
    assert first.identity.digest != second.identity.digest
