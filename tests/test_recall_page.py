"""Tests of pipelines/recall_page.py: what a reader finds on it."""

from pipelines.recall_page import render_recall_page
from tests.pages import Page
from tests.stored import index_manifest


def test_each_index_has_its_plot_and_its_table():
    page = render_recall_page([index_manifest(image=0.97, text=0.953)])
    assert len(Page(page).all("svg")) == 1
    assert "image queries 0.970 in 1.00 ms, text queries 0.953 in 1.00 ms" in page
    assert "0.95 was asked for" in page
    assert page.count("(searches)") == 2
    assert "asked for, and &lt;so&gt; on." in page


def test_an_index_of_one_setting_has_no_plot():
    page = render_recall_page([index_manifest()])
    assert Page(page).all("svg") == []
