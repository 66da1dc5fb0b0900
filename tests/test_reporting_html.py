"""The HTML page as a document: complete, self-contained, and deaf to what texts want it to do."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree, html
from report_fixture import VARIANTS, make_report

from safegene_runtime import reporting
from safegene_runtime.reporting import svg, view
from safegene_runtime.reporting.markup import Markup, el, visible

REPORTS = {name: make() for name, make in VARIANTS.items()}
PAGES = {name: reporting.render_html(report) for name, report in REPORTS.items()}
TREES = {name: html.document_fromstring(page) for name, page in PAGES.items()}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
URLS = {
    "href",
    "src",
    "srcset",
    "action",
    "formaction",
    "xlink:href",
    "data",
    "poster",
    "background",
}


@every_tree
def test_a_page_runs_one_script_and_loads_nothing(tree: Any) -> None:
    assert len(tree.xpath("//script")) == len(tree.xpath("//style")) == 1
    for element in tree.iter(etree.Element):
        for name, value in element.attrib.items():
            assert not name.startswith("on"), name
            assert name != "style", "the policy forbids it"
            if name in URLS:
                assert value.startswith(("#", "data:image/svg+xml,")), value
    assert not tree.xpath("//iframe|//object|//embed|//base|//img|//video|//audio|//form[@action]")
    assert not re.search(r"url\(|@import", tree.xpath("string(//style)"))


@every_tree
def test_the_policy_allows_exactly_this_style_and_script(tree: Any) -> None:
    (policy,) = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        digest = hashlib.sha256(tree.xpath(f"string(//{tag})").encode()).digest()
        assert rules[name] == f"'sha256-{base64.b64encode(digest).decode()}'"
    first = tree.xpath("//head/*")
    assert [element.tag for element in first[:2]] == ["meta", "meta"], "before anything it governs"


@every_tree
def test_ids_are_unique_and_references_point_somewhere(tree: Any) -> None:
    ids = tree.xpath("//@id")
    assert len(ids) == len(set(ids))
    for attribute in ("aria-labelledby", "for"):
        assert set(tree.xpath(f"//@{attribute}")) <= set(ids)
    assert {link[1:] for link in tree.xpath("//a/@href")} <= set(ids)


@pytest.mark.parametrize("name", PAGES)
def test_verdict_sentence_and_ladder_are_on_the_page(name: str) -> None:
    report, tree = REPORTS[name], TREES[name]
    hero = tree.get_element_by_id("verdict")
    assert hero.xpath("string(.//h1)") == report["verdict"]
    said = " ".join(hero.xpath("string(p[1])").split() + hero.xpath("string(p[2])").split())
    assert said.startswith(" ".join(visible(report["sentence"]).split()))
    rungs = tree.xpath("//ol[@class='ladder']/li")
    assert [rung.get("class") for rung in rungs] == [
        f"rung {rung['status'].replace(' ', '-')}" for rung in report["rungs"]
    ]


@pytest.mark.parametrize("name", PAGES)
def test_every_prompt_and_flip_has_its_row(name: str) -> None:
    report, tree = REPORTS[name], TREES[name]
    rows = tree.xpath("//table[@id='prompt-table']/tbody/tr")
    assert [row.xpath("string(th/code)") for row in rows] == [
        visible(prompt["id"]) for prompt in report["prompts"]
    ]
    listed = tree.xpath("//section[@id='flips']//tbody/tr/th/code")
    assert [one.text for one in listed] == [visible(prompt["id"]) for prompt in view.flips(report)]


def test_parts_that_were_not_measured_are_not_shown() -> None:
    def parts(name: str) -> set[str]:
        return {section.get("id") for section in TREES[name].xpath("//main/section")}

    everything = {
        "verdict", "ladder", "gate", "flips", "measurements", "weights", "attacks", "categories", "prompts",
        "provenance",
    }  # fmt: skip
    assert parts("fail") == everything
    assert parts("pass-bare") == everything - {"weights", "attacks"}
    assert parts("fail-integrity") == {"verdict", "ladder", "provenance"}
    assert "Evidence for no loss, prompt by prompt" in PAGES["pass-sequential"]
    assert "Evidence for no loss, prompt by prompt" not in PAGES["pass"]


def test_replies_are_there_only_with_texts_and_hidden_until_asked_for() -> None:
    assert not TREES["pass"].xpath("//pre")
    details = TREES["fail"].xpath("//pre/ancestor::details")
    assert len(details) >= len(REPORTS["fail"]["prompts"])
    assert not TREES["fail"].xpath("//pre[not(ancestor::details)]|//details[@open]")


def test_controls_are_hidden_where_no_script_could_serve_them() -> None:
    controls = TREES["pass"].get_element_by_id("controls")
    assert controls.get("hidden") is not None
    assert len(controls.xpath(".//label")) == len(controls.xpath(".//input|.//select"))


def test_hostile_texts_are_shown_and_do_nothing() -> None:
    page, tree = PAGES["hostile"], TREES["hostile"]
    assert "&lt;script&gt;" in page
    for hidden in "\u202e\x00\x1b\x7f\ud800":
        assert hidden not in page
    assert "\\u202egpj.exe \\x00\\x1b[31m" in tree.text_content()
    assert "\\ud800" in tree.text_content()
    page.encode("utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_plots_have_names_and_finite_coordinates(name: str) -> None:
    for plot in TREES[name].xpath("//svg[@role='img']"):
        assert plot.xpath("string(title)")
    for plot in TREES[name].xpath("//svg"):
        assert plot.get("role") == "img" or plot.get("aria-hidden") == "true"
        assert not re.search(
            r"\b(nan|inf)\b", etree.tostring(plot, encoding="unicode").split(">", 2)[0]
        )
        for element in plot.iter(etree.Element):
            for key in ("x", "y", "cx", "cy", "x1", "y1", "x2", "y2", "width", "height"):
                value = float(element.get(key, 0))
                assert -1e-9 <= value < 1e5, (key, value)


def test_the_heat_map_marks_the_layer_without_the_adapter() -> None:
    marked = TREES["fail"].xpath("//section[@id='weights']//div[contains(@class,'heat')]"
                                 "//g[contains(@class,'b0')]/title/text()")  # fmt: skip
    assert marked == ["model.layers.11.v_proj (Q8_0): beta 0.0300"]
    assert not TREES["pass"].xpath("//div[contains(@class,'heat')]//g[contains(@class,'b0')]")


@pytest.mark.parametrize(
    ("beta", "name"),
    [(-3.0, "b0"), (0.0, "b0"), (0.5, "b1"), (0.9, "b2"), (1.0, "b3"), (1.1, "b4"), (2.0, "b5"),
     (float("nan"), "b0"), (float("inf"), "b0")],
)  # fmt: skip
def test_a_beta_that_is_no_number_is_in_the_worst_colour(beta: float, name: str) -> None:
    assert svg.beta_bin(beta) == name


def test_experts_of_one_cell_show_the_worst() -> None:
    def module(number: int, beta: float) -> dict[str, Any]:
        return {
            "module": f"experts.{number}",
            "layer": 0,
            "kind": "up",
            "beta": beta,
            "type": "F16",
        }

    for order in ((1.0, 0.2, 1.01), (0.2, 1.0, 1.01)):
        drawn = svg.beta_heat_map([module(i, beta) for i, beta in enumerate(order)])
        assert drawn is not None
        assert "beta 0.2000" in drawn
        assert "beta 1.0" not in drawn


@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_a_curve_without_anything_to_show_is_left_out(values: list[float]) -> None:
    assert svg.kl_curve(values, 0.01) is None
    assert svg.evidence_path(values, 20.0) is None


@pytest.mark.parametrize("values", [[1e-9], [0.0, 1e-3], [5.0] * 2, [1e-12, 1e3]])
def test_a_curve_copes_with_any_magnitude(values: list[float]) -> None:
    for limit in (1e-8, 1.5):
        plot = svg.kl_curve(values, limit)
        assert plot is not None
        etree.fromstring(plot)


def test_where_kl_is_advice_the_page_says_so_and_names_the_bound() -> None:
    report = make_report(prompts=3)
    report["bounds"] |= {"mean_kl": 0.1, "kl_ceiling": 0.5, "kl_gates": False}
    remarks = {name: remark for name, _, remark in view.headline(report)}
    assert remarks["Mean KL"] == "nats; advice 0.1, bound 0.5"
    assert remarks["Same top token"].startswith("advice ")
    page = reporting.render_html(report)
    assert "bound of the mean 0.5" in page
    stated = html.document_fromstring(page).xpath("//dl[@class='pairs']/div")
    pairs = {one.findtext("dt"): one.findtext("dd") for one in stated}
    assert (pairs["mean KL at most"], pairs["mean KL advised"]) == ("0.5", "0.1")
    assert "top-1 at least" not in pairs


def test_one_prompt_is_a_scatter_too() -> None:
    margin = {"reference": 2.0, "artifact": 2.0, "base": 2.0}
    prompt = make_report(prompts=3)["prompts"][0] | {"margin": margin}
    plot = svg.margin_scatter([prompt])
    assert plot is not None
    etree.fromstring(plot)
    assert svg.margin_scatter([prompt | {"margin": None}]) is None


# --- escaping --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text())
def test_any_text_comes_back_as_text(inner: str, attribute: str) -> None:
    made = el("p", inner, title=attribute)
    parsed = etree.fromstring(made)
    assert (parsed.text or "") == visible(inner)
    assert not len(parsed)
    # XML turns these into spaces within an attribute
    assert parsed.get("title") == re.sub(r"[\n\t]", " ", visible(attribute))


@given(st.text())
def test_what_is_visible_holds_nothing_that_hides(text: str) -> None:
    shown = visible(text)
    assert all(c.isprintable() or c in "\n\t\u00a0" for c in shown)
    shown.encode("utf-8")


def test_only_markup_goes_in_as_it_is() -> None:
    assert el("b", "<i>") == "<b>&lt;i&gt;</b>"
    assert el("b", Markup("<i></i>")) == "<b><i></i></b>"
    assert el("b", [None, ["a", el("i")]], hidden=True, id=None, class_="x") == (
        '<b hidden class="x">a<i></i></b>'
    )
    assert el("br") == "<br>"
