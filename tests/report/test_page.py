"""The page of a made-up run: whole, self-contained, and deaf to what its texts ask for."""

import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.io.records import read_records
from almost_jax.report import page, plots, tables

Make = Callable[[int], Path]
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Reader(HTMLParser):
    """Collects the tags with attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def built(make_finished_run: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "run"
    shutil.copytree(make_finished_run(3), folder)
    assert page.build(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def reader(built: Path) -> Reader:
    reader = Reader()
    reader.feed((built / "report.html").read_text())
    return reader


def test_gold_json_has_its_shape(make_finished_run: Make) -> None:
    gold = json.loads((make_finished_run(3) / "evaluation" / "gold.json").read_text())
    assert list(gold["configurations"]) == ["A", "B", "C"]
    assert list(gold["gaps"]) == ["A - B", "B - C"]
    assert list(gold["pairs"]) == ["raw", "heuristic", "as_is"]
    assert all({"kept", "accuracy", "ties"} == set(figure) for figure in gold["pairs"].values())
    assert [gold["pairs"][name]["kept"] for name in gold["pairs"]] == [120, 80, 40]
    expected = ["accuracy", "length_matched_accuracy", "longer_wins_accuracy", "as_is_accuracy"]
    assert list(gold["reward_model"]) == expected
    assert list(gold["best_of_n"]) == ["1", "4", "oracle_4"]
    assert list(gold["policies"]) == ["prompted", "sft_self_play", "sft", "rlsf"]
    assert list(gold["steps"]) == ["sft_self_play - prompted", "sft - sft_self_play", "rlsf - sft"]
    assert list(gold["demonstrations"]) == ["self_play", "reward_guided"]
    for figures in (gold["configurations"], gold["policies"], gold["demonstrations"]):
        for figure in figures.values():
            assert figure["ci95"][0] <= figure["mean"] <= figure["ci95"][1]
            assert figure["n"] > 0
    assert [point["step"] for point in gold["rlsf_curve"]] == [0, 20, 40]
    assert {"step", "kl", "reward", "gold"} <= set(gold["rlsf_curve"][0])
    assert gold["demonstrations"]["reward_guided"]["unscored"] == 40  # every second turn answers hostile text
    assert gold["contamination"] == dict.fromkeys(gold["contamination"], 0)


def test_claims_follow_the_intervals(make_finished_run: Make) -> None:
    gold = json.loads((make_finished_run(3) / "evaluation" / "gold.json").read_text())
    claims = {claim.text: claim for claim in tables.claims(gold)}
    assert len(claims) == 12
    assert claims["A beats B"].verdict == "holds"
    assert claims["A beats B"].gain == pytest.approx(
        gold["configurations"]["A"]["mean"] - gold["configurations"]["B"]["mean"]
    )
    for gap, interval, verdict in ((0.1, (0.05, 0.2), "holds"), (0.1, (-0.1, 0.2), "within noise")):
        assert tables.Claim("g", "t", 0.0, gap, gap, interval).verdict == verdict
    assert tables.Claim("g", "t", 0.5, 0.4, -0.1, (-0.2, -0.05)).verdict == "fails"


def test_page_loads_nothing_and_runs_nothing(reader: Reader) -> None:
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "image", "foreignobject"}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "xlink:href", "src"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    policies = [a["content"] for tag, a in reader.tags if tag == "meta" and a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_page_shows_hostile_text_as_text(reader: Reader, built: Path) -> None:
    assert "<script>alert(1)</script></pre><img src=x onerror=alert(2)> ␛[31mred␛]0;title␇" in reader.text
    assert "{{ 7 * 7 }}" in reader.text
    assert "<script>alert(4)</script>" in reader.text  # the config's
    for name in ("report.html", "report.md"):
        assert not CONTROLS.search((built / name).read_text()), name


def test_markdown_shows_hostile_text_as_text(built: Path) -> None:
    text = (built / "report.md").read_text()
    outside_fences = re.sub(r"^````+\n.*?^````+$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_fences and "<img" not in outside_fences
    assert "http://" not in outside_fences
    linked = re.findall(r"(?<!\\)\]\(([^)]*)\)", outside_fences)
    assert linked and all((built / target).is_file() for target in linked)


def test_page_has_every_section_and_figure(reader: Reader, built: Path) -> None:
    for heading in ("What each step claims", "rule of thumb", "pairs right", "length?", "guidance", "policies improve"):
        assert heading in reader.text
    figures = {path.stem for path in (built / "figures").glob("*.png")}
    expected = {"configurations", "filters", "score_by_length", "policies", "over_optimisation"}
    assert figures == expected | {"training_reward", "training_sft", "training_rlsf"}
    assert sum(tag == "svg" for tag, _ in reader.tags) == len(figures)
    ids = [attributes["id"] for _, attributes in reader.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    used = {(a.get("xlink:href") or a.get("href") or "#")[1:] for tag, a in reader.tags if tag == "use"}
    assert used <= set(ids)


def test_page_tells_what_the_filters_are_worth_to_the_reward_model(
    built: Path, scored_run: Path, make_finished_run: Make
) -> None:
    run = make_finished_run(3)
    scored = read_records(run / "reward_ablation" / "scores.jsonl")
    ablation = json.loads((run / "reward_ablation" / "ablation.json").read_text())
    found, by_gold = ablation["held_out"], ablation["by_gold"]
    assert found["raw"]["accuracy"]["as_is"]["n"] == len(scored) == 120 and found["as_is"]["longer_wins"]["n"] == 40
    # Chosen and rejected have been swapped now and then.
    assert by_gold["raw"]["accuracy"] != found["raw"]["accuracy"]
    for folder, judged in ((built, by_gold["raw"]), (scored_run, None)):
        if judged is None:
            page.build(folder)
        text = (folder / "report.md").read_text()
        text = text[text.index("What are the filters worth to the reward model?") :]
        assert "1,234 steps" in text and "4,321" in text and ("gold score, on n = 120 held-out pairs" in text) == (
            judged is not None
        )
        for figures in (*found.values(), *([judged] if judged else [])):
            assert all(f"{one['mean']:.3f}" in text for one in figures["accuracy"].values())
            assert f"{figures['gains']['as_is - heuristic']['difference']:+.3f}" in text


def test_figures_take_the_pages_colours_and_fonts(built: Path) -> None:
    svgs = re.findall(r"<svg.*?</svg>", (built / "report.html").read_text(), flags=re.DOTALL)
    joined = "".join(svgs)
    assert "var(--blue)" in joined and "var(--ink)" in joined
    assert "font-family" not in joined and "DejaVu" not in joined
    assert not set(re.findall(r"#[0-9a-f]{6}\b", joined)) - {"#ffffff"}


def test_what_is_not_up_to_date_stands_at_the_top(scored_run: Path) -> None:
    page.build(scored_run)
    assert not page.has_notes(scored_run)
    page.build(scored_run, ["Not all of this is of the settings below: <b>rlsf</b> is stale."])
    assert page.has_notes(scored_run)
    html, text = ((scored_run / f"report.{end}").read_text() for end in ("html", "md"))
    assert "Not all of this is of the settings below: &lt;b&gt;rlsf" in html
    assert text.index("Not all of this is of the settings below") < text.index("## ")
    page.build(scored_run)
    assert not page.has_notes(scored_run)


def test_page_is_the_same_bytes_each_time(built: Path) -> None:
    before = {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}
    page.build(built)
    assert before == {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}


def test_summary_table_is_fit_for_a_terminal(built: Path) -> None:
    table = page.summary_table(built)
    lines = table.splitlines()
    assert len(lines) == 14
    assert len({len(line) for line in lines}) == 1
    assert "A beats B" in table and "✓ holds" in table


def test_hostile_names_stay_in_their_cells_on_a_terminal() -> None:
    table = tables.Table(("name", "value"), [("a|b\x1b[2J\nc", "1"), ("[red]x[/red]", "2")], (1,))
    shown = tables.as_markdown(table, escape=False)
    assert not CONTROLS.search(shown.replace("\n", ""))
    assert all(line.count("|") == 3 for line in shown.splitlines())
    assert all(unicodedata.category(sign) != "Cc" for sign in shown.replace("\n", ""))


def test_hostile_configuration_names_do_not_break_figures() -> None:
    figure = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 3}
    name = "$\\frac{<b>\x1b[1m"
    with plots.style():
        svg = plots.as_svg(plots.configurations({"configurations": {name: figure}}, {}), "x")
    assert "$\\frac{&lt;b&gt;␛[1m" in svg


def test_a_run_without_gold_scores_still_has_a_page(make_finished_run: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(make_finished_run(3), folder)
    shutil.rmtree(folder / "evaluation")
    page.build(folder)
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    assert "No gold score was taken" in reader.text
    assert "What became of n = 120 synthetic comparisons" in reader.text
    assert "<script>alert(1)</script>" in reader.text  # RLSF's samples
    assert "reward 0.50, advantage -0.12" in reader.text
    assert sum(tag == "svg" for tag, _ in reader.tags) == 3
    assert "no evaluation/gold.json" in page.summary_table(folder)


def test_a_run_that_has_barely_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: fresh\nseed: 1\n")
    assert "almost_jax: fresh" in page.build(tmp_path).read_text()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config.yaml"):
        page.build(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "gold.json").write_text("{")
    with pytest.raises(InputError, match="gold.json: not JSON"):
        page.build(tmp_path)
