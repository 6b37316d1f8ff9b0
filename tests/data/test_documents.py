import numpy as np

from kd_jax.data.documents import Documents, from_lines, from_rows, hold_out

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


def test_hold_out_splits_the_documents_in_two():
    documents = listed([str(i) for i in range(40)])
    rest, held = hold_out(documents, 0.1, seed=3)
    assert len(list(held)) == held.identity.count == 4
    assert sorted([*rest, *held], key=int) == list(documents)
    assert list(rest) == sorted(rest, key=int)  # the order stays
    assert [list(part) for part in hold_out(documents, 0.1, seed=3)] == [list(rest), list(held)]
    assert list(hold_out(documents, 0.1, seed=4)[1]) != list(held)
    assert len({documents.identity.digest, rest.identity.digest, held.identity.digest}) == 3


def test_hold_out_takes_at_least_one_document():
    rest, held = hold_out(listed(["a", "b", "c"]), 0.01, seed=0)
    assert (rest.identity.count, held.identity.count) == (2, 1)


def test_parts_of_different_texts_have_different_identities():
    chosen = np.array([True, False])
    first, second = (listed(texts).part(chosen, "part") for texts in (["a", "b"], ["a", "c"]))
    assert first.identity.digest != second.identity.digest
